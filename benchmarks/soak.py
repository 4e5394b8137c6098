"""Whether anything grows: 100,000 virtual rounds, and twenty minutes of live ones.

The virtual part is the Coordinator, groups, pace and record of a live host under a virtual clock, with a record on disk and a
model of one tensor: every version is written, and swept as `Retention` says. In the last tenth of the rounds late updates are patched
in, so that sums and final forms are written and swept too. The live part is a real host with sockets, devices in another process;
its tokens are forgotten after a minute, so that their number is settled long before the second half.
The two run side by side, each on a core of its own; the whole takes about 25 minutes on a quiet machine.

S1: over the second half of each part memory (resident, and what of it is no file's), open files and the time of a round are flat, and the record
grows by no more than the row of each version that a line keeps for ever. Flat: the line of least squares rises by at most 2 % of the
mean of the half (files not at all; round time 10 %). The machine's speed changes too, by a quarter within minutes: a process beside
(`soak_clock.py`) does the same little work twice a second, arithmetic and commits of a database, and what a round takes is looked at
in milliseconds and in units of that. What grows does so in both; what only one of them has is the machine's (what else runs
slows an idle process more than a busy one), so the smaller rise counts. And of each what is certain: two standard errors of the line
through ten means, whose spread has the slow changes in it, are taken off, unless they are 20 % or more. All is told. A minute of either, as `--quick` runs it, shows that it works, no more.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks import one_parameter
from benchmarks.frame import Goal, run, table
from shoal.fleet.keys import HostKeys
from shoal.plan.build import build
from shoal.plan.manifest import Manifest
from shoal.plan.run_plan import begin_run
from shoal.policy import Late, RoundPolicy
from shoal.record.retention import SETTING, Retention
from shoal.record.sqlite import open_store
from shoal.simulate.virtual import UpdateOf, VirtualClock, VirtualFleet, drive
from shoal.simulate.virtual_population import VirtualPopulation
from shoal.tensors import Tensors

ROUNDS: Final = 100_000
PATCHED: Final = 10_000
"""Of those; a patched one takes three times as long."""
LIVE_S: Final = 1200.0
RETENTION: Final = Retention(recent=100, every=1000)
ROW_BYTES: Final = 400.0
"""Most that the record may grow with a version whose tensors are swept: the line's own row and its keys."""
SAMPLES: Final = 200
DEVICES: Final = 20
WARM: Final = 30
"""Live rounds before the first sample: programs are compiled by then."""


@dataclass(frozen=True)
class Sample:
    """How things stand after some rounds."""

    rounds: float
    rss_kb: float
    anonymous_kb: float
    files: float
    record_kb: float
    round_ms: float
    """Mean of those since the sample before."""
    clock_ms: float
    """Mean of what the work beside took meanwhile."""
    pace: float
    """The one over the other: the time of a round whatever the machine's speed."""


WHAT: Final = ("rss_kb", "anonymous_kb", "files", "record_kb", "round_ms", "clock_ms", "pace")
MOST_RISE: Final = {"rss_kb": 0.02, "anonymous_kb": 0.02, "files": 0.0, "round": 0.1}


class Samples:
    """Takes samples, at most so many, evenly."""

    def __init__(self, folder: Path, pid: int, clock: "WorkBeside") -> None:
        self._folder, self._pid, self._clock = folder, pid, clock
        self._then = (0, time.perf_counter())
        self.taken: list[Sample] = []

    def take(self, rounds: int) -> None:
        gc.collect()
        before, then_s = self._then
        now_s = time.perf_counter()
        record = sum(path.stat().st_size for path in self._folder.rglob("*") if path.is_file()) / 1000.0
        memory = _memory(self._pid)
        files = len(os.listdir(f"/proc/{self._pid}/fd"))
        mean_ms = 1000.0 * (now_s - then_s) / max(1, rounds - before)
        clock_ms = self._clock.mean_ms(then_s, now_s)
        sample = Sample(
            rounds, memory["Rss"], memory["Anonymous"], files, record, mean_ms, clock_ms, mean_ms / clock_ms
        )
        self.taken.append(sample)
        self._then = rounds, time.perf_counter()

    def rises(self) -> dict[str, float]:
        """What -> the rise over the second half by least squares, as a share of its mean; the record's in bytes a round."""
        half = self.taken[len(self.taken) // 2 :]
        rows = np.array([astuple(sample) for sample in half])
        rounds = rows[:, 0]
        assert rounds[-1] > rounds[0], "there were no rounds"
        made = {}
        for column, name in enumerate(WHAT, start=1):
            slope = float(np.cov(rounds, rows[:, column])[0, 1] / np.var(rounds, ddof=1))
            whole = 1000.0 * slope if name == "record_kb" else slope * (rounds[-1] - rounds[0]) / rows[:, column].mean()
            made["record_bytes" if name == "record_kb" else name] = float(whole)
        certain = []
        for column, name in enumerate(WHAT, start=1):
            if name in ("round_ms", "pace"):
                error = _standard_error(rounds, rows[:, column]) * (rounds[-1] - rounds[0]) / rows[:, column].mean()
                # So uncertain a rise is taken as it is seen.
                certain.append(made[name] - (2.0 * error if error < MOST_RISE["round"] else 0.0))
        return made | {"round": min(certain)}

    def mean_round_ms(self) -> list[float]:
        """Of twenty parts of the whole, one after the other."""
        times = np.array([sample.round_ms for sample in self.taken])
        return [round(float(part.mean()), 3) for part in np.array_split(times, min(20, len(times)))]


def _standard_error(x: np.ndarray, y: np.ndarray) -> float:
    """Of the slope of the line through the means of ten parts of the points."""
    x, y = (np.array([part.mean() for part in np.array_split(each, min(10, len(each)))]) for each in (x, y))
    if len(x) < 3:
        return 0.0
    slope, start = np.polyfit(x, y, 1)
    residual = y - slope * x - start
    return float(np.sqrt(residual @ residual / (len(x) - 2) / np.sum(np.square(x - x.mean()))))


def _memory(pid: int) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: float(line.split()[1]) for line in lines if line.split()[1].isdigit()}


class WorkBeside:
    """The process that does the same little work again and again, and what it took."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "took"
        self._process = _start(sys.executable, "-m", "benchmarks.soak_clock", self._file)
        while not (self._file.exists() and self._file.stat().st_size):
            assert self._process.poll() is None, "the process beside ended at once"
            time.sleep(0.02)

    def mean_ms(self, start_s: float, end_s: float) -> float:
        """Of the times from one moment of `time.perf_counter` to another; of the nearest where there is none."""
        ended_s, took_ms = np.loadtxt(self._file, ndmin=2).T
        within = (ended_s >= start_s) & (ended_s <= end_s)
        return float(took_ms[within].mean() if within.any() else took_ms[np.abs(ended_s - end_s).argmin()])

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=30)


def flat(rises: dict[str, float]) -> bool:
    """Whether the rises are within bounds."""
    return rises["record_bytes"] <= ROW_BYTES and all(rises[name] <= most for name, most in MOST_RISE.items())


def _of_allowed(rise: float, most: float) -> float:
    if most:
        return rise / most
    return 0.0 if rise <= 0.0 else float("inf")


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    with (
        tempfile.TemporaryDirectory() as name,
        closing(WorkBeside(Path(name))) as clock,
        ThreadPoolExecutor(1) as beside,
    ):
        live = beside.submit(_live, 6.0 if quick else LIVE_S, clock)
        discounted, patched = Late.discount(1.0, max_staleness=3), Late.patch(max_staleness=3)
        parts = {
            "virtual, discounted": _virtual(discounted, 500 if quick else ROUNDS - PATCHED, clock),
            "virtual, patched": _virtual(patched, 100 if quick else PATCHED, clock),
            **live.result(),
        }
    rises = {}
    for name, samples in parts.items():
        print(f"{name}:")
        chosen = samples.taken[:: max(1, len(samples.taken) // 10)]
        table(["rounds", *WHAT], [list(astuple(sample)) for sample in chosen])
        rises[name] = samples.rises()
        print("rise over the second half:", {what: round(value, 4) for what, value in rises[name].items()})
    worst = max(
        max(of["record_bytes"] / ROW_BYTES, *(_of_allowed(of[n], most) for n, most in MOST_RISE.items()))
        for of in rises.values()
    )
    why = "a quick run is too short to tell" if quick else ""
    what = "100,000 virtual rounds and 20 live minutes: worst rise over the second half, as a share of what is allowed"
    return [Goal("S1", what, worst, "<= 1", why=why)], {
        "rises": rises,
        "flat": {n: flat(of) for n, of in rises.items()},
        "round_ms": {name: samples.mean_round_ms() for name, samples in parts.items()},
    }


# 100,000 virtual rounds.


def _virtual(late: Late, rounds: int, beside: WorkBeside) -> Samples:
    policy = RoundPolicy(goal=10, over_selection=1.3, selection_window_s=30.0, reporting_window_s=180.0, late=late)
    built = build(one_parameter.task.replace(rounds=policy), seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder, clock, keys = Path(name), VirtualClock(), HostKeys.make()
        store = open_store(folder)
        run_id = begin_run(
            store, built.plan.sign(keys.signing), built.model, kind="simulate", rounds=rounds, seed=0,
            config={SETTING: RETENTION.to_json()}, clock=clock,
        )  # fmt: skip
        population = VirtualPopulation(devices=2_000, window_hours=24.0, daily_swing=1.0)
        fleet = VirtualFleet(population, built.plan.manifest, clock, update_of=_made_up(built.plan.manifest))
        drive(fleet, store, run_id, rounds=rounds, keys=keys, seed=0)
        samples = Samples(folder, os.getpid(), beside)
        while not fleet.finished:
            fleet.run(until_s=float("inf"), commits=max(1, rounds // SAMPLES))
            samples.take(store.last_version(run_id) or 0)
            fleet.tally.commits.clear()  # the history that the virtual fleet keeps for its caller
            fleet.tally.check_ins.clear()
        store.close()
    return samples


def _made_up(manifest: Manifest) -> UpdateOf:
    """Updates that differ, so that every version is another."""
    rng = np.random.default_rng(0)

    def update_of(device: int, version: int, blocks: int) -> tuple[Tensors, int]:
        return {spec.name: rng.normal(size=spec.shape).astype(spec.numpy_dtype) for spec in manifest.update}, 4

    return update_of


# Twenty live minutes.


def _live(seconds: float, beside: WorkBeside) -> dict[str, Samples]:
    """A host and a process of 20 devices, as a user starts them."""
    shoal = [sys.executable, "-m", "shoal"]
    task = str(Path(__file__).parent / "one_parameter.py") + ":quickly_forgotten"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, record, ready, nothing = folder / "data", folder / "run", folder / "ready", folder / "nothing"
        for made in (data, nothing):
            made.mkdir()
        for number in range(DEVICES):
            np.savez(data / f"device-{number:02d}.npz", x=np.full(4, number, np.float32))
        kept = f"{RETENTION.recent}:{RETENTION.every}"
        host = _start(
            *shoal, "host", task, "--rounds", "1000000000", "--port", "0", "--run", record, "--ready-file", ready,
            "--tls", "--keep", kept,
        )  # fmt: skip
        devices: subprocess.Popen[bytes] | None = None
        try:
            while not ready.exists():
                assert host.poll() is None, "the host ended before it was ready"
                time.sleep(0.02)
            ca = next(record.glob("**/ca.pem"))
            devices = _start(*shoal, "device", "--server", ready.read_text().strip(), "--data", data, "--ca", ca)
            return _watched(seconds, record, {"host": (host, record), "devices": (devices, nothing)}, beside)
        finally:
            for process in (devices, host):
                if process is not None:
                    process.terminate()
                    process.wait(timeout=30)


def _start(*command: object) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _watched(
    seconds: float,
    record: Path,
    processes: "dict[str, tuple[subprocess.Popen[bytes], Path]]",
    beside: WorkBeside,
) -> dict[str, Samples]:
    store = open_store(record, read_only=True)
    run_id = store.runs()[-1].id
    try:
        while (store.last_version(run_id) or 0) < WARM:
            time.sleep(0.1)
        samples = {name: Samples(folder, process.pid, beside) for name, (process, folder) in processes.items()}
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            time.sleep(max(0.5, seconds / SAMPLES))
            for name, (process, _) in processes.items():
                assert process.poll() is None, f"the {name} ended with {process.returncode}"
            rounds = store.last_version(run_id) or 0
            for of in samples.values():
                of.take(rounds)
    finally:
        store.close()
    return samples


if __name__ == "__main__":
    run("soak", measure, __doc__ or "")
