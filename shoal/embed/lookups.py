"""What a caller asks of several rows at once: bags that are summed up, and tables side by side."""

from typing import Final

import numpy as np

from shoal import validate
from shoal.embed._compiled import compiled

MODES: Final = {"sum": 0, "mean": 1, "max": 2}


def reduce_bags(vectors: np.ndarray, offsets: np.ndarray, mode: str) -> np.ndarray:
    """One vector a bag: `vectors` (n, dim) float32, `offsets` (bags,) -> (bags, dim). An empty bag gives zeros.

    As torch.nn.EmbeddingBag without its last offset. Sums are in order and in float64, rounded once.
    """
    validate.one_of(MODES, mode=mode)
    made = np.zeros((len(offsets), vectors.shape[1]), np.float32)
    _reduce(vectors, np.append(offsets, len(vectors)), MODES[mode], made)
    return made


@compiled
def _reduce(vectors: np.ndarray, bounds: np.ndarray, mode: int, made: np.ndarray) -> None:
    total = np.empty(vectors.shape[1], np.float64)
    for bag in range(len(made)):
        count = bounds[bag + 1] - bounds[bag]
        if count == 0:
            continue
        total[:] = -np.inf if mode == 2 else 0.0
        for i in range(bounds[bag], bounds[bag + 1]):
            for k in range(len(total)):
                total[k] = max(total[k], vectors[i, k]) if mode == 2 else total[k] + vectors[i, k]
        for k in range(len(total)):
            made[bag, k] = total[k] / count if mode == 1 else total[k]
