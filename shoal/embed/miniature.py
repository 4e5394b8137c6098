"""Small caches that stand for large ones: a table's block reads over DRAM, for many settings, at a few per cent of the work.

A cache of C vectors is emulated by one of R C vectors over the R-th part of the *blocks*, chosen by a hash of the block; all
vectors of a kept block are kept, all others leave their queries. (Sampling vectors, as one does for caches without blocks,
would part block-mates, and neither a shared read nor a prefetch would be seen.) Reads are scaled back by what the sample holds of
the blocks that the queries touch, as SHARDS-adj does for lookups. After a re-placement a sample is drawn anew.

References: Waldspurger, Saemundsson, Ahmad and Park, 2017, Cache modeling and optimization using miniature simulations,
USENIX ATC; Eisenman et al., 2019, Bandana, arXiv 1811.05922, section on miniature caches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal import validate
from shoal.embed.cache import Cache
from shoal.embed.layout import Layout
from shoal.embed.placement import depth_above
from shoal.embed.replicate import kept
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


def sample_blocks(trace: Trace, layout: Layout, rate: float, *, seed: int = 0) -> Sample:
    """Keeps a share of the blocks, by hash, and what the queries ask of them.

    Replicas are left out of the choice: a vector is kept with its home block.
    """
    validate.between(1e-6, 1, rate=rate)
    blocks = np.arange(layout.num_blocks, dtype=np.uint64) + np.uint64(seed * 0x9E3779B9)
    hashed = (blocks * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB) >> np.uint64(32)
    is_kept = hashed < np.uint64(rate * 2**32)
    if not is_kept.any():
        is_kept[np.argmin(hashed)] = True
    touched = np.unique(
        np.repeat(np.arange(len(trace)), np.diff(trace.indptr)) * layout.num_blocks + layout.block_of[trace.ids]
    )
    in_sample = int(is_kept[touched % layout.num_blocks].sum())
    return Sample(
        float(is_kept.mean()), len(touched) / max(1, in_sample), kept(trace, is_kept[layout.block_of[trace.ids]])
    )


def rate_for(capacity: int, *, entries: int = 300) -> float:
    """The least share of blocks at which a miniature of the cache has enough entries to be trusted."""
    validate.positive(capacity=capacity, entries=entries)
    return min(1.0, max(0.001, entries / capacity))


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
) -> Curve:
    """Measures a table's curve with miniature caches and picks the setting for each budget.

    Args:
        trace: what to replay; the first `skip` queries warm the caches.
        counts: (rows,) lookups in training, by which the layout is `hot_first` and thresholds count.
        budgets: bytes of DRAM, rising.
        entries: least entries of a miniature cache.
    """
    best_reads, best = [], []
    for budget in budgets:
        reads = [
            _reads(trace, layout, counts, setting, setting.capacity(budget, vector_bytes), entries, skip, seed)
            for setting in settings
        ]
        best.append(settings[int(np.argmin(reads))])
        best_reads.append(min(reads))
    return Curve(budgets=tuple(budgets), reads=tuple(best_reads), settings=tuple(best))


def _reads(
    trace: Trace,
    layout: Layout,
    counts: np.ndarray,
    setting: Setting,
    capacity: int,
    entries: int,
    skip: int,
    seed: int,
) -> float:
    sample = sample_blocks(trace, layout, rate_for(capacity, entries=entries), seed=seed)
    small = max(1, round(capacity * sample.rate))
    depth = depth_above(layout, counts, setting.threshold)
    return sample.reads(layout, setting.cache(small, trace.num_rows), depth, skip=skip)


def prefetch_pays(prefetched: int, prefetch_hits: int, reads: int, *, least: float = 0.05) -> bool:
    """The break-even test that keeps prefetch on: whether enough of what entered unasked was asked for in time.

    A prefetched vector that is never asked for pushes out one that may have been. Below `least` of them used, prefetch is switched
    off for the table; with fewer than a thousand reads nothing can be said yet.
    """
    return reads < 1000 or prefetched == 0 or prefetch_hits / prefetched >= least
