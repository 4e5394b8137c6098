"""The compiled half of a lookup: probe and copy, choose blocks, scatter what was read, admit it to the cache.

One lookup is `probe_rows` (under the table's lock), where rows are missing `plan_reads`, and `settle` tells the cache of the hits;
then for each round of a lane `reads.read_round` and `scatter` (without a lock), `admit_round` (under it). All run without the
GIL. The cache is told the same, in the same order, as in `simulate.replay`: so a replay foretells a store's reads.

Where a row is (`View.where`): a slot of the block file; ABSENT where it was never written; below that, -2 - r for row r of
the memory of hot rows.
A slot is block * slots a block + place. `id_at` names the row that a slot was written for; it is *live* if `where`
says so, or if it is a valid replica. All else in a block is stale and never looked at.
"""

from typing import Final, NamedTuple

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed._memory import copy, prefetch
from shoal.embed._sorted import distinct, first_at, order_of
from shoal.embed.cache import (
    CAPACITY,
    HAS_SKETCH,
    LISTS,
    POLICY,
    READ_AWARE,
    S3_FIFO,
    State,
    _home,
    admit,
    is_worth,
    probe,
    spare,
    touch,
    was_prefetched,
)  # fmt: skip
from shoal.embed.choose import MOST_COPIES, cover
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
    """Copies the rows that are in memory: `ids` (n,) int64 -> `out` (n, W); `entries` (n,) int32: their entries in the cache.

    Returns:
        How many are missing, their places in `missed`, and how many were in the memory of hot rows. The first is
        -1 - place of an id out of range, and nothing has changed.
    """
    rows = len(view.where)
    for i in range(len(ids)):
        if not 0 <= ids[i] < rows:
            return -1 - i, 0
    # Pass by pass over a chunk: its probes wait for memory together, then its copies.
    for begin in range(0, len(ids), CHUNK):
        end = min(begin + CHUNK, len(ids))
        _probe_all(state, ids[begin:end], entries[begin:end])
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
def settle(
    state: State, view: View, ids: np.ndarray, entries: np.ndarray, slots_per_block: int, blocks: np.ndarray
) -> int:
    """Tells the cache of the hits; to a read-aware one a hit counts for nothing where its block is read anyway.

    Args:
        entries: (n,) int32 as `probe_rows` left them: -1 where the cache had nothing.
        blocks: (blocks,) int64 rising: what the lookup reads.

    Returns:
        How many hits are the first of a prefetched row.
    """
    used = 0
    for i in range(len(entries)):
        if entries[i] >= 0:
            used += was_prefetched(state, entries[i])
    if not state.head[READ_AWARE] or not len(blocks):
        touch_all(state, entries)
        return used
    for i in range(len(entries)):
        if entries[i] >= 0:
            if _lies_in(view, ids[i], slots_per_block, blocks):
                spare(state, entries[i])
            else:
                touch(state, entries[i])
    return used


@compiled
def _lies_in(view: View, id: int, slots_per_block: int, blocks: np.ndarray) -> bool:
    """Whether the row, or a copy of it that is valid, is in one of the blocks, rising."""
    if _is_among(blocks, view.where[id] // slots_per_block):
        return True
    if len(view.replica_ids) == 0:
        return False
    r = first_at(view.replica_ids, id)
    while r < len(view.replica_ids) and view.replica_ids[r] == id:
        if view.replica_valid[r] and _is_among(blocks, view.replica_slots[r] // slots_per_block):
            return True
        r += 1
    return False


@compiled
def _is_among(rising: np.ndarray, number: int) -> bool:
    at = first_at(rising, number)
    return bool(at < len(rising) and rising[at] == number)


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
    order = order_of(slots)  # of a row that is asked for twice the first place comes first
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
    """Chooses the copy of each row that is read: `slots` (M,) are those of the homes, and become those."""
    starts = np.zeros(len(missed) + 1, np.int64)
    options = np.empty(len(missed) * MOST_COPIES, np.int64)
    end = 0
    for m in range(len(missed)):
        id = ids[missed[m]]
        options[end] = slots[m]
        end += 1
        r = first_at(view.replica_ids, id)
        while r < len(view.replica_ids) and view.replica_ids[r] == id and end - starts[m] < MOST_COPIES:
            if view.replica_valid[r]:
                options[end] = view.replica_slots[r]
                end += 1
            r += 1
        starts[m + 1] = end
    chosen = np.empty(len(missed), np.int64)
    cover(starts, options[:end] // slots_per_block, chosen)
    for m in range(len(missed)):
        slots[m] = options[chosen[m]]


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
    prefetches: bool,
) -> int:
    """Lets the cache take what came with the rows that were asked for, then those; how many of the former it took.

    Args:
        prefetches: whether `View.offered` counts.
    """
    words = view.cached.shape[1]
    for b in range(begin, end):
        view.read_count[plan.blocks[b]] += 1
    if not capacity:
        return 0
    taken = 0
    rows = slice(plan.starts[begin], plan.starts[end])
    order = order_of(plan.places[rows]) + plan.starts[begin]  # as they were asked for
    block_of, offers = np.empty(len(order), np.int64), False
    for b in range(begin, end):
        offers = offers or view.offered[plan.blocks[b]] > 0
        block_of[plan.starts[b] - plan.starts[begin] : plan.starts[b + 1] - plan.starts[begin]] = b
    prefetches = prefetches and offers
    asked = distinct(ids) if prefetches else ids
    for m in order:
        b = block_of[m - plan.starts[begin]]
        if not prefetches or m != _first(plan, b) or queue.status[b - begin] != OK:
            continue
        for place in range(view.offered[plan.blocks[b]]):
            slot = plan.blocks[b] * slots_per_block + place
            id = view.id_at[slot]
            if id < 0 or _is_among(asked, id) or not is_live(view, id, slot) or probe(state, id) >= 0:
                continue
            taken += _take(state, view, queue, b - begin, place * words, id, True)
    for m in order:
        b = block_of[m - plan.starts[begin]]
        id, slot = ids[plan.places[m]], plan.slots[m]
        if _is_again(plan, b, m) or queue.status[b - begin] != OK or not is_live(view, id, slot):
            continue
        if probe(state, id) < 0 and is_worth(state, _num_rows(plan, b)):
            _take(state, view, queue, b - begin, slot % slots_per_block * words, id, False)
    return taken


@compiled
def _is_again(plan: Plan, b: int, m: int) -> bool:
    """Whether the row was asked for earlier in the same lookup."""
    return bool(m > plan.starts[b] and plan.slots[m] == plan.slots[m - 1])


@compiled
def _num_rows(plan: Plan, b: int) -> int:
    """The rows that a block gives, each once."""
    number = 0
    for m in range(plan.starts[b], plan.starts[b + 1]):
        number += not _is_again(plan, b, m)
    return number


@compiled
def _first(plan: Plan, b: int) -> int:
    """Of the rows that a block gives, the one that was asked for first."""
    first = int(plan.starts[b])
    for m in range(plan.starts[b], plan.starts[b + 1]):
        if plan.places[m] < plan.places[first]:
            first = m
    return first


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
    r = first_at(view.replica_ids, id)
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
def carry_over(old: State, old_rows: np.ndarray, new: State, new_rows: np.ndarray) -> None:
    """Puts what one cache holds into another, empty one, as far as it has room."""
    for entry in range(old.head[CAPACITY]):
        if old.id_of[entry] < 0 or new.head[LISTS + 2] == 0:
            continue
        at = admit(new, old.id_of[entry], False)
        if at >= 0:
            for k in range(old_rows.shape[1]):
                new_rows[at, k] = old_rows[entry, k]


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
