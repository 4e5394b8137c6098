"""Parameters that come while the step before is computed (`--ahead`): how much faster steps are on a slow link, and what it costs in accuracy.

Speed: one server, one worker, a core each, a link shaped in both directions (`shaped_link`) so that all parameters take half to four times as long as the way forward. Turns of eight steps
in a row, in order of layers: each step with all updates before it, or with all but the last; the first of a turn waits in both. Of a way forward F, a way back B and
parameters that take D down and up, no step takes less than max(F + B, D); in order one comes near it where what is used last is most of the bytes.

Accuracy: a perceptron on Fashion-MNIST, in one process, a worker and a server; Adam, and SGD with momentum; four seeds; 600 steps without a version between them.

P1  seconds of a step in order over ahead, D = 2 F, the worse of the nets
P2  points of accuracy that are lost, of means over seeds, over the standard deviation of seeds: the worse of the optimizers
"""

import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import optax

import shoal
from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.schedule import Member, started
from benchmarks.shaped_link import shaped_link
from shoal.cli.task_argument import load_task
from shoal.pod import ServerTrainer, Version, Watch

NETS: Final = ("chain", "language model")
RATIOS: Final = (0.5, 1.0, 2.0, 4.0)
CYCLES: Final = 6
TURN_STEPS: Final = 8
SEEDS: Final = 4
STEPS: Final = 600
OPTIMIZERS: Final = {"Adam": optax.adam(1e-3), "momentum": optax.sgd(0.02, momentum=0.9)}


def paces(quick: bool) -> list[dict[str, Any]]:
    """Seconds of steps, both ways, of each net and ratio."""
    cells: list[dict[str, Any]] = []
    with shaped_link() as link:
        print(f"the link: {link.kind}")
        server, worker = Member(link, 0, ["--serve", link.address]), Member(link, 1, [])
        try:
            for net in NETS[:1] if quick else NETS:
                link.shape(None)
                asked = {"net": net, "mode": "training"}
                alone = worker.ask({**asked, "servers": started(link, server, asked)})
                for ratio in (2.0,) if quick else RATIOS:
                    link.shape(alone["bytes"] / (ratio * alone["forward_s"]))
                    begun_s = time.perf_counter()
                    found = worker.ask({"ahead": 2 if quick else CYCLES, "steps": TURN_STEPS})
                    cells.append({"net": net, "ratio": ratio, **alone, **found})
                    print(f"# {net}, ratio {ratio:g}: {time.perf_counter() - begun_s:.0f} s", flush=True)
        finally:
            server.close()
            worker.close()
    return cells


def gain(cell: dict[str, Any]) -> tuple[float, float, float]:
    """Seconds in order over ahead, of pairs: (median, low, high)."""
    pairs = zip(cell["seconds"]["sliced"], cell["seconds"]["ahead"], strict=True)
    return percentile_interval([one / other for one, other in pairs], 50)


def accuracies(quick: bool) -> dict[str, dict[str, list[float]]]:
    """On the test set, of each optimizer, both ways, of each seed."""
    task = load_task("examples/pod/mlp.py")
    loaded = shoal.data.load("fashion-mnist")
    made: dict[str, dict[str, list[float]]] = {name: {"in order": [], "ahead": []} for name in OPTIMIZERS}
    for name, optimizer in OPTIMIZERS.items():
        local = shoal.Local(optimizer=optimizer, batch_size=128)
        for seed in range(2 if quick else SEEDS):
            for way, ahead in (("in order", False), ("ahead", True)):
                found: list[Version] = []
                trainer = ServerTrainer(task.replace(local=local), order="layer", ahead=ahead)
                steps = 100 if quick else STEPS
                trainer.train(loaded.train, steps=steps, commit_every=steps, seed=seed, held_out=loaded.test, watch=Watch(on_version=found.append))  # fmt: skip
                made[name][way].append(found[-1].metrics["accuracy"])
    return made


def lost(found: dict[str, list[float]]) -> float:
    """In standard deviations of the seeds in order."""
    spread = float(np.std(found["in order"], ddof=1))
    return (float(np.mean(found["in order"])) - float(np.mean(found["ahead"]))) / spread


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    cells = paces(quick)
    table(
        ["net", "D / F", "forward, ms", "step alone, ms", "in order, ms", "ahead, ms", "in order / ahead", "from", "to"],
        [
            [
                cell["net"], cell["ratio"], 1e3 * cell["forward_s"], 1e3 * cell["step_s"],
                *(1e3 * float(np.median(cell["seconds"][way])) for way in ("sliced", "ahead")), *gain(cell),
            ]
            for cell in cells
        ],
    )  # fmt: skip
    found = accuracies(quick)
    table(
        ["optimizer", "accuracy in order", "ahead", "of each seed in order", "ahead"],
        [
            [name, *(float(np.mean(each)) for each in ways.values()), *(" ".join(f"{a:.4f}" for a in each) for each in ways.values())]
            for name, ways in found.items()
        ],
    )  # fmt: skip
    worst = min((gain(cell) for cell in cells if cell["ratio"] == 2), key=lambda each: each[1], default=None)
    short = "it needs the full run" if quick else ""
    return [
        Goal("P1", "seconds of a step in order over ahead, D = 2 F, the worse net", worst and worst[0], ">= 1.25", why=short, judged=worst and worst[1]),
        Goal("P2", "accuracy lost by it, in standard deviations of seeds, the worse optimizer", max(lost(ways) for ways in found.values()), "<= 1", why=short),
    ], {"cells": cells, "accuracies": found}  # fmt: skip


if __name__ == "__main__":
    run("schedule_ahead", measure, __doc__ or "")
