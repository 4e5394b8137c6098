"""Social Hash Partitioner: puts vectors that are asked for together into the same block. Recursive bisection.

A query is a hyperedge over its vectors. Each split of a set of blocks into two halves swaps pairs of vectors, one from
each side, as long as the pair lowers the *final p-fanout*: where a side will be split into s blocks, a query with
n vectors on it costs s (1 - (1 - p/s)^n), which is the expected number of its blocks if each vector is asked for
with probability p. Swaps keep both sides exactly full: every block but the last is full.

Deterministic: each split draws from a generator seeded by (seed, first slot), so subtrees may run in any order and
thread. Time O(pins x iterations x log2 blocks); memory 8 bytes a pin and level.

References:
    Kabiljo, Karrer, Pundir, Pupyrev and Shalita, 2017, Social Hash Partitioner, VLDB, arXiv 1707.06665: p-fanout
    (their eq. 1), final p-fanout and the settings of Giraph's SocialHashPartitionerSettings. Departures: gains are
    sorted, not binned; imbalance is 0; a swap is left out with probability 0.1, against cycles, as in LLVM's
    BalancedPartitioning.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal import validate
from shoal.embed._compiled import compiled
from shoal.embed._sorted import order_of
from shoal.embed.trace import Trace

MOST_LOOKED_AT: Final = 4096
"""Pins that are looked at to find a vector's mate."""
MOST_WORK: Final = 1500
"""Pins that passes over all blocks look at in all, for each pin."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How hard to look. The defaults are the paper's."""

    p: float = 0.5
    """Probability with which a vector of a query is asked for; 1 is plain fanout."""
    iterations: int = 20
    """Rounds of swaps a split."""
    skip: float = 0.1
    """Share of good swaps that are left out in a round."""
    stop: float = 1e-4
    """A split ends when a round moves less than this share of its vectors."""
    multilevel: bool = False
    """Not in the paper: pair up vectors before a split, split the pairs of pairs, and refine level by level."""
    passes: int = 0
    """Not in the paper: passes of swaps between any two blocks after the last split, on plain fanout."""
    seed: int = 0

    def __post_init__(self) -> None:
        validate.positive(p=self.p, iterations=self.iterations)
        validate.between(0, 1, p=self.p, skip=self.skip, stop=self.stop)


def partition(
    trace: Trace,
    vectors_per_block: int,
    settings: Settings | None = None,
    *,
    start: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    threads: int = 1,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Orders the vectors so that runs of `vectors_per_block` are asked for together.

    Args:
        trace: queries; those with one vector say nothing.
        start: (rows,) the ids in a first order, from which it goes on (re-placement); random by default.
        weights: (queries,) how much each query counts; 1 by default.
        threads: subtrees at a time.
        progress: is told the share of splits done.

    Returns:
        (rows,) int64: the ids of *all* rows; rows that no query names come last, in order of id.
    """
    validate.positive(vectors_per_block=vectors_per_block, threads=threads)
    settings = settings or Settings()
    is_seen = trace.counts() > 0
    order = np.random.default_rng(settings.seed).permutation(trace.num_rows) if start is None else start
    order = order[is_seen[order]]
    unseen = np.flatnonzero(~is_seen)
    if not len(order):
        return unseen
    local = np.full(trace.num_rows, -1, np.int32)
    local[order] = np.arange(len(order), dtype=np.int32)
    weight = np.ones(len(trace), np.float32) if weights is None else weights.astype(np.float32)
    edges = _without_small(trace.indptr, local[trace.ids], weight)
    full = -(-len(order) // vectors_per_block) * vectors_per_block
    found = _Search(settings, vectors_per_block, progress, size=full, is_warm=start is not None)
    with ThreadPoolExecutor(threads) as pool:
        found.place(np.arange(full, dtype=np.int32), edges, 0, pool if threads > 1 else None, threads)
    placed = _without_holes(found.order, len(order), vectors_per_block)
    if settings.passes and len(edges[0]) > 1:
        placed = _refined(placed, edges, vectors_per_block, settings)
    return np.concatenate([order[placed], unseen])


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""indptr int64, pins int32, weights float32 of the hyperedges that lie in a set of vectors, numbered from 0."""


@dataclass
class _Search:
    """The recursion: a set of vectors gets a run of slots."""

    settings: Settings
    vectors_per_block: int
    progress: Callable[[float], None] | None
    size: int
    """Slots: the vectors, and as many holes as fill the last block."""
    is_warm: bool

    def __post_init__(self) -> None:
        self.order = np.empty(self.size, np.int64)
        self.done = 0

    def place(
        self, vectors: np.ndarray, edges: Edges, first_slot: int, pool: ThreadPoolExecutor | None, free: int
    ) -> None:
        """Gives the vectors (n,) the slots from `first_slot` on."""
        blocks = -(-len(vectors) // self.vectors_per_block)
        if blocks <= 1 or len(edges[0]) <= 1:
            self.order[first_slot : first_slot + len(vectors)] = vectors
            self.done += len(vectors)
            if self.progress:
                self.progress(self.done / self.size)
            return
        left_blocks = (blocks + 1) // 2
        left_size = left_blocks * self.vectors_per_block
        side = self._side(len(vectors), left_size, edges, first_slot, left_blocks, blocks - left_blocks)
        left, right = _halves(*edges, side)
        parts = (vectors[side == 0], left, first_slot), (vectors[side == 1], right, first_slot + left_size)
        del edges, vectors
        if pool is not None and free > 1:
            other = pool.submit(self.place, *parts[0], pool, free // 2)
            self.place(*parts[1], pool, free // 2)
            other.result()
        else:
            for part in parts:
                self.place(*part, None, 1)

    def _side(
        self, size: int, left_size: int, edges: Edges, first_slot: int, left_blocks: int, right_blocks: int
    ) -> np.ndarray:
        """Which half each vector goes to, (size,) of 0 and 1."""
        settings = self.settings
        longest = int(np.diff(edges[0]).max()) + 1
        powers = [(1 - settings.p / blocks) ** np.arange(longest + 1.0) for blocks in (left_blocks, right_blocks)]
        rng = np.random.default_rng([settings.seed, first_slot, size])
        levels, pair_of = [edges], list[np.ndarray]()
        unit = self.vectors_per_block if settings.multilevel and not self.is_warm else 1
        while unit % 2 == 0 and len(levels[-1][0]) > 1:
            unit //= 2
            pair_of.append(_pairs(*levels[-1], size >> len(pair_of), rng.permutation(size >> len(pair_of))))
            levels.append(_without_small(levels[-1][0], *_contracted(*levels[-1], pair_of[-1])))
        side = np.zeros(size >> len(pair_of), np.int8)
        side[left_size >> len(pair_of) :] = 1
        while True:
            here = levels.pop()
            _bisect(*here, side, np.array(powers, np.float32), settings.iterations, settings.skip, settings.stop, rng)
            if not pair_of:
                return side
            side = side[pair_of.pop()]


def _without_holes(order: np.ndarray, num: int, vectors_per_block: int) -> np.ndarray:
    """The order without its holes (numbers from `num` on): the block with most of them comes last and fills the others."""
    blocks = order.reshape(-1, vectors_per_block)
    last = int(np.argmax((blocks >= num).sum(1)))
    slots = np.concatenate([blocks[:last], blocks[last + 1 :], blocks[last : last + 1]]).reshape(-1)
    spare = slots[-vectors_per_block:]
    spare = spare[spare < num]
    head = slots[:-vectors_per_block].copy()
    holes = np.flatnonzero(head >= num)
    head[holes] = spare[: len(holes)]
    return np.concatenate([head, spare[len(holes) :]])


def _refined(order: np.ndarray, edges: Edges, vectors_per_block: int, settings: Settings) -> np.ndarray:
    """The order after swaps between any two full blocks."""
    slot_of = np.empty(len(order), np.int64)
    slot_of[order] = np.arange(len(order))
    starts, queries = _by_vector(edges[0], edges[1], len(order))
    rng = np.random.default_rng([settings.seed, len(order)])
    work = MOST_WORK * len(edges[1])
    for _ in range(settings.passes):
        visits = rng.permutation(len(order))
        swaps, work = _swap_anywhere(*edges, starts, queries, order, slot_of, vectors_per_block, visits, work)
        if swaps < settings.stop * len(order) or work <= 0:
            break
    return order


@compiled
def _swap_anywhere(
    indptr: np.ndarray,
    pins: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    queries: np.ndarray,
    order: np.ndarray,
    slot_of: np.ndarray,
    size: int,
    visits: np.ndarray,
    work: int,
) -> tuple[int, int]:
    """One pass: each vector goes to the block that gains most, if one of its vectors can come back and both gain.

    Returns:
        The swaps made, and the work (pins looked at) that is left.
    """
    full = len(order) // size
    present, last = np.zeros(full + 1, np.float32), np.full(full + 1, -1, np.int64)
    touched, is_mine = np.empty(full + 1, np.int64), np.full(len(indptr), -1, np.int64)
    swaps, stamp = 0, 0
    for visit in range(len(visits)):
        if work <= 0:
            break
        vector = visits[visit]
        home = slot_of[vector] // size
        if home == full:
            continue
        stays, num_touched = np.float32(0), 0
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            is_mine[query] = vector
            alone = True
            stamp += 1
            work -= indptr[query + 1] - indptr[query]
            for other in pins[indptr[query] : indptr[query + 1]]:
                block = slot_of[other] // size
                if block == home:
                    alone = alone and other == vector
                elif last[block] != stamp:
                    last[block] = stamp
                    if present[block] == 0:
                        touched[num_touched] = block
                        num_touched += 1
                    present[block] += weights[query]
            if not alone:
                stays += weights[query]
        best, best_gain = -1, np.float32(0)
        for i in range(num_touched):
            gain = (
                present[touched[i]] - stays
            )  # of the queries, those that already read there, less those that stay here
            if gain > best_gain and touched[i] < full:
                best, best_gain = touched[i], gain
            present[touched[i]] = 0
        if best < 0:
            continue
        partner, partner_gain = -1, np.float32(1e-4)
        for slot in range(best * size, best * size + size):
            gain = best_gain
            for at in range(starts[order[slot]], starts[order[slot] + 1]):
                query = queries[at]
                here, there = 0, 0
                work -= indptr[query + 1] - indptr[query]
                for other in pins[indptr[query] : indptr[query + 1]]:
                    block = slot_of[other] // size
                    here += block == home
                    there += block == best
                if is_mine[query] == vector:  # both are in it: a swap changes nothing
                    gain -= weights[query] * ((here == 1) + 0)
                else:
                    gain += weights[query] * ((there == 1) - (here == 0) * 1)
            if gain > partner_gain:
                partner, partner_gain = order[slot], gain
        if partner >= 0:
            slot_of[vector], slot_of[partner] = slot_of[partner], slot_of[vector]
            order[slot_of[vector]], order[slot_of[partner]] = vector, partner
            swaps += 1
    return swaps, work


@compiled
def _by_vector(indptr: np.ndarray, pins: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """By vector instead of by query: `queries[starts[v]:starts[v + 1]]` name vector v."""
    starts = np.zeros(size + 1, np.int64)
    for at in range(len(pins)):
        starts[pins[at] + 1] += 1
    for vector in range(size):
        starts[vector + 1] += starts[vector]
    queries, filled = np.empty(len(pins), np.int32), starts[:-1].copy()
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            queries[filled[pins[at]]] = query
            filled[pins[at]] += 1
    return starts, queries


@compiled
def _pairs(indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, size: int, order: np.ndarray) -> np.ndarray:
    """Pairs up vectors that share queries, heaviest first by a greedy pass in `order`; who is left over, by chance.

    Returns:
        (size,) int64: the number of each vector's pair, 0 to size / 2 - 1.
    """
    starts, queries = _by_vector(indptr, pins, size)
    pair_of, number = np.full(size, -1, np.int64), 0
    score, touched = np.zeros(size, np.float32), np.empty(size, np.int64)
    for vector in order:
        if pair_of[vector] >= 0:
            continue
        num_touched, looked_at = 0, 0
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            begin, end = indptr[query], indptr[query + 1]
            for other in pins[begin:end]:
                if other != vector and pair_of[other] < 0:
                    if score[other] == 0:
                        touched[num_touched] = other
                        num_touched += 1
                    score[other] += weights[query] / (end - begin - 1)
            looked_at += end - begin
            if looked_at > MOST_LOOKED_AT:
                break
        best = -1
        for i in range(num_touched):
            if best < 0 or score[touched[i]] > score[best]:
                best = touched[i]
        for i in range(num_touched):
            score[touched[i]] = 0
        if best >= 0:
            pair_of[vector] = pair_of[best] = number
            number += 1
    waiting = -1
    for vector in order:
        if pair_of[vector] < 0:
            if waiting < 0:
                waiting = vector
            else:
                pair_of[vector] = pair_of[waiting] = number
                number += 1
                waiting = -1
    return pair_of


@compiled
def _contracted(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, pair_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pins as pairs; a second pin of a pair in one query becomes -1."""
    last, made = np.full(len(pair_of) // 2 + 1, -1, np.int64), np.empty(len(pins), np.int32)
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            pair = pair_of[pins[at]]
            made[at] = pair if last[pair] != query else -1
            last[pair] = query
    return made, weights


@compiled
def _bisect(
    indptr: np.ndarray,
    pins: np.ndarray,
    weights: np.ndarray,
    side: np.ndarray,
    powers: np.ndarray,
    iterations: int,
    skip: float,
    stop: float,
    rng: np.random.Generator,
) -> None:
    """Improves `side` (n,) in place by rounds of swaps."""
    gain = np.empty(len(side), np.float32)
    for _ in range(iterations):
        _gains(indptr, pins, weights, side, powers, gain)
        if _swap(side, gain, skip, rng) <= stop * len(side):
            return


@compiled
def _gains(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray, powers: np.ndarray, gain: np.ndarray
) -> None:
    """What the final p-fanout loses, over p, when a vector goes to the other side."""
    gain[:] = 0
    for query in range(len(indptr) - 1):
        begin, end = indptr[query], indptr[query + 1]
        right = 0
        for at in range(begin, end):
            right += side[pins[at]]
        left = end - begin - right
        from_left = weights[query] * (powers[0, max(0, left - 1)] - powers[1, right])
        from_right = weights[query] * (powers[1, max(0, right - 1)] - powers[0, left])
        for at in range(begin, end):
            vector = pins[at]
            gain[vector] += from_right if side[vector] else from_left


@compiled
def _swap(side: np.ndarray, gain: np.ndarray, skip: float, rng: np.random.Generator) -> int:
    """Swaps the best of one side with the best of the other while a pair gains; returns the vectors moved."""
    best = np.full(2, -np.inf)
    for vector in range(len(side)):
        best[side[vector]] = max(best[side[vector]], gain[vector])
    left = _candidates(side, gain, 0, -best[1])
    right = _candidates(side, gain, 1, -best[0])
    moved = 0
    for i in range(min(len(left), len(right))):
        if gain[left[i]] + gain[right[i]] <= 1e-7:
            break
        if rng.random() >= skip:
            side[left[i]] = 1
            side[right[i]] = 0
            moved += 2
    return moved


@compiled
def _candidates(side: np.ndarray, gain: np.ndarray, of: int, above: float) -> np.ndarray:
    """The vectors of a side that gain more than `above`, best first."""
    number = 0
    for vector in range(len(side)):
        number += side[vector] == of and gain[vector] > above
    found = np.empty(number, np.int64)
    number = 0
    for vector in range(len(side)):
        if side[vector] == of and gain[vector] > above:
            found[number] = vector
            number += 1
    best: np.ndarray = found[order_of(-gain[found])]
    return best


@compiled
def _without_small(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hyperedges with two or more pins that count; pins below 0 do not."""
    kept_ptr, kept = np.empty(len(indptr), np.int64), np.empty(len(pins), np.int32)
    kept_weights = np.empty(len(weights), np.float32)
    number, end = 0, 0
    kept_ptr[0] = 0
    for query in range(len(indptr) - 1):
        begin = end
        for at in range(indptr[query], indptr[query + 1]):
            if pins[at] >= 0:
                kept[end] = pins[at]
                end += 1
        if end - begin < 2 or weights[query] <= 0:
            end = begin
            continue
        kept_weights[number] = weights[query]
        number += 1
        kept_ptr[number] = end
    return kept_ptr[: number + 1].copy(), kept[:end].copy(), kept_weights[:number].copy()


@compiled
def _halves(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The hyperedges within each side, vectors numbered anew in their order."""
    number = np.zeros(2, np.int32)
    name = np.empty(len(side), np.int32)
    for vector in range(len(side)):
        name[vector] = number[side[vector]]
        number[side[vector]] += 1
    return _half(indptr, pins, weights, side, name, 0), _half(indptr, pins, weights, side, name, 1)


@compiled
def _half(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray, name: np.ndarray, of: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_edges, num_pins = 0, 0
    for query in range(len(indptr) - 1):
        here = 0
        for at in range(indptr[query], indptr[query + 1]):
            here += side[pins[at]] == of
        if here > 1:
            num_edges += 1
            num_pins += here
    kept_ptr, kept, kept_weights = (
        np.empty(num_edges + 1, np.int64),
        np.empty(num_pins, np.int32),
        np.empty(num_edges, np.float32),
    )
    kept_ptr[0] = 0
    number, end = 0, 0
    for query in range(len(indptr) - 1):
        begin = end
        for at in range(indptr[query], indptr[query + 1]):
            if side[pins[at]] == of and end < num_pins:
                kept[end] = name[pins[at]]
                end += 1
        if end - begin < 2:
            end = begin
            continue
        kept_weights[number] = weights[query]
        number += 1
        kept_ptr[number] = end
    return kept_ptr, kept, kept_weights


def fanout(trace: Trace, block_of: np.ndarray) -> float:
    """Mean distinct blocks of a query, of those with a vector: what partitioning lowers. `block_of` is (rows,)."""
    queries = np.repeat(np.arange(len(trace)), np.diff(trace.indptr))
    pairs = queries * (int(block_of.max()) + 1) + block_of[trace.ids]
    return len(np.unique(pairs)) / max(1, len(np.unique(queries)))
