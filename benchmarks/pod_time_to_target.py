"""Time to a target after the rules of MLPerf training: a perceptron by Adam on Fashion-MNIST, two processes of two devices each, a core a process.

The clock starts when data is first touched and ends when an evaluation of all 10,000 test images finds 86 %; initialisation and compilation, on
zeros, are before it and have a column of their own. Five seeds, of which the best and the worst are dropped: the mean of the other three ("olympic").
All see the same examples in the same order from the same first weights, and evaluate as often. Ways take turns, another order for each seed.

M1: time of our settings (sharded; in two levels; with bfloat16 sums, too) over that of plain JAX (one `jax.jit` with shardings), the worst of the three:
the mean of the three middle ratios of the seeds.
"""

import sys
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, run, table
from benchmarks.pod_step_crew import Crew, System
from benchmarks.pod_time_member import DEVICES, WAYS

MEMBER: Final = System("jax", (sys.executable, "-m", "benchmarks.pod_time_member"), devices=DEVICES)
SEEDS: Final = 5
LIMIT_S: Final = 240.0


def olympic(values: Sequence[float]) -> float:
    """The mean without the best and the worst."""
    return float(np.mean(sorted(values)[1:-1] if len(values) > 2 else values))


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    ways, seeds = ("plain", *(list(WAYS)[:1] if quick else WAYS)), 1 if quick else SEEDS
    found: dict[str, list[Any]] = {way: [] for way in ways}
    with Crew(MEMBER, "mlp", LIMIT_S) as crew:
        crew.wait()
        for seed in range(seeds):
            for turn in range(len(ways)):
                way = ways[(turn + seed) % len(ways)]
                found[way].append(
                    max(crew.ask({"way": way, "seed": seed}), key=lambda answer: float(answer["seconds"]))
                )
                print(f"# seed {seed}, {way}: {found[way][-1]['seconds']:.1f} s", flush=True)
    table(
        ["way", "s to target", "fastest", "slowest", "steps", "accuracy", "first initialisation, s"],
        [
            [
                way, olympic(times), min(times), max(times), " ".join(str(one["steps"]) for one in each),
                float(np.mean([one["accuracy"] for one in each])), max(one["initialisation"] for one in each),
            ]
            for way, each in found.items()
            for times in [[one["seconds"] for one in each]]
        ],
    )  # fmt: skip
    ratios = {
        way: [one["seconds"] / other["seconds"] for one, other in zip(found[way], found["plain"], strict=True)]
        for way in ways[1:]
    }
    table(["way", *(f"seed {n}" for n in range(seeds)), "olympic"], [[w, *r, olympic(r)] for w, r in ratios.items()])
    worst = max(olympic(each) for each in ratios.values())
    goal = Goal(
        "M1", "time to target of our settings over plain JAX's, the worst setting", None if quick else worst, "<= 1"
    )
    return [goal], {"found": found, "ratios": ratios}


if __name__ == "__main__":
    run("pod_time_to_target", measure, __doc__ or "")
