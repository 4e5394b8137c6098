"""What a store learns from a trace: where rows should lie, which cache each table should have, how much memory it should get.

1. *Placement.* A table's rows are placed by the first 70 % of its queries, above all by what a cache misses of them: hot rows
   hit wherever they lie (`placement.py`). If the other 30 % read no less of the new placement than of the present one, with
   the memory that the table has, it stays where it is. With effort `high` a second placement is made by annealing, and the one of both
   is taken that reads less of these. Copies that are asked for are made wherever the rows lie.
2. *Cache.* On the other 30 % miniature caches (`miniature.py`) tell the block reads of each setting at several sizes: the table's
   curve. Settings without neighbours are always among them, so prefetch is off where it does not pay.
3. *Memory.* It is divided along the curves' convex hulls (`divide.py`). The last point of a curve is the whole table in memory
   and no reads: a table gets there when its lookups a byte earn it.
4. *Drift.* With `most_blocks` placement goes on from the present one and only the blocks that save most are written; caches and
   memory stay. `rebalance` is the other half: it divides memory anew by what was asked of late, and writes no block.

References: Eisenman et al., 2019, Bandana, arXiv 1811.05922 (thresholds chosen by simulation; memory by hit curves); Cidon et
al., 2015, Dynacache, HotCloud (allocation on hulls).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from shoal import validate
from shoal.embed.cache import POLICIES, Cache
from shoal.embed.divide import divide, redivide
from shoal.embed.layout import Layout
from shoal.embed.miniature import SETTINGS, Curve, Setting, read_curve
from shoal.embed.partition import Settings, partition
from shoal.embed.placement import Plan, depth_above, place
from shoal.embed.progress import Meter, Tell, nobody
from shoal.embed.replicate import num_copies, with_copies
from shoal.embed.simulate import misses, replay
from shoal.embed.trace import Trace
from shoal.errors import DataError

if TYPE_CHECKING:
    from shoal.embed.store import EmbeddingStore
    from shoal.embed.table import Table

SIZES: Final = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Parts of a table in memory at which its curve is measured."""
LEAST_GAIN: Final = 0.01
"""A new placement must save such a part of the reads to be worth writing."""
ENOUGH_COPIES: Final = 0.9
"""Where a table has such a part of the copies that are wanted, none are written for their own sake."""
FEWEST: Final = 100
"""Queries that must be remembered before memory is divided by them."""

Effort = Literal["normal", "high"]
ANNEALED: Final = Settings(multilevel=True, anneal=300, passes=4)
"""What effort `high` places the misses by once more."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `EmbeddingStore.retrain` is asked for, which says what each is. Checked when made."""

    most_blocks: int | None = None
    effort: Effort = "normal"
    space: float = 0.0
    policies: Sequence[str] = ("s3-fifo", "w-tinylfu", "lru")

    def __post_init__(self) -> None:
        if self.most_blocks is not None:
            validate.whole(1, most_blocks=self.most_blocks)
        validate.one_of(get_args(Effort), effort=self.effort)
        validate.between(0, 1, space=self.space)
        validate.of_kind(tuple | list, f"some of {', '.join(POLICIES)}, in a list", policies=self.policies)
        for policy in self.policies:
            validate.one_of(POLICIES, policy=policy)
        if not self.policies:
            raise ValueError(f"Expected at least one of {', '.join(POLICIES)} in policies, got none.")
        if self.most_blocks is not None and (self.space or self.effort != "normal"):
            raise ValueError(
                f"Expected no space and no effort with most_blocks, got space={self.space!r} and effort={self.effort!r}: these "
                "are for placing all rows anew. Leave most_blocks out."
            )

    @property
    def choices(self) -> list[Setting]:
        """The caches to choose from."""
        return [setting for setting in SETTINGS if setting.policy in self.policies]


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What was learned of one table."""

    layout: Layout | None
    """Where its rows should lie; None: where they do."""
    heat: np.ndarray
    """(rows,) lookups in the part that was placed by."""
    curve: Curve
    """Block reads of the tuning part over bytes of memory."""
    present_reads: float
    """Those at present."""
    queries: int
    """Of the tuning part."""


def retrain(store: "EmbeddingStore", traces: Mapping[str, Trace], wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """See the module, and `EmbeddingStore.retrain`. The caller holds the store's writer, and has checked that rows are the tables'.

    Raises:
        DataError: a trace has too few queries to learn from.
    """
    for name, trace in traces.items():
        if len(trace) < 10:
            raise DataError(f"Expected a trace of table {name!r} with at least 10 queries, got {len(trace)}.")
    if wanted.most_blocks is not None:
        return {name: _move(store, name, trace, wanted.most_blocks, tell) for name, trace in traces.items()}
    total = _memory_for(store, traces)
    smallest = total / 2 / max(1, len(traces))
    learned = {name: learn(store._tables[name], trace, wanted, smallest, tell) for name, trace in traces.items()}
    given = divide({name: _points(store._tables[name], one.curve) for name, one in learned.items()}, total)
    return {name: _settle(store, name, learned[name], given[name], tell) for name in learned}


def rebalance(store: "EmbeddingStore", *, least_gain: float = 0.03) -> dict[str, float]:
    """Divides memory anew between the tables in blocks, and chooses their evictions, by the queries that they remember.

    Nothing changes where that saves less than `least_gain` of the reads. The caller holds the store's writer.

    Returns:
        Bytes of memory of each table that was weighed.
    """
    validate.between(0, 1, least_gain=least_gain)
    plain = [setting for setting in SETTINGS if np.isinf(setting.threshold)]
    tables = {
        name: table
        for name, table in store._tables.items()
        if table.mirror is None and table.recent is not None and len(table.recent.trace()) >= FEWEST
    }
    current = {name: float(table.record.cache_bytes) for name, table in tables.items()}
    if not tables:
        return current
    total = _memory_for(store, tables)
    smallest, curves = total / 2 / len(tables), {}
    for name, table in tables.items():
        assert table.recent is not None
        trace = table.recent.trace()
        sizes = _sizes(table, smallest)
        meter = Meter(nobody, name, len(plain) * len(sizes), "caches")
        curves[name] = _curve(table, trace, len(trace) // 3, table.layout(), trace.counts(), plain, sizes, meter)
    given = redivide(
        {name: _points(tables[name], curve) for name, curve in curves.items()},
        current,
        total_bytes=total,
        least_gain=least_gain,
    )
    if given != current:
        store._write.configure(
            {
                name: _cache_of(_setting_at(curves[name], size)) | {"cache_bytes": int(size)}
                for name, size in given.items()
            }
        )
    return given


def _memory_for(store: "EmbeddingStore", names: Iterable[str]) -> float:
    """What the store has for these tables: all that others and shadows do not take."""
    names = set(names)
    others = sum(table.record.cache_bytes for name, table in store._tables.items() if name not in names)
    shadows = sum(0 if table.shadow is None else table.shadow.nbytes for table in store._tables.values())
    return float(store.statistics().dram_bytes - others - shadows)


def learn(table: "Table", trace: Trace, wanted: Wanted, smallest: float, tell: Tell) -> Learned:
    """Placement and curve of one table; changes nothing.

    Args:
        smallest: bytes at which its curve begins at the latest.
    """
    record, choices = table.record, wanted.choices
    train, tune = Trace(trace.indptr, trace.ids, record.rows).split(0.7, 0.3)
    heat, layouts = train.counts(), _placed(table, train, wanted, tell)
    warm = train.slice(max(0, len(train) - 2 * len(tune)), len(train))
    both, skip = Trace.joined([warm, tune]), len(warm)
    present, now, sizes = table.layout(), [float(record.cache_bytes)], _sizes(table, smallest)
    plain = [setting for setting in choices if np.isinf(setting.threshold)]
    tries = len(plain) + len(choices) * (len(layouts) + len(sizes))
    meter = Meter(tell, f"{record.name}: trying caches by {len(tune):,} queries", tries, "caches")
    stays = _curve(table, both, skip, present, heat, plain, now, meter).reads[0]
    moves = [_curve(table, both, skip, layout, heat, choices, now, meter).reads[0] for layout in layouts]
    layout = layouts[int(np.argmin(moves))]
    is_better = table.mirror is not None or min(moves) < (1 - LEAST_GAIN) * stays
    copies = num_copies(record.rows, table.slots_per_block, wanted.space)
    if not is_better and len(present.replica_ids) < ENOUGH_COPIES * copies:
        layout, is_better = _copied(table, train, present, wanted), True
    where, settings = (layout, choices) if is_better else (present, plain)
    curve = _curve(table, both, skip, where, heat, settings, sizes, meter)
    meter.reach(1.0)
    as_it_is = replay(both, present, table.new_cache(), skip=skip).block_reads if table.mirror is None else 0
    return Learned(
        layout=layout if is_better else None, heat=heat, curve=curve, present_reads=as_it_is, queries=len(tune)
    )


def _placed(table: "Table", train: Trace, wanted: Wanted, tell: Tell) -> list[Layout]:
    """Where the rows might lie, by a part of the trace and a cache of the table's size; with high effort, two ways."""
    name, size = table.record.name, table.slots_per_block
    meter = Meter(tell, f"{name}: placing by {len(train):,} queries", table.record.rows, "rows")
    plan = Plan(space=wanted.space)
    found = [place(train, size, lambda: _usual_cache(table), plan, progress=meter.reach)]
    if wanted.effort == "high":
        meter = Meter(tell, f"{name}: annealing", table.record.rows, "rows")
        plan, first = replace(plan, partition=ANNEALED, rounds=1), found[0].without_copies()
        found.append(place(train, size, lambda: _usual_cache(table), plan, first=first, progress=meter.reach))
    return found


def _copied(table: "Table", train: Trace, present: Layout, wanted: Wanted) -> Layout:
    """The rows where they lie, with the copies that are wanted."""
    layout = present.without_copies()
    missed = misses(train, replay(train, layout, _usual_cache(table)))
    return with_copies(layout, missed, train.counts(), wanted.space, Plan().partition).hot_first(train.counts())


def _usual_cache(table: "Table") -> Cache:
    """An empty cache of the table's size, of the kind that serves most traces well."""
    record, setting = table.record, Setting(policy="s3-fifo", read_aware=True)
    room = setting.capacity(table.cache_room(record.cache_bytes), table.codec.row_bytes)
    return setting.cache(max(table.slots_per_block, min(room, record.rows)), record.rows)


def _sizes(table: "Table", smallest: float) -> list[float]:
    whole = table.record.rows * table.codec.row_bytes
    return sorted({min(SIZES[0] * whole, smallest), *(part * whole for part in SIZES[1:])})


def _curve(
    table: "Table",
    trace: Trace,
    skip: int,
    layout: Layout,
    heat: np.ndarray,
    settings: list[Setting],
    sizes: list[float],
    meter: Meter,
) -> Curve:
    """The table's curve over bytes of its memory, of which a part is for rows that change often."""
    rooms = [table.cache_room(int(size)) for size in sizes]
    curve = read_curve(
        trace, layout, heat, rooms, table.codec.row_bytes, settings=settings, skip=skip, tell=meter.advance
    )
    return replace(curve, budgets=tuple(sizes))


def _points(table: "Table", curve: Curve) -> list[tuple[float, float]]:
    """(bytes, reads) as far as the caller's choice of tier lets them be."""
    whole = (float(table.record.rows * table.codec.row_bytes), 0.0)
    if table.record.asked == "dram":
        return [whole]
    points = list(zip(curve.budgets, curve.reads, strict=True))
    return points if table.record.asked == "block" else [*points, whole]


def _setting_at(curve: Curve, size: float) -> Setting:
    """The setting of the largest measured size that fits."""
    return curve.settings[max(0, int(np.searchsorted(curve.budgets, size * (1 + 1e-9), side="right")) - 1)]


def _cache_of(setting: Setting) -> dict[str, Any]:
    """A setting as fields of a table's record."""
    admission = "duel" if setting.duel else "threshold"
    return {"policy": setting.policy, "admission": admission, "read_aware": setting.read_aware}


def _settle(store: "EmbeddingStore", name: str, learned: Learned, given: float, tell: Tell) -> dict[str, Any]:
    """Gives a table its memory and cache, and where that saves reads its new places."""
    table, whole = store._tables[name], store._tables[name].record.rows * store._tables[name].codec.row_bytes
    points = _points(table, learned.curve)
    sizes, at_size = [size for size, _ in points], [reads for _, reads in points]
    reads = float(np.interp(given, sizes, at_size)) / max(1, learned.queries)
    told = {"reads_before": learned.present_reads / max(1, learned.queries), "reads_after": reads, "written_blocks": 0}
    in_memory = given >= whole and table.record.asked != "block"
    setting = _setting_at(learned.curve, given)
    size = whole if in_memory else int(given)
    if in_memory:
        saved = 1024 * (points[0][1] - points[-1][1]) / max(1.0, points[-1][0] - points[0][0])
        reason = f"{saved:.3g} block reads saved a kilobyte: no other table would save more with these {size} bytes"
    else:
        reason = f"{size} bytes of memory serve it best: {reads:.3g} block reads a query foretold"
    settings = _cache_of(setting) | {"cache_bytes": size, "reason": reason, "tier": "dram" if in_memory else "block"}
    if learned.layout is None and not in_memory:
        store._write.configure(
            {name: settings | {"reason": f"{reason}; its rows stay where they are, a new placement saves no reads"}}
        )
    else:
        layout = learned.layout or table.layout()
        offered = np.zeros(layout.num_blocks, np.int16)
        if learned.layout is not None and not in_memory:
            offered = depth_above(layout, learned.heat, setting.threshold).astype(np.int16)
        told["written_blocks"] = store.place(name, layout, offered=offered, progress=tell, **settings)
    return told | _settings(store._tables[name])


def _settings(table: "Table") -> dict[str, Any]:
    record = table.record
    return {"tier": record.tier, "reason": record.reason, "policy": record.policy, "cache_bytes": record.cache_bytes}


def _move(store: "EmbeddingStore", name: str, trace: Trace, most_blocks: int, tell: Tell) -> dict[str, Any]:
    """Follows drift: goes on from the present placement and writes only the blocks that repay it."""
    table = store._tables[name]
    if table.mirror is not None:
        return _settings(table) | {"written_blocks": 0, "reads_before": 0.0, "reads_after": 0.0}
    trace = Trace(trace.indptr, trace.ids, table.record.rows)
    before = replay(trace, table.layout(), table.new_cache())
    missed = misses(trace, before)
    meter = Meter(tell, f"{name}: placing anew from where rows lie", table.record.rows, "rows")
    start = np.argsort(table.layout().slot_of, kind="stable")
    settings = replace(Plan().partition, multilevel=False)
    order = partition(missed, table.slots_per_block, settings, start=start, progress=meter.reach)
    meter.reach(1.0)
    layout = Layout.from_order(_seen_first(order, trace), table.slots_per_block).hot_first(trace.counts())
    offered = None
    if table.view.offered.any():
        counts = trace.counts()
        offered = depth_above(layout, counts, float(np.quantile(counts[counts > 0], 0.8))).astype(np.int16)
    written = store.place(name, layout, offered=offered, most_blocks=most_blocks, misses=missed)
    after = replay(trace, table.layout(), table.new_cache())
    return _settings(table) | {
        "written_blocks": written,
        "reads_before": before.reads_per_query,
        "reads_after": after.reads_per_query,
    }


def _seen_first(order: np.ndarray, train: Trace) -> np.ndarray:
    """Rows that were never asked for come last, in order of id: nothing is known of them but that."""
    seen = train.counts()[order] > 0
    return np.concatenate([order[seen], np.sort(order[~seen])])
