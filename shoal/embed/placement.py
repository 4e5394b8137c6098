"""Where vectors should lie: the ways of the paper, and ours, which knows the cache.

`place` is ours. It partitions the queries in several levels (`partition.Settings.multilevel`), replays the trace over the
outcome and a cache, and partitions again what was *missed*, with the whole queries at a small weight beside it: a vector that
the cache holds anyway takes no part in choosing neighbours. The last misses decide which vectors get further copies
(`replicate.py`). Vectors never seen come after all others in order of id: they are as cold as can be told, and
neighbours in id were often made together. `by_values` orders by k-means for tables without a trace.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from shoal import validate
from shoal.embed.cache import Cache
from shoal.embed.layout import Layout
from shoal.embed.partition import Settings, fanout, partition
from shoal.embed.progress import Share, nobody, parts
from shoal.embed.replicate import with_copies
from shoal.embed.simulate import misses, replay
from shoal.embed.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How `place` works."""

    partition: Settings = field(default_factory=lambda: Settings(multilevel=True, passes=2))
    rounds: int = 2
    """Times that the misses are placed anew; 0 is placement blind to the cache."""
    queries_weight: float = 0.1
    """Weight of a whole query beside its misses."""
    space: float = 0.0
    """Blocks of copies over the table's, 0 to 1: with 0.2 a fifth of the rows have a copy, for a fifth more storage."""

    def __post_init__(self) -> None:
        validate.whole(0, rounds=self.rounds)
        validate.not_negative(queries_weight=self.queries_weight)
        validate.between(0, 1, space=self.space)


def place(
    trace: Trace, vectors_per_block: int, new_cache: Callable[[], Cache], plan: Plan | None = None,
    *, first: Layout | None = None, threads: int = 1, progress: Share | None = None,
) -> Layout:  # fmt: skip
    """The layout for a trace and a cache of the kind that will stand before it.

    Args:
        new_cache: makes an empty cache; called once a round.
        first: where it begins, if a placement blind to the cache has been made and found good; else it is made
            here, and id order kept where it does not carry over to queries that it was not learnt from.
        progress: is told the share done.
    """
    plan, progress = plan or Plan(), progress or nobody
    layout = _learned(trace, vectors_per_block, new_cache, plan, first, threads, progress)
    if plan.space:
        missed = misses(trace, replay(trace, layout, new_cache()))
        layout = with_copies(layout, missed, trace.counts(), plan.space, plan.partition)
    progress(1.0)
    return layout.hot_first(trace.counts())


def _learned(
    trace: Trace, vectors_per_block: int, new_cache: Callable[[], Cache], plan: Plan, first: Layout | None,
    threads: int, progress: Share,
) -> Layout:  # fmt: skip
    """Where the vectors lie, without copies."""
    learns = first is None
    check, blind, *rounds = parts(progress, [2 * learns, 3 * learns, *[6] * plan.rounds])
    if first is None:
        if is_patternless(trace, vectors_per_block, plan.partition, progress=check):
            return Layout.in_id_order(trace.num_rows, vectors_per_block)
        order = partition(trace, vectors_per_block, plan.partition, threads=threads, progress=blind)
        first = Layout.from_order(order, vectors_per_block)
    layout = first
    for number, tell in enumerate(rounds):
        missed = misses(trace, replay(trace, layout, new_cache()))
        layout = _placed(trace, missed, vectors_per_block, plan, number, threads, tell)
    return layout


def _placed(
    trace: Trace, missed: Trace, vectors_per_block: int, plan: Plan, number: int, threads: int, progress: Share
) -> Layout:
    """The misses placed, with the whole queries at a small weight."""
    weights = np.repeat([1.0, plan.queries_weight], len(trace))
    settings = replace(plan.partition, seed=plan.partition.seed + number + 1)
    both = Trace.joined([missed, trace])
    order = partition(both, vectors_per_block, settings, weights=weights, threads=threads, progress=progress)
    return Layout.from_order(order, vectors_per_block)


def is_patternless(
    trace: Trace, vectors_per_block: int, settings: Settings, *, least_gain: float = 0.02, progress: Share | None = None
) -> bool:
    """Whether a placement learnt from the first two thirds does not carry over to the last: then id order is as good.

    Where the gain over id order on queries that were not learnt from is below `least_gain`, moving vectors is not worth it.
    """
    learnt, held_out = trace.split(2, 1)
    if not learnt.num_lookups or not held_out.num_lookups:
        return True
    order = partition(learnt, vectors_per_block, settings, progress=progress)
    block_of = np.empty(trace.num_rows, np.int64)
    block_of[order] = np.arange(trace.num_rows) // vectors_per_block
    in_id_order = fanout(held_out, np.arange(trace.num_rows) // vectors_per_block)
    return bool(fanout(held_out, block_of) > (1 - least_gain) * in_id_order)


def depth_above(layout: Layout, counts: np.ndarray, threshold: float) -> np.ndarray:
    """How many vectors at the head of each block were asked for more than `threshold` times: (num_blocks,) int32.

    The layout must be `hot_first(counts)`. Bandana's prefetch admission, as `simulate.replay` and the store take it.
    """
    ids = layout.ids_of()
    heat = np.where(ids >= 0, counts[np.maximum(ids, 0)], -1)
    return np.asarray(np.sum(heat > threshold, axis=1), np.int32)


def by_values(
    values: np.ndarray, vectors_per_block: int, *, seed: int, clusters: int = 256, iterations: int = 10
) -> np.ndarray:
    """Orders vectors by recursive k-means on their values: (rows,) ids, near ones together.

    Bandana's two-stage k-means (256 clusters, then clusters inside them), carried on until a cluster fits a block.
    `clusters=rows // vectors_per_block` is flat k-means; its time is rows x clusters.

    Args:
        values: (rows, dim) float.
    """
    validate.positive(vectors_per_block=vectors_per_block, clusters=clusters, iterations=iterations)
    rng = np.random.default_rng(seed)
    order: list[np.ndarray] = []
    waiting = [np.arange(len(values))]
    while waiting:
        members = waiting.pop()
        number = min(clusters, len(members) // vectors_per_block)
        if number < 2:
            order.append(members)
            continue
        label = _k_means(values[members].astype(np.float32), number, iterations, rng)
        groups = [members[label == k] for k in range(number) if np.any(label == k)]
        if len(groups) == 1:
            order.append(members)
            continue
        waiting.extend(reversed(groups))
    return np.concatenate(order)


def _k_means(values: np.ndarray, clusters: int, iterations: int, rng: np.random.Generator) -> np.ndarray:
    """Lloyd's algorithm from random members: the cluster of each vector, (n,)."""
    centres = values[rng.choice(len(values), clusters, replace=False)]
    label = np.zeros(len(values), np.int64)
    for _ in range(iterations):
        label = _nearest(values, centres)
        sums = np.zeros_like(centres)
        np.add.at(sums, label, values)
        size = np.bincount(label, minlength=clusters)[:, None]
        centres = np.where(size > 0, sums / np.maximum(size, 1), centres).astype(np.float32)
    return label


def _nearest(values: np.ndarray, centres: np.ndarray) -> np.ndarray:
    offset = (centres**2).sum(1)
    parts = [
        np.argmin(offset - 2 * values[begin : begin + 8192] @ centres.T, axis=1)
        for begin in range(0, len(values), 8192)
    ]
    return np.concatenate(parts)
