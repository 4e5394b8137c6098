"""The cache by itself: miss ratios against libCacheSim, miniature caches against full ones, and the speed of hits.

K1: ids one by one, no blocks, no prefetch, 1, 5 and 20 % of the distinct ids. K2: block reads predicted by miniature caches of 300
entries or more (the mean of three, each of which keeps a share of the blocks, 8 to 40 %: tables of the generator's own size), against a full
replay; and what their choice of setting costs. K3: batches
of 4,096 uniform ids, all of them held by a cache of 64 MB (524,288 vectors of 128 B), through the store's own lookup, against
`numpy.take` of the same rows, interleaved.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.embed_data import PER_BLOCK, VECTOR_BYTES, Case, cases
from benchmarks.frame import PEERS, Goal, percentile_interval, run, table
from shoal.embed import kernel
from shoal.embed._compiled import compiled
from shoal.embed.cache import POLICIES, Cache, State, admit, probe, touch
from shoal.embed.layout import Layout
from shoal.embed.miniature import SETTINGS, foretold, rate_for
from shoal.embed.partition import Settings, partition
from shoal.embed.placement import depth_above
from shoal.embed.simulate import replay
from shoal.errors import DataError


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    found = cases(0.05 if quick else 0.1, (1,) if quick else (1, 3, 6))
    parity = _parity(found[:1] if quick else found)
    miniature = _miniature(cases(1.0, (1, 2, 3)) if not quick else found[:1])
    hits = _hits(40 if quick else 400)
    why = "it needs all traces" if quick else ""
    off = (
        {policy: max(row["off"] for row in parity if row["policy"] == policy) for policy in POLICIES} if parity else {}
    )
    goals = [
        Goal("K1", "miss ratio, largest distance from libcachesim's, all policies", max(off.values(), default=None),
             "<= 0.002", why or ("" if parity else "libcachesim is not installed")),
        Goal("K2a", "miniature caches: predicted block reads, largest relative error", max(r["error"] for r in miniature), "<= 0.02", why),
        Goal("K2b", "miniature caches: the chosen setting's reads over the best's, less 1, worst",
             max(r["regret"] for r in miniature), "<= 0.01", why),
        Goal("K3a", "hits, M/s on one core", hits["hits_per_s"] / 1e6, ">= 3", judged=hits["low"] / 1e6),
        Goal("K3b", "hits' speed over a bare gather's", hits["ratio"], ">= 0.6", judged=hits["ratio_low"]),
    ]  # fmt: skip
    return goals, {"parity": parity, "off": off, "miniature": miniature, "hits": hits}


def _parity(found: Sequence[Case]) -> list[dict[str, Any]]:
    python = PEERS / "libcachesim" / "bin" / "python"
    if not python.exists():
        print(f"libcachesim is not installed in {PEERS} (benchmarks/peers/setup.sh libcachesim): K1 is not judged")
        return []
    rows = []
    for one in found:
        ids = one.both.ids
        # Below 100 its W-TinyLFU has no window and keeps nothing.
        capacities = [max(100, int(share * len(np.unique(ids)))) for share in (0.01, 0.05, 0.20)]
        theirs = _their_misses(python, ids, capacities)
        for at, capacity in enumerate(capacities):
            for policy in POLICIES:
                ours = _misses(Cache(policy, capacity, one.rows).state, ids) / len(ids)
                rival = theirs[policy][at] / len(ids)
                rows.append({"trace": one.name, "capacity": capacity, "policy": policy, "ours": ours, "libcachesim": rival, "off": abs(ours - rival)})  # fmt: skip
    names = ["trace", "capacity", "policy", "ours", "libcachesim", "off"]
    table(names, [[row[name] for name in names] for row in rows])
    return rows


def _their_misses(python: Path, ids: np.ndarray, capacities: list[int]) -> dict[str, list[int]]:
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "input.npz", ids=ids, capacities=np.array(capacities))
        script = Path(__file__).parent / "peers" / "misses.py"
        done = subprocess.run(
            [str(python), str(script), f"{folder}/input.npz"], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise DataError(f"libcachesim failed: {(done.stderr.strip() or 'no word').splitlines()[-1]}")
    told: dict[str, list[int]] = json.loads(done.stdout.strip().splitlines()[-1])
    return told


@compiled
def _misses(state: State, ids: np.ndarray) -> int:
    missed = 0
    for id in ids:
        entry = probe(state, id)
        if entry >= 0:
            touch(state, entry)
        else:
            missed += 1
            admit(state, id, False)
    return missed


def _miniature(found: Sequence[Case]) -> list[dict[str, Any]]:
    """For each trace and DRAM: every setting's predicted and full reads."""
    rows = []
    for one in found:
        counts = one.train.counts()
        order = partition(one.train, PER_BLOCK, Settings(multilevel=True))
        layout = Layout.from_order(order, PER_BLOCK).hot_first(counts)
        for share in (0.05, 0.20):
            predicted, full = [], []
            for setting in SETTINGS:
                capacity = setting.capacity(share * one.rows * VECTOR_BYTES, VECTOR_BYTES)
                depth = depth_above(layout, counts, setting.threshold)
                whole = replay(one.both, layout, setting.cache(capacity, one.rows), depth, skip=len(one.tune))
                full.append(float(whole.block_reads))
                predicted.append(
                    foretold(one.both, layout, counts, setting, capacity, skip=len(one.tune), may_replay=False)
                )
            rate = rate_for(capacity, layout.num_blocks)
            errors = np.abs(np.array(predicted) / np.array(full) - 1)
            rows.append({
                "trace": one.name, "dram": share, "rate": rate, "error": float(errors.max()), "mean error": float(errors.mean()),
                "regret": full[int(np.argmin(predicted))] / min(full) - 1,
            })  # fmt: skip
    names = ["trace", "dram", "rate", "error", "mean error", "regret"]
    table(names, [[row[name] for name in names] for row in rows])
    return rows


def _hits(pairs: int) -> dict[str, float]:
    """Hits and bare gathers a second, interleaved batch by batch; the best policy for hits is S3-FIFO, which only counts."""
    capacity, words, batch = 64_000_000 // VECTOR_BYTES, VECTOR_BYTES // 4, 4096
    held = Cache("s3-fifo", capacity, capacity)
    for id in range(capacity):
        admit(held.state, id, False)
    rng = np.random.default_rng(0)
    view = kernel.View(
        where=np.arange(capacity, dtype=np.int32), id_at=np.arange(capacity, dtype=np.int32),
        cached=rng.integers(0, 2**32, (capacity, words), np.uint32), resident=np.zeros((1, words), np.uint32),
        offered=np.zeros(capacity // PER_BLOCK + 1, np.int16), read_count=np.zeros(capacity // PER_BLOCK + 1, np.uint32),
        replica_ids=np.zeros(0, np.int32), replica_slots=np.zeros(0, np.int32), replica_valid=np.zeros(0, np.uint8),
    )  # fmt: skip
    out, entries, missed = np.empty((batch, words), np.uint32), np.empty(batch, np.int32), np.empty(batch, np.int64)
    no_blocks = np.empty(0, np.int64)
    hit_s, bare_s = [], []
    for number in range(2 * pairs + 4):
        ids = rng.integers(0, capacity, batch)
        begun = time.perf_counter()
        if number % 2:
            assert kernel.probe_rows(held.state, view, ids, out, entries, missed) == (0, 0)
            kernel.settle(held.state, view, ids, entries, PER_BLOCK, no_blocks)
            hit_s.append(time.perf_counter() - begun)
        else:
            np.take(view.cached, ids, axis=0, out=out)
            bare_s.append(time.perf_counter() - begun)
    hit_s, bare_s = hit_s[2:], bare_s[2:]  # the first compile
    rates = [batch / s for s in hit_s]
    ratios = [bare / hit for bare, hit in zip(bare_s, hit_s, strict=True)]
    value, low, _ = percentile_interval(rates, 50)
    ratio, ratio_low, _ = percentile_interval(ratios, 50)
    print(f"hits: {value / 1e6:.2f} M/s, {ratio:.2f} of a bare gather")
    return {"hits_per_s": value, "low": low, "ratio": ratio, "ratio_low": ratio_low, "pairs": float(len(ratios))}


if __name__ == "__main__":
    run("embed_cache", measure, __doc__ or "")
