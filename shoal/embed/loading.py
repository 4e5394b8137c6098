"""All rows of a table, as callers hand them over: one array, or pieces of what does not fit in memory."""

from collections.abc import Iterable
from typing import final

import numpy as np

from shoal.embed.manifest import TableRecord
from shoal.embed.table import Table


def refuse_shape(record: TableRecord, vectors: np.ndarray) -> None:
    """Raises ValueError unless there is a vector of the right size for each row."""
    if vectors.shape != (record.rows, record.dim):
        raise ValueError(
            f"Expected vectors of shape ({record.rows}, {record.dim}) for table {record.name!r}, got {vectors.shape}."
        )


@final
class Pieces:
    """Rows in id order from an iterable of arrays, a piece in memory at a time."""

    def __init__(self, table: Table, pieces: Iterable[np.ndarray]) -> None:
        self._table, self._pieces, self._next = table, iter(pieces), 0
        self._held = np.empty((0, table.codec.words), np.uint32)

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        assert ids[0] == self._next, "rows are asked for in id order"
        while len(self._held) < len(ids):
            piece = next(self._pieces, None)
            if piece is None:
                raise ValueError(
                    f"Expected {self._table.record.rows} vectors for table {self._table.record.name!r}, got "
                    f"{self._next + len(self._held)}."
                )
            self._held = np.concatenate([self._held, self._table.codec.encode(piece)])
        made, self._held = self._held[: len(ids)], self._held[len(ids) :]
        self._next += len(ids)
        return made
