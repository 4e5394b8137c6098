"""What all systems of `pod_step` have in common: sizes, first weights, batches and rates. NumPy alone: rivals have no JAX."""

from itertools import pairwise
from typing import Any, Final

import numpy as np

MEMBERS: Final = 2
WIDTHS: Final = (784, 1024, 1024, 1024, 10)
VOCABULARY, ROW, DIM, LAYERS, HEADS = 2048, 64, 192, 4, 6
BATCH: Final = {"mlp": 256, "decoder": 16}
"""Examples of a step, of all members together."""
RATE: Final = {"adam": 1e-3, "adamw": 1e-3, "lamb": 1e-3, "sgd": 1e-3}
DECAY: Final = 0.01
"""Of AdamW and LAMB, on every tensor."""
POOL: Final = 4
"""Batches that are gone through in turn; they are where they are needed before the clock starts."""

Weights = dict[str, np.ndarray]


def weights(model: str) -> Weights:
    """The first weights, by name; a matrix is (in, out)."""
    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, rows**-0.5, (rows, columns)).astype(np.float32)

    if model == "mlp":
        pairs = list(pairwise(WIDTHS))
        kernels = {f"kernel{n}": matrix(*pair) for n, pair in enumerate(pairs)}
        return kernels | {f"bias{n}": np.zeros(pair[1], np.float32) for n, pair in enumerate(pairs)}
    made = {"embed": 0.02 * rng.normal(size=(VOCABULARY, DIM)), "place": 0.02 * rng.normal(size=(ROW, DIM))}
    for layer in range(LAYERS):
        made |= {f"layer{layer}/qkv": matrix(DIM, 3 * DIM), f"layer{layer}/out": matrix(DIM, DIM)}
        made |= {f"layer{layer}/up": matrix(DIM, 4 * DIM), f"layer{layer}/down": matrix(4 * DIM, DIM)}
        made |= {f"layer{layer}/norm{n}": np.ones(DIM) for n in (1, 2)}
    made["norm"] = np.ones(DIM)
    return {name: np.asarray(value, np.float32) for name, value in made.items()}


def batches(model: str) -> list[dict[str, np.ndarray]]:
    """The pool, whole."""
    rng, size = np.random.default_rng(1), BATCH[model]
    if model == "mlp":
        hidden = rng.normal(size=(WIDTHS[0], WIDTHS[-1]))
        images = [rng.normal(size=(size, WIDTHS[0])).astype(np.float32) for _ in range(POOL)]
        return [{"x": x, "y": (x @ hidden).argmax(1).astype(np.int32)} for x in images]
    words = [rng.zipf(1.3, (size, ROW + 1)) % VOCABULARY for _ in range(POOL)]
    return [{"x": w[:, :-1].astype(np.int32), "y": w[:, 1:].astype(np.int32)} for w in words]


def part(batch: dict[str, np.ndarray], rank: int) -> dict[str, Any]:
    """A member's rows of a batch."""
    return {name: np.split(value, MEMBERS)[rank] for name, value in batch.items()}
