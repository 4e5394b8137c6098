"""Whether a large cohort costs more per client than a small one, in time and in memory: 10, 100, 1,000 and 10,000 of 20,000 users.

LeNet (62,006 parameters), 50 images a client in five steps. Each size runs in processes of its own by `shoal.simulate` at its
default settings; the sizes take turns, so that a machine that gets slower does so for all. Seconds per client are those of rounds
after the first, whole rounds with selection, staging and commit. Memory is the peak of what was resident in the process
(`ru_maxrss`): interpreter, JAX, compiled programs and the data, 123 MB that all users share, included; beside it the
part above what was resident before the first round.

Q1: the largest seconds per client over the smallest. Q2: the largest peak over the smallest.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.simulation_turns import ROOT

TURNS: Final = 2
ROUNDS: Final[Mapping[int, int]] = {10: 20, 100: 8, 1_000: 3, 10_000: 1}
"""Cohort -> timed rounds of a turn."""
QUICK_ROUNDS: Final[Mapping[int, int]] = {10: 3, 40: 2}
LIMIT_S: Final = 600.0
"""A process that takes longer has failed."""


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    told: dict[int, list[dict[str, Any]]] = {cohort: [] for cohort in rounds}
    for turn in range(1 if quick else TURNS):
        for cohort in rounds if turn % 2 == 0 else reversed(rounds):
            told[cohort].append(_rounds_of(cohort, rounds[cohort]))
            print(f"# {cohort}: {told[cohort][-1]}", flush=True)
    figures = {cohort: _figures(cohort, turns) for cohort, turns in told.items()}
    table(
        ["cohort", "ms per client", "95 % low", "high", "first round, s", "before, MiB", "peak, MiB"],
        [[cohort, *(1e3 * s for s in f["seconds_per_client"]), f["first_s"], f["before_mib"], f["peak_mib"]] for cohort, f in figures.items()],
    )  # fmt: skip
    return _goals(figures, quick), {"cohorts": {str(cohort): found for cohort, found in figures.items()}}


def _rounds_of(cohort: int, rounds: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.cohort_scale_rounds", "--cohort", str(cohort), "--rounds", str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"The rounds of {cohort} failed: {done.stderr.strip().splitlines()[-1:]}")
    made: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return made


def _figures(cohort: int, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    seconds = [second / cohort for told in turns for second in told["seconds"]]
    return {
        "seconds_per_client": percentile_interval(seconds, 50),
        "first_s": max(told["first_s"] for told in turns),
        "before_mib": round(max(told["before_mib"] for told in turns)),
        "peak_mib": round(max(told["peak_mib"] for told in turns)),
    }


def _goals(figures: Mapping[int, Mapping[str, Any]], quick: bool) -> list[Goal]:
    what = "from cohort 10 to 10,000, the largest over the smallest"
    if quick:
        return [
            Goal("Q1", f"seconds per client {what}", None, "<= 1.2"),
            Goal("Q2", f"peak memory {what}", None, "<= 1.1"),
        ]
    middle, low, high = np.array([f["seconds_per_client"] for f in figures.values()]).T
    worst = high[np.argmax(middle)] / low[np.argmin(middle)]
    peaks = [f["peak_mib"] for f in figures.values()]
    return [
        Goal("Q1", f"seconds per client {what}", float(middle.max() / middle.min()), "<= 1.2", judged=float(worst)),
        Goal("Q2", f"peak memory {what}", max(peaks) / min(peaks), "<= 1.1"),
    ]


if __name__ == "__main__":
    run("cohort_scale", measure, __doc__ or "")
