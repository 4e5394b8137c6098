"""Two systems on one machine that take turns at their rounds, each a process (or several) that is stopped between its turns."""

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from benchmarks.frame import PEERS
from shoal.errors import ShoalError

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "peers" / "simulation"
MIB = 1 << 20


class SystemFailed(ShoalError):
    """A system could not be run to its end; the message is the last it said."""


@dataclass(frozen=True)
class System:
    """How a system is started."""

    name: str
    environment: str = ""
    """Folder of its virtual environment; empty: ours."""
    script: str = ""
    """In `peers/simulation`."""
    workers: int = 1
    threads: int = 0
    """Of a worker, where it is to be told."""

    @property
    def python(self) -> Path:
        return PEERS / self.environment / "bin" / "python" if self.environment else Path(sys.executable)

    @property
    def is_installed(self) -> bool:
        return self.python.exists()

    def command(self) -> list[str]:
        what = [str(SCRIPTS / self.script)] if self.script else ["-m", "benchmarks.simulation_ours"]
        return [str(self.python), *what]


OURS = System("shoal")
RIVALS = (
    System("pfl, 1 process of 2 threads", "pfl", "pfl_rounds.py", threads=2),
    System("pfl, 2 processes of 1 thread", "pfl", "pfl_rounds.py", workers=2, threads=1),
    System("flwr", "flwr", "flwr_rounds.py"),
    System("fedjax", "fedjax", "fedjax_rounds.py"),
)


@dataclass
class Running:
    """A system that runs, up to its next turn. Use as a context: whatever is left of it is ended."""

    system: System
    arguments: Sequence[str]
    deadline: float
    """`time.monotonic()` after which it has failed."""
    seconds: list[float] = field(default_factory=list)
    peak_mib: float = 0.0
    """Peak resident memory, summed over its processes (what they share counts for each)."""
    _processes: list[subprocess.Popen[str]] = field(default_factory=list)
    _lines: "queue.Queue[str | None]" = field(default_factory=queue.Queue)

    def __enter__(self) -> "Running":
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        for rank, more in enumerate(_worker_environments(self.system)):
            process = subprocess.Popen(
                [*self.system.command(), *self.arguments, "--begun", str(time.time())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stderr=self._errors, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT), **more},
            )  # fmt: skip
            self._processes.append(process)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._until("TURN ")
        except SystemFailed:
            self.__exit__()
            raise
        self._each(psutil.Process.suspend)
        return self

    def __exit__(self, *_: object) -> None:
        self._each(psutil.Process.kill)
        for process in self._processes:
            process.wait()
        self._reader.join(10.0)
        for stream in (self._errors, *(s for p in self._processes for s in (p.stdin, p.stdout) if s)):
            try:
                stream.close()
            except BrokenPipeError:  # a turn that nobody heard of
                pass

    def turn(self) -> float:
        """One turn: mean seconds of its rounds. Before and after it the system is stopped, whatever it would do while it waits."""
        self._each(psutil.Process.resume)
        self._go()
        fresh = json.loads(self._until("TURN "))
        self._each(psutil.Process.suspend)
        self.seconds += fresh
        return float(sum(fresh) / len(fresh))

    def finish(self) -> dict[str, Any]:
        """Runs the last rounds; what the system tells of itself."""
        self._each(psutil.Process.resume)
        self.peak_mib = sum(_peak_bytes(made) for p in self._processes for made in _tree(p.pid)) / MIB
        while True:
            self._go()
            line = self._until("TURN ", "{")
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return told

    def _each(self, do: Callable[[psutil.Process], T]) -> list[T]:
        """What comes of it for each of the system's processes that is still there."""
        found = []
        for process in self._processes:
            for made in _tree(process.pid):
                try:
                    found.append(do(made))
                except psutil.NoSuchProcess:  # it has ended by itself since
                    pass
        return found

    def _go(self) -> None:
        stream = self._processes[0].stdin
        assert stream is not None
        try:
            stream.write("\n")
            stream.flush()
        except BrokenPipeError:
            raise self._failure("ended") from None

    def _read(self) -> None:
        stream = self._processes[0].stdout
        assert stream is not None
        for line in stream:
            self._lines.put(line)
        self._lines.put(None)

    def _until(self, *prefixes: str) -> str:
        """The rest of the next line that begins so; a JSON line whole. Rivals print other things too."""
        while True:
            try:
                line = self._lines.get(timeout=max(0.01, self.deadline - time.monotonic()))
            except queue.Empty:
                raise SystemFailed(f"{self.system.name}: no time left") from None
            if line is None:
                raise self._failure("ended")
            for prefix in prefixes:
                if line.startswith(prefix):
                    return line if prefix == "{" else line[len(prefix) :]

    def _failure(self, what: str) -> SystemFailed:
        self._errors.seek(0)
        said = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        return SystemFailed(f"{self.system.name} {what}" + (f"; it last said: {said[-1][:200]}" if said else ""))


@dataclass(frozen=True)
class Session:
    """What came of the turns of ours and a rival."""

    ratios: tuple[float, ...]
    """Rival's mean seconds of a turn over ours, by pair."""
    ours: dict[str, Any]
    rival: dict[str, Any]
    """What each tells of itself, with `peak_mib`."""


def take_turns(
    rival: System, *, pairs: int, ours_arguments: Sequence[str], rival_arguments: Sequence[str], limit_s: float
) -> Session:
    """Ours and a rival, turn about; who begins alternates.

    Raises:
        SystemFailed: either ended too early or took longer than the limit.
    """
    deadline = time.monotonic() + limit_s
    with Running(OURS, ours_arguments, deadline) as ours, Running(rival, rival_arguments, deadline) as other:
        ratios = []
        for pair in range(pairs):
            took = {}
            for each in (ours, other) if pair % 2 == 0 else (other, ours):
                took[id(each)] = each.turn()
            ratios.append(took[id(other)] / took[id(ours)])
        told = [{**each.finish(), "peak_mib": each.peak_mib} for each in (ours, other)]
    return Session(tuple(ratios), told[0], told[1])


def alone(arguments: Sequence[str], turns: int, limit_s: float) -> dict[str, Any]:
    """Ours without anybody beside it."""
    with Running(OURS, arguments, time.monotonic() + limit_s) as ours:
        for _ in range(turns):
            ours.turn()
        return {**ours.finish(), "peak_mib": ours.peak_mib}


def _worker_environments(system: System) -> list[Mapping[str, str]]:
    alike = {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    alike |= {"OMP_NUM_THREADS": str(system.threads)} if system.threads else {}
    if system.workers == 1:
        return [alike]
    addresses = ",".join(f"localhost:{port}" for port in _free_ports(system.workers))
    return [
        {**alike, "PFL_WORKER_ADDRESSES": addresses, "PFL_WORKER_RANK": str(rank)} for rank in range(system.workers)
    ]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for made in sockets:
        made.bind(("localhost", 0))
    ports = [int(made.getsockname()[1]) for made in sockets]
    for made in sockets:
        made.close()
    return ports


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _peak_bytes(process: psutil.Process) -> int:
    """Peak resident memory where the system keeps it (Linux), else what is resident now."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return int(process.memory_info().rss)
    except (OSError, psutil.NoSuchProcess):
        return 0
