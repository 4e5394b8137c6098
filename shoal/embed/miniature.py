"""Small caches that stand for large ones: a table's block reads over DRAM, for many settings, at a few per cent of the work.

A cache of C vectors is emulated by one of R C vectors over the R-th part of the *blocks*; all
vectors of a kept block are kept, all others leave their queries. (Sampling vectors, as one does for caches without blocks,
would part block-mates, and neither a shared read nor a prefetch would be seen.) Reads are scaled back by 1/R: what the sample
has too few or too many of are accesses to the hottest blocks, which are hits (SHARDS-adj). After a re-placement a sample is
drawn anew.

References: Waldspurger, Saemundsson, Ahmad and Park, 2017, Cache modeling and optimization using miniature simulations,
USENIX ATC; Eisenman et al., 2019, Bandana, arXiv 1811.05922, section on miniature caches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal import validate
from shoal.embed.cache import Cache
from shoal.embed.layout import Layout
from shoal.embed.placement import depth_above
from shoal.embed.simulate import replay
from shoal.embed.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a table's cache."""

    policy: str
    threshold: float = np.inf
    """Prefetched vectors enter if they were asked for more often than this in training; inf is no prefetch."""
    duel: bool = False
    """Prefetched vectors must also beat the victim."""
    read_aware: bool = False

    def cache(self, capacity: int, num_rows: int) -> Cache:
        """An empty cache."""
        return Cache(self.policy, capacity, num_rows, duel=self.duel, read_aware=self.read_aware)

    def capacity(self, budget_bytes: float, vector_bytes: int) -> int:
        """Vectors that fit the budget, metadata counted."""
        return Cache.capacity_of(budget_bytes, vector_bytes, self.policy, duel=self.duel)


SETTINGS: tuple[Setting, ...] = (
    Setting(policy="lru"),
    Setting(policy="s3-fifo"),
    Setting(policy="w-tinylfu"),
    Setting(policy="s3-fifo", read_aware=True),
    Setting(policy="w-tinylfu", read_aware=True),
    *(Setting(policy="s3-fifo", threshold=threshold, read_aware=True) for threshold in (20.0, 80.0)),
    *(Setting(policy="w-tinylfu", threshold=threshold, read_aware=True) for threshold in (5.0, 20.0, 80.0)),
    Setting(policy="w-tinylfu", threshold=0.0, duel=True, read_aware=True),
)
"""What is tried for each table."""

SAMPLES: Final = 3
"""Miniatures whose mean is taken."""


@dataclass(frozen=True, eq=False)
class Sample:
    """The part of a table's blocks that a miniature cache sees."""

    rate: float
    """Share of the blocks."""
    scale: float
    """Block reads of the table for one of the sample."""
    trace: Trace
    """Queries with only the vectors of the kept blocks."""

    def reads(self, layout: Layout, cache: Cache, depth: np.ndarray | None = None, *, skip: int = 0) -> float:
        """Block reads that the whole table would take."""
        return replay(self.trace, layout, cache, depth, skip=skip).block_reads * self.scale


def sample_blocks(trace: Trace, layout: Layout, rate: float, *, seed: int = 0, shift: float = 0.0) -> Sample:
    """Keeps a share of the blocks and what the queries ask of them.

    Blocks are taken evenly down the order of how often they are asked for, from a start that `seed` draws and `shift` (0 to 1) moves
    on: a hash alone errs by the luck of the hottest. Replicas are left out of the choice: a vector is kept with its home block.
    """
    validate.between(1e-6, 1, rate=rate)
    heat = np.bincount(layout.block_of[trace.ids], minlength=layout.num_blocks)
    start = (np.random.default_rng(seed).random() + shift) % 1
    steps = np.floor(np.arange(layout.num_blocks + 1) * rate + start)
    is_kept = np.zeros(layout.num_blocks, bool)
    is_kept[np.argsort(-heat, kind="stable")] = np.diff(steps) > 0
    if not is_kept.any():
        is_kept[np.argmax(heat)] = True
    share = float(is_kept.mean())
    return Sample(share, 1 / share, trace.only(is_kept[layout.block_of[trace.ids]]))


def rate_for(capacity: int, num_blocks: int, *, entries: int = 300, blocks: int = 500) -> float:
    """The least share of blocks at which a miniature has enough entries, and sees enough blocks, to be trusted."""
    validate.positive(capacity=capacity, num_blocks=num_blocks, entries=entries, blocks=blocks)
    return min(1.0, max(0.001, entries / capacity, blocks / num_blocks))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Block reads of a table over the DRAM that it is given."""

    budgets: tuple[float, ...]
    """Bytes, rising."""
    reads: tuple[float, ...]
    """Block reads of the trace at each budget, with the best setting there."""
    settings: tuple[Setting, ...]
    """That setting."""


def read_curve(
    trace: Trace,
    layout: Layout,
    counts: np.ndarray,
    budgets: Sequence[float],
    vector_bytes: int,
    *,
    settings: Sequence[Setting] = SETTINGS,
    entries: int = 300,
    skip: int = 0,
    seed: int = 0,
    tell: Callable[[], None] | None = None,
) -> Curve:
    """Measures a table's curve with miniature caches and picks the setting for each budget.

    Args:
        trace: what to replay; the first `skip` queries warm the caches.
        counts: (rows,) lookups in training, by which the layout is `hot_first` and thresholds count.
        budgets: bytes of DRAM, rising.
        entries: least entries of a miniature cache.
        tell: is called when a setting has been tried at a budget.
    """
    best_reads, best = [], []
    for budget in budgets:
        reads = []
        for setting in settings:
            size = setting.capacity(budget, vector_bytes)
            reads.append(foretold(trace, layout, counts, setting, size, entries=entries, skip=skip, seed=seed))
            if tell:
                tell()
        best.append(settings[int(np.argmin(reads))])
        best_reads.append(min(reads))
    return Curve(budgets=tuple(budgets), reads=tuple(best_reads), settings=tuple(best))


def foretold(
    trace: Trace,
    layout: Layout,
    counts: np.ndarray,
    setting: Setting,
    capacity: int,
    *,
    entries: int = 300,
    skip: int = 0,
    seed: int = 0,
    may_replay: bool = True,
) -> float:
    """Block reads of one setting: the mean of `SAMPLES` miniatures, as one errs by the luck of its hottest blocks.

    Args:
        may_replay: where so many miniatures cost no less than the whole, the whole is replayed.
    """
    depth = depth_above(layout, counts, setting.threshold)
    rate = rate_for(capacity, layout.num_blocks, entries=entries)
    if may_replay and SAMPLES * rate >= 1:
        whole = setting.cache(min(capacity, trace.num_rows), trace.num_rows)
        return float(replay(trace, layout, whole, depth, skip=skip).block_reads)
    found = []
    for number in range(SAMPLES):
        sample = sample_blocks(trace, layout, rate, seed=seed, shift=number / SAMPLES)
        small = setting.cache(max(1, round(capacity * sample.rate)), trace.num_rows)
        found.append(sample.reads(layout, small, depth, skip=skip))
    return float(np.mean(found))
