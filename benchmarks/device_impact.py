"""What a device process costs the machine that it is on: a foreground program's speed, and memory and processor time while it waits.

I1: a foreground program on every core, with the device's processes (`shoal device`, the demo's net in training) running and stopped (SIGSTOP),
in turn, half a second each; the slow-down is the ratio of what the foreground gets done, the median over pairs. Foregrounds: arithmetic (products of
matrices in the first-level cache), memory (copies of 64 MiB) and waking (a program that sleeps for 2 ms and then works for about 1: how long
that takes, as a user feels it). Judged at the default priority; beside it what `low` and `normal` cost, and a foreground on one core only: its neighbour is
then the device's, which no priority prevents (they share memory, and where cores are threads of one, more), but `--when idle` does.

I2: a device that has checked in and waits: of `shoal-device`, JAX-free, see `device_idle.py`; beside it `shoal device` with JAX, with conditions looked at
every few seconds: resident memory of all its processes, and processor time over a minute.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_double
from importlib.util import find_spec
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.device_idle import idle as measure_idle
from benchmarks.device_idle import idle_goals
from benchmarks.frame import Goal, percentile_interval, run, table

HERE: Final = Path(__file__).parent
TASKS: Final = HERE / "impact_task.py"
WINDOW_S: Final = 0.5
START_S: Final = 120.0
WAITS_S: Final = 60.0
SETTLES_S: Final = 20.0


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    pairs = 4 if quick else 24
    rows = []
    with tempfile.TemporaryDirectory(prefix="shoal-impact-") as scratch:
        data = _pictures(Path(scratch) / "me.npz")
        with _host(f"{TASKS}:task", Path(scratch) / "run") as server:
            for priority in ("lowest",) if quick else ("lowest", "low", "normal"):
                with _device(server, data, "--priority", priority) as device:
                    _until_it_trains(device)
                    rows += [
                        _row(device, priority, name, cores, pairs) for name in FOREGROUNDS for cores in _cores(priority)
                    ]
        with _host(f"{TASKS}:unreached", Path(scratch) / "waits") as server:
            waiting = {} if quick else {"jax": _waiting(server, data)}
    table(
        ["foreground", "cores", "priority", "slow-down %", "95 %", "device's share of a core: beside it", "alone"],
        [
            [
                r["foreground"],
                r["cores"],
                r["priority"],
                100 * r["slower"],
                f"{100 * r['low']:.1f} to {100 * r['high']:.1f}",
                r["beside"],
                r["alone"],
            ]
            for r in rows
        ],
    )
    table(
        ["runtime", "MB", "of it shared", "processor %"],
        [[n, w["mb"], w["shared_mb"], w["percent"]] for n, w in waiting.items()],
    )
    judged = max(
        (r for r in rows if r["priority"] == "lowest" and r["cores"] == os.cpu_count()), key=lambda r: r["slower"]
    )
    why = "it needs the full run" if quick else ""
    lacks = "" if find_spec("iree") is not None and find_spec("iree.compiler") is not None else "it needs shoal[iree]"
    idle = None if why or lacks else measure_idle()
    goals = [
        Goal("I1", f"slow-down of a foreground on the same cores, the worst of three ({judged['foreground']}), in %", 100 * judged["slower"], "<= 5", why,
             100 * judged["high"]),
        *idle_goals(idle, why or lacks),
    ]  # fmt: skip
    return goals, {"rows": rows, "waiting": waiting, "idle": idle}


# The device.


def _pictures(path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(
        path,
        image=rng.integers(0, 255, (600, 28, 28, 1), dtype=np.uint8),
        label=rng.integers(0, 10, 600).astype(np.int32),
    )
    return path


@contextmanager
def _host(task: str, folder: Path) -> Iterator[str]:
    ready = folder.with_suffix(".ready")
    command = [
        "host",
        task,
        "--rounds",
        "1000",
        "--port",
        "0",
        "--run",
        str(folder),
        "--ready-file",
        str(ready),
        "--minimum-group",
        "1",
    ]
    with _process(command) as process:
        end_s = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > end_s:
                sys.exit("the host did not start")
            time.sleep(0.1)
        yield ready.read_text().strip()


@contextmanager
def _device(server: str, data: Path, *options: str) -> Iterator[psutil.Process]:
    with _process(
        ["device", "--server", server, "--data", str(data), "--id", "one", "--threads", "1", *options]
    ) as process:
        yield psutil.Process(process.pid)


@contextmanager
def _process(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "shoal", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=30)


def _until_it_trains(device: psutil.Process) -> None:
    end_s = time.monotonic() + START_S
    while time.monotonic() < end_s:
        before = _cpu_s(device)
        time.sleep(2.0)
        if device.children() and _cpu_s(device) - before > 1.4:
            time.sleep(10.0)  # what compiles would be taken for training
            return
    sys.exit("the device does not train")


def _family(device: psutil.Process) -> list[psutil.Process]:
    return [device, *device.children(recursive=True)]


def _cpu_s(device: psutil.Process) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _family(device))


# I1.


def _cores(priority: str) -> tuple[int, ...]:
    every = os.cpu_count() or 1
    return (every, 1) if priority == "lowest" and every > 1 else (every,)


def _arithmetic() -> None:
    a = np.ones((64, 64), np.float32)
    for _ in range(20):
        a @ a


def _memory(source: "np.ndarray" = np.ones(8 << 20), target: "np.ndarray" = np.ones(8 << 20)) -> None:  # noqa: B008
    np.copyto(target, source)


def _waking() -> None:
    time.sleep(0.002)
    for _ in range(10):
        _arithmetic()


FOREGROUNDS: Final[dict[str, Callable[[], None]]] = {"arithmetic": _arithmetic, "memory": _memory, "waking": _waking}


def _work(name: str, done: "Synchronized[float]") -> None:
    unit = FOREGROUNDS[name]
    while True:
        unit()
        done.value += 1.0


def _row(device: psutil.Process, priority: str, name: str, cores: int, pairs: int) -> dict[str, Any]:
    alone = _share(device, 1.0 if pairs < 10 else 3.0)
    context = multiprocessing.get_context("spawn")
    counters = [context.Value(c_double, 0.0) for _ in range(cores)]
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    workers = [context.Process(target=_work, args=(name, counter), daemon=True) for counter in counters]
    try:
        for worker in workers:
            worker.start()
        while not all(counter.value > 10 for counter in counters):
            time.sleep(0.1)
        slower, used_s = [], 0.0
        for number in range(pairs):
            rates = {}
            for runs in (True, False) if number % 2 else (False, True):
                _let(device, runs)
                time.sleep(0.05)
                before = _cpu_s(device)
                rates[runs] = _rate(counters)
                used_s += (_cpu_s(device) - before) if runs else 0.0
            slower.append(rates[False] / rates[True] - 1.0)
    finally:
        _let(device, True)
        for worker in workers:
            worker.kill()
    _, low, high = percentile_interval(slower, 50)
    return {
        "foreground": name, "cores": cores, "priority": priority, "slower": median(slower), "low": low, "high": high,
        "beside": used_s / (pairs * WINDOW_S), "alone": alone,
    }  # fmt: skip


def _share(device: psutil.Process, seconds: float) -> float:
    before = _cpu_s(device)
    time.sleep(seconds)
    return (_cpu_s(device) - before) / seconds


def _rate(counters: "Sequence[Synchronized[float]]") -> float:
    before, begun_s = sum(counter.value for counter in counters), time.perf_counter()
    time.sleep(WINDOW_S)
    return (sum(counter.value for counter in counters) - before) / (time.perf_counter() - begun_s)


def _let(device: psutil.Process, run: bool) -> None:
    for process in _family(device):
        process.send_signal(signal.SIGCONT if run else signal.SIGSTOP)


# I2.


def _waiting(server: str, data: Path) -> dict[str, float]:
    with _device(server, data, "--when", "charging") as device:
        time.sleep(SETTLES_S)
        before = _cpu_s(device)
        time.sleep(WAITS_S)
        used_s = _cpu_s(device) - before
        memory = [process.memory_full_info() for process in _family(device)]
    resident, own = sum(m.rss for m in memory), sum(m.uss for m in memory)
    return {"mb": resident / 1e6, "shared_mb": (resident - own) / 1e6, "percent": 100 * used_s / WAITS_S}


if __name__ == "__main__":
    run("device_impact", measure, __doc__ or "")
