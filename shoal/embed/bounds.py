"""What no cache and no layout can beat, and what is nearly out of reach: the marks against which policies are read.

Belady: the fewest misses of any cache of vectors without prefetch; it knows the future (Belady, 1966). A vector that
would be the first to be forgotten is not taken in (bypass).
Ideal packing: with Belady's cache, each query reads its misses in blocks that hold nothing else: ceil(misses / vectors
a block). No layout has such blocks for all queries at once. It is no bound for a cache that prefetches across
queries, only a mark; what is asked for the first time costs a read even here.
Foreseen: a made-up table has more to tell than its trace. A placement learnt from many *futures* (`generator.futures`: the
same users, histories, communities and drift, other draws) knows all that can be learnt of the test, and Belady's cache
before it knows the rest. What that reads (`reads_behind`) is out of reach of whoever learns from the trace, as far as
our partitioner can show it; Belady's cache has fewest misses, not fewest reads, so it is a mark again and no proof.
"""

import heapq

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed._sorted import distinct
from shoal.embed.choose import Copies, choose_blocks, copies_of
from shoal.embed.layout import Layout
from shoal.embed.trace import Trace


def belady(trace: Trace, capacity: int) -> np.ndarray:
    """Which lookups Belady's cache of `capacity` vectors misses: (lookups,) bool. Time O(lookups log lookups)."""
    return _belady(trace.ids, _next_use(trace.ids, trace.num_rows), trace.num_rows, capacity)


def ideal_reads(trace: Trace, is_miss: np.ndarray, vectors_per_block: int) -> np.ndarray:
    """Block reads of each query, (queries,), if its misses were packed as tightly as can be."""
    missed = np.concatenate([[0], np.cumsum(is_miss)])[trace.indptr]
    return np.asarray(-(-np.diff(missed) // vectors_per_block))


def reads_behind(trace: Trace, is_miss: np.ndarray, layout: Layout) -> np.ndarray:
    """Block reads of each query, (queries,) int64, if a cache left just these lookups (lookups,) bool to the layout."""
    missed = trace.only(is_miss)
    reads = np.zeros(len(trace), np.int64)
    _reads_behind(copies_of(layout), missed.indptr, missed.ids, reads)
    return reads


@compiled
def _reads_behind(copies: Copies, indptr: np.ndarray, ids: np.ndarray, reads: np.ndarray) -> None:
    for query in range(len(reads)):
        mine = distinct(ids[indptr[query] : indptr[query + 1]])
        reads[query] = choose_blocks(copies, mine, len(mine), np.empty(len(mine), np.int64))


@compiled
def _next_use(ids: np.ndarray, num_rows: int) -> np.ndarray:
    """Where each lookup's id comes next; the number of lookups where it does not."""
    upcoming = np.full(num_rows, len(ids), np.int64)
    following = np.empty(len(ids), np.int64)
    for at in range(len(ids) - 1, -1, -1):
        following[at] = upcoming[ids[at]]
        upcoming[ids[at]] = at
    return following


@compiled
def _belady(ids: np.ndarray, following: np.ndarray, num_rows: int, capacity: int) -> np.ndarray:
    is_miss = np.zeros(len(ids), np.bool_)
    held = np.full(num_rows, -1, np.int64)  # where the id of a held vector comes next
    heap = [(0, 0)]  # (-next use, id); what does not agree with `held` is stale
    heap.pop()
    size = 0
    for at in range(len(ids)):
        id = ids[at]
        is_held = held[id] >= 0
        is_miss[at] = not is_held
        if following[at] == len(ids):
            size -= is_held
            held[id] = -1
            continue
        if not is_held and size == capacity:
            while held[heap[0][1]] != -heap[0][0]:
                heapq.heappop(heap)
            if -heap[0][0] <= following[at]:
                continue
            held[heapq.heappop(heap)[1]] = -1
            size -= 1
        size += not is_held
        held[id] = following[at]
        heapq.heappush(heap, (-following[at], id))
    return is_miss
