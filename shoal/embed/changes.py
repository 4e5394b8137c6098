"""What one step of writing does to a table, as a value: journalled first, then applied, and applied again when opened.

A change names the rows that now rest in memory with their values, and the blocks that were written (durably, before
the change) with whom they hold. All else follows from it, so a live table and a replayed one are the same.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from shoal.errors import ProtocolError, StoreError
from shoal.tensors import PARSE_ERRORS, pack, unpack


def _ids() -> np.ndarray:
    return np.empty(0, np.int32)


def _numbers() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Change:
    """One step. n = rows to memory, b = blocks written, K = slots a block."""

    table: str
    row_ids: np.ndarray = field(default_factory=_ids)
    """(n,) int32, each once."""
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.uint32))
    """(n, words) uint32: their values."""
    blocks: np.ndarray = field(default_factory=_numbers)
    """(b,) int64: the blocks written."""
    kinds: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    """(b,) uint8: HOME or DELTA."""
    offered: np.ndarray = field(default_factory=lambda: np.empty(0, np.int16))
    """(b,) int16: how many of each block's first slots are offered to the cache when it is read."""
    sums: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    """(b,) uint64: checksums."""
    members: np.ndarray = field(default_factory=lambda: np.empty((0, 1), np.int32))
    """(b, K) int32: the row in each slot, -1 where none."""
    replaces: np.ndarray = field(default_factory=_numbers)
    """(b,) int64: the HOME block whose rows and replicas move here place by place; -1 where none.

    A HOME block that replaces none takes its rows from wherever they were at home."""
    fresh: np.ndarray = field(default_factory=_ids)
    """(h,) int32: rows that get a new value by being written into a HOME block: copies elsewhere are out of date."""
    freed: np.ndarray = field(default_factory=_numbers)
    """(f,) int64: blocks that nobody needs any more (those replaced included)."""

    def to_bytes(self) -> bytes:
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        return pack(arrays, {"table": self.table})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises StoreError for what `to_bytes` would not have written."""
        try:
            arrays, header = unpack(data)
            return cls(table=str(header["table"]), **{name: arrays[name] for name in _ARRAYS})
        except (ProtocolError, *PARSE_ERRORS) as error:
            raise StoreError(f"A record of the journal is no change of a table: {error}.") from error


_ARRAYS = ("row_ids", "rows", "blocks", "kinds", "offered", "sums", "members", "replaces", "fresh", "freed")
