"""One worker's process, seen from its supervisor: started, told, listened to, ended with all that it started.

A worker that is started without an assignment is a *warm spare*: it imports what it needs and then waits at its standard input. So a restart
costs no import, for the memory of one idle process.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final, Self, cast, final

from shoal import validate
from shoal.pod.membership_events import Mark
from shoal.pod.worker import AUTOGROUP, COORDINATOR, LIFE, LOWEST, MARKS_FD, PROCESS, PROCESSES, Assignment

TAIL_BYTES: Final = 4096
"""Of what it wrote last, kept to say why it ended."""
_TAIL_LINES: Final = 3
_FAULT_CHARACTERS: Final = 300
_LINE_BYTES: Final = 1 << 16
_READ_S: Final = 1.0
"""When it is gone, what it wrote is read for so long: a process that it left behind may hold the pipe open."""
_NOT_HANDED_ON: Final = frozenset({"SHOAL_POD_SECRET", LIFE, COORDINATOR, PROCESSES, PROCESS, MARKS_FD})

Output = Callable[[str], None]
"""What a worker writes, line by line."""


@final
class Guard:
    """The process that ends all workers if this one dies (`guard.py`)."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", str(Path(__file__).with_name("guard.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def add(self, group: int) -> None:
        """A process group that is to end with this process."""
        self._say(f"+{group}\n")

    def remove(self, group: int) -> None:
        """It has ended; its number may become another's."""
        self._say(f"-{group}\n")

    def close(self) -> None:
        """No worker is left."""
        with suppress(BrokenPipeError):
            cast(IO[bytes], self._process.stdin).close()
        self._process.wait()

    def _say(self, line: str) -> None:
        pipe = cast(IO[bytes], self._process.stdin)
        with suppress(BrokenPipeError):  # it was killed; workers still see the end of their standard input
            pipe.write(line.encode())
            pipe.flush()


@final
class WorkerProcess:
    """See the module's text. Made by `start`."""

    def __init__(
        self, process: asyncio.subprocess.Process, marks: asyncio.StreamReader, guard: Guard, output: Output
    ) -> None:
        self._process, self._marks, self._guard, self._output = process, marks, guard, output
        self._tail = b""
        self._fault = ""
        self.said: Callable[[Mark], None] = lambda mark: None
        """Called with each mark."""
        self.ended: Final = asyncio.create_task(self._listen())
        """Done when it is gone, with all that it started: (exit code, its last lines)."""

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        environ: Mapping[str, str],
        assignment: Assignment | None,
        *,
        guard: Guard,
        output: Output,
    ) -> Self:
        """Starts it, in a process group of its own.

        Args:
            command: the program and its arguments.
            environ: its environment, to which what it needs to know is added.
            assignment: None: it is a spare.
            guard: ends it if this process dies.
            output: is called with each line that it writes.

        Raises:
            OSError: it cannot be started.
        """
        read, write = os.pipe()
        kept = {name: value for name, value in environ.items() if name not in _NOT_HANDED_ON}
        known = {MARKS_FD: str(write), "PYTHONUNBUFFERED": "1", **(assignment.to_environ() if assignment else {})}
        try:
            process = await asyncio.create_subprocess_exec(
                *command, env=kept | known, pass_fds=(write,), start_new_session=True,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            )  # fmt: skip
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        guard.add(process.pid)
        if assignment is None:
            with suppress(OSError):  # the system has no such thing, or the process is gone
                Path("/proc", str(process.pid), AUTOGROUP).write_text(str(LOWEST))
        marks = asyncio.StreamReader(limit=_LINE_BYTES)
        protocol = asyncio.StreamReaderProtocol(marks)
        pipe = os.fdopen(read, "rb", buffering=0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        made = cls(process, marks, guard, output)
        made.ended.add_done_callback(lambda _: transport.close())
        return made

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.returncode is None

    def assign(self, assignment: Assignment) -> None:
        """A spare becomes a worker."""
        self._tell({"assign": {name: getattr(assignment, name) for name in assignment.__dataclass_fields__}})

    def ask_to_pause(self) -> None:
        """It is to leave at its next checkpoint."""
        self._tell({"ask": True})

    async def end(self, grace_s: float) -> None:
        """Ends it: SIGTERM, and SIGKILL after so long; 0: at once. Returns when that is done."""
        if grace_s > 0:
            self._signal(signal.SIGTERM)
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        if self.is_alive:
            self._signal(signal.SIGKILL)
        await asyncio.shield(self.ended)

    async def _listen(self) -> tuple[int, str]:
        readers = [asyncio.create_task(self._read_output()), asyncio.create_task(self._read_marks())]
        code = await self._process.wait()
        self._signal(signal.SIGKILL)  # whom it left behind
        self._guard.remove(self.pid)
        await asyncio.wait(readers, timeout=_READ_S)
        for reader in readers:
            reader.cancel()
        return (1, self._fault) if self._fault else (code, _last_lines(self._tail))

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def _tell(self, told: Mapping[str, Any]) -> None:
        pipe = cast(asyncio.StreamWriter, self._process.stdin)
        if not pipe.is_closing():
            pipe.write(json.dumps(told).encode() + b"\n")

    async def _read_marks(self) -> None:
        try:
            while line := await self._marks.readline():
                self.said(parsed(json.loads(line)))
        except (ValueError, TypeError) as error:  # ValueError: no JSON, or too long a line
            self._fault = f"it sent a mark that is none: {str(error)[:_FAULT_CHARACTERS]}"
            self._signal(signal.SIGKILL)

    async def _read_output(self) -> None:
        pipe, begun = cast(asyncio.StreamReader, self._process.stdout), b""
        while data := await pipe.read(_LINE_BYTES):
            self._tail = (self._tail + data)[-TAIL_BYTES:]
            *lines, begun = (begun + data).split(b"\n")
            if len(begun) > _LINE_BYTES:
                lines, begun = [*lines, begun], b""
            for line in lines:
                self._output(line.decode(errors="replace").rstrip("\r"))
        if begun:
            self._output(begun.decode(errors="replace"))


def parsed(said: Any) -> Mark:
    """A mark from JSON. Raises TypeError or ValueError where it is none."""
    if not isinstance(said, dict):
        raise TypeError(f"Expected a mark as a JSON object, got {str(said)[:80]!r}.")
    mark = Mark(**said)
    validate.types(mark)
    validate.not_negative(step_s=mark.step_s)
    return mark


def _last_lines(tail: bytes) -> str:
    lines = ["".join(c for c in line if c.isprintable()).strip() for line in tail.decode(errors="replace").splitlines()]
    return " | ".join(line[:300] for line in [line for line in lines if line][-_TAIL_LINES:])
