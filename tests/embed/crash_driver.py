"""Kills a writer at each of many points and looks at what is left. Run as a program, so that it may fork.

python crash_driver.py FOLDER POINTS: prints one JSON line: how many points, how many writers were killed, what was wrong.
A point is a call that reaches the disk (write, sync, allocate, rename, unlink): the writer dies in its place, after half
of the bytes where it writes.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from shoal.embed import EmbeddingStore, Layout, TableSpec, Trace

ROWS, DIM, STEPS = 400, 32, 36
CALLS = ("pwrite", "fsync", "fdatasync", "posix_fallocate", "replace", "unlink", "ftruncate")


def kind_of(step: int) -> str:
    """Every fourth step tidies, every eighth places anew, every eighth moves some blocks, the others update."""
    return {1: "place", 5: "move", 3: "tidy", 7: "tidy"}.get(step % 8, "update")


def values_after(step: int) -> np.ndarray:
    """What the rows are when `step` steps are done."""
    rng = np.random.default_rng(0)
    made = rng.normal(size=(ROWS, DIM)).astype(np.float32)
    for number in range(step):
        if kind_of(number) == "update":
            ids = np.random.default_rng(number).choice(ROWS, 90, replace=False)
            made[ids] = number + np.arange(DIM)
    return made


def do(store: EmbeddingStore, step: int) -> None:
    if kind_of(step) == "tidy":
        store.compact()
    elif kind_of(step) == "place":
        store.place("t", Layout.at_random(ROWS, 32, seed=step))
    elif kind_of(step) == "move":
        layout = Layout.at_random(ROWS, 32, seed=step)
        misses = Trace.of([layout.ids_of()[block].tolist() for block in (2, 5, 8)] * 2, ROWS)
        assert store.place("t", layout, misses=misses, most_blocks=3)
    else:
        ids = np.random.default_rng(step).choice(ROWS, 90, replace=False)
        store.update("t", ids, (step + np.arange(DIM)[None, :] + np.zeros((90, 1))).astype(np.float32))


def make(folder: Path) -> None:
    with EmbeddingStore.create(folder, {"t": TableSpec(rows=ROWS, dim=DIM, tier="block")}, dram="10KB") as store:
        store.load("t", values_after(0))


def write_until(folder: Path, point: int, told: int) -> None:
    """The writer: dies at the call numbered `point`, tells each step that returned. With -1 it counts the calls."""
    calls = [0]

    def deadly(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == point:
                if name == "pwrite":
                    half = len(arguments[1]) // 2 // 4096 * 4096
                    if half:
                        real(arguments[0], arguments[1][:half], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    store = EmbeddingStore.open(folder)
    for name in CALLS:
        if hasattr(os, name):
            setattr(os, name, deadly(getattr(os, name), name))
    for step in range(STEPS):
        do(store, step)
        os.write(told, f"{step + 1} {calls[0]}\n".encode())
    os._exit(0)


def run(folder: Path, point: int) -> tuple[int, int, bool]:
    """Steps that returned, calls made, and whether the writer was killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            write_until(folder, point, write)
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as file:
        lines = [line.split() for line in file]
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"the writer failed at point {point}")
    return int(lines[-1][0]) if lines else 0, int(lines[-1][1]) if lines else 0, os.WIFSIGNALED(status)


def wrong_after(folder: Path, done: int) -> str:
    """What is not as it should be after `done` steps returned; empty where all is."""
    with EmbeddingStore.open(folder) as store:
        found = store.lookup("t", np.arange(ROWS))
        if store.verify() != {"t": []}:
            return f"damaged blocks {store.verify()}"
        if not any(np.array_equal(found, values_after(step)) for step in (done, min(done + 1, STEPS))):
            return f"values are those of neither {done} nor {done + 1} steps"
        store.update("t", [1], np.zeros((1, DIM), np.float32))
        if store.lookup("t", [1]).any():
            return "it cannot be written"
    with EmbeddingStore.open(folder) as store:
        return "an update was lost" if store.lookup("t", [1]).any() else ""


def main(folder: Path, num_points: int) -> None:
    make(folder / "made")
    shutil.copytree(folder / "made", folder / "count")
    _, calls, _ = run(folder / "count", -1)
    points = np.unique(np.linspace(1, calls, num_points).astype(int))
    killed, wrong = 0, []
    for point in points.tolist():
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(folder / "made", folder / "run")
        done, _, was_killed = run(folder / "run", point)
        killed += was_killed
        if text := wrong_after(folder / "run", done):
            wrong.append(f"point {point}: {text}")
    print(json.dumps({"calls": calls, "points": len(points), "killed": killed, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
