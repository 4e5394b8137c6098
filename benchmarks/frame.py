"""The form of every benchmark: tables for people, then one RESULT line, kept in `benchmarks/results/NAME.jsonl`.

A goal keeps its id for ever. `--quick` runs judge what they can; a goal that needs the full run has `met: null`, says
why, and carries the last full figure. A benchmark is never a test.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.record.provenance import provenance

RESULTS = Path(__file__).parent / "results"
PEERS = Path(os.environ.get("SHOAL_PEERS", Path.home() / ".cache" / "shoal" / "peers"))
"""Where `peers/setup.sh` puts the rivals' environments, one each."""


@dataclass(frozen=True)
class Goal:
    """One goal of a benchmark and how it was met."""

    id: str
    what: str
    value: float | None
    """What was measured; None where a quick run cannot tell."""
    bound: str
    """`<= 240` or `>= 2.5`."""
    why: str = ""
    """Why it is not judged, where it is not."""
    judged: float | None = None
    """The worse end of the value's interval, where the goal is judged by that."""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.why:
            return None
        sign, limit = self.bound.split()
        value = self.value if self.judged is None else self.judged
        return bool({"<=": value <= float(limit), ">=": value >= float(limit), "<": value < float(limit)}[sign])

    def to_json(self, name: str) -> dict[str, Any]:
        made: dict[str, Any] = {
            "id": self.id,
            "what": self.what,
            "value": self.value,
            "bound": self.bound,
            "met": self.met,
        }
        if self.met is None:
            made |= {"why": self.why or "it needs the full run", "last_full": last_full(name, self.id)}
        if self.judged is not None:
            made["judged"] = self.judged
        return made


def run(name: str, measure: Callable[[bool], tuple[Sequence[Goal], dict[str, Any]]], description: str) -> None:
    """Parses `--quick`, measures, prints the RESULT line and keeps that of a full run.

    Args:
        name: of the benchmark.
        measure: quick -> goals and further figures; prints its tables itself.
        description: for `--help`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--quick", action="store_true", help="at most 50 s; goals that need more are not judged")
    quick = parser.parse_args().quick
    begun = time.perf_counter()
    goals, figures = measure(quick)
    result = {
        "name": name,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "machine": {**provenance([]), "processor": _processor()},
        "goals": [goal.to_json(name) for goal in goals],
        "quick": quick,
        "seconds": round(time.perf_counter() - begun, 1),
        **figures,
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    for goal in goals:
        sign = {True: "met", False: "NOT met", None: "not judged"}[goal.met]
        value = "-" if goal.value is None else f"{goal.value:.4g}"
        print(f"{goal.id}: {goal.what}: {value} ({goal.bound}) {sign}")
    print("RESULT " + json.dumps(result))


def last_full(name: str, goal_id: str) -> dict[str, Any] | None:
    """The goal's figure in the newest full run that is kept."""
    path = RESULTS / f"{name}.jsonl"
    if not path.exists():
        return None
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        kept = json.loads(line)
        for goal in kept["goals"]:
            if goal["id"] == goal_id and goal["met"] is not None:
                return {"value": goal["value"], "met": goal["met"], "date": kept["date"], "commit": kept["commit"]}
    return None


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table for people."""
    cells = [list(header), *([f"{c:.4g}" if isinstance(c, float) else str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def percentile_interval(values: Sequence[float], q: float, *, seed: int = 0) -> tuple[float, float, float]:
    """A percentile and its 95 % bootstrap interval: (value, low, high)."""
    data = np.asarray(values)
    rng = np.random.default_rng(seed)
    drawn = np.percentile(rng.choice(data, (2000, len(data))), q, axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(np.percentile(data, q)), float(low), float(high)


def _commit() -> str:
    made = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return made.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
