"""What is lost when things die: nothing. Histories in virtual time, and real processes that are really killed.

Histories (`tests/fleet/histories.py`): the real Coordinator, round machine, groups and record; at each command and write the
server may die, streams break, devices forget, and with three Edges each of these may die on its own. After every history each
commit is held against what its members' updates make, and everything that a device was told against the record.

Processes: `shoal host --edges 2` and a process of eight devices, over sockets, rounds as fast as they go. The Coordinator
and an Edge are killed in turn with SIGKILL; the Edges start the one again, the host the other. Every device is in every
version, so each version has one right model: that of `shoal simulate`, undisturbed.
"""

import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks.frame import Goal, run, table
from benchmarks.recovery_task import DEVICES
from shoal.record.run import open_run

ROOT = Path(__file__).parents[1]
TASK = f"{Path(__file__).parent / 'recovery_task.py'}:task"
POLICIES = ("exact", "uniform", "surplus", "late", "patched", "stored", "asynchronous", "exact_stored")
ALIVE_S = 60.0

T = TypeVar("T")


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    histories, crashes = play(quick)
    killed = kill(2 if quick else 20)
    why = "" if not quick else "it needs the full run"
    faults = killed["lost"] + killed["twice"] + killed["other_bits"]
    goals = [
        Goal(
            "R1",
            "updates lost, counted twice, or versions with other bits, over all histories and kills",
            faults,
            "<= 0",
            why,
        ),
        Goal("R1a", "virtual histories with crashes at every command", histories, ">= 100000", why),
        Goal("R1b", "real SIGKILLs, of Coordinator and of Edge each", killed["kills"], ">= 20", why),
    ]
    return goals, {"crashes": crashes, **killed}


def play(quick: bool) -> tuple[int, int]:
    """Histories and crashes; a history that does not hold ends the benchmark."""
    each, of_edges = (40, 20) if quick else (9_500, 3_700)
    jobs = [(name, first, min(first + 1900, each), 1) for name in POLICIES for first in range(0, each, 1900)]
    jobs += [(name, 0, of_edges, 3) for name in POLICIES if name != "exact_stored"]
    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(_histories, jobs))
    total, crashes, edges = (sum(column) for column in zip(*made, strict=True))
    print(
        f"{total:,} histories, {crashes:,} crashes of the server, {edges:,} of Edges, {time.perf_counter() - begun:.0f} s: all hold"
    )
    return total, crashes + edges


def _histories(job: tuple[str, int, int, int]) -> tuple[int, int, int]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.fleet.histories", *map(str, job)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if made.returncode:
        sys.exit(f"a history does not hold:\n{made.stderr[-3000:]}")
    found = re.match(r"(\d+) histories, (\d+) crashes, (\d+) of Edges", made.stdout)
    assert found is not None, made.stdout
    return int(found[1]), int(found[2]), int(found[3])


def kill(times: int) -> dict[str, Any]:
    """Kills Coordinator and Edges in turn; returns what came of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = folder / "run"
        _write_data(folder / "data")
        devices: subprocess.Popen[bytes] | None = None
        host = _start(folder, "host", TASK, "--rounds", 10**6, "--port", 0, "--edges", 2, "--run", record)
        try:
            address = _until(lambda: _found(folder / "host.log", r"listening on (\S+)"))
            devices = _start(folder, "device", "--server", address, "--data", folder / "data", "--in-process")
            _until(lambda: _version(record) >= 5)
            resumed = {"host": _kills(record, "host", times), "edge": _kills(record, "edge", times)}
            for process in _processes(record, "host"):
                process.terminate()
            _until(lambda: not _processes(record, "host") and not _processes(record, "edge"))
        finally:
            (record / "restart.json").unlink(missing_ok=True)
            for process in [*_processes(record, "edge"), *_processes(record, "host")]:
                process.kill()
            for child in (host, devices):
                if child is not None:
                    child.kill()
                    child.wait()
        return _judge(folder, record) | _tell(resumed) | {"kills": times}


def _kills(record: Path, command: str, times: int) -> list[float]:
    """Seconds from each kill to the next version."""
    rng, seconds = random.Random(command), []
    for _ in range(times):
        time.sleep(rng.uniform(0.2, 1.5))
        victims = _until(lambda: _processes(record, command))
        number = rng.randrange(len(victims))
        before, begun = _version(record), time.perf_counter()
        victims[number].send_signal(signal.SIGKILL)
        _until(lambda before=before: _version(record) > before)  # type: ignore[misc]
        seconds.append(time.perf_counter() - begun)
        _until(lambda: len(_processes(record, "edge")) == 2 and len(_processes(record, "host")) == 1)
    return seconds


def _judge(folder: Path, record: Path) -> dict[str, Any]:
    """Holds every version against that of an undisturbed run."""
    with open_run(record) as found:
        commits = list(found.store.commits(found.id))
    last = commits[-1].version
    if [commit.version for commit in commits] != list(range(last + 1)):
        sys.exit("the line has a gap")
    simulated = folder / "simulated"
    subprocess.run(
        [sys.executable, "-m", "shoal", "simulate", TASK, "--backend", "sequential", "--data", str(folder / "data"), "--rounds", str(last), "--run", str(simulated)],
        check=True, capture_output=True,
    )  # fmt: skip
    with open_run(simulated) as found:
        right = [commit.model.root for commit in found.store.commits(found.id)]
    missing = sum(len(DEVICES) - commit.members for commit in commits[1:])
    return {
        "versions": last,
        "lost": max(0, missing),
        "twice": max(0, -missing),
        "other_bits": sum(commit.model.root != root for commit, root in zip(commits, right, strict=True)),
    }


def _tell(resumed: dict[str, list[float]]) -> dict[str, Any]:
    rows, figures = [], {}
    for what, seconds in resumed.items():
        median, longest = float(np.median(seconds)), max(seconds)
        rows.append([what, len(seconds), median, longest])
        figures[f"{what}_resumes_s"] = {"median": round(median, 2), "longest": round(longest, 2)}
    table(["killed", "times", "median s to the next version", "longest s"], rows)
    return figures


def _write_data(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in DEVICES:
        x = rng.normal(size=(8, 64)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, y=x.sum(axis=1))


def _start(folder: Path, command: str, *arguments: object) -> "subprocess.Popen[bytes]":
    with (folder / f"{command}.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "shoal", command, *map(str, arguments)], stdout=log, stderr=log)


def _processes(record: Path, command: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if command in words[1:5] and any(str(record) in word for word in words):
            found.append(process)
    return found


def _version(record: Path) -> int:
    with open_run(record) as found:
        return found.store.last_version(found.id) or 0


def _found(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, path.read_text())
    return found[1] if found else None


def _until(seen: Callable[[], T]) -> T:
    end_s = time.monotonic() + ALIVE_S
    while not (made := seen()):
        if time.monotonic() > end_s:
            sys.exit(f"nothing for {ALIVE_S:.0f} s")
        time.sleep(0.02)
    return made


if __name__ == "__main__":
    run("fleet_recovery", measure, __doc__)
