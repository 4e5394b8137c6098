"""The compiled half of a lookup: probe and copy, choose blocks, scatter what was read, admit it to the cache.

One lookup is `probe_rows` (under the table's lock), and where rows are missing `plan_reads`, then for each round of a
lane `reads.read_round` and `scatter` (without a lock), `admit_round` (under it). All run without the GIL.

Where a row is (`View.where`): a slot of the block file; ABSENT where it was never written; below that, -2 - r for row r of
the memory of hot rows.
A slot is block * slots a block + place. `id_at` names the row that a slot was written for; it is *live* if `where`
says so, or if it is a valid replica. All else in a block is stale and never looked at.
"""

from typing import Final, NamedTuple

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed._memory import copy, prefetch
from shoal.embed.cache import CAPACITY, HAS_SKETCH, POLICY, S3_FIFO, State, _home, admit, probe, touch
from shoal.embed.reads import OK, Queue

ABSENT: Final = -1
AHEAD: Final = 12
"""Rows between asking for a line and copying it."""
LINE: Final = 64
CHUNK: Final = 256
"""Rows of one pass: what their lines take fits a core's cache."""


class View(NamedTuple):
    """A table's arrays, as compiled functions take them. W = words a row, S = slots."""

    where: np.ndarray
    """(rows,) int32."""
    id_at: np.ndarray
    """(S,) int32; -1 where a slot is empty."""
    cached: np.ndarray
    """(capacity, W) uint32: the vectors of the cache's entries."""
    resident: np.ndarray
    """(hot rows, W) uint32: rows whose newest value is in memory and in the journal."""
    offered: np.ndarray
    """(blocks,) int16: how many of a block's first slots are offered to the cache when it is read."""
    read_count: np.ndarray
    """(blocks,) uint32: reads of each block, halved now and then."""
    replica_ids: np.ndarray
    """(replicas,) int32, sorted."""
    replica_slots: np.ndarray
    """(replicas,) int32."""
    replica_valid: np.ndarray
    """(replicas,) uint8: 0 where the row has changed since."""


@compiled
def probe_rows(
    state: State, view: View, ids: np.ndarray, out: np.ndarray, entries: np.ndarray, missed: np.ndarray
) -> tuple[int, int]:
    """Copies the rows that are in memory: `ids` (n,) int64 -> `out` (n, W); `entries` (n,) int32 is scratch.

    Returns:
        How many are missing, their places in `missed`, and how many were in the memory of hot rows. The first is
        -1 - place of an id out of range, and nothing has changed.
    """
    rows = len(view.where)
    for i in range(len(ids)):
        if not 0 <= ids[i] < rows:
            return -1 - i, 0
    # Pass by pass over a chunk: its probes wait for memory together, then its touches, then its copies.
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        _probe_all(state, ids[begin:end], entries[begin:end])
        touch_all(state, entries[begin:end])
        _copy_all(view.cached, entries[begin:end], out[begin:end])
    count, resident, words = 0, 0, out.shape[1]
    for i in range(len(ids)):
        if entries[i] >= 0:
            continue
        slot = view.where[ids[i]]
        if slot == ABSENT:
            out[i] = 0
        elif slot < 0:
            resident += 1
            for k in range(words):
                out[i, k] = view.resident[-2 - slot, k]
        else:
            missed[count] = i
            count += 1
    return count, resident


@compiled
def _probe_all(state: State, ids: np.ndarray, entries: np.ndarray) -> None:
    """`cache.probe` for each id; the lines that it will want are asked for one pass before."""
    buckets, id_of, capacity = state.buckets, state.id_of, state.head[CAPACITY]
    index, names, marks = buckets.ctypes.data, id_of.ctypes.data, state.mark.ctypes.data
    for i in range(len(ids)):
        at = _home(state, ids[i])
        entries[i] = at
        prefetch(index + 4 * at)
    for i in range(len(ids)):
        entry = int(buckets[entries[i]])
        entries[i] = entry
        prefetch(names + 4 * max(entry, 0))
        prefetch(marks + max(entry, 0))
    for i in range(len(ids)):
        entry = int(entries[i])
        if entry >= 0 and id_of[entry] != ids[i]:
            entry = probe(state, ids[i])
        entries[i] = entry if entry < capacity else -1


@compiled
def touch_all(state: State, entries: np.ndarray) -> None:
    """`cache.touch` for each entry that is not below zero.

    Where the policy only counts it is written out here: a call for each hit costs more than the hit.
    """
    head, mark = state.head, state.mark
    if head[POLICY] == S3_FIFO and not head[HAS_SKETCH]:
        for i in range(len(entries)):
            if entries[i] >= 0:
                marked = int(mark[entries[i]]) & 0xFB
                mark[entries[i]] = marked + 8 if marked < 0xF8 else marked
    else:
        for i in range(len(entries)):
            if entries[i] >= 0:
                touch(state, entries[i])


@compiled
def _copy_all(rows: np.ndarray, entries: np.ndarray, out: np.ndarray) -> None:
    """`out[i] = rows[entries[i]]` where the entry is not below zero; lines are asked for some rows ahead."""
    size, count = out.shape[1] * out.itemsize, len(out)
    to, source = out.ctypes.data, rows.ctypes.data
    for i in range(count):
        ahead = max(0, int(entries[min(i + AHEAD, count - 1)]))
        for offset in range(0, size, LINE):
            prefetch(source + ahead * size + offset)
        entry = int(entries[i])
        if entry >= 0:
            copy(to + i * size, source + entry * size, size)


class Plan(NamedTuple):
    """Which blocks to read for the missing rows, in rising order, and what to take from each. M = missing rows."""

    blocks: np.ndarray
    """(blocks,) int64."""
    starts: np.ndarray
    """(blocks + 1,) int64: block b gives rows starts[b]..starts[b + 1] - 1 of the next two."""
    places: np.ndarray
    """(M,) int64: where in the request."""
    slots: np.ndarray
    """(M,) int64: where in the file."""


@compiled
def plan_reads(view: View, slots_per_block: int, ids: np.ndarray, missed: np.ndarray) -> Plan:
    """The blocks that hold the rows at `missed` (M,); with replicas, few of them."""
    slots = np.empty(len(missed), np.int64)
    for m in range(len(missed)):
        slots[m] = view.where[ids[missed[m]]]
    if len(view.replica_ids):
        _cover(view, slots_per_block, ids, missed, slots)
    order = np.argsort(slots)
    slots, places = slots[order], missed[order]
    blocks, starts, count = np.empty(len(slots), np.int64), np.empty(len(slots) + 1, np.int64), 0
    for m in range(len(slots)):
        block = slots[m] // slots_per_block
        if count == 0 or blocks[count - 1] != block:
            blocks[count] = block
            starts[count] = m
            count += 1
    starts[count] = len(slots)
    return Plan(blocks[:count], starts[: count + 1], places, slots)


@compiled
def _cover(view: View, slots_per_block: int, ids: np.ndarray, missed: np.ndarray, slots: np.ndarray) -> None:
    """Greedy: rows with fewest copies first, each from a block already chosen, else from the one that most rows want.

    References: Fan et al., 2024, MaxEmbed, ASPLOS (online page choice).
    """
    num = len(missed)
    first, last = np.empty(num, np.int64), np.empty(num, np.int64)
    options = 0
    for m in range(num):
        id = ids[missed[m]]
        first[m] = np.searchsorted(view.replica_ids, id)
        last[m] = first[m]
        while last[m] < len(view.replica_ids) and view.replica_ids[last[m]] == id:
            last[m] += 1
        options += 1 + last[m] - first[m]
    size = 16
    while size < 3 * options:
        size *= 2
    keys, wanted, chosen = np.full(size, -1, np.int64), np.zeros(size, np.int64), np.zeros(size, np.uint8)
    for m in range(num):
        wanted[_bucket(keys, slots[m] // slots_per_block)] += 1
        for r in range(first[m], last[m]):
            if view.replica_valid[r]:
                wanted[_bucket(keys, view.replica_slots[r] // slots_per_block)] += 1
    for m in np.argsort(last - first, kind="mergesort"):
        best, best_slot = _bucket(keys, slots[m] // slots_per_block), slots[m]
        for r in range(first[m], last[m]):
            if not view.replica_valid[r]:
                continue
            other = _bucket(keys, view.replica_slots[r] // slots_per_block)
            if (chosen[other], wanted[other]) > (chosen[best], wanted[best]):
                best, best_slot = other, np.int64(view.replica_slots[r])
        wanted[_bucket(keys, slots[m] // slots_per_block)] -= 1
        for r in range(first[m], last[m]):
            if view.replica_valid[r]:
                wanted[_bucket(keys, view.replica_slots[r] // slots_per_block)] -= 1
        chosen[best] = 1
        slots[m] = best_slot


@compiled
def _bucket(keys: np.ndarray, key: int) -> int:
    """Where a key is in an open hash table of a power of two, entered if it is new."""
    at = (key * 2654435761) & (len(keys) - 1)
    while keys[at] != key and keys[at] != -1:
        at = (at + 1) & (len(keys) - 1)
    keys[at] = key
    return at


@compiled
def scatter(queue: Queue, plan: Plan, begin: int, end: int, slots_per_block: int, out: np.ndarray) -> None:
    """Copies the rows of the plan's blocks begin..end - 1, which lie in the lane's places 0.., to the request."""
    words = out.shape[1]
    for b in range(begin, end):
        if queue.status[b - begin] != OK:
            continue
        for m in range(plan.starts[b], plan.starts[b + 1]):
            at = plan.slots[m] % slots_per_block * words
            for k in range(words):
                out[plan.places[m], k] = queue.buffer[b - begin, at + k]


@compiled
def admit_round(
    state: State,
    view: View,
    queue: Queue,
    plan: Plan,
    begin: int,
    end: int,
    slots_per_block: int,
    ids: np.ndarray,
    capacity: int,
) -> int:
    """Lets the cache take what came with the rows that were asked for, then those; how many of the former it took.

    In the order of `simulate.replay`, so that a replay foretells a store's reads.
    """
    words = view.cached.shape[1]
    for b in range(begin, end):
        view.read_count[plan.blocks[b]] += 1
    if not capacity:
        return 0
    taken = 0
    rows = slice(plan.starts[begin], plan.starts[end])
    order = np.argsort(plan.places[rows]) + plan.starts[begin]  # as they were asked for
    block_of = np.repeat(np.arange(begin, end), np.diff(plan.starts[begin : end + 1]))
    for m in order:
        b = block_of[m - plan.starts[begin]]
        if m != _first(plan, b) or queue.status[b - begin] != OK:
            continue
        for place in range(view.offered[plan.blocks[b]]):
            slot = plan.blocks[b] * slots_per_block + place
            id = view.id_at[slot]
            if id < 0 or _is_wanted(plan, b, slot) or not is_live(view, id, slot) or probe(state, id) >= 0:
                continue
            taken += _take(state, view, queue, b - begin, place * words, id, True)
    for m in order:
        b = block_of[m - plan.starts[begin]]
        id, slot = ids[plan.places[m]], plan.slots[m]
        if queue.status[b - begin] == OK and is_live(view, id, slot) and probe(state, id) < 0:
            _take(state, view, queue, b - begin, slot % slots_per_block * words, id, False)
    return taken


@compiled
def _first(plan: Plan, b: int) -> int:
    """Of the rows that a block gives, the one that was asked for first."""
    first = int(plan.starts[b])
    for m in range(plan.starts[b], plan.starts[b + 1]):
        if plan.places[m] < plan.places[first]:
            first = m
    return first


@compiled
def _is_wanted(plan: Plan, b: int, slot: int) -> bool:
    return bool(np.any(plan.slots[plan.starts[b] : plan.starts[b + 1]] == slot))


@compiled
def _take(state: State, view: View, queue: Queue, place: int, at: int, id: int, prefetched: bool) -> int:
    entry = admit(state, id, prefetched)
    if entry < 0:
        return 0
    for k in range(view.cached.shape[1]):
        view.cached[entry, k] = queue.buffer[place, at + k]
    return 1


@compiled
def is_live(view: View, id: int, slot: int) -> bool:
    """Whether the slot holds the row's present value."""
    if view.where[id] == slot:
        return True
    if len(view.replica_ids) == 0 or view.where[id] < 0:
        return False
    r = np.searchsorted(view.replica_ids, id)
    while r < len(view.replica_ids) and view.replica_ids[r] == id:
        if view.replica_slots[r] == slot:
            return bool(view.replica_valid[r])
        r += 1
    return False


@compiled
def refresh_cached(state: State, view: View, ids: np.ndarray, rows: np.ndarray) -> None:
    """Gives the cache's copies of `ids` (n,) their new values `rows` (n, W)."""
    for i in range(len(ids)):
        entry = probe(state, ids[i])
        if entry >= 0:
            for k in range(rows.shape[1]):
                view.cached[entry, k] = rows[i, k]


@compiled
def gather(rows: np.ndarray, ids: np.ndarray, out: np.ndarray) -> int:
    """`out[i] = rows[ids[i]]`; -1, or the place of the first id out of range, and then nothing has changed."""
    for i in range(len(ids)):
        if not 0 <= ids[i] < len(rows):
            return i
    _copy_all(rows, ids, out)
    return -1


@compiled
def live_rows(view: View, slots_per_block: int, blocks: np.ndarray) -> np.ndarray:
    """(n,) int64: rows of each block whose present value it holds, replicas left out."""
    made = np.zeros(len(blocks), np.int64)
    for i in range(len(blocks)):
        for slot in range(blocks[i] * slots_per_block, (blocks[i] + 1) * slots_per_block):
            if view.id_at[slot] >= 0 and view.where[view.id_at[slot]] == slot:
                made[i] += 1
    return made
