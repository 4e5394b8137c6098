"""What both systems of `pod_elastic` have in common. NumPy alone: the rival has no JAX."""

from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np

MEMBERS: Final = 2
WIDTHS: Final = (784, 512, 512, 10)
BATCH: Final = 128
"""Examples of a step, of each member."""
RATE: Final = 1e-3
POOL: Final = 4
"""Batches that are gone through in turn."""
CALL: Final = 4
"""Steps of ours in one call of the compiled program."""
SAVE_EVERY: Final = 256
"""Steps of ours from one checkpoint to the next, for faults that nobody survives; the rival has none."""


def weights() -> dict[str, np.ndarray]:
    """The first weights; a matrix is (in, out)."""
    rng = np.random.default_rng(0)
    made = {}
    for number, (rows, columns) in enumerate(pairwise(WIDTHS)):
        made[f"kernel{number}"] = rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)
        made[f"bias{number}"] = np.zeros(columns, np.float32)
    return made


def batches(member: int) -> list[dict[str, np.ndarray]]:
    """A member's pool."""
    rng = np.random.default_rng(1 + member)
    hidden = np.random.default_rng(0).normal(size=(WIDTHS[0], WIDTHS[-1]))
    images = [rng.normal(size=(BATCH, WIDTHS[0])).astype(np.float32) for _ in range(POOL)]
    return [{"x": x, "y": (x @ hidden).argmax(1).astype(np.int32)} for x in images]


def reached(folder: Path) -> tuple[int, int]:
    """(number of the life, examples that are in the model) as the furthest member says."""
    found = [(0, 0)]
    for path in folder.glob("reached-*"):
        words = path.read_text().split()
        if len(words) == 2:
            found.append((int(words[0]), int(words[1])))
    return max(found)
