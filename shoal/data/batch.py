"""How examples become blocks of fixed shape: a device's number of examples never causes a compilation.

A *block* is k steps of B examples with a mask, what `LocalRule.block` takes. What is missing is filled with
real examples under a false mask: a made-up row (zeros) can make a NaN that a mask does not stop, and batch
norm would see it. This module neither scales pixels nor moves anything to an accelerator. Memory: one block
and the indices of one epoch.

Randomness: the caller passes a generator of its own for each use, by counter rather than by sequence, so that
no device's order depends on another's: `np.random.Generator(np.random.Philox(key=...))` with a key (0 <= key
< 2**128) made from the run's seed, the round and the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import final

import numpy as np

from shoal import validate
from shoal.data.store import Examples

Block = tuple[dict[str, np.ndarray], np.ndarray]
"""Field -> array (k, B, ...), and mask (k, B) bool: True where the example counts."""


@final
@dataclass(frozen=True, eq=False, kw_only=True)
class Blocks:
    """An iterable over blocks that covers the examples `epochs` times, each pass in a fresh order.

    Iterating again goes on with the generator: another order. Masked-out slots repeat an example of the same
    batch; masked-out steps, at the end of the last block only, repeat one of the last batch.

    Example:
        >>> rng = np.random.Generator(np.random.Philox(key=7))
        >>> blocks = Blocks(Examples({"x": np.arange(5)}), batch_size=2, steps_per_block=2, rng=rng)
        >>> [(batches["x"].shape, mask.tolist()) for batches, mask in blocks]
        [((2, 2), [[True, True], [True, True]]), ((2, 2), [[True, False], [False, False]])]
    """

    examples: Examples = field(kw_only=False)
    """What is batched: N >= 1 examples."""
    batch_size: int
    """B, examples in a step."""
    steps_per_block: int
    """k, steps in a block."""
    epochs: int = 1
    """Passes over the examples."""
    rng: np.random.Generator | None = None
    """Source of the orders; needed when `shuffle` is set."""
    shuffle: bool = True
    """False keeps the stored order, for evaluation."""
    drop_remainder: bool = False
    """Leaves out a last batch that is not full, in every epoch (another one each time when shuffled)."""

    def __post_init__(self) -> None:
        """Checks the settings; see `num_steps` for the errors."""
        validate.positive(steps_per_block=self.steps_per_block)
        _ = self.num_steps
        if self.shuffle and self.rng is None:
            raise ValueError("Expected rng when shuffle=True, got None. Pass a generator, or shuffle=False.")

    @property
    def num_steps(self) -> int:
        """Steps that train on something: masked-out steps are not counted."""
        return num_steps(len(self.examples), self.batch_size, self.epochs, drop_remainder=self.drop_remainder)

    @property
    def num_examples(self) -> int:
        """Examples under a true mask, over all epochs."""
        return self._num_used() * self.epochs

    def __len__(self) -> int:
        """The number of blocks."""
        return num_blocks(
            len(self.examples),
            self.batch_size,
            self.epochs,
            steps_per_block=self.steps_per_block,
            drop_remainder=self.drop_remainder,
        )

    @property
    def padding(self) -> float:
        """Waste: the fraction of slots under a false mask, padded / total, in [0, 1)."""
        total = len(self) * self.steps_per_block * self.batch_size
        return 1 - self.num_examples / total

    def __iter__(self) -> Iterator[Block]:
        k, waiting = self.steps_per_block, self._no_steps()
        for _ in range(self.epochs):
            waiting = _join(waiting, self._epoch())
            while len(waiting[0]) >= k:
                yield self._block(waiting[0][:k], waiting[1][:k])
                waiting = waiting[0][k:], waiting[1][k:]
        if len(waiting[0]):
            yield self._block(*_fill_steps(*waiting, num_steps=k))

    def _block(self, indices: np.ndarray, mask: np.ndarray) -> Block:
        return self.examples.take(indices), np.array(mask)

    def _epoch(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices and mask of one pass, (steps, B) each; a last batch is filled with its first example."""
        rng, size = (self.rng if self.shuffle else None), self.batch_size
        count, drop = len(self.examples), self.drop_remainder
        counts = step_counts(count, size, drop_remainder=drop)
        return step_indices(count, size, rng=rng, drop_remainder=drop), np.arange(size) < counts[:, None]

    def _num_used(self) -> int:
        """Examples used in one epoch."""
        count = len(self.examples)
        return count - count % self.batch_size if self.drop_remainder else count

    def _no_steps(self) -> tuple[np.ndarray, np.ndarray]:
        return np.empty((0, self.batch_size), np.int64), np.empty((0, self.batch_size), bool)


def step_indices(
    num_examples: int,
    batch_size: int,
    epochs: int = 1,
    *,
    rng: np.random.Generator | None,
    drop_remainder: bool = False,
) -> np.ndarray:
    """Which example stands where, (steps, B) int64; a last batch is filled with its first. Without rng in the stored order."""
    used = num_examples - num_examples % batch_size if drop_remainder else num_examples
    missing = -used % batch_size
    passes = []
    for _ in range(epochs):
        order = np.arange(used) if rng is None else rng.permutation(num_examples)[:used]
        passes.append(np.append(order, np.repeat(order[used + missing - batch_size], missing)) if missing else order)
    return (passes[0] if epochs == 1 else np.concatenate(passes)).reshape(-1, batch_size)


@lru_cache(maxsize=4096)
def step_counts(num_examples: int, batch_size: int, epochs: int = 1, *, drop_remainder: bool = False) -> np.ndarray:
    """How many of each step's examples count, its first: (steps,) int32, read-only."""
    full, rest = divmod(num_examples, batch_size)
    made = np.array(([batch_size] * full + ([rest] if rest and not drop_remainder else [])) * epochs, np.int32)
    made.flags.writeable = False
    return made


def num_steps(num_examples: int, batch_size: int, epochs: int = 1, *, drop_remainder: bool = False) -> int:
    """Returns the steps that cover the examples `epochs` times.

    Raises:
        ValueError: No examples, a count below one, or `drop_remainder` with less than one full batch.
    """
    validate.positive(batch_size=batch_size, epochs=epochs)
    if num_examples < 1:
        raise ValueError(f"Expected at least one example, got {num_examples}. Leave out users without examples.")
    if drop_remainder and num_examples < batch_size:
        raise ValueError(
            f"Nothing remains of {num_examples} examples: drop_remainder=True, batch_size={batch_size}. "
            f"Take batch_size <= {num_examples} or drop_remainder=False."
        )
    full, rest = divmod(num_examples, batch_size)
    return epochs * (full + (1 if rest and not drop_remainder else 0))


def num_blocks(
    num_examples: int, batch_size: int, epochs: int = 1, *, steps_per_block: int, drop_remainder: bool = False
) -> int:
    """Returns the blocks of `steps_per_block` steps that hold those steps; raises as `num_steps` does."""
    validate.positive(steps_per_block=steps_per_block)
    return -(-num_steps(num_examples, batch_size, epochs, drop_remainder=drop_remainder) // steps_per_block)


def _join(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def _fill_steps(indices: np.ndarray, mask: np.ndarray, *, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Adds wholly masked steps that repeat the first example of the last batch."""
    missing = num_steps - len(indices), indices.shape[1]
    padding = np.full(missing, indices[-1, 0]), np.zeros(missing, bool)
    return _join((indices, mask), padding)
