"""From an assignment to a device's first local step, over slow links: what a device does while its model of 20 MB arrives.

A real host and a real device process, a core each, joined by a link that is shaped to 5, 20 and 100 Mbit/s in both directions (`shaped_link`). Each session is a device that nobody knew before: it fetches the plan, starts the child that runs programs, fetches the model, takes its steps, reports, and is counted. Two ways take turns:

    whole     the child is started and programs are compiled when the model is there
    ahead     while it arrives: what shoal does

with programs that were never compiled here (cold: a device's first session for a task), and with those that were (warm: later ones; they are read from the cache).

L1  seconds from assignment to the end of the first block of steps, whole over ahead, where it can win: the best of the six cells. Whole sessions, to `counted`, are beside it.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, percentile_interval, run, table
from benchmarks.pod_step_crew import ONE_THREAD
from benchmarks.shaped_link import Link, shaped_link

MBIT: Final = (5, 20, 100)
PAIRS: Final = {5: 2, 20: 5, 100: 12}
WAYS: Final = ("whole", "ahead")
PORT: Final = 8577
TASK: Final = """
import jax, jax.numpy as jnp, optax, shoal

WIDTH, LAYERS = 1000, 5

def init(key):
    return {f"layer{n}": jax.random.normal(jax.random.fold_in(key, n), (WIDTH, WIDTH)) * WIDTH**-0.5 for n in range(LAYERS)}

def loss(params, state, batch, key):
    x = batch["x"]
    for n in range(LAYERS):
        x = jnp.tanh(x @ params[f"layer{n}"])
    return jnp.mean(jnp.square(x - batch["x"]), axis=1)

task = shoal.Task(
    name="slow-link", init=init, loss=loss, batch={"x": ((WIDTH,), "float32")}, local=shoal.Local(optimizer=optax.adam(1e-3), batch_size=32, max_examples=256),
    rounds=shoal.RoundPolicy(goal=1, minimum_group=1, over_selection=1.0),
)
"""


class Started:
    """A `Runner` that notes when its first block was done; `is_whole`: it starts when it is given the model."""

    def __init__(self, inner: Any, seen: dict[str, float], *, is_whole: bool) -> None:
        self._inner, self._seen, self._is_whole = inner, seen, is_whole

    def compile(self) -> float:
        return 0.0 if self._is_whole else float(self._inner.compile())

    def set_model(self, root: str, tensors: Any) -> None:
        if self._is_whole:
            self._is_whole = False
            self._inner.compile()
        self._inner.set_model(root, tensors)

    def block(self, *given: Any) -> None:
        self._inner.block(*given)
        if "step" not in self._seen:
            self._inner.carry()  # it is done, not only begun
            self._seen["step"] = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def session(asked: dict[str, Any]) -> dict[str, float]:
    """One device's, from its beginning until its update is counted."""
    from shoal.data.store import Examples
    from shoal.fleet.device import Device
    from shoal.fleet.device_host import DeviceHost
    from shoal.fleet.grpc_link import GrpcLink
    from shoal.plan.child import ChildRunner
    from shoal.plan.stablehlo import this_runtime

    seen: dict[str, float] = {}
    runners: list[Any] = []

    def make(plan: Any) -> Any:
        inner = ChildRunner(plan, threads=1, priority="normal", cache=Path(asked["cache"]))
        runners.append(inner)
        return Started(inner, seen, is_whole=asked["way"] == "whole")

    def look(device: Device) -> None:
        if device.progress.stage == "fetching":
            seen.setdefault("assigned", time.perf_counter())

    x = np.random.default_rng(0).normal(size=(256, 1000)).astype(np.float32)
    device = Device(
        asked["name"], lambda: Examples({"x": x}), link=GrpcLink(asked["server"]), host=DeviceHost(make_runner=make, runtime=this_runtime()),
        rng=np.random.default_rng(0), on_progress=look,
    )  # fmt: skip
    running = asyncio.create_task(device.run())
    while not device.progress.counted:
        if running.done():
            running.result()
            raise RuntimeError("The device ended before its update was counted.")
        await asyncio.sleep(0.005)
    counted = time.perf_counter()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    for runner in runners:
        runner.close()
    return {"step_s": seen["step"] - seen["assigned"], "session_s": counted - seen["assigned"]}


def member() -> None:
    """A line of JSON for each session."""
    for line in sys.stdin:
        print(json.dumps(asyncio.run(session(json.loads(line)))), flush=True)


def pinned(link: Link, end: int, words: Sequence[str]) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    return link.command(end, ["taskset", "--cpu-list", str(cores[end % len(cores)]), sys.executable, *words])


def measured(link: Link, folder: Path, quick: bool) -> list[dict[str, Any]]:
    (folder / "task.py").write_text(TASK)
    server = "{}:{}".format(*link.over(PORT))
    root = Path(__file__).parent.parent
    environ = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(root)}
    words = [
        "-m",
        "shoal",
        "host",
        "task.py",
        "--rounds",
        "1000",
        "--address",
        link.address,
        "--port",
        str(PORT),
        "--insecure",
        "--run",
        "run",
    ]
    cells: list[dict[str, Any]] = []
    with (folder / "log").open("w") as log:
        host = subprocess.Popen(pinned(link, 0, words), cwd=folder, stdout=log, stderr=log, env=environ)
        worker = subprocess.Popen(
            pinned(link, 1, ["-m", "benchmarks.schedule_fleet", "--member"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            cwd=root, env=environ,
        )  # fmt: skip
        try:
            while "listening on" not in (folder / "log").read_text():
                assert host.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            numbers = count()

            def turn(way: str, kind: str) -> Any:
                name = f"device{next(numbers)}"
                cache = folder / ("warm" if kind == "warm" else name)
                return asked_of(worker, {"name": name, "way": way, "server": server, "cache": str(cache)})

            turn("ahead", "warm")  # fills the cache
            for rate in (100,) if quick else MBIT:
                link.shape(1e6 * rate / 8)
                for kind in ("cold", "warm"):
                    cell: dict[str, Any] = {"mbit": rate, "programs": kind, **{way: [] for way in WAYS}}
                    for pair in range(2 if quick else PAIRS[rate]):
                        for way in WAYS if pair % 2 == 0 else WAYS[::-1]:
                            cell[way].append(turn(way, kind))
                            print(
                                f"# {rate} Mbit/s, {kind}, {way}: first step after {cell[way][-1]['step_s']:.2f} s",
                                flush=True,
                            )
                    cells.append(cell)
        finally:
            for process in (worker, host):
                process.terminate()
                process.wait()
    return cells


def asked_of(worker: "subprocess.Popen[str]", what: dict[str, Any]) -> Any:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(json.dumps(what) + "\n")
    worker.stdin.flush()
    for line in worker.stdout:
        if re.match(r"\{", line):
            return json.loads(line)
    raise RuntimeError("The device's process ended.")


def over(cell: dict[str, Any], what: str) -> tuple[float, float, float]:
    """Seconds of whole over those of ahead, of pairs."""
    pairs = zip(cell["whole"], cell["ahead"], strict=True)
    return percentile_interval([one[what] / other[what] for one, other in pairs], 50)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    with shaped_link() as link, tempfile.TemporaryDirectory() as folder:
        print(f"the link: {link.kind}")
        cells = measured(link, Path(folder), quick)
    table(
        ["Mbit/s", "programs", *(f"{way}, s to the first step" for way in WAYS), "whole / ahead", "from", "to", "sessions"],
        [
            [
                cell["mbit"], cell["programs"], *(float(np.median([each["step_s"] for each in cell[way]])) for way in WAYS), *over(cell, "step_s"),
                over(cell, "session_s")[0],
            ]
            for cell in cells
        ],
    )  # fmt: skip
    best = max((over(cell, "step_s") for cell in cells), key=lambda found: found[1])
    why = "it needs the full run" if quick else ""
    goal = Goal("L1", "assignment to first local step, whole over ahead, the best of the cells", best[0], ">= 1.5", why=why, judged=best[1])  # fmt: skip
    return [goal], {"link": link.kind, "cells": cells}


if __name__ == "__main__":
    member() if "--member" in sys.argv else run("schedule_fleet", measure, __doc__ or "")
