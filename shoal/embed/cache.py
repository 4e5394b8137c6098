"""A cache of vectors in memory: which ids it holds, and in which entry. The vectors themselves are the caller's.

A `Cache` is flat NumPy arrays, handed as one named tuple to compiled functions: `probe`, `touch`, `admit`, `drop`.
Entries number 0 to capacity - 1; the caller keeps the vector of entry e at row e of a (capacity, dim) array. The
policy is an integer in the state, so a kernel over any cache is compiled once. No lock: one thread at a time.

Policies:
    lru: as in the paper. Eisenman et al., 2019, Bandana, arXiv 1811.05922.
    s3-fifo: a small FIFO of a tenth, a main FIFO with 2-bit counters, ghosts of what left the small one. Yang et al.,
        2023, FIFO queues are all you need for cache eviction, SOSP.
    w-tinylfu: a window LRU of 1 %, a segmented LRU behind a duel of sketched frequencies. Einziger, Friedman and
        Manes, 2017, TinyLFU, arXiv 1512.00727. The sketch has 8 bytes an
        entry, 4 hashes, raises only its least counters, and is halved after 10 counts an entry. As in libCacheSim a
        vector is counted once more when it leaves the window, and the window takes what the main part has not.

What comes with a block that was read for another vector is *prefetched*. Which of it is offered is the caller's matter; where the state says *duel*, an offered vector enters only if its sketched frequency beats that of
the vector that would be evicted for it.

Where the state says *read-aware*, the cache is told what a vector costs when it is missing, which is a read only if no
other vector of its block is missing too: a hit whose block is read anyway is not counted (`spare` instead of `touch`), and
of g vectors that one read brought, each is taken in with probability 1/g (`is_worth`). Ours; no paper has it.

Memory: `Cache.bytes_per_entry` counts all of it: index, links, counters, ghosts, sketch.

Invariants:
    (1) Each id is in at most one entry; the index finds exactly the ids of entries and ghosts.
    (2) Each entry is in one list: free, first, second or third; their lengths add up to the capacity.
    (3) Entries of ghosts number capacity and more, lie in a ring, and are never returned.
"""

from typing import Final, NamedTuple, final

import numpy as np

from shoal import validate
from shoal.embed._compiled import compiled

POLICIES: Final = {"lru": 0, "s3-fifo": 1, "w-tinylfu": 2}
"""Name -> code in the state."""
LRU, S3_FIFO, W_TINYLFU = 0, 1, 2

# Places in `State.head`.
POLICY, CAPACITY, GHOSTS, GHOST_AT, FIRST_ROOM, SECOND_ROOM, THIRD_ROOM, HAS_SKETCH, COUNTED, COUNT_LIMIT, DUEL = range(
    11
)
HAS_EVICTED, GHOSTS_HELD, GHOST_OLDEST, READ_AWARE, DRAWN = 11, 12, 13, 14, 15
LISTS: Final = 16
"""Then, for each list: newest entry, oldest entry, length."""
FREE, FIRST, SECOND, THIRD = 0, 1, 2, 3
HEAD_SIZE: Final = LISTS + 3 * 4

BUCKETS_PER_ID: Final = 1.6
SKETCH_PER_ENTRY: Final = 8
SKETCH_HASHES: Final = 4
MOST_FREQUENT: Final = 127
S3_SMALL, S3_GHOST, S3_MOVE = 0.10, 0.90, 2
WINDOW, PROBATION = 0.01, 0.2
SAMPLE: Final = 10
GHOST_RING: Final = 2
"""Places in the ring for each ghost: what is taken out leaves holes."""


class State(NamedTuple):
    """The arrays of a cache, as compiled functions take them."""

    head: np.ndarray
    """(HEAD_SIZE,) int64: policy, sizes, counters, lists."""
    buckets: np.ndarray
    """(buckets,) int32: entry by hash of its id, linear probing; -1 where empty."""
    id_of: np.ndarray
    """(capacity + ring of ghosts,) int32: id of each entry and ghost; -1 where empty."""
    older: np.ndarray
    """(capacity,) int32: the next older entry of the same list, -1 at the end."""
    newer: np.ndarray
    """(capacity,) int32: the next newer."""
    mark: np.ndarray
    """(capacity,) uint8: the entry's list (2 bits), was prefetched and not used since (1), frequency (the rest)."""
    sketch: np.ndarray
    """(sketch counters,) int8: count-min sketch of access counts; (1,) without one."""


@final
class Cache:
    """An empty cache of `capacity` vectors of a table of `num_rows`."""

    def __init__(
        self, policy: str, capacity: int, num_rows: int, *, duel: bool = False, read_aware: bool = False
    ) -> None:
        """Args:
        policy: lru | s3-fifo | w-tinylfu.
        capacity: vectors, at least 1.
        num_rows: ids are 0 to num_rows - 1; below 2**31.
        duel: prefetched vectors must beat the victim's frequency. Adds a sketch where the policy has none.
        read_aware: count what a miss costs in reads, not misses.
        """
        validate.one_of(POLICIES, policy=policy)
        validate.whole(1, capacity=capacity, num_rows=num_rows)
        validate.between(1, 2**31 - 1, capacity=capacity, num_rows=num_rows)
        validate.flags(duel=duel, read_aware=read_aware)
        self.policy, self.capacity, self.num_rows, self.duel = policy, capacity, num_rows, duel
        self.read_aware = read_aware
        self.state = _new_state(POLICIES[policy], capacity, duel)
        self.state.head[READ_AWARE] = read_aware

    def __len__(self) -> int:
        return self.capacity - int(self.state.head[LISTS + 2])

    @property
    def ids(self) -> np.ndarray:
        """(held,) int32: the ids that it holds, in no order."""
        return self.state.id_of[: self.capacity][self.state.id_of[: self.capacity] >= 0]

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays: what the cache costs beside the vectors."""
        return sum(array.nbytes for array in self.state)

    @staticmethod
    def bytes_per_entry(policy: str, *, duel: bool = False) -> float:
        """Bytes of index, links, counters, ghosts and sketch for one vector held."""
        validate.one_of(POLICIES, policy=policy)
        ghosts = S3_GHOST if policy == "s3-fifo" else 0.0
        sketch = SKETCH_PER_ENTRY if duel or policy == "w-tinylfu" else 0
        return 4 * BUCKETS_PER_ID * (1 + ghosts) + 4 * (1 + GHOST_RING * ghosts) + 4 + 4 + 1 + sketch

    @classmethod
    def capacity_of(cls, budget_bytes: float, vector_bytes: int, policy: str, *, duel: bool = False) -> int:
        """The vectors that fit a budget with all that goes with them; at least 1."""
        return max(1, int(budget_bytes / (vector_bytes + cls.bytes_per_entry(policy, duel=duel))))


def _new_state(policy: int, capacity: int, duel: bool) -> State:
    num_ghosts = int(S3_GHOST * capacity) if policy == S3_FIFO else 0
    has_sketch = duel or policy == W_TINYLFU
    head = np.zeros(HEAD_SIZE, np.int64)
    head[[POLICY, CAPACITY, GHOSTS, DUEL, HAS_SKETCH]] = policy, capacity, num_ghosts, duel, has_sketch
    head[FIRST_ROOM] = max(1, int((S3_SMALL if policy == S3_FIFO else WINDOW) * capacity))
    head[SECOND_ROOM] = capacity - head[FIRST_ROOM]
    if policy == W_TINYLFU:
        head[THIRD_ROOM] = int((1 - PROBATION) * head[SECOND_ROOM])
    head[COUNT_LIMIT] = SAMPLE * max(1, head[SECOND_ROOM])
    head[LISTS:] = np.tile([-1, -1, 0], 4)
    head[LISTS : LISTS + 3] = capacity - 1, 0, capacity
    return State(
        head=head,
        buckets=np.full(int(np.ceil(BUCKETS_PER_ID * (capacity + num_ghosts))) + 1, -1, np.int32),
        id_of=np.full(capacity + GHOST_RING * num_ghosts, -1, np.int32),
        older=np.arange(-1, capacity - 1, dtype=np.int32),
        newer=np.append(np.arange(1, capacity, dtype=np.int32), np.int32(-1)).astype(np.int32),
        mark=np.zeros(capacity, np.uint8),
        sketch=np.zeros(max(SKETCH_HASHES, SKETCH_PER_ENTRY * capacity) if has_sketch else 1, np.int8),
    )


def prefetch_pays(prefetched: int, used: int, *, least: float = 0.05, fewest: int = 1000) -> bool:
    """The break-even test that keeps prefetch on: whether enough of what entered unasked was asked for before it left.

    A prefetched vector that is never asked for pushes out one that may have been. Below a share of `least` prefetch is
    switched off; before `fewest` vectors entered nothing can be said. `miniature.py` compares whole settings beforehand; this is
    for when a trace no longer tells.
    """
    return prefetched < fewest or used >= least * prefetched


# The functions below are compiled. `state` is a State, ids and entries are integers.


@compiled
def probe(state: State, id: int) -> int:
    """The entry that holds the id, or -1. Changes nothing."""
    entry = _find(state, id)
    return entry if entry < state.head[CAPACITY] else -1


@compiled
def touch(state: State, entry: int) -> None:
    """Tells the policy that the entry was asked for."""
    head, mark = state.head, state.mark
    mark[entry] &= ~4
    if head[HAS_SKETCH]:
        _count(state, state.id_of[entry])
    if head[POLICY] == S3_FIFO:
        if mark[entry] < 0xF8:
            mark[entry] += 8
    elif head[POLICY] == LRU or int(np.int64(mark[entry])) & 3 != SECOND:
        of = int(np.int64(mark[entry])) & 3
        if head[LISTS + 3 * of] != entry:
            _move(state, entry, of)
    else:
        _promote(state, entry)


@compiled
def spare(state: State, entry: int) -> None:
    """Tells a read-aware policy that the entry was asked for, though its block was read anyway: it saved nothing."""
    if state.head[READ_AWARE]:
        state.mark[entry] &= ~4
    else:
        touch(state, entry)


@compiled
def is_worth(state: State, group: int) -> bool:
    """Whether to admit one of `group` vectors that were missing and came with one read; a draw, from the state's own."""
    head = state.head
    if not head[READ_AWARE] or group <= 1 or head[LISTS + 2] > 0:
        return True
    head[DRAWN] = (head[DRAWN] * 1103515245 + 12345) & 0x7FFFFFFF
    return bool((head[DRAWN] >> 8) * group < 1 << 23)


@compiled
def admit(state: State, id: int, prefetched: bool) -> int:
    """Gives an id that is not held an entry, evicting when full; -1 where a prefetched one loses its duel."""
    head = state.head
    is_full = head[LISTS + 2] == 0
    if head[DUEL] and prefetched and is_full and not _beats(state, id, _victim(state)):
        return -1
    ghost = _find(state, id)
    if ghost >= 0:  # only ghosts are found here: the id is not held
        _forget(state, ghost)
    if head[LISTS + 2] == 0:
        if head[POLICY] == S3_FIFO:
            _evict_s3_fifo(state)
        elif head[POLICY] == W_TINYLFU:
            _evict_w_tinylfu(state, prefetched)
        else:
            _evict(state, head[LISTS + 3 * FIRST + 1])
    entry = int(head[LISTS + 1])
    state.mark[entry] = 4 if prefetched else 0  # and of the free list
    _move(state, entry, _list_for(state, ghost >= 0, prefetched))
    state.id_of[entry] = id
    _insert_index(state, id, entry)
    if head[HAS_SKETCH] and not prefetched:
        _count(state, id)
    return entry


@compiled
def drop(state: State, id: int) -> int:
    """Forgets an id, if it is held; returns the entry that held it, or -1."""
    entry = _find(state, id)
    if entry < 0:
        return -1
    if entry >= state.head[CAPACITY]:
        _forget(state, entry)
        return -1
    _evict(state, entry)
    return entry


@compiled
def was_prefetched(state: State, entry: int) -> bool:
    """Whether the entry was prefetched and nobody has asked for it since."""
    return bool(state.mark[entry] & 4)


@compiled
def _list_for(state: State, was_ghost: bool, prefetched: bool) -> int:
    head = state.head
    if head[POLICY] == S3_FIFO:
        small_is_full = head[HAS_EVICTED] == 0 and head[LISTS + 3 * FIRST + 2] >= head[FIRST_ROOM]
        return SECOND if was_ghost or small_is_full else FIRST
    if head[POLICY] == W_TINYLFU and prefetched:
        return SECOND
    return FIRST


@compiled
def _beats(state: State, id: int, entry: int) -> bool:
    """Whether the id is asked for more often than what the entry holds, by the sketch."""
    return _frequency(state, id) > _frequency(state, state.id_of[entry])


@compiled
def _victim(state: State) -> int:
    """The entry that an admission of a prefetched vector would most likely evict, looked at only."""
    head = state.head
    first, second, third = int(head[LISTS + 4]), int(head[LISTS + 7]), int(head[LISTS + 10])
    if head[POLICY] == S3_FIFO:
        if second >= 0 and (head[LISTS + 8] > head[SECOND_ROOM] or first < 0):
            return second
        return first
    if head[POLICY] == W_TINYLFU:
        return second if second >= 0 else (third if third >= 0 else first)
    return first


@compiled
def _evict_s3_fifo(state: State) -> None:
    head, mark = state.head, state.mark
    head[HAS_EVICTED] = 1
    while True:
        if head[LISTS + 8] > head[SECOND_ROOM] or head[LISTS + 5] == 0:
            entry = head[LISTS + 7]
            frequency = int(np.int64(mark[entry])) >> 3
            if frequency == 0:
                _evict(state, entry)
                return
            mark[entry] = (int(np.int64(mark[entry])) & 7) | ((min(frequency, 3) - 1) << 3)
            _move(state, entry, SECOND)
        else:
            while head[LISTS + 5] > 0:
                entry = head[LISTS + 4]
                if int(np.int64(mark[entry])) >> 3 < S3_MOVE:
                    id = state.id_of[entry]
                    _evict(state, entry)
                    _remember(state, id)
                    return
                mark[entry] &= 7
                _move(state, entry, SECOND)


@compiled
def _evict_w_tinylfu(state: State, prefetched: bool) -> None:
    """Moves the window's oldest on until one is evicted; a prefetched vector takes the main part's oldest instead."""
    head = state.head
    if prefetched:
        _evict(state, _victim(state))
        return
    while head[LISTS + 5] > 0:
        candidate = head[LISTS + 4]
        id = state.id_of[candidate]
        if head[LISTS + 8] + head[LISTS + 11] < head[SECOND_ROOM]:
            _move(state, candidate, _segment(state))
        else:
            victim = head[LISTS + 7] if head[LISTS + 7] >= 0 else head[LISTS + 10]
            if victim < 0 or not _beats(state, id, victim):
                _evict(state, candidate)
                _count(state, id)
                return
            _evict(state, victim)
            _move(state, candidate, _segment(state))
        _count(state, id)
    if head[LISTS + 2] == 0:
        _evict(state, head[LISTS + 7] if head[LISTS + 7] >= 0 else head[LISTS + 10])


@compiled
def _segment(state: State) -> int:
    """The lowest segment of the main part with room."""
    head = state.head
    if head[LISTS + 8] >= head[SECOND_ROOM] - head[THIRD_ROOM] and head[LISTS + 11] < head[THIRD_ROOM]:
        return THIRD
    return SECOND


@compiled
def _promote(state: State, entry: int) -> None:
    head = state.head
    if head[THIRD_ROOM] == 0:
        _move(state, entry, SECOND)
        return
    _move(state, entry, THIRD)
    while head[LISTS + 11] > head[THIRD_ROOM]:
        _move(state, head[LISTS + 10], SECOND)


@compiled
def _move(state: State, entry: int, to: int) -> None:
    """Takes the entry out of its list and makes it the newest of list `to`."""
    head, older, newer, mark = state.head, state.older, state.newer, state.mark
    base = LISTS + 3 * (int(np.int64(mark[entry])) & 3)
    before, after = older[entry], newer[entry]
    if after >= 0:
        older[after] = before
    else:
        head[base] = before
    if before >= 0:
        newer[before] = after
    else:
        head[base + 1] = after
    head[base + 2] -= 1
    base = LISTS + 3 * to
    newest = head[base]
    older[entry] = newest
    newer[entry] = -1
    if newest >= 0:
        newer[newest] = entry
    else:
        head[base + 1] = entry
    head[base] = entry
    head[base + 2] += 1
    mark[entry] = (mark[entry] & ~3) | to


@compiled
def _evict(state: State, entry: int) -> None:
    """Frees the entry."""
    _delete_index(state, state.id_of[entry])
    state.id_of[entry] = -1
    _move(state, entry, FREE)


@compiled
def _remember(state: State, id: int) -> None:
    """Puts an id into the ring of ghosts. The oldest leave: above `GHOSTS` of them, or where the ring comes round."""
    head = state.head
    if head[GHOSTS] == 0:
        return
    ring = len(state.id_of) - head[CAPACITY]
    while head[GHOSTS_HELD] >= head[GHOSTS] or (head[GHOSTS_HELD] > 0 and head[GHOST_AT] == head[GHOST_OLDEST]):
        oldest = head[CAPACITY] + head[GHOST_OLDEST]
        if state.id_of[oldest] >= 0:
            _forget(state, oldest)
        head[GHOST_OLDEST] = (head[GHOST_OLDEST] + 1) % ring
    if head[GHOSTS_HELD] == 0:
        head[GHOST_OLDEST] = head[GHOST_AT]
    ghost = head[CAPACITY] + head[GHOST_AT]
    state.id_of[ghost] = id
    _insert_index(state, id, ghost)
    head[GHOSTS_HELD] += 1
    head[GHOST_AT] = (head[GHOST_AT] + 1) % ring


@compiled
def _forget(state: State, ghost: int) -> None:
    """Takes a ghost out and leaves a hole in the ring."""
    _delete_index(state, state.id_of[ghost])
    state.id_of[ghost] = -1
    state.head[GHOSTS_HELD] -= 1


@compiled
def _home(state: State, id: int) -> int:
    """Where the search for an id begins."""
    return ((id * 0x9E3779B1 & 0xFFFFFFFF) * len(state.buckets)) >> 32


@compiled
def _find(state: State, id: int) -> int:
    at = _home(state, id)
    while True:
        entry = int(state.buckets[at])
        if entry < 0 or state.id_of[entry] == id:
            return entry
        at += 1
        if at == len(state.buckets):
            at = 0


@compiled
def _insert_index(state: State, id: int, entry: int) -> None:
    at = _home(state, id)
    while state.buckets[at] >= 0:
        at += 1
        if at == len(state.buckets):
            at = 0
    state.buckets[at] = entry


@compiled
def _delete_index(state: State, id: int) -> None:
    """Takes an id out and moves later ones of the same run back, so that no search breaks off too soon."""
    buckets = state.buckets
    size = len(buckets)
    at = _home(state, id)
    while state.id_of[buckets[at]] != id:
        at += 1
        if at == size:
            at = 0
    hole = at
    while True:
        at += 1
        if at == size:
            at = 0
        entry = buckets[at]
        if entry < 0:
            break
        if (at - _home(state, state.id_of[entry])) % size >= (at - hole) % size:
            buckets[hole] = entry
            hole = at
    buckets[hole] = -1


@compiled
def _count(state: State, id: int) -> None:
    """One more access of the id: its least counters rise; all counters are halved from time to time."""
    head, sketch = state.head, state.sketch
    least = _frequency(state, id)
    hashed = (id + 1) * 0x9E3779B1 & 0xFFFFFFFF
    for _ in range(SKETCH_HASHES):
        hashed = ((hashed ^ hashed >> 15) * 0x85EBCA6B + 0x27D4EB2F) & 0xFFFFFFFF
        at = hashed * len(sketch) >> 32
        if sketch[at] <= least < MOST_FREQUENT:
            sketch[at] += 1
    head[COUNTED] += 1
    if head[COUNTED] >= head[COUNT_LIMIT]:
        head[COUNTED] = 0
        for i in range(len(sketch)):
            sketch[i] >>= 1


@compiled
def _frequency(state: State, id: int) -> int:
    """The sketch's estimate of the id's accesses."""
    sketch = state.sketch
    hashed = (id + 1) * 0x9E3779B1 & 0xFFFFFFFF
    least = int(MOST_FREQUENT)
    for _ in range(SKETCH_HASHES):
        hashed = ((hashed ^ hashed >> 15) * 0x85EBCA6B + 0x27D4EB2F) & 0xFFFFFFFF
        at = hashed * len(sketch) >> 32
        least = min(least, int(sketch[at]))
    return least
