"""Replays a trace over a layout and a cache, and counts block reads: the figure that all placements are judged by.

No bytes move: a block read is counted, and the cache is told what came with it. A query's vectors are looked up
together; its misses are read together (`choose_blocks`); then prefetched vectors enter the cache, and after them those
that were asked for. Time: 10-30 M lookups/s where all hit, some 3 M where most miss.
"""

from dataclasses import dataclass

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed.cache import Cache, State, admit, is_worth, probe, spare, touch, was_prefetched
from shoal.embed.choose import Copies, choose_blocks, copies_of, is_read
from shoal.embed.layout import Layout
from shoal.embed.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replay counted."""

    num_queries: int
    lookups: int
    """Distinct ids, query by query."""
    hits: int
    block_reads: int
    prefetched: int
    """Vectors that entered the cache though nobody had asked for them."""
    prefetch_hits: int
    """Of these, how many were asked for before they left."""
    reads: np.ndarray
    """(queries,) int32: block reads of each query."""
    is_miss: np.ndarray
    """(lookups of the trace,) bool: what was missed. A second mention in one query is none."""

    @property
    def reads_per_query(self) -> float:
        return self.block_reads / max(1, self.num_queries)

    @property
    def miss_ratio(self) -> float:
        return 1 - self.hits / max(1, self.lookups)


def replay(trace: Trace, layout: Layout, cache: Cache, depth: np.ndarray | None = None, *, skip: int = 0) -> Replay:
    """Replays the trace; the cache goes on from where it is.

    Args:
        depth: (num_blocks,) how many vectors at the head of a read block are offered to the cache; none by default.
        skip: queries at the head that warm the cache and are not counted.
    """
    depth = np.zeros(layout.num_blocks, np.int32) if depth is None else depth.astype(np.int32)
    reads, is_miss = np.zeros(len(trace), np.int32), np.zeros(trace.num_lookups, np.bool_)
    counters = np.zeros(4, np.int64)
    ids = layout.ids_of().astype(np.int32)
    _replay(
        cache.state,
        copies_of(layout),
        ids,
        depth,
        trace.indptr,
        trace.ids,
        trace.num_rows,
        skip,
        reads,
        is_miss,
        counters,
    )
    lookups, hits, prefetched, prefetch_hits = map(int, counters)
    return Replay(
        num_queries=len(trace) - skip,
        lookups=lookups,
        hits=hits,
        block_reads=int(reads[skip:].sum()),
        prefetched=prefetched,
        prefetch_hits=prefetch_hits,
        reads=reads[skip:],
        is_miss=is_miss,
    )


@compiled
def _replay(
    state: State,
    copies: Copies,
    ids_of: np.ndarray,
    depth: np.ndarray,
    indptr: np.ndarray,
    ids: np.ndarray,
    num_rows: int,
    skip: int,
    reads: np.ndarray,
    is_miss: np.ndarray,
    counters: np.ndarray,
) -> None:
    last_query = np.full(num_rows, -1, np.int64)
    longest = 1
    for query in range(len(indptr) - 1):
        longest = max(longest, indptr[query + 1] - indptr[query])
    missing, chosen, hit = np.empty(longest, np.int64), np.empty(longest, np.int64), np.empty(longest, np.int64)
    for query in range(len(indptr) - 1):
        if query == skip:
            counters[:] = 0
        num_missing, num_hits = 0, 0
        for at in range(indptr[query], indptr[query + 1]):
            id = ids[at]
            if last_query[id] == query:
                continue
            last_query[id] = query
            counters[0] += 1
            entry = probe(state, id)
            if entry >= 0:
                counters[1] += 1
                counters[3] += was_prefetched(state, entry)
                hit[num_hits] = entry
                num_hits += 1
            else:
                is_miss[at] = True
                missing[num_missing] = id
                num_missing += 1
        if num_missing:
            reads[query] = choose_blocks(copies, missing, num_missing, chosen)
        for i in range(num_hits):
            if is_read(copies, state.id_of[hit[i]], chosen, num_missing):
                spare(state, hit[i])
            else:
                touch(state, hit[i])
        for i in range(num_missing):
            if _is_first(chosen, i):
                counters[2] += _prefetch(state, ids_of[chosen[i]], depth[chosen[i]], last_query, query)
        for i in range(num_missing):
            group = np.sum(chosen[:num_missing] == chosen[i])
            if probe(state, missing[i]) < 0 and is_worth(state, group):
                admit(state, missing[i], False)


@compiled
def _is_first(chosen: np.ndarray, i: int) -> bool:
    for j in range(i):  # noqa: SIM110 (Numba compiles no generator expression)
        if chosen[j] == chosen[i]:
            return False
    return True


@compiled
def _prefetch(state: State, ids: np.ndarray, depth: int, last_query: np.ndarray, query: int) -> int:
    """Offers the head of a block to the cache, but for what the query asked for; returns how many entered."""
    entered = 0
    for slot in range(depth):
        id = ids[slot]
        if id >= 0 and last_query[id] != query and probe(state, id) < 0:
            entered += admit(state, id, True) >= 0
    return entered


def misses(trace: Trace, replayed: Replay) -> Trace:
    """The trace of what was missed: each query's misses, empty queries kept."""
    return trace.only(replayed.is_miss)
