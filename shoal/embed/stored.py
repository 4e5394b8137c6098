"""Rows past the cache: what the writer reads, what `verify` checks, and what serves where a block is damaged.

A block whose checksum is wrong is never used: its rows come from a copy (in memory, in the cache, in a replica), or the error names
file, block and row.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from shoal.embed import checksum
from shoal.embed.cache import probe
from shoal.embed.kernel import ABSENT
from shoal.embed.progress import Meter, Tell
from shoal.embed.space import FREE
from shoal.errors import StoreError

if TYPE_CHECKING:
    from shoal.embed.table import Table


class RowLost(StoreError):
    """A block is damaged and a row in it has no copy. The block is in `Table.lost` from now on."""


def try_block(table: "Table", block: int) -> np.ndarray | None:
    """The rows in a block, (slots, words), or None where it is damaged."""
    try:
        data = table.file.read(np.array([block]))[0]
    except StoreError:
        return None
    words = data.view(np.uint64)
    if int(checksum.of_words(words, np.uint64(block))) != int(table.sums[block]):
        return None
    return _slots(table, data)


def damaged_blocks(table: "Table", tell: Tell) -> list[int]:
    """Reads every block in use; the numbers of those that are damaged. The caller is in `Table.reading`."""
    used = np.flatnonzero(table.space.kind != FREE)
    meter, bad = Meter(tell, f"{table.record.name}: checking", len(used), "blocks"), []
    for block in used.tolist():
        if try_block(table, block) is None:
            bad.append(block)
        meter.advance()
    return bad


def _slots(table: "Table", block: np.ndarray) -> np.ndarray:
    used = table.slots_per_block * table.codec.row_bytes
    rows: np.ndarray = block[:used].view(np.uint32)
    return rows.reshape(table.slots_per_block, table.codec.words)


def copy_of(table: "Table", id: int, but: int) -> Any:
    """A row's present value from anywhere but one block."""
    with table.lock:
        where = int(table.view.where[id])
        entry = probe(table.cache.state, id) if table.capacity else -1
        if where < ABSENT:
            return table.view.resident[-2 - where].copy()
        if entry >= 0:
            return table.view.cached[entry].copy()
        r = slice(*np.searchsorted(table.view.replica_ids, [id, id + 1]))
        slots = [where, *table.view.replica_slots[r][table.view.replica_valid[r] > 0].tolist()]
    for slot in slots:
        if slot >= 0 and slot // table.slots_per_block != but:
            rows = try_block(table, slot // table.slots_per_block)
            if rows is not None:
                with table.lock:
                    table.counters.rescued_rows += 1
                return rows[slot % table.slots_per_block].copy()
    return None


def stored_rows(table: "Table", ids: np.ndarray) -> np.ndarray:
    """The present values of rows (n, words), past the cache: for the writer, which alone may call it.

    Raises StoreError where a block is damaged and a row has no copy.
    """
    if table.mirror is not None:
        copied: np.ndarray = table.mirror[ids]
        return copied
    out = np.zeros((len(ids), table.codec.words), np.uint32)
    where = table.view.where[ids].astype(np.int64)
    resident = where < ABSENT
    out[resident] = table.view.resident[-2 - where[resident]]
    order = np.argsort(where, kind="stable")
    order = order[where[order] >= 0]
    blocks = where[order] // table.slots_per_block
    for start in range(0, len(order), 1 << 14):
        part = slice(start, start + (1 << 14))
        _read_rows(table, ids, order[part], blocks[part], where, out)
    return out


def _read_rows(
    table: "Table", ids: np.ndarray, order: np.ndarray, blocks: np.ndarray, where: np.ndarray, out: np.ndarray
) -> None:
    unique, index = np.unique(blocks, return_inverse=True)
    data = table.file.read(unique)
    sound = checksum.of_blocks(data.view(np.uint64), unique) == table.sums[unique]
    used = table.slots_per_block * table.codec.row_bytes
    rows = data[:, :used].view(np.uint32).reshape(len(unique), table.slots_per_block, table.codec.words)
    out[order] = rows[index, where[order] % table.slots_per_block]
    for i in order[~sound[index]].tolist():
        row = copy_of(table, int(ids[i]), int(where[i]) // table.slots_per_block)
        if row is None:
            table.lost.add(int(where[i]) // table.slots_per_block)
            raise RowLost(
                f"Block {int(where[i]) // table.slots_per_block} of {table.path} is damaged and row {int(ids[i])} of "
                f"table {table.record.name!r} has no copy. Write it again with update, or restore the file."
            )
        out[i] = row
