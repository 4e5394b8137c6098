"""All rows of a table, as callers hand them over: one array, or pieces of what does not fit in memory."""

from collections.abc import Callable, Iterable
from typing import Any, final

import numpy as np

from shoal import validate
from shoal.embed.arrays import array_of
from shoal.embed.table import Table


def whole_rows(table: Table, given: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Rows by their ids from one array. Raises TypeError or ValueError unless it has a vector of the right size for each row."""
    record, vectors = table.record, array_of(given, "vectors")
    if vectors.shape != (record.rows, record.dim):
        raise ValueError(
            f"Expected vectors of shape ({record.rows}, {record.dim}) for table {record.name!r}, got {vectors.shape}."
        )
    if vectors.dtype.kind not in "fiu":
        raise TypeError(f"Expected vectors of table {record.name!r} to be numbers, got {vectors.dtype}.")
    return lambda ids: table.codec.encode(vectors[ids])


@final
class Pieces:
    """Rows in id order from an iterable of arrays, a piece in memory at a time."""

    def __init__(self, table: Table, pieces: Iterable[np.ndarray]) -> None:
        validate.of_kind(Iterable, "an array (rows, dim), or pieces of it one after another", vectors=pieces)
        self._table, self._pieces, self._next = table, iter(pieces), 0
        self._held = np.empty((0, table.codec.words), np.uint32)
        self._given = 0

    def rows_of(self, ids: np.ndarray) -> np.ndarray:
        assert ids[0] == self._next, "rows are asked for in id order"
        while len(self._held) < len(ids):
            piece = self._piece()
            if piece is None:
                raise self._another_number(str(self._given))
            self._held = np.concatenate([self._held, self._table.codec.encode(piece)])
        made, self._held = self._held[: len(ids)], self._held[len(ids) :]
        self._next += len(ids)
        if self._next == self._table.record.rows and (len(self._held) or self._piece() is not None):
            raise self._another_number(f"at least {self._given}")
        return made

    def _piece(self) -> np.ndarray | None:
        """The next piece that is not empty; None: there is no more."""
        name, dim = self._table.record.name, self._table.record.dim
        for piece in self._pieces:
            made = array_of(piece, f"pieces of table {name!r}")
            if made.ndim != 2 or made.shape[1] != dim or made.dtype.kind not in "fiu":
                raise ValueError(
                    f"Expected pieces of table {name!r} to be arrays of numbers (n, {dim}), got {made.dtype}{list(made.shape)}."
                )
            self._given += len(made)
            if len(made):
                return made
        return None

    def _another_number(self, got: str) -> ValueError:
        record = self._table.record
        return ValueError(f"Expected {record.rows} vectors for table {record.name!r}, got {got}.")
