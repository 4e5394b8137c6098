"""How well and how fast vectors are put into blocks, against Mt-KaHyPar: fanout up to 100,000 vectors, time at a million.

Both get the queries of training (hyperedges of two or more vectors) and blocks of 32 that may not overflow: Mt-KaHyPar
with k = ceil(n / 32) and no imbalance (preset DEFAULT for quality, one thread each; LARGE_K, its fastest for many blocks, for time, two threads each).
`paper` is SHP with the paper's settings, `ours` is `Settings(multilevel=True, passes=2)`, for quality annealed besides. A rival that does not end within its limit is stopped; where it
was stopped, its time is at least that limit. It runs in an environment of its own (`benchmarks/peers/setup.sh mtkahypar`); without
that the goals are not judged.
"""

import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embed_data import PER_BLOCK, case, real_trace
from benchmarks.frame import PEERS, Goal, run, table
from shoal.embed.generator import TableKind, generate, tables
from shoal.embed.partition import Settings, fanout, partition
from shoal.embed.trace import Trace
from shoal.errors import DataError

PAPER, OURS = Settings(iterations=20), Settings(multilevel=True, passes=2)
ANNEALED = Settings(multilevel=True, anneal=300, passes=4)
QUALITY_LIMIT_S, SPEED_LIMIT_S = 150.0, 450.0
PYTHON = PEERS / "mtkahypar" / "bin" / "python"


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    has_rival = PYTHON.exists()
    if not has_rival:
        print(f"mtkahypar is not installed in {PEERS} (benchmarks/peers/setup.sh mtkahypar): no goal can be judged")
    quality = [] if not has_rival else [_quality(name, trace) for name, trace in _small(quick)]
    names = ["trace", "vectors", "pins", "paper", "ours", "mtkahypar", "paper s", "ours s", "mtkahypar s"]
    table(names, [[row[name] for name in names] for row in quality])
    speed = None if quick or not has_rival else _speed()
    why = "" if has_rival and not quick else "it needs mtkahypar and the full run"
    ratios = [row["ours"] / row["mtkahypar"] for row in quality if row["mtkahypar"]]
    complete = bool(ratios) and len(ratios) == len(quality)
    goals = [
        Goal("N1", "fanout over mtkahypar's, worst trace up to 100,000 vectors", max(ratios, default=None), "<= 1.03",
             why or ("" if complete else "mtkahypar did not end within its limit on every trace")),
        Goal("N2", "mtkahypar's time over ours, 1 M vectors and 10 M pins, two threads each", speed["ratio"] if speed else None, ">= 1", why),
    ]  # fmt: skip
    return goals, {"quality": quality, "speed": speed}


def _small(quick: bool) -> list[tuple[str, Trace]]:
    real = real_trace()
    found = [] if real is None else [("real", case("real", real, is_real=True).train)]
    if quick:
        return [("table1, 5,000 rows", case("", generate(tables(0.05)[0]).trace).train)]
    found += [(f"table{n} x 0.1", case("", generate(tables(0.1)[n - 1]).trace).train) for n in (1, 3, 6)]
    wide = TableKind(name="wide", rows=100_000, mean_bag=8, compulsory=0.15, cold=0.1, seed=3)
    return [*found, ("100,000 rows, bags of 8", generate(wide).trace)]


def _quality(name: str, trace: Trace) -> dict[str, Any]:
    row: dict[str, Any] = {"trace": name, "vectors": int((trace.counts() > 0).sum()), "pins": trace.num_lookups}
    for who, settings in (("paper", PAPER), ("ours", ANNEALED)):
        row[who], row[f"{who} s"] = _timed(trace, settings)
    block_of, seconds = _rival(trace, "DEFAULT", QUALITY_LIMIT_S)
    row["mtkahypar"] = None if block_of is None else fanout(trace, block_of)
    row["mtkahypar s"] = seconds
    print(row, flush=True)
    return row


def _timed(trace: Trace, settings: Settings, threads: int = 1) -> tuple[float, float]:
    begun = time.perf_counter()
    order = partition(trace, PER_BLOCK, settings, threads=threads)
    seconds = time.perf_counter() - begun
    block_of = np.empty(trace.num_rows, np.int64)
    block_of[order] = np.arange(trace.num_rows) // PER_BLOCK
    return fanout(trace, block_of), seconds


def _speed() -> dict[str, Any]:
    kind = TableKind(name="million", rows=1_050_000, mean_bag=10, compulsory=0.095, cold=0.1, seed=4)
    trace = generate(kind).trace
    ours, ours_s = _timed(trace, OURS, threads=2)
    block_of, seconds = _rival(trace, "LARGE_K", SPEED_LIMIT_S, threads=2)
    rival = None if block_of is None else fanout(trace, block_of)
    found = {
        "vectors": int((trace.counts() > 0).sum()), "pins": trace.num_lookups, "ours": ours, "ours s": ours_s,
        "mtkahypar": rival, "mtkahypar s": seconds, "ratio": seconds / ours_s, "rival was stopped": rival is None,
    }  # fmt: skip
    print(found, flush=True)
    return found


def _rival(trace: Trace, preset: str, limit_s: float, threads: int = 1) -> tuple[np.ndarray | None, float]:
    """The rival's blocks, (rows,), and its seconds without building its input; None and the limit where it was stopped."""
    script = Path(__file__).parent / "peers" / "blocks.py"
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npz"
        np.savez(given, indptr=trace.indptr, ids=trace.ids, rows=trace.num_rows, per_block=PER_BLOCK)
        with subprocess.Popen(
            [str(PYTHON), str(script), str(given), preset, str(made), str(threads)], stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout
            while (line := child.stdout.readline()) and line.strip() != "ready":  # what the rival itself says
                pass
            try:
                child.wait(limit_s if line else None)
            except subprocess.TimeoutExpired:
                child.kill()
                return None, limit_s
        if child.returncode:
            raise DataError(f"mtkahypar failed with {child.returncode}")
        with np.load(made) as found:
            return found["block_of"], float(found["seconds"])


if __name__ == "__main__":
    run("embed_partition", measure, __doc__ or "")
