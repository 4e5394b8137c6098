"""Re-placement: all blocks of a table anew, or only those new blocks that repay their write.

Both write to free blocks; what they replace stays until the change is committed and its readers have left. A whole rewrite
needs as much free space as the table takes; it is what `load` and a first `retrain` do.

Moving a row costs a write only where it goes to: the slot that it leaves is stale, not rewritten. So a new block is worth
what it saves by itself: over the queries of a trace, the old blocks that are read only for rows of that new block, less the
one read of it. `best_blocks` takes the blocks with most saved reads for a write, up to a limit.

References: Shalita et al., 2016, Social Hash, NSDI (why re-partitioning is limited to what pays).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np

from shoal.embed import checksum
from shoal.embed._compiled import compiled
from shoal.embed._sorted import distinct, order_of
from shoal.embed.blockfile import aligned
from shoal.embed.deltas import Step, undo, write_blocks
from shoal.embed.kernel import ABSENT
from shoal.embed.layout import Layout
from shoal.embed.progress import Meter, Tell
from shoal.embed.space import FREE, HOME
from shoal.embed.stored import stored_rows
from shoal.embed.table import Table
from shoal.embed.trace import Trace
from shoal.tensors import Tensors

_CHUNK: Final = 1 << 10
"""Blocks in memory at once."""


def whole(
    table: Table, layout: Layout, offered: np.ndarray, rows_of: Callable[[np.ndarray], np.ndarray], tell: Tell
) -> tuple[Tensors, np.ndarray]:
    """Writes all blocks of a layout, durably; the state that has them, and the blocks.

    Args:
        offered: (num_blocks,) first slots of each block that are offered to the cache.
        rows_of: ids (n,) int64 -> encoded rows (n, words), asked in the order of the blocks.
    """
    meter = Meter(tell, f"{table.record.name}: writing", layout.num_blocks, "blocks")
    table.make_room(layout.num_blocks)
    with table.lock:
        blocks = table.space.take(layout.num_blocks).astype(np.int64)
    members = layout.ids_of().astype(np.int32)
    sums = table.sums.copy()
    try:
        for first in range(0, len(blocks), _CHUNK):
            part = slice(first, first + _CHUNK)
            sums[blocks[part]] = _write(table, blocks[part], members[part], rows_of)
            meter.advance(len(blocks[part]))
        table.file.sync()
        table.space.wrote(blocks)
    except BaseException:
        undo(table, blocks)
        raise
    return _state(table, layout, blocks, members, offered, sums), blocks


def _write(
    table: Table, blocks: np.ndarray, members: np.ndarray, rows_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    held = members >= 0
    rows = np.zeros((*members.shape, table.codec.words), np.uint32)
    rows[held] = rows_of(members[held].astype(np.int64))
    data = aligned(len(blocks) * table.record.block_bytes).reshape(len(blocks), table.record.block_bytes)
    data[:, : table.slots_per_block * table.codec.row_bytes] = rows.reshape(
        len(blocks), table.slots_per_block * table.codec.words
    ).view(np.uint8)
    table.file.write(blocks, data)
    return checksum.of_blocks(data.view(np.uint64), blocks)


def _state(
    table: Table, layout: Layout, blocks: np.ndarray, members: np.ndarray, offered: np.ndarray, sums: np.ndarray
) -> Tensors:
    size = table.slots_per_block
    slots = blocks[:, None] * size + np.arange(size)
    id_at = np.full(len(table.view.id_at), -1, np.int32)
    id_at[slots.reshape(-1)] = members.reshape(-1)
    kind = np.full(table.space.num_blocks, FREE, np.uint8)
    kind[blocks] = HOME
    all_offered = np.zeros(table.space.num_blocks, np.int16)
    all_offered[blocks] = offered
    at = layout.replica_slots
    return {
        "where": (blocks[layout.block_of] * size + layout.slot_of % size).astype(np.int32),
        "id_at": id_at,
        "sums": sums,
        "kind": kind,
        "wear": table.space.wear,
        "offered": all_offered,
        "replica_ids": layout.replica_ids.astype(np.int32),
        "replica_slots": (blocks[at // size] * size + at % size).astype(np.int32),
        "replica_valid": np.ones(len(at), np.uint8),
        "resident_ids": np.empty(0, np.int32),
        "resident_rows": np.empty((0, table.codec.words), np.uint32),
    }


def best_blocks(table: Table, layout: Layout, misses: Trace, most: int) -> np.ndarray:
    """The blocks of a new layout that save most reads for their write, at most `most`; only such as save any.

    Args:
        misses: what the cache missed, query by query: hits cost no read wherever they lie.
    """
    saved = saved_reads(
        table.view.where, table.slots_per_block, layout.block_of, misses.indptr, misses.ids, layout.num_blocks
    )
    order = np.argsort(-saved, kind="stable")[:most]
    made: np.ndarray = order[saved[order] > 0]
    return made


@compiled
def saved_reads(
    where: np.ndarray, slots_per_block: int, new_block: np.ndarray, indptr: np.ndarray, ids: np.ndarray, num_blocks: int
) -> np.ndarray:
    """(num_blocks,) int64: reads that each new block saves if it alone is written."""
    saved = np.zeros(num_blocks, np.int64)
    for query in range(len(indptr) - 1):
        mine = ids[indptr[query] : indptr[query + 1]]
        old, new = np.empty(len(mine), np.int64), np.empty(len(mine), np.int64)
        count = 0
        for id in mine:
            if where[id] >= 0:
                old[count], new[count] = where[id] // slots_per_block, new_block[id]
                count += 1
        order = order_of(old[:count])
        begin = 0
        while begin < count:  # an old block counts for a new one that takes all that the query wants of it
            end, same = begin, True
            while end < count and old[order[end]] == old[order[begin]]:
                same = same and new[order[end]] == new[order[begin]]
                end += 1
            if same:
                saved[new[order[begin]]] += 1
            begin = end
        touched = distinct(new[:count])
        for block in touched:
            saved[block] -= 1
    return saved


def some(table: Table, layout: Layout, chosen: np.ndarray, offered: np.ndarray) -> Step:
    """Writes some blocks of a new layout, durably, and the change that moves their rows there.

    Rows that rest in memory stay there; their slots wait for them.
    """
    members = layout.ids_of()[chosen].astype(np.int32)
    replicas = np.isin(chosen[:, None] * table.slots_per_block + np.arange(table.slots_per_block), layout.replica_slots)
    members[replicas] = -1
    never = (members >= 0) & (table.view.where[np.maximum(members, 0)] == ABSENT)
    members[never] = -1
    held = members >= 0
    ids = members[held].astype(np.int64)
    values = stored_rows(table, ids)
    rows = np.zeros((*members.shape, table.codec.words), np.uint32)
    rows[held] = values
    emptied = _emptied(table, ids)
    step = write_blocks(
        table, members, rows, np.full(len(members), HOME, np.uint8), offered=offered[chosen].astype(np.int16)
    )
    return Step(replace(step.change, freed=emptied), values, step.written_bytes)


def _emptied(table: Table, ids: np.ndarray) -> np.ndarray:
    """HOME blocks that hold nothing more, no replica either, once rows `ids` have another home."""
    size = table.slots_per_block
    left = table.home_of(ids)
    left = left[left >= 0]
    homes = np.unique(left // size)
    slots = homes[:, None] * size + np.arange(size)
    made: np.ndarray = homes[np.all((table.view.id_at[slots] < 0) | np.isin(slots, left), axis=1)]
    return made
