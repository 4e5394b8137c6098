"""A place for one worker on this machine: what the membership machine calls a host. Keeps the worker, and a warm spare for the next life."""

import asyncio
import os
import random
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from shoal import validate
from shoal.pod.membership_events import Event, Exited, Joined, Mark, Marked, StartWorker
from shoal.pod.worker import Assignment
from shoal.pod.worker_process import Guard, WorkerProcess

NUM_PORTS: Final = 8
"""That a place offers for coordinators."""
_CANNOT_START: Final = 127
_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")


@dataclass(frozen=True, kw_only=True)
class WorkerCommand:
    """How a place starts its worker."""

    command: Sequence[str]
    """The program, which calls `shoal.pod.worker.attached`, and its arguments."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ), repr=False)
    """Its environment."""
    devices: int = 1
    """Accelerators that it will have; virtual ones on a CPU."""
    has_spare: bool = True
    """Whether a warm spare is kept: a restart costs no import, for the memory of an idle process."""
    grace_s: float = 5.0
    """From SIGTERM to SIGKILL."""

    def __post_init__(self) -> None:
        if not self.command:
            raise ValueError(
                "Expected the command of a worker, got none, such as command=[sys.executable, 'train.py']."
            )
        validate.whole(1, devices=self.devices)
        validate.not_negative(grace_s=self.grace_s)


@final
class Place:
    """See the module's text. `start`, `ask` and `stop` return at once; what comes of it is said."""

    def __init__(
        self,
        name: str,
        how: WorkerCommand,
        *,
        guard: Guard,
        tasks: asyncio.TaskGroup,
        say: Callable[[Event], None],
        output: Callable[[str, str], None],
    ) -> None:
        """
        Args:
            name: its own among the hosts.
            how: its worker is started.
            guard: of this process.
            tasks: where it runs; when they are cancelled its worker is ended.
            say: is told what becomes of the worker.
            output: (name, line) that the worker writes.
        """
        self.name, self._how, self._guard, self._tasks, self._say, self._output = name, how, guard, tasks, say, output
        self._worker: WorkerProcess | None = None
        self._spare: asyncio.Task[WorkerProcess] | None = None
        self._told_to_stop = asyncio.Event()
        self._is_stuck = False
        self.is_free = asyncio.Event()
        """No worker runs."""
        self.is_free.set()

    def joined(self, address: str) -> Joined:
        """What it is to the machine; `address`: under which others reach this one."""
        return Joined(self.name, address, self._how.devices, free_ports(NUM_PORTS))

    def start(self, wanted: StartWorker) -> None:
        """Its worker is to run. It has none."""
        assert self.is_free.is_set()
        self.is_free.clear()
        self._told_to_stop.clear()
        self._is_stuck = False
        self._tasks.create_task(self._live(wanted))

    def ask(self) -> None:
        """Its worker is to pause at its next checkpoint."""
        if self._worker is not None:
            self._worker.ask_to_pause()

    def stop(self, *, is_stuck: bool = False) -> None:
        """Its worker is to end; `is_stuck`: it would not listen."""
        self._is_stuck = is_stuck
        self._told_to_stop.set()

    async def close(self) -> None:
        """Ends the spare; the worker has ended with its task."""
        if self._spare is not None:
            with suppress(OSError):
                await (await self._spare).end(0.0)

    async def _live(self, wanted: StartWorker) -> None:
        try:
            code, why = await self._work(wanted)
        except OSError as error:
            code, why = _CANNOT_START, f"it could not be started: {error}"
        finally:
            self._worker = None
            self.is_free.set()  # before it is said: the answer may be the next life
        self._say(Exited(self.name, wanted.life, code, why))

    async def _work(self, wanted: StartWorker) -> tuple[int, str]:
        assignment = Assignment(wanted.life, wanted.coordinator, wanted.num_processes, wanted.process_id)
        self._worker = worker = await self._take(assignment)
        worker.said = lambda mark: self._heard(wanted.life, mark)
        ending = asyncio.create_task(self._end_when_told(worker))
        try:
            return await asyncio.shield(worker.ended)
        finally:
            ending.cancel()
            if worker.is_alive:  # this task was cancelled
                await worker.end(self._how.grace_s)

    async def _end_when_told(self, worker: WorkerProcess) -> None:
        await self._told_to_stop.wait()
        await worker.end(0.0 if self._is_stuck else self._how.grace_s)

    async def _take(self, assignment: Assignment) -> WorkerProcess:
        """The spare, where there is one; else a new process."""
        if self._spare is not None:
            spare = await asyncio.shield(self._spare)  # `close` ends it where this is cancelled
            self._spare = None
            if spare.is_alive:
                spare.assign(assignment)
                return spare
        return await self._new(assignment)

    async def _new(self, assignment: Assignment | None) -> WorkerProcess:
        return await WorkerProcess.start(
            self._how.command, self._how.environ, assignment,
            guard=self._guard, output=lambda line: self._output(self.name, line),
        )  # fmt: skip

    def _heard(self, life: int, mark: Mark) -> None:
        self._say(Marked(self.name, life, mark))
        if self._how.has_spare and self._spare is None and mark.step >= 0 and not self._told_to_stop.is_set():
            # Not before: its imports would take the processor from this life's compilation.
            self._spare = asyncio.create_task(self._new(None))


def free_ports(number: int) -> tuple[int, ...]:
    """Ports that nobody has now, and that the system gives nobody who does not ask for them by number."""
    first, last = 20000, 32767
    if _RANGE.exists():
        low, high = map(int, _RANGE.read_text().split())
        first, last = (20000, low - 1) if low > 21000 else (high + 1, 65535) if high < 65000 else (first, last)
    found: list[int] = []
    for port in random.SystemRandom().sample(range(first, last), min(last - first, 20 * number)):
        with socket.socket() as listening, suppress(OSError):
            listening.bind(("", port))
            found.append(port)
        if len(found) == number:
            return tuple(found)
    raise OSError(f"Expected {number} free ports from {first} to {last}, got {len(found)}.")
