"""What is written when rows change: rows that change often rest in memory, the others go to delta blocks; then tidying.

An update makes one `Change`. Its rows are parted:

1. Rows that already rest in memory, or lie in a delta block (so they change a second time), rest in memory while there is
   room: the journal takes their bytes, no block is written.
2. Where the write budget allows, HOME blocks of which much has changed are written anew, whole.
3. The others fill whole delta blocks, neighbours in the placement beside each other; what does not fill a block rests in
   memory too.
4. Where memory is full, the rows longest unchanged leave it for delta blocks, a quarter at a time.

Tidying (`compact`) makes one `Change` within a number of blocks:

1. Delta blocks without a live row are freed: that costs no write.
2. HOME blocks with many rows elsewhere are written anew, whole; first those where a write saves most reads: rows elsewhere
   times reads of the block since the last time.
3. Where free blocks run short, sparse delta blocks are merged.
4. Where the free blocks are worn (written well beyond the mean), the least worn HOME blocks change places with them.

Write amplification of an update: 1.03 for rows of 128 B (a row's number in the journal), plus tidying, which the budget
limits.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from shoal.embed import checksum, kernel
from shoal.embed.blockfile import aligned
from shoal.embed.changes import Change
from shoal.embed.kernel import ABSENT
from shoal.embed.space import DELTA, HOME
from shoal.embed.stored import RowLost, stored_rows
from shoal.embed.table import Table

SPARE: Final = 0.10
"""Part of a file's blocks that tidying keeps free."""
FEWEST_AWAY: Final = 1 / 8
"""A HOME block is written anew only with so many of its rows elsewhere."""
WEAR_SLACK: Final = 1.0
"""Writes beyond the mean from which a free block counts as worn."""


@dataclass(frozen=True, eq=False)
class Step:
    """A change whose blocks are written, and what `Table.apply` needs beside it."""

    change: Change
    values: np.ndarray
    """Values of the blocks' rows, in the order of `change.members`, empty slots left out."""
    written_bytes: int


def update(table: Table, ids: np.ndarray, rows: np.ndarray, *, spare_blocks: float = 0.0) -> Step:
    """Writes the blocks of an update; nothing of it is visible yet.

    Args:
        ids: (n,) int64, each once, in range.
        rows: (n, words) uint32.
        spare_blocks: what may be written beyond the rows themselves, so that some go home at once.
    """
    if table.mirror is not None:
        change = Change(table=table.record.name, row_ids=ids.astype(np.int32), rows=rows)
        return Step(change, np.empty((0, table.codec.words), np.uint32), 0)
    while True:
        try:
            return _update(table, ids, rows, spare_blocks)
        except RowLost:  # its block is left alone now
            continue


def _update(table: Table, ids: np.ndarray, rows: np.ndarray, spare_blocks: float) -> Step:
    rests, evicted, room = _parted(table, ids)
    cold_ids, cold_rows = ids[~rests], rows[~rests]
    cold_ids = np.concatenate([cold_ids, evicted])
    cold_rows = np.concatenate([cold_rows, table.view.resident[-2 - table.view.where[evicted]]])
    homes = _homes_that_pay(table, cold_ids, spare_blocks)
    home = table.home_of(cold_ids)
    goes_home = np.isin(home // table.slots_per_block, homes) & (home >= 0)
    delta_ids, delta_rows = cold_ids[~goes_home], cold_rows[~goes_home]
    order = np.argsort(home[~goes_home], kind="stable")  # neighbours in the placement beside each other
    delta_ids, delta_rows = delta_ids[order], delta_rows[order]
    full = len(delta_ids) // table.slots_per_block * table.slots_per_block
    if len(delta_ids) - full > room:
        full = len(delta_ids)
    new_ids = np.concatenate([cold_ids[goes_home], delta_ids[:full]])
    new_rows = np.concatenate([cold_rows[goes_home], delta_rows[:full]])
    step = _write_step(table, homes, delta_ids[:full], new_ids, new_rows, _no_blocks())
    change = replace(
        step.change,
        row_ids=np.concatenate([ids[rests], delta_ids[full:]]).astype(np.int32),
        rows=np.concatenate([rows[rests], delta_rows[full:]]),
        fresh=cold_ids[goes_home].astype(np.int32),
    )
    return Step(change, step.values, step.written_bytes)


def _no_blocks() -> np.ndarray:
    return np.empty(0, np.int64)


def _homes_that_pay(table: Table, ids: np.ndarray, spare_blocks: float) -> np.ndarray:
    """HOME blocks that are written anew with their changed rows in them, instead of these going to delta blocks.

    Such a write costs the rows that have not changed. Taken are those that bring most rows home for it, weighed by reads of the
    block, until `spare_blocks` are spent.
    """
    size = table.slots_per_block
    with_home = table.home_of(ids)
    with_home = with_home[with_home >= 0]
    if spare_blocks < 1 or not len(with_home):
        return _no_blocks()
    homes, changed = np.unique(with_home // size, return_counts=True)
    sound = _are_sound(table, homes)
    homes, changed = homes[sound], changed[sound]
    cost = 1.0 - changed / size + 1e-3
    gain = (changed + _rows_away(table, homes)) * (1.0 + table.view.read_count[homes])
    order = np.argsort(-gain / cost, kind="stable")
    order = order[changed[order] + _rows_away(table, homes[order]) >= FEWEST_AWAY * size]
    order = order[: int(np.searchsorted(np.cumsum(cost[order]), spare_blocks, side="right"))]
    made: np.ndarray = np.sort(homes[order]).astype(np.int64)
    return made


def _parted(table: Table, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Which rows rest in memory from now on (n,) bool; which leave it for that (m,) int64; how many more would fit then."""
    capacity, reserve = table.resident_capacity, table.slots_per_block
    where = table.view.where[ids].astype(np.int64)
    rests = where < ABSENT
    again = np.zeros(len(ids), bool)
    again[where >= 0] = table.space.kind[where[where >= 0] // table.slots_per_block] == DELTA
    # Half of the memory at a time: the rest is for rows that are hotter than these, and for what does not fill a block.
    coming = np.flatnonzero(again)[: max(0, min(capacity // 2, capacity - int(rests.sum()) - reserve))]
    rests[coming] = True
    total = table.num_resident + len(coming)
    evicted = np.empty(0, np.int64)
    if total + reserve > capacity:
        held = np.flatnonzero(table.resident_id >= 0)
        held = held[~np.isin(table.resident_id[held], ids)]
        oldest = held[np.argsort(table.resident_stamp[held], kind="stable")]
        evicted = table.resident_id[oldest[: max(total + reserve - capacity, capacity // 4)]].astype(np.int64)
    return rests, evicted, capacity - total + len(evicted)


def write_blocks(
    table: Table,
    members: np.ndarray,
    rows: np.ndarray,
    kinds: np.ndarray,
    *,
    replaces: np.ndarray | None = None,
    offered: np.ndarray | None = None,
) -> Step:
    """Writes blocks to free places, durably: `members` (b, K) int32, `rows` (b, K, words) uint32."""
    table.make_room(len(members))
    with table.lock:
        blocks = table.space.take(len(members)).astype(np.int64)
    try:
        data = aligned(len(blocks) * table.record.block_bytes).reshape(len(blocks), table.record.block_bytes)
        data[:, : table.slots_per_block * table.codec.row_bytes] = rows.reshape(
            len(blocks), table.slots_per_block * table.codec.words
        ).view(np.uint8)
        if len(blocks):
            table.file.write(blocks, data)
            table.file.sync()
        table.space.wrote(blocks)
    except BaseException:
        undo(table, blocks)
        raise
    change = Change(
        table=table.record.name,
        blocks=blocks,
        kinds=kinds,
        offered=np.zeros(len(blocks), np.int16) if offered is None else offered,
        sums=checksum.of_blocks(data.view(np.uint64), blocks),
        members=members,
        replaces=np.full(len(blocks), -1, np.int64) if replaces is None else replaces,
        rows=np.empty((0, table.codec.words), np.uint32),
    )
    return Step(change, np.empty((0, table.codec.words), np.uint32), len(blocks) * table.record.block_bytes)


def undo(table: Table, blocks: np.ndarray) -> None:
    """Frees blocks that were taken for a change that does not come."""
    with table.lock:
        table.space.give_back(blocks)


def compact(table: Table, most_blocks: int, *, everything: bool = False) -> Step | None:
    """Writes the blocks of one step of tidying, `most_blocks` at most; None where there is nothing to do.

    `everything`: also HOME blocks with a single row elsewhere. Rows that are lost, and their neighbours, stay where they are.
    """
    if table.mirror is not None:
        return None
    while True:
        try:
            return _compact(table, most_blocks, everything)
        except RowLost:  # its block is left alone now
            continue


def _compact(table: Table, most_blocks: int, everything: bool) -> Step | None:
    kinds, size = table.space.kind, table.slots_per_block
    deltas = np.flatnonzero(kinds == DELTA)
    live = kernel.live_rows(table.view, size, deltas)
    dead = deltas[live == 0]
    homes = _homes_to_write(table, most_blocks, everything)
    worn = _worn_homes(table, most_blocks - len(homes), homes)
    homes = np.concatenate([homes, worn])
    merged = _sparse_deltas(table, deltas, live, most_blocks - len(homes), homes)
    if not len(homes) and not len(merged) and not len(dead):
        return None
    table.view.read_count[:] //= 2
    moving = _live_ids(table, merged)
    home = table.home_of(moving)
    stays = ~np.isin(home // size, homes) | (home < 0)
    moving = moving[stays][np.argsort(home[stays], kind="stable")]
    none = np.empty((0, table.codec.words), np.uint32)
    return _write_step(table, homes, moving, _no_blocks(), none, np.concatenate([merged, dead]))


def _homes_to_write(table: Table, most: int, everything: bool) -> np.ndarray:
    size = table.slots_per_block
    homes = np.flatnonzero(table.space.kind == HOME)
    homes = homes[_are_sound(table, homes)]
    away = _rows_away(table, homes)
    fewest = 1 if everything else max(1, int(FEWEST_AWAY * size))
    score = away * (1.0 + table.view.read_count[homes])
    chosen = np.flatnonzero(away >= fewest)
    made: np.ndarray = homes[chosen[np.argsort(-score[chosen], kind="stable")][: max(0, most)]]
    return made


def _are_sound(table: Table, blocks: np.ndarray) -> np.ndarray:
    """(n,) bool: whether no row of each block would have to be read from a block whose rows are lost."""
    if not table.lost:
        return np.ones(len(blocks), bool)
    size = table.slots_per_block
    ids = table.view.id_at[blocks[:, None] * size + np.arange(size)]
    where = table.view.where[np.maximum(ids, 0)]
    bad = (ids >= 0) & (where >= 0) & np.isin(where // size, list(table.lost))
    made: np.ndarray = ~bad.any(axis=1)
    return made


def _rows_away(table: Table, homes: np.ndarray) -> np.ndarray:
    """(n,) int64: rows of each HOME block whose value is in a delta block."""
    size = table.slots_per_block
    slots = homes[:, None] * size + np.arange(size)
    ids = table.view.id_at[slots]
    where = table.view.where[np.maximum(ids, 0)]
    moved = (ids >= 0) & (where >= 0) & (where != slots)
    moved &= table.space.kind[np.maximum(where, 0) // size] == DELTA
    away: np.ndarray = moved.sum(axis=1)
    return away


def _worn_homes(table: Table, most: int, chosen: np.ndarray) -> np.ndarray:
    """HOME blocks that were written little, to be moved to free blocks that were written much."""
    with table.lock:
        free = np.flatnonzero(table.space._is_free)
    wear = table.space.wear
    if not len(free) or most <= 0 or wear[free].min() < wear.mean() + WEAR_SLACK:
        return np.empty(0, np.int64)
    homes = np.setdiff1d(np.flatnonzero(table.space.kind == HOME), chosen)
    homes = homes[_are_sound(table, homes)]
    made: np.ndarray = homes[np.argsort(wear[homes], kind="stable")][: min(most, len(free))].astype(np.int64)
    return made


def _sparse_deltas(table: Table, deltas: np.ndarray, live: np.ndarray, most: int, homes: np.ndarray) -> np.ndarray:
    """Delta blocks to merge into fewer, where free blocks run short."""
    if most <= 0 or table.space.num_free >= SPARE * table.space.num_blocks:
        return np.empty(0, np.int64)
    few = (live > 0) & (live <= table.slots_per_block // 2) & _are_sound(table, deltas)
    sparse, rows = deltas[few], live[few]
    order = np.argsort(rows, kind="stable")
    fits = np.cumsum(rows[order]) <= most * table.slots_per_block
    made: np.ndarray = sparse[order[fits]].astype(np.int64)
    return made


def _write_step(
    table: Table, homes: np.ndarray, moving: np.ndarray, new_ids: np.ndarray, new_rows: np.ndarray, freed: np.ndarray
) -> Step:
    """Writes HOME blocks anew and rows `moving` to delta blocks, in this order; values are the present ones but for `new_ids`."""
    size = table.slots_per_block
    members = table.view.id_at[homes[:, None] * size + np.arange(size)]
    delta_members = np.full((-(-len(moving) // size), size), -1, np.int32)
    delta_members.reshape(-1)[: len(moving)] = moving
    all_members = np.concatenate([members, delta_members])
    held = all_members >= 0
    held_ids = all_members[held].astype(np.int64)
    values = _values(table, held_ids, new_ids, new_rows)
    rows = np.zeros((*all_members.shape, table.codec.words), np.uint32)
    rows[held] = values
    kinds = np.repeat(np.array([HOME, DELTA], np.uint8), [len(members), len(delta_members)])
    replaces = np.concatenate([homes, np.full(len(delta_members), -1)]).astype(np.int64)
    offered = np.zeros(len(kinds), np.int16)
    offered[: len(homes)] = table.view.offered[homes]
    step = write_blocks(table, all_members, rows, kinds, replaces=replaces, offered=offered)
    gone = np.unique(np.concatenate([homes, freed])).astype(np.int64)
    return Step(replace(step.change, freed=gone), values, step.written_bytes)


def _values(table: Table, ids: np.ndarray, new_ids: np.ndarray, new_rows: np.ndarray) -> np.ndarray:
    """The values of rows (n, words): of `new_ids` those of `new_rows`, of the others the present ones."""
    order = np.argsort(new_ids, kind="stable")
    at = np.minimum(np.searchsorted(new_ids[order], ids), max(0, len(new_ids) - 1))
    is_new = new_ids[order][at] == ids if len(new_ids) else np.zeros(len(ids), bool)
    made = np.empty((len(ids), table.codec.words), np.uint32)
    made[~is_new] = stored_rows(table, ids[~is_new])
    made[is_new] = new_rows[order[at[is_new]]]
    return made


def _live_ids(table: Table, blocks: np.ndarray) -> np.ndarray:
    slots = (blocks[:, None] * table.slots_per_block + np.arange(table.slots_per_block)).reshape(-1)
    ids = table.view.id_at[slots].astype(np.int64)
    made: np.ndarray = ids[(ids >= 0) & (table.view.where[np.maximum(ids, 0)] == slots)]
    return made
