"""How a journalled change becomes a table's state. The caller is the writer; the table's lock is taken here.

Invariants after each change:
    (1) Each row is in one place (`View.where`), and each HOME block's list of rows (`id_at`) names those that belong there.
    (2) A replica is valid only if it has its row's present value.
    (3) What the cache holds of a changed row is its new value, or is gone.
"""

import numpy as np

from shoal.embed import kernel
from shoal.embed.cache import drop
from shoal.embed.changes import Change
from shoal.embed.kernel import ABSENT
from shoal.embed.space import DELTA, HOME
from shoal.embed.table import Table


def apply(table: Table, change: Change, values: np.ndarray | None = None) -> None:
    """Makes a journalled change the table's state.

    Args:
        values: (rows in `members`, words) the values of the blocks' members, in order, for copies in the cache; not
            needed where nothing is cached.
    """
    assert values is None or len(values) == int((change.members >= 0).sum()), "a value for each member"
    with table.lock:
        table.changes += 1
        if len(change.blocks):
            table.grow_to(int(change.blocks.max()) + 1)
        if len(change.blocks):
            _apply_blocks(table, change, values)  # first: it makes room in memory for the rows
        _apply_rows(table, change.row_ids, change.rows)
        _forget_members(table, change.freed)
        table.space.retire(change.freed)


def _apply_rows(table: Table, ids: np.ndarray, rows: np.ndarray) -> None:
    if not len(ids):
        return
    if table.mirror is not None:
        table.mirror[ids] = rows
        table.changed[ids] = True
        return
    where = table.view.where[ids]
    new = where >= ABSENT
    while len(table.free_resident) < int(new.sum()):
        _more_resident(table)
    taken = [table.free_resident.pop() for _ in range(int(new.sum()))]
    table.resident_id[taken], table.resident_home[taken] = ids[new], where[new]
    table.view.where[ids[new]] = -2 - np.array(taken, np.int32)
    places = -2 - table.view.where[ids]
    table.view.resident[places] = rows
    table.resident_stamp[places] = table.changes
    _invalidate_replicas(table, ids)
    for id in ids[new].tolist():
        drop(table.cache.state, id)


def _more_resident(table: Table) -> None:
    """Only a replay of a store with other settings comes here."""
    old = len(table.resident_id)
    more = max(old, 64)
    table.view = table.view._replace(
        resident=np.concatenate([table.view.resident, np.zeros((more, table.codec.words), np.uint32)])
    )
    table.resident_id = np.append(table.resident_id, np.full(more, -1, np.int32))
    table.resident_home = np.append(table.resident_home, np.full(more, -1, np.int32))
    table.resident_stamp = np.append(table.resident_stamp, np.zeros(more, np.int64))
    table.free_resident = [*range(old + more - 1, old - 1, -1), *table.free_resident]


def _apply_blocks(table: Table, change: Change, values: np.ndarray | None) -> None:
    slots = change.blocks[:, None] * table.slots_per_block + np.arange(table.slots_per_block)
    replaced = change.replaces >= 0
    _invalidate_replicas(table, change.fresh)
    left = _move_replicas(table, change.replaces[replaced], change.blocks[replaced])
    _leave_home(table, change.members[(change.kinds == HOME) & ~replaced])
    table.view.id_at[slots.reshape(-1)] = change.members.reshape(-1)
    held = change.members >= 0
    held[replaced] &= _is_home(table, change.replaces[replaced], left)
    stays = np.zeros(held.shape, bool)
    at_home = change.kinds == HOME
    stays[at_home] = table.view.where[np.maximum(change.members[at_home], 0)] < ABSENT
    stays &= held
    table.resident_home[-2 - table.view.where[change.members[stays]]] = slots[stays]
    ids = change.members[held & ~stays]
    _release(table, ids)
    table.view.where[ids] = slots[held & ~stays]
    table.sums[change.blocks] = change.sums
    table.view.offered[change.blocks] = change.offered
    table.space.use(change.blocks, change.kinds)
    table.damaged.difference_update(change.blocks.tolist())
    table.lost.difference_update(change.blocks.tolist())
    is_delta = change.kinds == DELTA
    _invalidate_replicas(table, change.members[is_delta][change.members[is_delta] >= 0])
    if values is not None and table.capacity:
        ids = change.members[change.members >= 0].astype(np.int64)
        kernel.refresh_cached(table.cache.state, table.view, ids, values)


def _leave_home(table: Table, members: np.ndarray) -> None:
    """Rows that get another HOME block are taken off the list of their present one."""
    slots = table.home_of(members[members >= 0])
    table.view.id_at[slots[slots >= 0]] = -1


def _is_home(table: Table, old: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Which slots of replaced HOME blocks hold a row that is at home there, and not a replica: (b, K)."""
    return ~np.isin(old[:, None] * table.slots_per_block + np.arange(table.slots_per_block), left)


def _move_replicas(table: Table, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Replicas in rewritten blocks go along, with fresh values; the slots that they leave."""
    if not len(table.view.replica_ids) or not len(old):
        return np.empty(0, np.int64)
    block_of = dict(zip(old.tolist(), new.tolist(), strict=True))
    blocks = table.view.replica_slots // table.slots_per_block
    moved = np.flatnonzero(np.isin(blocks, old))
    left: np.ndarray = table.view.replica_slots[moved].astype(np.int64)
    to = np.array([block_of[b] for b in blocks[moved].tolist()], np.int64)
    table.view.replica_slots[moved] = to * table.slots_per_block + left % table.slots_per_block
    table.view.replica_valid[moved] = 1
    return left


def _invalidate_replicas(table: Table, ids: np.ndarray) -> None:
    if len(table.view.replica_ids) and len(ids):
        table.view.replica_valid[np.isin(table.view.replica_ids, ids)] = 0


def _release(table: Table, ids: np.ndarray) -> None:
    """Rows that leave the memory of hot rows."""
    where = table.view.where[ids]
    places = (-2 - where[where < ABSENT]).tolist()
    table.resident_id[places] = -1
    table.free_resident.extend(places)


def _forget_members(table: Table, blocks: np.ndarray) -> None:
    if len(blocks):
        slots = blocks[:, None] * table.slots_per_block + np.arange(table.slots_per_block)
        table.view.id_at[slots.reshape(-1)] = -1
        table.resident_home[np.isin(table.resident_home // table.slots_per_block, blocks)] = -1
        gone = np.isin(table.view.replica_slots // table.slots_per_block, blocks)
        table.view.replica_slots[gone], table.view.replica_valid[gone] = -1, 0  # the block will hold other rows


def restore_resident(table: Table) -> None:
    """Puts the rows that rested in memory when the state was written where they were."""
    ids, rows = table.pending
    if len(ids):
        apply(table, Change(table=table.record.name, row_ids=ids, rows=rows))
    table.pending = (ids[:0], rows[:0])
