"""Which example a batch has where: a function of (seed, epoch), so that a run goes on in the middle of an epoch, on any mesh.

    full        every order of all examples is as likely as any other: for data in memory, or on a disk that reads anywhere
    window W    runs of W/32 examples come in a drawn order, and each example stands within W of where its run has it: who reads along reads runs,
                and needs a buffer of 2 W examples
    parts P     each of P hosts has examples of its own, and a P-th of each batch comes from each

How well a window mixes is measured, not hoped for (`mixing`): where it does badly, a run's luck depends on how its data lies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

import numpy as np

from shoal import validate
from shoal.data.batch import num_steps, step_counts, step_indices

_RUNS: Final = 32
"""In a window."""
_MEASURED: Final = 64
"""Batches."""


@final
@dataclass(frozen=True, kw_only=True)
class Order:
    """Of one data set."""

    num_examples: int
    batch_size: int
    """B, of all members together."""
    seed: int
    window: int | None = None
    """None: full."""
    parts: int = 1
    """Hosts that have examples of their own, consecutive ones."""
    drop_remainder: bool = False
    """Leaves out a last batch that is not full, another one in each epoch."""

    def __post_init__(self) -> None:
        """
        Raises:
            ValueError: a number is not positive, or a batch or the examples cannot be shared by so many parts.
        """
        validate.positive(num_examples=self.num_examples, batch_size=self.batch_size, parts=self.parts)
        if self.window is not None:
            validate.positive(window=self.window)
        if self.batch_size % self.parts or self.num_examples < self.parts:
            raise ValueError(
                f"Expected batches and examples for {self.parts} parts, got batch_size={self.batch_size} (a multiple is needed) of "
                f"{self.num_examples} examples."
            )
        _ = self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Batches of one pass."""
        return max(num_steps(n, self._size, drop_remainder=self.drop_remainder) for n in self._sizes)

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Indices (steps, B) int64 and mask (steps, B) of one pass. What is missing in a last batch repeats an example of it."""
        begin, indices, mask = 0, [], []
        for part, size in enumerate(self._sizes):
            order = self._drawn(size, np.random.Generator(np.random.Philox(key=[self.seed, (number << 16) + part])))
            rows = step_indices(size, self._size, rng=None, drop_remainder=self.drop_remainder)
            counts = step_counts(size, self._size, drop_remainder=self.drop_remainder)
            real = np.arange(self._size) < counts[:, None]
            missing = self.steps_per_epoch - len(rows)  # a part that is shorter by one
            indices.append(begin + np.pad(order[rows], ((0, missing), (0, 0)), mode="edge"))
            mask.append(np.pad(real, ((0, missing), (0, 0))))
            begin += size
        return np.concatenate(indices, axis=1), np.concatenate(mask, axis=1)

    def steps(self, first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Indices (B,) and mask (B,) of step `first` and all after it, without end."""
        epoch, skipped = divmod(first, self.steps_per_epoch)
        while True:
            indices, mask = self.epoch(epoch)
            yield from zip(indices[skipped:], mask[skipped:], strict=True)
            epoch, skipped = epoch + 1, 0

    @property
    def _size(self) -> int:
        return self.batch_size // self.parts

    @property
    def _sizes(self) -> list[int]:
        edges = np.linspace(0, self.num_examples, self.parts + 1).astype(int)
        return [int(size) for size in np.diff(edges)]

    def _drawn(self, size: int, rng: np.random.Generator) -> np.ndarray:
        if self.window is None:
            return rng.permutation(size)
        runs = np.array_split(np.arange(size), -(-size // max(1, self.window // _RUNS)))
        sequence = np.concatenate([runs[number] for number in rng.permutation(len(runs))])
        return sequence[np.argsort(np.arange(size) + self.window * rng.random(size), kind="stable")]


def mixing(order: Order) -> float:
    """How far apart in the data the examples of a batch lie, on average, as a share of what a full shuffle makes it. See `spread`."""
    indices, mask = order.epoch(0)
    return spread(indices[:_MEASURED], mask[:_MEASURED], order.num_examples)


def spread(indices: np.ndarray, mask: np.ndarray, num_examples: int) -> float:
    """The mean distance of two examples of a batch, over N/3, which is that of any two examples. Batches of neighbours have B/N.

    Args:
        indices, mask: (steps, B).
        num_examples: N.
    """
    found = []
    for row, real in zip(indices, mask, strict=True):
        places = np.sort(row[real])
        n = len(places)
        if n > 1:
            apart = float(np.dot(2 * np.arange(n) - n + 1, places))  # sum over i > j of places[i] - places[j]
            found.append(apart / (n * (n - 1) / 2))
    return float(np.mean(found)) / (num_examples / 3) if found else 1.0
