"""One of two workers runs at a third of its speed: time to a target, synchronous, stale-synchronous and asynchronous. Real processes, one server.

The straggler is stopped and let go by turns (SIGSTOP 40 ms, SIGCONT 20 ms), so that nothing in the program knows of it. A perceptron by SGD with momentum on
Fashion-MNIST; the clock runs from the first version (after 40 steps of the first worker) to the first one with 84 % on the test set. Three seeds; the ways take turns.

A1: seconds of synchronous training over those of the better of the two others, the median of the seeds.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.frame import Goal, run, table
from shoal.record.run import open_run

TASK: Final = """
import optax, shoal
from shoal.cli.task_argument import load_task

task = load_task("examples/pod/mlp.py").replace(local=shoal.Local(optimizer=optax.sgd(0.02, momentum=0.9), batch_size=128))
"""
WAYS: Final = {"synchronous": "0", "stale-synchronous, 4 steps": "4", "asynchronous": "any"}
SEEDS: Final = 3
TARGET, QUICK_TARGET = 0.84, 0.7
STEPS, EVERY = 2000, 40
STOPPED_S, RUNNING_S = 0.04, 0.02


def seconds_to_target(staleness: str, seed: int, target: float) -> tuple[float, int]:
    """Seconds, and steps of the first worker; infinite where it is not reached."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "task.py").write_text(TASK)
        words = [
            "train", str(folder / "task.py"), "--data", "name:fashion-mnist", "--steps", str(STEPS), "--commit-every", str(EVERY), "--workers", "2",
            "--servers", "1", "--staleness", staleness, "--order", "layer", "--checkpoint-every", str(STEPS), "--seed", str(seed), "--run", str(folder / "run"),
        ]  # fmt: skip
        with (folder / "log").open("w") as log:
            process = subprocess.Popen([sys.executable, "-m", "shoal", *words], stdout=log, stderr=log)
            try:
                return _watched(process, folder, target)
            finally:
                process.terminate()
                process.wait()


def _watched(process: "subprocess.Popen[bytes]", folder: Path, target: float) -> tuple[float, int]:
    while not (rows := _versions(folder)):
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        time.sleep(0.1)
    with _slowed(_second_worker(process.pid)):
        while process.poll() is None and not any(accuracy >= target for _, accuracy, _ in rows):
            time.sleep(0.2)
            rows = _versions(folder)
    for version, accuracy, at_s in _versions(folder):
        if accuracy >= target:
            return at_s - rows[0][2], version * EVERY
    return float("inf"), STEPS


def _versions(folder: Path) -> list[tuple[int, float, float]]:
    """Of each version but the first its number, accuracy, and when it was there."""
    try:
        with open_run(folder / "run") as found:
            versions, values = found.history("accuracy")
            made = {commit.version: commit.created_s for commit in found.store.commits(found.id)}
        return [(int(v), float(a), made[int(v)]) for v, a in zip(versions, values, strict=True) if int(v) in made]
    except Exception:  # it is not there yet
        return []


def _second_worker(supervisor: int) -> int:
    """The process of worker 1: of those that train the second to have been started (the server is the third)."""
    children = psutil.Process(supervisor).children(recursive=True)
    training = [c for c in children if "shoal.cli.train_pod" in " ".join(c.cmdline()) and c.net_connections()]
    return sorted(training, key=lambda child: (child.create_time(), child.pid))[1].pid


@contextmanager
def _slowed(pid: int) -> Iterator[None]:
    """At a third of its speed."""
    is_over = threading.Event()

    def turns() -> None:
        while not is_over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STOPPED_S)
            os.kill(pid, signal.SIGCONT)
            time.sleep(RUNNING_S)

    thread = threading.Thread(target=turns, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    for seed in range(1 if quick else SEEDS):
        for turn in range(len(WAYS)):
            way = list(WAYS)[(turn + seed) % len(WAYS)]
            found[way].append(seconds_to_target(WAYS[way], seed, QUICK_TARGET if quick else TARGET))
            print(f"# seed {seed}, {way}: {found[way][-1][0]:.1f} s", flush=True)
    table(
        ["way", "s to target", "of each seed", "steps"],
        [
            [way, float(np.median([s for s, _ in each])), " ".join(f"{s:.1f}" for s, _ in each), " ".join(str(n) for _, n in each)]
            for way, each in found.items()
        ],
    )  # fmt: skip
    synchronous, *others = (float(np.median([s for s, _ in each])) for each in found.values())
    why = "the full run has another target, and three seeds" if quick else ""
    goal = Goal("A1", "time to target with one of two workers at a third of its speed, synchronous over the better of the others", synchronous / min(others), ">= 1", why=why)  # fmt: skip
    return [goal], {"found": found}


if __name__ == "__main__":
    run("schedule_async", measure, __doc__ or "")
