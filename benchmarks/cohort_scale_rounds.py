"""Rounds of one cohort size, in a process of its own: what `cohort_scale` measures. Prints one JSON line."""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence

import numpy as np

import shoal
from benchmarks import simulation_ours
from benchmarks.simulation_common import BATCH, CLASSES, EACH, weights
from shoal.policy import RoundPolicy

USERS = 20_000
IMAGES = 10_000
"""Distinct images; users hold random ones of them, so that the data take the same memory whatever the cohort."""
MIB = 1 << 20


def population() -> shoal.data.Population:
    """Users of 50 images each."""
    rng = np.random.default_rng(0)
    examples = shoal.data.Examples({
        "image": rng.standard_normal((IMAGES, 32, 32, 3), dtype=np.float32),
        "label": rng.integers(0, CLASSES, IMAGES).astype(np.int32),
    })  # fmt: skip
    held = rng.integers(0, IMAGES, (USERS, EACH))
    return shoal.data.Population.from_split(examples, {f"{user:05d}": held[user] for user in range(USERS)})


def measure(cohort: int, rounds: int) -> dict[str, object]:
    """Seconds of the rounds after the first, and resident memory before the first and at its peak."""
    task = simulation_ours.task("lenet", weights("lenet"))
    task = task.replace(rounds=RoundPolicy(goal=cohort, over_selection=1.0))
    devices = population()
    before = peak_bytes()
    ends = [time.perf_counter()]
    shoal.simulate(task, devices, rounds=1 + rounds, on_round=lambda result: ends.append(time.perf_counter()))
    first, *seconds = np.diff(ends).tolist()
    return {
        "cohort": cohort, "first_s": first, "seconds": seconds, "clients": cohort, "steps": EACH // BATCH,
        "before_mib": before / MIB, "peak_mib": peak_bytes() / MIB,
    }  # fmt: skip


def peak_bytes() -> int:
    """The most memory that was resident at once until now; 0 where the system does not say."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Simulates rounds of one cohort size and prints one JSON line.")
    parser.add_argument("--cohort", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True, help="timed rounds, after one that compiles")
    given = parser.parse_args(arguments)
    print(json.dumps(measure(given.cohort, given.rounds)))


if __name__ == "__main__":
    main()
