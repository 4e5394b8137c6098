"""Which blocks of a table's file are free, how often each was written, and when a freed one may be written again.

Nothing is ever written over: a new value goes to a free block, and the block that it replaces is *retired*. Readers enter
an epoch and leave it; a retired block is free again when every reader that entered before has left. The next block to be
written is the free one that was written least, so wear spreads over what is free.

Invariants:
    (1) A block is free, retired, or in use (`HOME`, `DELTA`); only free ones are handed out.
    (2) A block that a reader may be reading is not free.
    (3) `wear` only rises; it counts every write, also one whose change was never committed.
"""

from collections import Counter, deque
from typing import Final, final

import numpy as np

FREE, HOME, DELTA = 0, 1, 2
"""What a block is: unused, a block of the placement, a block of rows that changed since."""
GROW: Final = 32
"""A file that is full grows by a 32nd."""


@final
class Space:
    """The blocks of one file. The table's lock guards all but `kind` and `wear`, which only the writer changes."""

    def __init__(self, kind: np.ndarray, wear: np.ndarray) -> None:
        """`kind` (blocks,) uint8 and `wear` (blocks,) uint32: from the table's state."""
        self.kind, self.wear = kind, wear
        self._is_free = kind == FREE
        self._epoch = 0
        self._readers: Counter[int] = Counter()
        self._retired: deque[tuple[int, np.ndarray]] = deque()

    @property
    def num_blocks(self) -> int:
        return len(self.kind)

    @property
    def num_free(self) -> int:
        """Blocks that may be written now."""
        self._reclaim()
        return int(self._is_free.sum())

    @property
    def has_readers(self) -> bool:
        return bool(self._readers)

    def enter(self) -> int:
        """A reader begins: the blocks in use now stay as they are until it leaves."""
        self._readers[self._epoch] += 1
        return self._epoch

    def leave(self, epoch: int) -> None:
        self._readers[epoch] -= 1
        if not self._readers[epoch]:
            del self._readers[epoch]

    def take(self, count: int) -> np.ndarray:
        """The `count` least written free blocks, in rising order (so neighbours are written together).

        Raises AssertionError where so many are not free: the caller grows the file first.
        """
        self._reclaim()
        free = np.flatnonzero(self._is_free)
        assert len(free) >= count, "grow the file first"
        chosen = np.sort(free[np.argsort(self.wear[free], kind="stable")[:count]])
        self._is_free[chosen] = False
        return chosen

    def give_back(self, blocks: np.ndarray) -> None:
        """Blocks that were taken and, for want of a commit, hold nothing."""
        self._is_free[blocks] = True

    def wrote(self, blocks: np.ndarray) -> None:
        self.wear[blocks] += 1

    def use(self, blocks: np.ndarray, kinds: np.ndarray) -> None:
        """A change that writes to these blocks is committed."""
        self._reclaim()  # when a journal is replayed, a block may have been retired before: later it must not count as free
        self.kind[blocks] = kinds
        self._is_free[blocks] = False

    def retire(self, blocks: np.ndarray) -> None:
        """A change after which nobody needs these blocks is committed."""
        if len(blocks):
            self.kind[blocks] = FREE
            self._retired.append((self._epoch, blocks))
            self._epoch += 1

    def grow(self, num_blocks: int) -> None:
        """The file has so many blocks now."""
        more = max(0, num_blocks - self.num_blocks)
        self.kind = np.append(self.kind, np.zeros(more, np.uint8))
        self.wear = np.append(self.wear, np.zeros(more, np.uint32))
        self._is_free = np.append(self._is_free, np.ones(more, bool))

    def missing(self, count: int) -> int:
        """How long the file must be, in blocks, for `count` to be free; 0 where they are."""
        lacking = count - self.num_free
        return 0 if lacking <= 0 else self.num_blocks + max(lacking, self.num_blocks // GROW)

    def _reclaim(self) -> None:
        oldest = min(self._readers, default=self._epoch)
        while self._retired and self._retired[0][0] < oldest:
            self._is_free[self._retired.popleft()[1]] = True
