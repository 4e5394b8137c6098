"""Which bytes move first: one server, one worker, a core each, joined by a link that is shaped in both directions (`shaped_link`).

The rate of the link is set so that all parameters take 0.25 to 4 times as long as the way forward (training: 0.5 to 2). All systems have the same stages and the same wire and take
turns; a pair is a turn of two of them in one cycle. Half of the cycles are of one life of the worker's process, half of another: how fast a process computes while bytes come differs from
one to the next. `random`, `tree`, `layer`, `tic`, `tac` as published: whole tensors, and a barrier between steps; `layer, free`
without the barrier, which is the honest rival; `tac, slices` is what shoal does. A turn of training is two steps in a row. No turn is left out; the first steps of a process,
which compile, are beside them.

T1  seconds of random order over `tac, slices`, ratio 1, the worst of the three chains: inference (T1a), training (T1b)
T2  E of `tac, slices` against the chain bound, the worst chain, inference, ratio 1
T3  seconds of `tac, slices` over `layer, free`: the worst cell where the guard is not off (T3a); what is gained on the branching and the embedding-first net at
    ratio 1, where the guard is not off (T3b)
T4  milliseconds to order 1,000 tensors, warm; the first call beside
T5  |foretold - measured| / measured makespan of `tac, slices`, the median over cells; foretold: simulated, times how much slower `layer, free` was than simulated.
    The error of the simulation alone is beside it
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.pod_step_crew import ONE_THREAD
from benchmarks.schedule_member import SYSTEMS
from benchmarks.schedule_nets import CHAINS, NETS
from benchmarks.shaped_link import Link, shaped_link
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Graph, Stage, Times, Transfer

RATIOS: Final = {"inference": (0.25, 0.5, 1.0, 2.0, 4.0), "training": (0.5, 1.0, 2.0)}
LIVES: Final = 2
"""Of the worker's process, for each net and mode."""
CYCLES: Final = 10
"""Of each life."""
FEW: Final = ["random", "layer, free", "tac, slices"]
TENSORS: Final = 1000


class Member:
    """A process at one end of the link."""

    def __init__(self, link: Link, end: int, words: Sequence[str]) -> None:
        cores = sorted(os.sched_getaffinity(0))
        pinned = ["taskset", "--cpu-list", str(cores[end % len(cores)])]
        root = Path(__file__).parent.parent
        self._process = subprocess.Popen(
            link.command(end, [*pinned, sys.executable, "-m", "benchmarks.schedule_member", *words]), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)},
        )  # fmt: skip

    def ask(self, what: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"The member ended with {self._process.wait()}.")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    warm_s, first_s = ordering()
    print(f"{TENSORS} tensors are ordered in {1e3 * warm_s:.2f} ms (the first call: {first_s:.2f} s)")
    cells: list[dict[str, Any]] = []
    with shaped_link() as link:
        print(f"the link: {link.kind}")
        server = Member(link, 0, ["--serve", link.address])
        try:
            for net in ("vgg",) if quick else NETS:
                for mode in ("inference",) if quick else ("inference", "training"):
                    cells += cells_of(link, server, net, mode, quick)
        finally:
            server.close()
    show(cells)
    detail = {"link": link.kind, "cells": cells, "ordering_s": warm_s, "first_ordering_s": first_s}
    return goals(cells, warm_s, quick), detail


def cells_of(link: Link, server: Member, net: str, mode: str, quick: bool) -> list[dict[str, Any]]:
    """One net in one mode, at all ratios."""
    ratios = (1.0,) if quick else RATIOS[mode]
    cells: list[dict[str, Any]] = [{"net": net, "mode": mode, "ratio": ratio, "lives": []} for ratio in ratios]
    for number in range(1 if quick else LIVES):
        begun = time.perf_counter()
        for cell, found in zip(cells, life(link, server, net, mode, ratios, quick), strict=True):
            cell["lives"].append(found)
        print(f"# {net}, {mode}, life {number + 1}: {time.perf_counter() - begun:.0f} s", flush=True)
    return cells


def life(link: Link, server: Member, net: str, mode: str, ratios: Sequence[float], quick: bool) -> list[dict[str, Any]]:
    """What one process of the worker finds, at all ratios."""
    worker = Member(link, 1, [])
    try:
        link.shape(None)
        asked = {"net": net, "mode": mode}
        alone = worker.ask({**asked, "servers": started(link, server, asked)})
        made = []
        for ratio in ratios:
            link.shape(alone["bytes"] / (ratio * alone["forward_s"]))
            systems = list(SYSTEMS) if ratio == 1 and not quick else FEW
            made.append({**alone, **worker.ask({"run": CYCLES, "systems": systems})})
        return made
    finally:
        worker.close()


def started(link: Link, server: Member, asked: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """Where the worker finds the server of each variant."""
    return {name: link.over(port) for name, port in server.ask(asked)["ports"].items()}


def ordering() -> tuple[float, float]:
    """Seconds to order a chain of so many tensors with random times: warm, and the first call."""
    transfers = tuple(Transfer(name=f"t{n:04d}", size_bytes=1) for n in range(TENSORS))
    stages = tuple(Stage(name=f"s{n}", after=(n - 1,) if n else (), needs=(n,)) for n in range(TENSORS))
    graph, rng, taken = Graph(transfers=transfers, stages=stages), np.random.default_rng(0), []
    for _ in range(20):
        times = Times(rng.integers(1, 10**6, TENSORS), rng.integers(1, 10**6, TENSORS))
        begun = time.perf_counter()
        fast_tac(graph, times)
        taken.append(time.perf_counter() - begun)
    return float(np.median(taken[1:])), taken[0]


def ratio_of(cell: dict[str, Any], one: str, other: str) -> tuple[float, float, float]:
    """Seconds of one system over another's, of the pairs of all lives: (median, low, high)."""
    pairs = [pair for life in cell["lives"] for pair in zip(life["seconds"][one], life["seconds"][other], strict=True)]
    return percentile_interval([a / b for a, b in pairs], 50)


def mean(cell: dict[str, Any], value: Callable[[dict[str, Any]], float]) -> float:
    """Over lives."""
    return float(np.mean([value(life) for life in cell["lives"]]))


def took_s(system: str) -> Callable[[dict[str, Any]], float]:
    """Median seconds of a step in a life."""
    return lambda life: float(np.median(life["seconds"][system]))


def efficiency(life: dict[str, Any], best: str = "chain_s") -> float:
    """E of `tac, slices` against a bound."""
    return float((life["upper_s"] - took_s("tac, slices")(life)) / (life["upper_s"] - life[best]))


def error(life: dict[str, Any]) -> float:
    """Of what the oracle foretells: the simulated makespan, by as much slower as steps in the order of layers were than theirs."""
    took, by_layers = (took_s(name)(life) for name in ("tac, slices", "layer, free"))
    foretold = life["predicted"]["tac, slices"] * by_layers / life["predicted"]["layer, free"]
    return float(abs(foretold - took) / took)


def simulated_error(life: dict[str, Any]) -> float:
    took = took_s("tac, slices")(life)
    return abs(float(life["predicted"]["tac, slices"]) - took) / took


def is_on(cell: dict[str, Any]) -> bool:
    """Whether the guard would order transfers in some life."""
    return any(life["guard"]["state"] != "off" for life in cell["lives"])


def foretold(life: dict[str, Any]) -> float:
    """Seconds of random order over ours, simulated."""
    return float(life["predicted"]["random"] / life["predicted"]["tac, slices"])


def show(cells: Sequence[dict[str, Any]]) -> None:
    table(
        ["net", "mode", "ratio", "MB/s", "forward, ms", "first steps, s", *(f"{name}, ms" for name in FEW), "random / ours", "foretold", "ours / layer", "from", "to", "S", "E", "E chain", "of each life", "error", "simulation's", "guard"],
        [
            [
                cell["net"], cell["mode"], cell["ratio"], 1e-6 * mean(cell, lambda life: life["bytes_per_s"]), 1e3 * mean(cell, lambda life: life["forward_s"]),
                mean(cell, lambda life: life["first_s"]), *(1e3 * mean(cell, took_s(name)) for name in FEW), ratio_of(cell, "random", "tac, slices")[0], mean(cell, foretold),
                *ratio_of(cell, "tac, slices", "layer, free"), mean(cell, lambda life: (life["upper_s"] - life["lower_s"]) / life["lower_s"]),
                mean(cell, lambda life: efficiency(life, "lower_s")), mean(cell, efficiency), " ".join(f"{efficiency(life):.2f}" for life in cell["lives"]),
                mean(cell, error), mean(cell, simulated_error), "on" if is_on(cell) else "off",
            ]
            for cell in cells
        ],
    )  # fmt: skip
    full = [cell for cell in cells if len(cell["lives"][0]["seconds"]) == len(SYSTEMS)]
    if full:
        print("ratio 1, every system: milliseconds of a step, median and 95th percentile")
        table(["net", "mode", *SYSTEMS], [[cell["net"], cell["mode"], *(spread(cell, name) for name in SYSTEMS)] for cell in full])  # fmt: skip


def spread(cell: dict[str, Any], system: str) -> str:
    seconds = [1e3 * s for life in cell["lives"] for s in life["seconds"][system]]
    return f"{np.median(seconds):.0f} {np.percentile(seconds, 95):.0f}"


def goals(cells: Sequence[dict[str, Any]], warm_s: float, quick: bool) -> list[Goal]:
    why = "it needs the full run" if quick else ""

    def over_random(mode: str) -> tuple[float, float] | None:
        found = [
            ratio_of(c, "random", "tac, slices")
            for c in cells
            if (c["mode"], c["ratio"]) == (mode, 1.0) and c["net"] in CHAINS
        ]
        return min(((value, low) for value, low, _ in found), key=lambda pair: pair[1], default=None)

    def judged(name: str, what: str, found: tuple[float, float] | None, bound: str, because: str = "") -> Goal:
        value, worse = found or (None, None)
        return Goal(name, what, value, bound, why=why or ("" if found else because), judged=worse)

    chains = [c for c in cells if (c["mode"], c["ratio"]) == ("inference", 1.0) and c["net"] in CHAINS]
    on = [c for c in cells if is_on(c)]
    against = [ratio_of(c, "tac, slices", "layer, free") for c in on]
    worst = max(((value, high) for value, _, high in against), key=lambda pair: pair[1], default=(1.0, 1.0))
    branching = [c for c in on if c["ratio"] == 1 and c["net"] in ("inception", "language model")]
    gains = [ratio_of(c, "layer, free", "tac, slices") for c in branching]
    least = min(((value, low) for value, low, _ in gains), key=lambda pair: pair[1], default=None)
    return [
        judged("T1a", "inference, random order over ours, the worst chain, ratio 1", over_random("inference"), ">= 1.6"),
        judged("T1b", "training, the same", over_random("training"), ">= 1.25"),
        Goal("T2", "E against the chain bound, the worst chain, inference, ratio 1", min((mean(c, efficiency) for c in chains), default=None), ">= 0.95", why=why),
        judged("T3a", f"ours over layer order, the worst of {len(on)} cells of {len(cells)} where the guard is not off", worst, "<= 1.02"),
        judged("T3b", f"layer order over ours on the branching and the embedding-first net, ratio 1, the least of {len(gains)} cells where the guard is not off", least, ">= 1.03", "the guard is off in all of them: no gain is foretold"),
        Goal("T4", f"ms to order {TENSORS} tensors, warm", 1e3 * warm_s, "<= 10"),
        Goal("T5", "|foretold - measured| / measured makespan of ours, the median over cells", float(np.median([mean(c, error) for c in cells])), "<= 0.1", why=why),
    ]  # fmt: skip


if __name__ == "__main__":
    run("schedule", measure, __doc__ or "")
