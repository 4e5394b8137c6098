"""Where each vector of a table lies: slots, counted through the blocks, and further copies of some vectors.

Slot s is place s % vectors_per_block of block s // vectors_per_block. Each vector has one home slot; replicas lie
in slots of their own, in the same blocks or in further ones. A slot holds at most one vector. A layout says
nothing about values, files or caches.

Memory: 8 bytes a row, 16 a replica. `ids_of` makes the reverse map: 8 bytes a slot.
"""

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self
from zipfile import BadZipFile

import numpy as np

from shoal import validate
from shoal.embed.arrays import integers_of, refuse_but_int64
from shoal.errors import DataError


def _none() -> np.ndarray:
    return np.empty(0, np.int64)


@dataclass(frozen=True, eq=False)
class Layout:
    """The slot of each vector and of each further copy. Checked when made."""

    slot_of: np.ndarray
    """(rows,) int64: home slot of each vector."""
    vectors_per_block: int
    """Slots in a block."""
    replica_ids: np.ndarray = field(default_factory=_none)
    """(m,) int64, sorted: the vectors that have further copies, once a copy."""
    replica_slots: np.ndarray = field(default_factory=_none)
    """(m,) int64: where those copies lie."""

    def __post_init__(self) -> None:
        validate.whole(1, vectors_per_block=self.vectors_per_block)
        refuse_but_int64(slot_of=self.slot_of, replica_ids=self.replica_ids, replica_slots=self.replica_slots)
        if not len(self.slot_of):
            raise ValueError("Expected a layout of at least one row, got none.")
        if len(self.replica_ids) != len(self.replica_slots):
            raise ValueError(
                f"Expected one slot a replica, got {len(self.replica_ids)} ids and {len(self.replica_slots)} slots."
            )
        if np.any(np.diff(self.replica_ids) < 0):
            raise ValueError("Expected replica_ids to be sorted.")
        if len(self.replica_ids) and not 0 <= self.replica_ids[0] <= self.replica_ids[-1] < self.num_rows:
            raise ValueError(f"Expected replica_ids from 0 to {self.num_rows - 1}.")
        slots = np.sort(np.concatenate([self.slot_of, self.replica_slots]))
        if slots[0] < 0 or np.any(slots[1:] == slots[:-1]):
            raise ValueError(
                f"Expected slots >= 0, each with one vector, got {slots[0]} as the least and "
                f"{int(np.sum(slots[1:] == slots[:-1]))} taken twice."
            )

    @property
    def num_rows(self) -> int:
        return len(self.slot_of)

    @cached_property
    def num_blocks(self) -> int:
        """Blocks up to the last slot in use."""
        last = max(int(self.slot_of.max()), int(self.replica_slots.max(initial=0)))
        return last // self.vectors_per_block + 1

    @property
    def block_of(self) -> np.ndarray:
        """(rows,) int64: home block of each vector."""
        return self.slot_of // self.vectors_per_block

    @property
    def space(self) -> float:
        """Slots of all blocks over the rows: 1.2 means a fifth more storage than the table."""
        return self.num_blocks * self.vectors_per_block / self.num_rows

    def ids_of(self) -> np.ndarray:
        """The vectors in each block: (num_blocks, vectors_per_block) int64, -1 where a slot is empty."""
        ids = np.full(self.num_blocks * self.vectors_per_block, -1, np.int64)
        ids[self.slot_of] = np.arange(self.num_rows)
        ids[self.replica_slots] = self.replica_ids
        return ids.reshape(-1, self.vectors_per_block)

    def replica_bounds(self) -> np.ndarray:
        """(rows + 1,) int64: the replicas of vector i are `replica_slots[bounds[i]:bounds[i + 1]]`."""
        return np.searchsorted(self.replica_ids, np.arange(self.num_rows + 1))

    def hot_first(self, heat: np.ndarray) -> Self:
        """The same blocks, the vectors inside each in falling order of `heat` (rows,): no block read changes.

        "Prefetch the vectors above a threshold" is then one small number a block instead of a bit a vector.
        """
        ids = self.ids_of()
        keys = np.where(ids >= 0, heat[np.maximum(ids, 0)].astype(np.float64), -np.inf)
        order = np.argsort(-keys, axis=1, kind="stable")
        return self.from_blocks(np.take_along_axis(ids, order, axis=1), self.num_rows, homes=self.block_of)

    def without_copies(self) -> Self:
        """The same blocks, but for those that hold copies only, or nothing."""
        _, block_of = np.unique(self.block_of, return_inverse=True)
        size = self.vectors_per_block
        return type(self)(block_of.astype(np.int64) * size + self.slot_of % size, size)

    @classmethod
    def from_order(cls, order: np.ndarray, vectors_per_block: int) -> Self:
        """The vectors of `order`, a permutation of the ids (rows,), fill the blocks one after another."""
        order = integers_of(order, "order")
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise ValueError(f"Expected a permutation of 0 to {len(order) - 1}.")
        slot_of = np.empty(len(order), np.int64)
        slot_of[order] = np.arange(len(order))
        return cls(slot_of, vectors_per_block)

    @classmethod
    def from_blocks(cls, ids: np.ndarray, num_rows: int, *, homes: np.ndarray | None = None) -> Self:
        """The layout whose `ids_of` is `ids`, (blocks, vectors_per_block), -1 where empty.

        Args:
            homes: (rows,) the block that is home to each vector; without it, the first that holds it.

        Raises:
            ValueError: A vector is nowhere, or not in its home.
        """
        slots = np.flatnonzero(ids >= 0)
        held = ids.reshape(-1)[slots].astype(np.int64)
        away = np.zeros(len(slots), np.int64) if homes is None else homes[held] != slots // ids.shape[1]
        order = np.lexsort((slots, away, held))
        slots, held, away = slots[order], held[order], away[order]
        is_home = np.ones(len(held), bool)
        is_home[1:] = held[1:] != held[:-1]
        if not np.array_equal(held[is_home], np.arange(num_rows)) or np.any(away[is_home]):
            raise ValueError(f"Expected each of {num_rows} vectors in its home block.")
        return cls(slots[is_home], ids.shape[1], held[~is_home], slots[~is_home])

    @classmethod
    def in_id_order(cls, rows: int, vectors_per_block: int) -> Self:
        """Vector i in slot i: what one has who does nothing."""
        validate.whole(1, rows=rows)
        return cls(np.arange(rows), vectors_per_block)

    @classmethod
    def at_random(cls, rows: int, vectors_per_block: int, *, seed: int) -> Self:
        """The vectors in a random order."""
        return cls.from_order(np.random.default_rng(seed).permutation(rows), vectors_per_block)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the arrays as .npz, without pickle."""
        with Path(path).open("wb") as file:
            np.savez(
                file,
                slot_of=self.slot_of,
                vectors_per_block=np.int64(self.vectors_per_block),
                replica_ids=self.replica_ids,
                replica_slots=self.replica_slots,
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote. Raises DataError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(file["slot_of"], int(file["vectors_per_block"]), file["replica_ids"], file["replica_slots"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise DataError(f"Expected a layout in {path}: {error}.") from error
