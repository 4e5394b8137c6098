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

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal import validate
from shoal.embed.annealing import COLDEST, HOTTEST, SAME, anneal
from shoal.embed.exchange import exchange
from shoal.embed.hypergraph import Edges, by_vector, contracted, halves, pairs_of, without_repeats, without_small
from shoal.embed.progress import Share, nobody, parts
from shoal.embed.swaps import bisect
from shoal.embed.trace import Trace

MOST_WORK: Final = 1500
"""Pins that passes over all blocks look at in all, for each pin."""
_TOGETHER: Final = 1 << 18
"""Proposals of annealing, at least, between two times that it tells how far it is (and that Ctrl-C is heard)."""


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
    anneal: int = 0
    """Not in the paper: proposals of swaps for each vector, by simulated annealing on plain fanout, before the passes. 100 to 1,000."""
    seed: int = 0

    def __post_init__(self) -> None:
        validate.positive(p=self.p, iterations=self.iterations)
        validate.not_negative(passes=self.passes, anneal=self.anneal)
        validate.between(0, 1, p=self.p, skip=self.skip, stop=self.stop)

    @property
    def costs(self) -> tuple[float, float, float]:
        """What splits, annealing and passes take, of the splits, roughly: for those who are told how far it is."""
        return 1.0, self.anneal / 8, self.passes / 10


def partition(
    trace: Trace,
    vectors_per_block: int,
    settings: Settings | None = None,
    *,
    start: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    threads: int = 1,
    progress: Share | None = None,
) -> np.ndarray:
    """Orders the vectors so that runs of `vectors_per_block` are asked for together.

    Args:
        trace: queries; those with one vector say nothing.
        start: (rows,) the ids in a first order, from which it goes on (re-placement); random by default.
        weights: (queries,) how much each query counts; 1 by default.
        threads: subtrees at a time.
        progress: is told the share done.

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
    edges = without_small(trace.indptr, without_repeats(trace.indptr, local[trace.ids], len(order)), weight)
    full = -(-len(order) // vectors_per_block) * vectors_per_block
    splits, annealing, passes = parts(progress or nobody, settings.costs)
    found = _Search(settings, vectors_per_block, splits, size=full, is_warm=start is not None)
    with ThreadPoolExecutor(threads) as pool:
        found.place(np.arange(full, dtype=np.int32), edges, 0, pool if threads > 1 else None, threads)
    placed = _without_holes(found.order, len(order), vectors_per_block)
    if len(edges[0]) > 1:
        _anneal(placed, edges, vectors_per_block, settings, annealing)
        _swap_on(placed, edges, vectors_per_block, settings, passes)
    return np.concatenate([order[placed], unseen])


@dataclass
class _Search:
    """The recursion: a set of vectors gets a run of slots."""

    settings: Settings
    vectors_per_block: int
    progress: Share
    size: int
    """Slots: the vectors, and as many holes as fill the last block."""
    is_warm: bool

    def __post_init__(self) -> None:
        self.order = np.empty(self.size, np.int64)
        self.left = self._work(self.size)
        self.whole = max(1, self.left)

    def place(
        self, vectors: np.ndarray, edges: Edges, first_slot: int, pool: ThreadPoolExecutor | None, free: int
    ) -> None:
        """Gives the vectors (n,) the slots from `first_slot` on."""
        blocks = -(-len(vectors) // self.vectors_per_block)
        if blocks <= 1 or len(edges[0]) <= 1:
            self.order[first_slot : first_slot + len(vectors)] = vectors
            self._did(self._work(len(vectors)))
            return
        left_blocks = (blocks + 1) // 2
        left_size = left_blocks * self.vectors_per_block
        side = self._side(len(vectors), left_size, edges, first_slot, left_blocks, blocks - left_blocks)
        self._did(self._work(len(vectors)) - self._work(left_size) - self._work(len(vectors) - left_size))
        left, right = halves(*edges, side)
        parts = (vectors[side == 0], left, first_slot), (vectors[side == 1], right, first_slot + left_size)
        del edges, vectors
        if pool is not None and free > 1:
            other = pool.submit(self.place, *parts[0], pool, free // 2)
            self.place(*parts[1], pool, free // 2)
            other.result()
        else:
            for part in parts:
                self.place(*part, None, 1)

    def _work(self, size: int) -> int:
        """What it takes to split a set of vectors into blocks: each vector once a level."""
        return size * (-(-size // self.vectors_per_block) - 1).bit_length()

    def _did(self, work: int) -> None:
        self.left -= work  # threads may lose a count: this is only told
        self.progress(1 - self.left / self.whole)

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
            pair_of.append(pairs_of(*levels[-1], size >> len(pair_of), rng.permutation(size >> len(pair_of))))
            levels.append(without_small(levels[-1][0], *contracted(*levels[-1], pair_of[-1])))
        side = np.zeros(size >> len(pair_of), np.int8)
        side[left_size >> len(pair_of) :] = 1
        while True:
            here = levels.pop()
            bisect(*here, side, np.array(powers, np.float32), settings.iterations, settings.skip, settings.stop, rng)
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


def _anneal(order: np.ndarray, edges: Edges, vectors_per_block: int, settings: Settings, progress: Share) -> None:
    """Anneals the order in place."""
    slot_of = np.empty(len(order), np.int64)
    slot_of[order] = np.arange(len(order))
    named = by_vector(edges[0], edges[1], len(order))
    rng = np.random.default_rng([settings.seed, len(order), 1])
    scale, proposals = float(np.mean(edges[2])), settings.anneal * len(order)
    together = max(_TOGETHER, len(edges[1]) // 4 // SAME * SAME)
    for first in range(1, proposals + 1, together):
        last = min(first + together - 1, proposals)
        anneal(
            edges, named, order, slot_of, vectors_per_block, first, last, proposals,
            HOTTEST * scale, COLDEST * scale, rng,
        )  # fmt: skip
        progress(last / proposals)


def _swap_on(order: np.ndarray, edges: Edges, vectors_per_block: int, settings: Settings, progress: Share) -> None:
    """Swaps between any two full blocks, in place."""
    slot_of = np.empty(len(order), np.int64)
    slot_of[order] = np.arange(len(order))
    named = by_vector(edges[0], edges[1], len(order))
    rng = np.random.default_rng([settings.seed, len(order)])
    work = MOST_WORK * len(edges[1])
    for number in range(settings.passes):
        visits = rng.permutation(len(order) // vectors_per_block)
        swaps, work = exchange(edges, named, order, slot_of, vectors_per_block, visits, work)
        progress((number + 1) / settings.passes)
        if swaps < settings.stop * len(order) or work <= 0:
            break


def fanout(trace: Trace, block_of: np.ndarray) -> float:
    """Mean distinct blocks of a query, of those with a vector: what partitioning lowers. `block_of` is (rows,)."""
    queries = np.repeat(np.arange(len(trace)), np.diff(trace.indptr))
    pairs = queries * (int(block_of.max()) + 1) + block_of[trace.ids]
    return len(np.unique(pairs)) / max(1, len(np.unique(queries)))
