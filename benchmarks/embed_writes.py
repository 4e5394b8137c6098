"""Writing: the budget while rows change (T1), reads meanwhile (T2), and placement after drift (T3). On a real store.

T1, T2: a table of the generator (a tenth of its rows, 128 B vectors) in a store with memory for 5 % of it, placed by its first
half. Twenty times a day 0.1, 1, 5 or 10 % of the rows change, those more likely that are asked for (1 - exp(-accesses)); the
queries of the second half run in between. The budget is 3 drive writes a day, the drive as large as the table and a fifth. A
twin store whose rows do not change answers the same queries. Also shown, and not judged: rows that change at random.

T3: the table is placed by the trace before an epoch of drift (5 % of rows change community); on the queries after it, the gain
over id order is compared: as placed before, after moving at most 10 % of the blocks, and placed anew.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.frame import Goal, run, table
from shoal.clock import ManualClock
from shoal.embed import Cache, EmbeddingStore, Layout, TableSpec, Trace
from shoal.embed.budget import DAY_S
from shoal.embed.generator import TableKind, generate, tables
from shoal.embed.placement import place

DIM, ROW_BYTES, PER_BLOCK = 32, 128, 32
REFRESHES, PER_DAY, SPARE, SHARE = 20, 3.0, 1.2, 0.05
RATES = (0.001, 0.01, 0.05, 0.10)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    scale, days = (0.05, 2) if quick else (0.1, 6)
    kind = tables(scale)[0]
    trace = generate(kind).permuted()
    learned, asked = trace.split(0.5, 0.5)
    layout = _placed(learned, kind.rows)
    rows = [_refreshes(kind.rows, learned, asked, layout, rate, days, by_access=True) for rate in RATES]
    rows += [_refreshes(kind.rows, learned, asked, layout, rate, days, by_access=False) for rate in RATES[1:]]
    table(
        ("change", "rows that", "written / budget", "most worn 1 % / budget", "written / changed", "reads", "twin", "worse by"),
        [
            (f"{100 * r['rate']:g} %", r["which"], r["of_budget"], r["worn"], r["amplification"], r["reads"], r["twin"],
             f"{100 * r['degraded']:.1f} %")
            for r in rows
        ],
    )  # fmt: skip
    drift = [_drift(kind_, quick) for kind_ in tables(scale)[: 1 if quick else 3]]
    table(
        ("table", "id order", "before drift's", "moved", "anew", "gain kept", "blocks written"),
        [
            (d["name"], d["id"], d["stale"], d["moved"], d["anew"], d["kept"], f"{100 * d['written']:.1f} %")
            for d in drift
        ],
    )
    judged = [row for row in rows if row["which"] == "are asked for"]
    why = "it needs the full run" if quick else ""
    goals = [
        Goal(
            "T1",
            "most of the write budget used, also by the most-written 1 % of blocks",
            max(max(r["of_budget"], r["worn"]) for r in judged),
            "<= 1",
            why,
        ),
        Goal("T2", "reads worse while rows change, at most", max(r["degraded"] for r in judged), "< 0.05", why),
        Goal(
            "T3",
            "placement gain kept after 5 % drift (10 % of blocks written at most)",
            min(d["kept"] for d in drift),
            ">= 0.9",
            why,
        ),
    ]
    return goals, {"rows": rows, "drift": drift, "scale": scale, "days": days}


def _placed(trace: Trace, rows: int) -> Layout:
    size = max(PER_BLOCK, rows // 20)
    return place(trace, PER_BLOCK, lambda: Cache("s3-fifo", size, rows)).hot_first(trace.counts())


def _open(folder: Path, rows: int, layout: Layout, clock: ManualClock) -> EmbeddingStore:
    size = rows * ROW_BYTES
    store = EmbeddingStore.create(
        folder, {"t": TableSpec(rows=rows, dim=DIM, tier="block")}, dram=int(SHARE * size),
        writes_per_day=PER_DAY, capacity=int(SPARE * size), clock=clock,
    )  # fmt: skip
    store.load("t", np.zeros((rows, DIM), np.float32), layout)
    return store


def _ask(store: EmbeddingStore, trace: Trace) -> int:
    """Block reads of the queries."""
    before = store.statistics().tables["t"].block_reads
    for query in range(len(trace)):
        store.lookup("t", trace.ids[trace.indptr[query] : trace.indptr[query + 1]])
    return store.statistics().tables["t"].block_reads - before


def _refreshes(
    rows: int, learned: Trace, asked: Trace, layout: Layout, rate: float, days: int, *, by_access: bool
) -> dict[str, Any]:
    rng, clock, steps = np.random.default_rng(0), ManualClock(1e9), REFRESHES * days
    chance = 1 - np.exp(-learned.counts().astype(float)) + 0.001 if by_access else np.ones(rows)
    count = max(1, int(rate * rows))
    folder = Path(tempfile.mkdtemp(prefix="shoal-writes-"))
    try:
        with _open(folder / "a", rows, layout, clock) as store, _open(folder / "b", rows, layout, clock) as twin:
            warm = asked.slice(0, len(asked) // 4)
            _ask(store, warm), _ask(twin, warm)
            begun, reads, twin_reads = store.statistics().written_bytes, 0, 0
            worn = store._tables["t"].space.wear.copy()
            parts = np.linspace(len(warm), len(asked), steps + 1).astype(int)
            for step in range(steps):
                clock.advance(DAY_S / REFRESHES)
                ids = rng.choice(rows, count, replace=False, p=chance / chance.sum())
                store.update("t", ids, rng.normal(size=(count, DIM)))
                part = asked.slice(int(parts[step]), int(parts[step + 1]))
                reads, twin_reads = reads + _ask(store, part), twin_reads + _ask(twin, part)
            wear = store._tables["t"].space.wear.astype(np.int64)
            wear[: len(worn)] -= worn
            written = store.statistics().written_bytes - begun
    finally:
        shutil.rmtree(folder)
    queries = int(parts[-1] - parts[0])
    most_worn = np.sort(wear)[-max(1, len(wear) // 100) :].mean()
    return {
        "rate": rate,
        "which": "are asked for" if by_access else "are any",
        "of_budget": written / (PER_DAY * days * SPARE * rows * ROW_BYTES),
        "worn": float(most_worn / (PER_DAY * days)),
        "amplification": written / (steps * count * ROW_BYTES),
        "reads": reads / queries,
        "twin": twin_reads / queries,
        "degraded": reads / twin_reads - 1,
    }


def _drift(kind: TableKind, quick: bool) -> dict[str, Any]:
    kind = TableKind(**{**{f: getattr(kind, f) for f in kind.__dataclass_fields__}, "drift": 0.05, "epochs": 2})
    before, after = generate(kind).permuted().split(0.5, 0.5)
    new, test = after.split(0.6, 0.4)
    folder = Path(tempfile.mkdtemp(prefix="shoal-drift-"))
    made: dict[str, Any] = {"name": kind.name}
    layouts = {
        "id": Layout.in_id_order(kind.rows, PER_BLOCK),
        "stale": _placed(before, kind.rows),
        "anew": _placed(new, kind.rows),
    }
    try:
        for name, layout in layouts.items():
            with _open(folder / name, kind.rows, layout, ManualClock(1e9)) as store:
                if name == "stale":
                    most = int(0.10 * layout.num_blocks)
                    made["stale"] = _warm_reads(store, new, test)
                    told = store.retrain({"t": new}, most_blocks=most)
                    made["written"] = told["t"]["written_blocks"] / layout.num_blocks
                    made["moved"] = _warm_reads(store, new, test)
                else:
                    made[name] = _warm_reads(store, new, test)
    finally:
        shutil.rmtree(folder)
    return made | {"kept": (made["id"] - made["moved"]) / (made["id"] - made["anew"])}


def _warm_reads(store: EmbeddingStore, warm: Trace, test: Trace) -> float:
    _ask(store, warm.slice(len(warm) // 2, len(warm)))
    return _ask(store, test) / len(test)


if __name__ == "__main__":
    run("embed_writes", measure, __doc__.splitlines()[0] if __doc__ else "")
