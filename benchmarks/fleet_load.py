"""How many devices a server holds, what each takes, and how many whole sessions a second one core serves.

The server is a process of its own (`shoal host`, Coordinator, Edge and record together); the devices are scripted, in
processes of their own, and send prepared bytes over sockets.

*Held*: 10,000 sessions, each on a TCP connection of its own, are checked in and wait, as devices that stay do; then
rounds of 2,000 are served. Memory is the resident memory of the server's process with all of them held less that before the
first, over their number.

*Whole sessions*: check-in, assignment, report, *counted*, each on a stream of its own, of devices that come once; with
one parameter there is nothing to carry. What is counted is the processor time of a process, all of its threads: a figure
of one core, whatever else the machine does. That of an Edge with a process of its own (H3: what one more Edge adds to a
host), and beside it that of a host that is Coordinator, Edge and record in one process, commits included. Devices on
connections that are there already, one each (H3) or many to a connection, as those of a gateway are (beside).
"""

import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import psutil

from benchmarks.fleet_load_devices import Orders, argument
from benchmarks.frame import Goal, run, table
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.run_plan import load_plan
from shoal.record.sqlite import open_store
from shoal.tensors import Index, to_bytes

PROCESSES: Final = 2
ERRORS: Final = {"refused", "released", "later", "incompatible", "incomplete", "ended by the server", "connection lost"}


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    held, goal = (500, 100) if quick else (10_000, 2_000)
    why = f"{held} sessions" if quick else ""
    rows = {kind: _held(held, goal, tls=kind == "TLS") for kind in ("plain", "TLS")}
    table(
        ["held", "sessions", "kB a session", "counted", "errors", "s to connect", "s for the rounds"],
        [[k, held, r.session_bytes / 1e3, r.counted, r.errors, r.connect_s, r.rounds_s] for k, r in rows.items()],
    )
    rounds = 4 if quick else 40
    rates = {
        "an Edge, a connection each": _whole(rounds, sessions=1000, connections=1000, tls=False, edge=True),
        "a connection each": _whole(rounds, sessions=1000, connections=1000, tls=False),
        "a connection each, TLS": _whole(rounds, sessions=1000, connections=1000, tls=True),
        "8 connections": _whole(rounds, sessions=1000, connections=8, tls=False),
    }
    table(
        ["whole sessions", "counted", "processor s", "a second of one core", "a second", "errors"],
        [[k, r.counted, r.processor_s, r.rate, r.counted / r.wall_s, r.errors] for k, r in rates.items()],
    )
    errors = sum(r.errors for r in rows.values()) + sum(r.errors for r in rates.values())
    served = min(r.counted for r in rows.values()) >= ROUNDS_HELD * goal and not errors
    plain, tls = rows["plain"].session_bytes / 1e3, rows["TLS"].session_bytes / 1e3
    goals = [
        Goal("H1", "sessions held, with rounds of a fifth served and no error", held * served, ">= 10000", why=why),
        Goal("H2", "memory of a held session, kB", plain, "<= 45", why=why),
        Goal("H2-tls", "memory of a held session with TLS, kB", tls, "<= 90", why=why),
        Goal(
            "H3",
            "whole sessions a second of one core of an Edge",
            rates["an Edge, a connection each"].rate,
            ">= 1500",
            why=why,
        ),
    ]
    figures = {
        "host": rates["a connection each"].rate,
        "multiplexed": rates["8 connections"].rate,
        "tls": rates["a connection each, TLS"].rate,
    }
    return goals, {**figures, "errors": errors}


ROUNDS_HELD: Final = 3


@dataclass(frozen=True)
class Held:
    session_bytes: float
    counted: int
    errors: int
    connect_s: float
    rounds_s: float


def _held(sessions: int, goal: int, *, tls: bool) -> Held:
    with _server(goal=goal, rounds=ROUNDS_HELD, tls=tls) as server:
        before = server.resident_bytes()
        begun = time.perf_counter()
        with server.devices(sessions=sessions, connections=sessions, stay=True) as devices:
            connected = time.perf_counter()
            each = (server.resident_bytes() - before) / sessions
            devices.let_report()
            server.until_finished()
            done = time.perf_counter()
            heard = devices.count()
    errors = sum(heard[kind] for kind in ERRORS) + abs(heard["assigned"] - heard["counted"])
    return Held(each, heard["counted"], errors, connected - begun, done - connected)


@dataclass(frozen=True)
class Whole:
    counted: int
    processor_s: float
    wall_s: float
    errors: int

    @property
    def rate(self) -> float:
        return self.counted / self.processor_s


def _whole(rounds: int, *, sessions: int, connections: int, tls: bool, edge: bool = False) -> Whole:
    goal = sessions // 2  # the others wait for the next round
    with (
        _server(goal=goal, rounds=rounds + 1, tls=tls, edge=edge) as server,
        server.devices(sessions=sessions, connections=connections, stay=False) as devices,
    ):
        devices.let_report()
        server.until_version(1)
        first, processor_s, begun = server.version, server.processor_s(), time.perf_counter()
        server.until_version(rounds)
        counted = (server.version - first) * goal
        processor_s, wall_s = server.processor_s() - processor_s, time.perf_counter() - begun
        heard = devices.count()
    return Whole(counted, processor_s, wall_s, sum(heard[kind] for kind in ERRORS))


class Devices:
    """The processes of the devices."""

    def __init__(self, orders: Sequence[Orders]) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fleet_load_devices", argument(each)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for each in orders
        ]  # fmt: skip
        for process in self._processes:
            _line(process)

    def let_report(self) -> None:
        for process in self._processes:
            _say(process, "report")

    def count(self) -> Counter[str]:
        heard: Counter[str] = Counter()
        for process in self._processes:
            _say(process, "count")
            heard.update(json.loads(_line(process)))
        return heard

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def _say(process: "subprocess.Popen[str]", line: str) -> None:
    stream: IO[str] | None = process.stdin
    assert stream is not None
    print(line, file=stream, flush=True)


def _line(process: "subprocess.Popen[str]") -> str:
    stream: IO[str] | None = process.stdout
    assert stream is not None
    line = stream.readline()
    if not line:
        raise RuntimeError("the devices' process has ended")
    return line


class Server:
    """`shoal host` and its record."""

    def __init__(self, host: "subprocess.Popen[bytes]", record: Path, port: int, ca: str) -> None:
        self._host, self._port, self._ca = host, port, ca
        process = psutil.Process(host.pid)
        self._process = next((child for child in process.children() if "edge" in child.cmdline()), process)
        self._store = open_store(record, read_only=True)
        self._run = self._store.runs()[-1].id
        manifest = load_plan(self._store, self._run).plan.manifest
        update = {spec.name: np.zeros(spec.shape, spec.numpy_dtype) for spec in manifest.update}
        slices = [pb.PushSlice(tensor=name, data=to_bytes(value)) for name, value in update.items()]
        self._root = Index.of(update, manifest.update).root
        self._update = pb.Report(root=self._root, weight=1, slices=slices).SerializeToString().hex()

    @contextlib.contextmanager
    def devices(self, *, sessions: int, connections: int, stay: bool) -> Iterator[Devices]:
        orders = [
            Orders(
                port=self._port, ca=self._ca, name=f"device-{number}", sessions=sessions // PROCESSES,
                connections=max(1, connections // PROCESSES), stay=stay, update_root=self._root, update=self._update,
            )
            for number in range(PROCESSES)
        ]  # fmt: skip
        devices = Devices(orders)
        try:
            yield devices
        finally:
            devices.close()

    @property
    def version(self) -> int:
        return self._store.last_version(self._run) or 0

    def until_version(self, version: int) -> None:
        while self.version < version:
            self._check()
            time.sleep(0.05)

    def until_finished(self) -> None:
        """Until the run has its last version, and its devices are told."""
        while self._store.run(self._run).status != "finished":
            self._check()
            time.sleep(0.05)
        time.sleep(1.0)

    def _check(self) -> None:
        if self._host.poll() is not None:
            raise RuntimeError(f"the host ended with {self._host.returncode}")

    def resident_bytes(self) -> int:
        time.sleep(1.0)  # what was begun ends
        return int(self._process.memory_info().rss)

    def processor_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        self._store.close()


@contextlib.contextmanager
def _server(*, goal: int, rounds: int, tls: bool, edge: bool = False) -> Iterator[Server]:
    task = str(Path(__file__).parent / "one_parameter.py") + ":task"
    windows = ["--over-selection", "1", "--selection-window", "900", "--reporting-window", "900"]
    with tempfile.TemporaryDirectory() as folder:
        record, ready = Path(folder) / "run", Path(folder) / "ready"
        command = [sys.executable, "-m", "shoal", "host", task, "--rounds", str(rounds), "--goal", str(goal), *windows]
        command += ["--edges", "1", "--port", str(_free_port())] if edge else ["--port", "0"]
        command += ["--per-address", str(10**9)]  # all devices are of this machine, and come faster than a gateway's
        command += ["--run", str(record), "--ready-file", str(ready), *(["--tls"] if tls else [])]
        host = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while not ready.exists():
                if host.poll() is not None:
                    raise RuntimeError(f"the host ended with {host.returncode} before it was ready")
                time.sleep(0.05)
            ca = next(record.glob("**/ca.pem")).read_text() if tls else ""
            server = Server(host, record, int(ready.read_text().rsplit(":", 1)[1]), ca)
            try:
                yield server
            finally:
                server.close()
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(host.pid).children():  # first: one that is left starts the host again
                    child.kill()
            host.kill()
            host.wait()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _raise_file_limit() -> None:
    """Each connection is a file descriptor on either side; child processes inherit the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"file descriptors allowed for each process: {hard}; processors: {os.cpu_count()}")


if __name__ == "__main__":
    _raise_file_limit()
    run("fleet_load", measure, __doc__ or "")
