"""Small stores and ways to hurt them."""

from pathlib import Path
from typing import Any

import numpy as np

from shoal.clock import ManualClock
from shoal.embed import EmbeddingStore, TableSpec

ROWS, DIM = 2000, 32


def vectors(rows: int = ROWS, dim: int = DIM, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


def small_store(folder: Path, *, dtype: Any = "float32", dram: str = "40KB", **options: Any) -> EmbeddingStore:
    """A store of one table in blocks, `items`, loaded with `vectors()`; the clock stands still."""
    spec = TableSpec(rows=ROWS, dim=DIM, dtype=dtype, tier="block", **options.pop("spec", {}))
    options.setdefault("clock", ManualClock(1e9))
    store = EmbeddingStore.create(folder, {"items": spec}, dram=dram, **options)
    store.load("items", vectors())
    return store


def flip(path: Path, byte: int, *, bit: int = 0) -> None:
    """Changes one bit of a file."""
    with path.open("r+b") as file:
        file.seek(byte)
        old = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([old ^ 1 << bit]))
