"""I2 of `device_impact`: `shoal-device`, from an environment with nothing else, waiting for a round of a host on this machine.

Its own memory (PSS, and RSS beside) and processor time, its children's included, before its first round and after some, when the process that runs
programs has gone. The host compiles for this machine, which takes `iree-base-compiler`.
"""

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
import psutil

from benchmarks.frame import PEERS, Goal, table
from shoal.plan.iree_targets import TARGETS, this_runtime

PACKAGE: Final = Path(__file__).parents[1] / "packaging" / "shoal-device"
IDLE_S: Final = 90.0
GONE_S: Final = 40.0
"""After its last round a device's process for programs has ended."""


def device_environment() -> Path:
    """A fresh environment with `shoal-device`, made anew each time; its libraries' folder."""
    place = PEERS / "device-environment"
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    subprocess.run([place / "bin" / "pip", "install", "--quiet", PACKAGE], check=True)
    (libraries,) = place.glob("lib/python*/site-packages")
    return libraries


LINE: Final = """
import jax.numpy as jnp
import shoal

task = shoal.Task(
    name="line", init=lambda key: {"w": jnp.zeros(())}, batch={"x": ((), "float32"), "y": ((), "float32")},
    loss=lambda params, state, batch, key: jnp.square(params["w"] * batch["x"] - batch["y"]),
    local=shoal.Local(batch_size=4), rounds=shoal.RoundPolicy(goal=2, minimum_group=2),
)
"""


def idle() -> dict[str, dict[str, float]]:
    """State -> MB and percent of a core. Rounds need two devices: one waits until another comes, and when that has gone."""
    found = {}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "line.py").write_text(LINE)
        np.savez(folder / "me.npz", x=np.ones(5, np.float32), y=np.ones(5, np.float32))
        with _host(folder) as address, _device(folder, address, "one") as device:
            time.sleep(10.0)
            found["before work"] = _taken(psutil.Process(device.pid))
            with _device(folder, address, "two"):
                time.sleep(15.0)
            rounds = len(re.findall(r"version +\d+/", (folder / "host.log").read_text()))
            time.sleep(GONE_S)
            found["after rounds"] = _taken(psutil.Process(device.pid))
    print(f"between the two it took part in {rounds} rounds")
    table(
        ["a device that waits", "PSS, MB", "RSS, MB", "threads", "children", "% of a core"],
        [
            [state, *(f"{row[name]:.3g}" for name in ("pss", "rss", "threads", "children", "cpu"))]
            for state, row in found.items()
        ],
    )
    return found


@contextmanager
def _host(folder: Path) -> Iterator[str]:
    ready, here = folder / "ready", this_runtime()
    target = [name for name, made in TARGETS.items() if here.runs(made.needs(here.version))][-1]
    command = [
        "host",
        folder / "line.py",
        "--port",
        0,
        "--run",
        folder / "run",
        "--iree",
        target,
        "--rounds",
        1_000_000,
        "--ready-file",
        ready,
    ]
    windows = ["--selection-window", 100_000, "--over-selection", 1, "--reporting-window", 5]
    with _process([sys.executable, "-m", "shoal", *command, *windows], folder / "host.log"):
        while not ready.exists():
            time.sleep(0.2)
        yield ready.read_text()


@contextmanager
def _device(folder: Path, address: str, name: str) -> "Iterator[subprocess.Popen[bytes]]":
    (key,) = re.findall(r"--key ([0-9a-f]{64})", (folder / "host.log").read_text())
    command = PEERS / "device-environment" / "bin" / "shoal-device"
    given = ["--server", address, "--data", folder / "me.npz", "--key", key, "--id", name]
    with _process([command, *given], folder / f"{name}.log") as process:
        yield process


@contextmanager
def _process(command: Sequence[object], log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    with log.open("w") as file:
        process = subprocess.Popen([str(word) for word in command], stdout=file, stderr=file, cwd=log.parent)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _taken(device: psutil.Process) -> dict[str, float]:
    children = device.children(recursive=True)
    all_of_it = [device, *children]
    memory = [process.memory_full_info() for process in all_of_it]
    before, begun = sum(map(_cpu_s, all_of_it)), time.monotonic()
    time.sleep(IDLE_S)
    after = sum(map(_cpu_s, all_of_it))
    return {
        "pss": sum(each.pss for each in memory) / 1e6, "rss": sum(each.rss for each in memory) / 1e6, "threads": device.num_threads(),
        "children": len(children), "cpu": 100 * (after - before) / (time.monotonic() - begun),
    }  # fmt: skip


def _cpu_s(process: psutil.Process) -> float:
    """Processor seconds of a process so far, of threads that still run: in nanoseconds where the system tells, as ticks of 10 ms miss or overrate a
    process that wakes for microseconds."""
    threads = Path(f"/proc/{process.pid}/task")
    try:
        return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads.iterdir()) / 1e9
    except OSError:
        return sum(process.cpu_times()[:2])


def idle_goals(idle: dict[str, dict[str, float]] | None, missing: str) -> Iterator[Goal]:
    """Those of I2; `missing`: why there are no figures."""
    rows = list((idle or {}).values())
    most = {name: max((row[name] for row in rows), default=None) for name in ("pss", "cpu")}
    yield Goal(
        "I2a",
        "MB (PSS) of a JAX-free device that waits, the more of before and after rounds",
        most["pss"],
        "<= 60",
        missing,
    )
    yield Goal("I2b", "% of a core that it takes", most["cpu"], "<= 0.1", missing)
