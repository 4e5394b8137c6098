"""The demo's processes, as the parent sees them: it starts them, hears from them, notices when one ends, ends them.

parent ─ orders (stdin) ─> server, devices-1 … devices-4 ─ news (stdout) ─> one queue
                                    └ standard error ─> logs/NAME.log
"""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self, final

import shoal
from shoal.errors import ShoalError

END_S: Final = 1.8
"""Longest wait for a child that was told to end; then it is killed."""
LAST_LINES: Final = 8


class ChildDied(ShoalError):
    """A process of the demo ended before its time; the text has its last lines."""


@dataclass(frozen=True)
class News:
    """Something a child said, or (kind `ended`, with its code) its end."""

    sender: str
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True)
class _Child:
    process: "subprocess.Popen[bytes]"
    log: Path
    reader: threading.Thread


@final
class Processes:
    """See the module's text. A context manager: no child outlives the block."""

    def __init__(self, logs: Path) -> None:
        """`logs`: the folder of what the children write to standard error."""
        self._logs = logs
        self._children: dict[str, _Child] = {}
        self._news: queue.Queue[News] = queue.Queue(10_000)
        self._is_ending = False
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, module: str) -> None:
        """Starts a child; it waits for its first order."""
        flags: dict[str, Any] = {"start_new_session": True}  # the terminal's Ctrl-C is for the parent alone
        if sys.platform == "win32":
            flags = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        log = self._logs / f"{name}.log"
        with open(log, "ab") as errors:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env=_environment(), **flags,
            )  # fmt: skip
        assert process.stdout is not None
        reader = threading.Thread(target=self._hear, args=(name, process, process.stdout), daemon=True)
        self._children[name] = _Child(process, log, reader)
        reader.start()

    def order(self, name: str, **order: Any) -> None:
        """Sends a child an order. A child that has ended is noticed by `news`."""
        stdin = self._children[name].process.stdin
        assert stdin is not None
        try:
            stdin.write(json.dumps(order).encode() + b"\n")
            stdin.flush()
        except OSError:  # it has ended: the reader of its news says so
            pass

    def news(self, *, timeout_s: float) -> News | None:
        """The next news, or None if there was none in this time.

        Raises:
            ChildDied: a child ended with another code than 0.
        """
        try:
            news = self._news.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if news.kind == "ended" and news.data["code"]:
            raise ChildDied(self._story(news.sender, int(news.data["code"])))
        return news

    def pids(self) -> dict[str, int]:
        """Process ids by name."""
        return {name: child.process.pid for name, child in self._children.items()}

    def close(self) -> None:
        """Ends all children: by the end of their input, then by force."""
        self._is_ending = True
        for child in self._children.values():
            assert child.process.stdin is not None
            try:
                child.process.stdin.close()
            except OSError:  # it has ended already
                pass
        deadline = time.monotonic() + END_S
        for child in self._children.values():
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            child.reader.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _hear(self, name: str, process: "subprocess.Popen[bytes]", stdout: IO[bytes]) -> None:
        with stdout:
            for line in stdout:
                data = json.loads(line)
                self._put(News(name, str(data.pop("kind")), data))
        self._put(News(name, "ended", {"code": process.wait()}))

    def _put(self, news: News) -> None:
        while not self._is_ending:  # nobody hears any more then
            try:
                return self._news.put(news, timeout=0.5)
            except queue.Full:  # whoever reads is busy; asked again until it reads, or the end comes
                pass

    def _story(self, name: str, code: int) -> str:
        log = self._children[name].log
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        told = "\n".join(f"    {line}" for line in lines) or "    (it said nothing)"
        return f"The process {name!r} {how}. Its last lines ({log}):\n{told}"


def _environment() -> dict[str, str]:
    """The parent's, with this shoal first: from a checkout as from a wheel."""
    home = Path(shoal.__file__).resolve().parent.parent
    own = [] if (home / "numpy").exists() else [str(home)]
    path = os.pathsep.join([*own, *filter(None, [os.environ.get("PYTHONPATH", "")])])
    return {**os.environ, "PYTHONPATH": path, "GRPC_VERBOSITY": os.environ.get("GRPC_VERBOSITY", "NONE")}
