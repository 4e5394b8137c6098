"""The latest queries of a table, as far as a bounded memory goes: by what `rebalance` divides memory anew.

Memory: 5 bytes a lookup.
"""

from typing import final

import numpy as np

from shoal import validate
from shoal.embed.trace import Trace


@final
class Recent:
    """A ring of ids. The table's lock guards it."""

    def __init__(self, lookups: int, num_rows: int) -> None:
        """`lookups`: ids that it remembers, at least 1."""
        validate.positive(lookups=lookups, num_rows=num_rows)
        self._ids, self._num_rows = np.empty(lookups, np.int32), num_rows
        self._begins = np.zeros(lookups, bool)
        self._at = self._held = 0

    def add(self, ids: np.ndarray) -> None:
        """One query, (n,) ids; of a longer one than fits its end is kept."""
        ids = ids[-len(self._ids) :]
        places = np.arange(self._at, self._at + len(ids)) % len(self._ids)
        self._ids[places], self._begins[places] = ids, False
        self._begins[places[:1]] = True
        self._at = (self._at + len(ids)) % len(self._ids)
        self._held = min(len(self._ids), self._held + len(ids))

    def trace(self) -> Trace:
        """The whole queries that it holds, oldest first."""
        order = np.arange(self._at - self._held, self._at) % len(self._ids)
        begins = np.flatnonzero(self._begins[order])
        if not len(begins):
            return Trace(np.zeros(1, np.int64), np.empty(0, np.int64), self._num_rows)
        ids = self._ids[order[begins[0] :]].astype(np.int64)
        return Trace(np.append(begins - begins[0], len(ids)), ids, self._num_rows)

    @property
    def size_bytes(self) -> int:
        return self._ids.nbytes + self._begins.nbytes
