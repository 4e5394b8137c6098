"""What a store learns from a trace: where rows should lie, which cache each table should have, how much memory it should get.

1. *Placement.* A table's rows are placed by the first 70 % of its queries, above all by what a cache misses of them: hot rows
   hit wherever they lie (`placement.py`).
2. *Cache.* On the other 30 %, replays tell the block reads of each eviction and each offer of neighbours, at several sizes:
   the table's curve. "No neighbours" is always among them, so prefetch is off where it does not pay.
3. *Memory.* It is shared out by the curves' convex hulls: always to the table where the next byte saves most reads. The last
   point of a curve is the whole table in memory and no reads: a table gets there when its lookups a byte earn it.
4. *Writing.* A table is written anew only if the replay says that this saves reads; with `most_blocks`, only the blocks that save
   most, and its memory stays as it is.

References: Eisenman et al., 2019, Bandana, arXiv 1811.05922 (thresholds chosen by simulation; memory by hit curves); Cidon et
al., 2015, Dynacache, HotCloud (allocation on hulls).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shoal import validate
from shoal.embed.cache import Cache
from shoal.embed.layout import Layout
from shoal.embed.partition import Settings, partition
from shoal.embed.placement import Plan, place
from shoal.embed.simulate import misses, replay
from shoal.embed.trace import Trace
from shoal.errors import DataError

if TYPE_CHECKING:
    from shoal.embed.store import EmbeddingStore
    from shoal.embed.table import Table

SIZES: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Parts of a table in memory at which its curve is measured."""
THRESHOLDS: Final = (0, 2, 5, 10, 20)
"""Neighbours are offered to the cache if they were asked for more often than this."""
TYPICAL: Final = 0.05
"""Part of the rows that the cache holds whose misses placement is trained on."""
RESIDENT: Final = 0.1
"""Part of a table's memory that is for rows that change often (see `Table.resident_capacity`)."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One size of a table's memory and what it is good for."""

    size_bytes: int
    reads: float
    """Block reads a query, times queries: of the tuning part."""
    policy: str
    offered: np.ndarray | None
    """(blocks,) neighbours offered; None for a whole table in memory."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned of one table."""

    layout: Layout
    curve: tuple[Point, ...]
    """By rising size, reads never rising."""
    present_reads: float
    """Reads of the tuning part with the layout that the table has now, at its present memory."""
    queries: int
    """Of the tuning part."""


def retrain(
    store: "EmbeddingStore",
    traces: Mapping[str, Trace],
    *,
    most_blocks: int | None = None,
    policies: tuple[str, ...] = ("s3-fifo", "w-tinylfu", "lru"),
    settings: Settings | None = None,
    space: float = 0.0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """See the module. The caller holds the store's writer.

    Args:
        most_blocks: write so many blocks of each table at most, those that save most reads; memory stays as it is.
        policies: evictions to choose from.
        settings: of the partitioner.
        space: further copies of rows, as a part of the rows: they save reads, and serve when a block is late or damaged.
        progress: is told what is being done.

    Returns:
        For each table: `tier`, `reason`, `policy`, `cache_bytes`, `reads_before`, `reads_after` (a query, foretold),
        `written_blocks`.

    Raises:
        DataError: a trace has too few queries to learn from, or rows that the table has not.
    """
    say = progress or (lambda text: None)
    settings = settings or Plan().partition
    for name, trace in traces.items():
        _check(store, name, trace)
    if most_blocks is not None:
        validate.positive(most_blocks=most_blocks)
        return {name: _move(store, name, trace, most_blocks, settings, say) for name, trace in traces.items()}
    learned = {
        name: learn(store._tables[name], trace, policies, settings, space, say) for name, trace in traces.items()
    }
    say("sharing out the memory")
    total = sum(store._tables[name].record.cache_bytes for name in learned)
    shares = share_out({name: _allowed(store._tables[name], one.curve) for name, one in learned.items()}, total)
    return {name: _settle(store, name, learned[name], shares[name], say) for name in learned}


def _check(store: "EmbeddingStore", name: str, trace: Trace) -> None:
    rows = store._tables[name].record.rows
    if trace.num_rows > rows and trace.num_lookups and int(trace.ids.max()) >= rows:
        raise DataError(f"Expected a trace of table {name!r} with ids below {rows}, got {int(trace.ids.max())}.")
    if len(trace) < 10:
        raise DataError(f"Expected a trace of table {name!r} with at least 10 queries, got {len(trace)}.")


def learn(
    table: "Table", trace: Trace, policies: tuple[str, ...], settings: Settings, space: float, say: Progress
) -> Learned:
    """Placement and curve of one table; changes nothing."""
    record, size = table.record, table.slots_per_block
    trace = Trace(trace.indptr, trace.ids, record.rows)
    train, tune = trace.split(0.7, 0.3)
    say(f"{record.name}: placing {record.rows:,} rows by {len(train):,} queries")
    heat = train.counts()
    plan = Plan(partition=settings, space=space)
    small = max(size, int(TYPICAL * record.rows))
    layout = place(train, size, lambda: Cache("s3-fifo", small, record.rows), plan).hot_first(heat)
    warm = train.slice(max(0, len(train) - 2 * len(tune)), len(train))
    both = Trace.joined([warm, tune])
    say(f"{record.name}: replaying {len(tune):,} queries at {len(SIZES)} sizes")
    points = [_best(table, part, both, len(warm), layout, heat, policies) for part in SIZES]
    points.append(Point(record.rows * table.codec.row_bytes, 0.0, record.policy, None))
    present = _present_layout(table)
    capacity = max(1, table.capacity)
    now = replay(both, present, Cache(record.policy, capacity, record.rows), skip=len(warm))
    return Learned(layout=layout, curve=_falling(points), present_reads=float(now.block_reads), queries=len(tune))


def _seen_first(order: np.ndarray, train: Trace) -> np.ndarray:
    """Rows that were never asked for come last, in order of id: nothing is known of them but that."""
    seen = train.counts()[order] > 0
    return np.concatenate([order[seen], np.sort(order[~seen])])


def _best(
    table: "Table", part: float, trace: Trace, skip: int, layout: Layout, heat: np.ndarray, policies: tuple[str, ...]
) -> Point:
    """The best eviction and offer of one size: first the eviction without neighbours, then the offer."""
    row_bytes, rows = table.codec.row_bytes, table.record.rows
    size_bytes = max(int(part * rows * row_bytes), 8 * row_bytes)

    def reads(policy: str, offered: np.ndarray | None) -> int:
        capacity = Cache.capacity_of((1 - RESIDENT) * size_bytes, row_bytes, policy)
        return replay(trace, layout, Cache(policy, min(rows, capacity), rows), offered, skip=skip).block_reads

    plain = {policy: reads(policy, None) for policy in policies}
    policy = min(plain, key=lambda name: plain[name])
    best, offer = plain[policy], np.zeros(layout.num_blocks, np.int16)
    members = layout.ids_of()
    heat_of = np.where(members >= 0, heat[np.maximum(members, 0)], -1)
    for threshold in THRESHOLDS:
        offered = (heat_of > threshold).sum(axis=1).astype(np.int16)
        found = reads(policy, offered)
        if found < best:
            best, offer = found, offered
    return Point(size_bytes, float(best), policy, offer)


def _present_layout(table: "Table") -> Layout:
    """Where the rows lie now; those never written as if they were in order of id behind the others."""
    where = table.state()["where"].astype(np.int64)
    absent = np.flatnonzero(where < 0)
    first = -(-(int(where.max(initial=-1)) + 1) // table.slots_per_block) * table.slots_per_block
    where[absent] = first + np.arange(len(absent))
    return Layout(where, table.slots_per_block)


def _falling(points: list[Point]) -> tuple[Point, ...]:
    """By rising size; a point that is no better than a smaller one is left out."""
    made: list[Point] = []
    for point in sorted(points, key=lambda one: one.size_bytes):
        if not made or point.reads < made[-1].reads:
            made.append(point)
    return tuple(made)


def _allowed(table: "Table", curve: tuple[Point, ...]) -> tuple[Point, ...]:
    """The points that the caller's choice of tier leaves."""
    if table.record.asked == "dram":
        return curve[-1:]
    return curve[:-1] if table.record.asked == "block" else curve


def share_out(curves: Mapping[str, tuple[Point, ...]], total_bytes: int) -> dict[str, Point]:
    """Gives each table a point of its curve: together at most `total_bytes`, with few reads in all.

    Greedy on the lower convex hulls, by reads saved a byte: optimal but for the last step, which may not fit. Every table gets its
    first point, also where these together are too much.
    """
    hulls = {name: _hull(curve) for name, curve in curves.items()}
    at = dict.fromkeys(hulls, 0)
    left = total_bytes - sum(hull[0].size_bytes for hull in hulls.values())
    while True:
        steps = [
            (_slope(hull[at[name]], hull[at[name] + 1]), name)
            for name, hull in hulls.items()
            if at[name] + 1 < len(hull) and hull[at[name] + 1].size_bytes - hull[at[name]].size_bytes <= left
        ]
        if not steps:
            return {name: hulls[name][at[name]] for name in hulls}
        _, name = max(steps)
        left -= hulls[name][at[name] + 1].size_bytes - hulls[name][at[name]].size_bytes
        at[name] += 1


def _slope(one: Point, other: Point) -> float:
    return (one.reads - other.reads) / max(1, other.size_bytes - one.size_bytes)


def _hull(curve: tuple[Point, ...]) -> list[Point]:
    made: list[Point] = []
    for point in curve:
        while len(made) >= 2 and _slope(made[-2], made[-1]) <= _slope(made[-1], point):
            made.pop()
        made.append(point)
    return made


def _settle(store: "EmbeddingStore", name: str, learned: Learned, point: Point, say: Progress) -> dict[str, Any]:
    """Writes a table as it was learned, where that saves reads."""
    table = store._tables[name]
    whole = point.offered is None
    per_query = learned.present_reads / max(1, learned.queries)
    told: dict[str, Any] = {"reads_before": per_query, "reads_after": point.reads / max(1, learned.queries)}
    if not whole and table.mirror is None and point.reads >= learned.present_reads:
        reason = (
            f"kept: the replay foretells {told['reads_after']:.3g} block reads a query anew, {per_query:.3g} as it is"
        )
        return told | _settings(table) | {"reason": reason, "reads_after": per_query, "written_blocks": 0}
    if whole:
        reason = (
            f"{_lookups_a_byte(learned, point)} block reads saved a kilobyte: no other table would save more with these "
            f"{point.size_bytes} bytes"
        )
    else:
        reason = (
            f"{point.size_bytes} bytes of memory serve it best: {told['reads_after']:.3g} block reads a query foretold"
        )
    say(f"{name}: writing {learned.layout.num_blocks:,} blocks")
    written = store.place(
        name,
        learned.layout,
        offered=np.zeros(learned.layout.num_blocks, np.int16) if point.offered is None else point.offered,
        tier="dram" if whole else "block",
        reason=reason,
        policy=point.policy,
        cache_bytes=point.size_bytes,
    )
    return told | _settings(store._tables[name]) | {"written_blocks": written}


def _lookups_a_byte(learned: Learned, point: Point) -> str:
    before = learned.curve[0]
    return f"{1024 * _slope(before, point):.3g}"


def _settings(table: "Table") -> dict[str, Any]:
    record = table.record
    return {"tier": record.tier, "reason": record.reason, "policy": record.policy, "cache_bytes": record.cache_bytes}


def _move(
    store: "EmbeddingStore", name: str, trace: Trace, most_blocks: int, settings: Settings, say: Progress
) -> dict[str, Any]:
    """Follows drift: goes on from the present placement and writes only the blocks that repay it."""
    table = store._tables[name]
    if table.mirror is not None:
        return _settings(table) | {"written_blocks": 0, "reads_before": 0.0, "reads_after": 0.0}
    trace = Trace(trace.indptr, trace.ids, table.record.rows)
    present = _present_layout(table)
    before = replay(trace, present, Cache(table.record.policy, max(1, table.capacity), table.record.rows))
    missed = misses(trace, before)
    say(f"{name}: placing anew from where rows lie")
    start = np.argsort(present.slot_of, kind="stable")
    order = _seen_first(
        partition(missed, table.slots_per_block, replace(settings, multilevel=False), start=start), trace
    )
    layout = Layout.from_order(order, table.slots_per_block).hot_first(trace.counts())
    members = layout.ids_of()
    counts = trace.counts()
    hot = np.where(members >= 0, counts[np.maximum(members, 0)], -1) > int(np.quantile(counts[counts > 0], 0.8))
    offered = hot.sum(axis=1).astype(np.int16) if table.view.offered.any() else None
    written = store.place(name, layout, offered=offered, most_blocks=most_blocks, misses=missed)
    cache = Cache(table.record.policy, max(1, table.capacity), table.record.rows)
    after = replay(trace, _present_layout(table), cache)
    return _settings(table) | {
        "written_blocks": written,
        "reads_before": before.reads_per_query,
        "reads_after": after.reads_per_query,
    }
