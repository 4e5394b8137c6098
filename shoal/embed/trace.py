"""Traces: which vectors each query asked for, in time order. What placement learns from and caches are judged on.

Format of the file: .npz with `indptr` (queries + 1,) and `ids` (lookups,); query q asked for
`ids[indptr[q]:indptr[q + 1]]`. No pickle.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self
from zipfile import BadZipFile, is_zipfile

import numpy as np

from shoal import validate
from shoal.embed.arrays import integers_of, refuse_but_int64
from shoal.errors import DataError


@dataclass(frozen=True, eq=False)
class Trace:
    """Queries of one table in time order. Checked when made."""

    indptr: np.ndarray
    """(queries + 1,) int64: where each query begins in `ids`."""
    ids: np.ndarray
    """(lookups,) int64."""
    num_rows: int
    """Rows of the table; every id is below it."""

    def __post_init__(self) -> None:
        refuse_but_int64(indptr=self.indptr, ids=self.ids)
        validate.whole(0, num_rows=self.num_rows)
        bounds = self.indptr
        if not len(bounds) or bounds[0] != 0 or bounds[-1] != len(self.ids) or np.any(np.diff(bounds) < 0):
            raise ValueError(f"Expected indptr to rise from 0 to {len(self.ids)} lookups.")
        if len(self.ids) and not 0 <= self.ids.min() <= self.ids.max() < self.num_rows:
            raise ValueError(f"Expected ids from 0 to {self.num_rows - 1}, got {self.ids.min()} to {self.ids.max()}.")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_lookups(self) -> int:
        return len(self.ids)

    @classmethod
    def of(cls, queries: Sequence[Sequence[int]], num_rows: int) -> Self:
        """A trace of lists of ids, one a query."""
        try:
            lengths = [len(query) for query in queries]
        except TypeError as error:
            raise TypeError(f"Expected queries to be lists of ids, such as [[3, 1], [4]]: {error}.") from error
        ids = integers_of([id for query in queries for id in query], "ids")
        return cls(np.cumsum([0, *lengths], dtype=np.int64), ids, num_rows)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, num_rows: int | None = None) -> Self:
        """Reads a file; without `num_rows`, the rows are as many as its highest id needs. Raises DataError."""
        try:
            if Path(path).is_file() and not is_zipfile(path):
                raise BadZipFile("it is no .npz")
            with np.load(path, allow_pickle=False) as file:
                indptr, ids = _integers(file["indptr"], "indptr"), _integers(file["ids"], "ids")
            return cls(indptr, ids, num_rows or int(ids.max(initial=0)) + 1)
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise DataError(
                f"Expected a trace (.npz with indptr and ids) in {path}: {str(error).rstrip('.')}."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `load` reads."""
        with Path(path).open("wb") as file:
            np.savez(file, indptr=self.indptr, ids=self.ids)

    @classmethod
    def joined(cls, traces: Sequence[Self]) -> Self:
        """Traces of one table, one after another."""
        ends = np.cumsum([0, *(trace.num_lookups for trace in traces)])
        indptr = [trace.indptr[1:] + end for trace, end in zip(traces, ends[:-1], strict=True)]
        ids = np.concatenate([trace.ids for trace in traces])
        return cls(np.concatenate([np.zeros(1, np.int64), *indptr]), ids, max(trace.num_rows for trace in traces))

    def only(self, is_kept: np.ndarray) -> Self:
        """The same queries with only some of their lookups, (lookups,) bool; empty queries stay."""
        until = np.concatenate([[0], np.cumsum(is_kept)])
        return type(self)(until[self.indptr], self.ids[is_kept], self.num_rows)

    def slice(self, begin: int, end: int) -> Self:
        """Queries begin to end - 1."""
        bounds = self.indptr[begin : end + 1]
        return type(self)(bounds - bounds[0], self.ids[bounds[0] : bounds[-1]], self.num_rows)

    def split(self, *shares: float) -> list[Self]:
        """Parts in time order, for example `split(0.5, 0.2, 0.3)`: placement, tuning, measurement."""
        validate.positive(**{f"share_{i}": share for i, share in enumerate(shares)})
        ends = np.round(np.cumsum([0.0, *shares]) / sum(shares) * len(self)).astype(int)
        return [self.slice(int(a), int(b)) for a, b in pairwise(ends)]

    def renamed(self, new_of: np.ndarray) -> Self:
        """The same queries with id i called `new_of[i]`, (rows,) a permutation."""
        return type(self)(self.indptr, new_of[self.ids].astype(np.int64), self.num_rows)

    def counts(self) -> np.ndarray:
        """(rows,) int64: lookups of each id."""
        return np.bincount(self.ids, minlength=self.num_rows)

    def transposed(self) -> tuple[np.ndarray, np.ndarray]:
        """By id instead of by query: `queries[starts[i]:starts[i + 1]]` asked for id i, in time order."""
        queries = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        order = np.argsort(self.ids, kind="stable")
        return np.concatenate([[0], np.cumsum(self.counts())]), queries[order]


def _integers(array: np.ndarray, name: str) -> np.ndarray:
    """As int64. Raises TypeError for numbers that would be rounded."""
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} are {array.dtype}, not integers")
    return array.astype(np.int64)
