"""A child process and the thread that keeps it: starts it, watches the clock and its memory, ends it.

One thread a child does both the starting and the watching, for a reason: on Linux a child is bound to the *thread* that
started it (PR_SET_PDEATHSIG), and a caller's thread may end long before the child should. The watching uses no
signal and no `select`, so that it is the same on every platform: at the deadline the child is killed, and the caller,
who waits for its answer, sees the end of the pipe.

Who ends a child: `stop`, the deadline of a request, want of work (`rest_after`), too much memory (where the system has no
limit of its own), itself, or the system. `ChildEnded` says which, with the last line that it wrote to standard error.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Final, cast, final

import numpy as np

import shoal
from shoal.errors import ProtocolError
from shoal.plan.channel import Channel
from shoal.plan.check import readable
from shoal.tensors import Tensors

LOOK_S: Final = 1.0
"""How often the keeper looks at the deadline."""
WATCH_S: Final = 0.1
MOST_OWED: Final = 4
"""Answers that a request may run ahead of."""
"""How often memory is looked at where the system has no limit."""
LAST_WORDS_BYTES: Final = 4096

_KEPT: Final = frozenset(
    (
        *("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "TEMP", "TMP", "XDG_CACHE_HOME", "TF_CPP_MIN_LOG_LEVEL"),
        *("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LIBTPU_INIT_ARGS", "NUMBER_OF_PROCESSORS"),
        *("SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "LOCALAPPDATA", "USERPROFILE", "PROGRAMDATA"),
    )
)
_KEPT_PREFIXES: Final = ("JAX_", "XLA_", "CUDA_", "NVIDIA_", "ROCM_", "HIP_", "HSA_", "TPU_", "SHOAL_")
_SECRET: Final = ("KEY", "TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL")


class ChildEnded(Exception):
    """The child is gone; the text says why, as the second half of a sentence."""


@final
class Child:
    """A running child process. One request at a time; `stop` from any thread."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Starts it. Raises ChildEnded if that is not possible."""
        self._command, self._environment = list(command), dict(environment)
        self._changed = threading.Condition()
        self._deadline = self._allowed_s = 0.0
        self._rests_at = 0.0
        self._memory_bytes = 0  # 0: not watched
        self._why = ""
        self._owed = 0  # answers that were not waited for
        self.owed_failure: dict[str, Any] | None = None
        self._is_over = False
        self._failures: list[OSError] = []
        self._last_words = ""
        self._process: subprocess.Popen[bytes]  # both are set by the keeper, before `started`
        self._channel: Channel
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed with the child
        started = threading.Event()
        self._keeper = threading.Thread(target=self._keep, args=(started,), daemon=True, name="shoal-child")
        self._keeper.start()
        started.wait()
        for failure in self._failures:
            self._errors.close()
            raise ChildEnded(f"could not be started: {failure}") from failure

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return not self._is_over and self._process.poll() is None

    def is_claimed(self) -> bool:
        """Whether it is alive; if so it does not rest until `rest_after` is called."""
        return self.rest_after(None)

    def rest_after(self, idle_s: float | None) -> bool:
        """From now on it is ended once so long has gone by; None: it is not. Whether it is alive."""
        with self._changed:
            self._rests_at = time.monotonic() + idle_s if idle_s is not None else 0.0
            return self.is_alive()

    def watch_memory(self, more_bytes: int) -> None:
        """From now on the child may take so much more than it takes now; it is ended if it takes more."""
        taken = _taken_bytes(self.pid)
        if taken is None:  # it is gone already: the next request says so
            return
        with self._changed:
            self._memory_bytes = taken + more_bytes
            self._changed.notify_all()

    def request(
        self,
        header: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        *,
        timeout_s: float,
        most_bytes: int,
        wait: bool = True,
    ) -> tuple[dict[str, Any], Tensors]:
        """Sends one request and waits for its answer.

        Without `wait` it goes on as soon as the request is sent, at most `MOST_OWED` answers ahead: a training of many
        short blocks then takes one round trip instead of many. The first of those answers that is an error is kept in
        `owed_failure`.

        Raises:
            ChildEnded: there will be no answer; the child is over.
        """
        return self._within(timeout_s, lambda: self._channel.send(header, tensors), most_bytes, wait=wait)

    @property
    def owes(self) -> bool:
        """Whether there are answers that were not waited for."""
        return self._owed > 0

    def hello(self, *, timeout_s: float) -> dict[str, Any]:
        """The child's first message. Raises ChildEnded."""
        return self._within(timeout_s, lambda: None, 0, wait=True)[0]

    def stop(self) -> None:
        """Ends the child, now. May be called at any time, any number of times."""
        self._end("was stopped")
        if threading.current_thread() is not self._keeper:
            self._keeper.join()

    def _within(
        self, timeout_s: float, send: Callable[[], None], most_bytes: int, *, wait: bool
    ) -> tuple[dict[str, Any], Tensors]:
        answer: tuple[dict[str, Any], Tensors] = ({}, {})
        try:
            self._set_deadline(timeout_s)
            send()
            self._owed += 1
            while self._owed > (0 if wait else MOST_OWED):
                self._set_deadline(timeout_s)
                tensors, header = self._channel.receive(most_bytes=most_bytes)
                self._owed -= 1
                if wait and not self._owed:
                    answer = (header, tensors)
                elif "error" in header:
                    self.owed_failure = self.owed_failure or header
        except ProtocolError as error:
            self._end(f"did not speak as it should: {error}")
            raise ChildEnded(self._story()) from error
        except (OSError, EOFError, ValueError) as error:  # ValueError: the pipe was closed by `stop`
            raise ChildEnded(self._story()) from error
        finally:
            self._set_deadline(0.0)
        return answer

    def _set_deadline(self, timeout_s: float) -> None:
        with self._changed:
            self._allowed_s = timeout_s
            self._deadline = time.monotonic() + timeout_s if timeout_s else 0.0
            if 0.0 < timeout_s < LOOK_S:  # else the keeper sees it in time by itself; waking it costs each request
                self._changed.notify_all()

    def _end(self, why: str) -> None:
        with self._changed:
            self._why = self._why or why
            self._is_over = True
            self._changed.notify_all()

    def _story(self) -> str:
        """Why the child is over; waits until it is."""
        if not self._is_over:
            try:  # the pipe has ended, so the process is about to
                self._process.wait(timeout=2.0)
            except subprocess.TimeoutExpired:
                pass
        self._end("")
        self._keeper.join()
        story = self._why or _exit_text(self._process.returncode)
        return f"{story} ({self._last_words})" if self._last_words else story

    def _keep(self, started: threading.Event) -> None:
        try:
            self._process = self._start()
        except OSError as error:
            self._failures.append(error)
            return
        finally:
            started.set()
        with self._changed:
            while not self._is_over:
                self._changed.wait(self._pause_s())
                self._look()
        self._process.kill()
        self._process.wait()
        self._last_words = _last_line(self._errors)
        self._errors.close()
        self._channel.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        flags = 0
        if sys.platform == "win32":
            flags = subprocess.CREATE_NO_WINDOW
        process = subprocess.Popen(
            self._command, env=self._environment, cwd=tempfile.gettempdir(), bufsize=0, creationflags=flags,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip
        self._channel = Channel(cast(FileIO, process.stdout), cast(FileIO, process.stdin))
        return process

    def _pause_s(self) -> float:
        most_s = WATCH_S if self._memory_bytes else LOOK_S
        return min(most_s, max(0.0, self._deadline - time.monotonic())) if self._deadline else most_s

    def _look(self) -> None:
        if self._deadline and time.monotonic() >= self._deadline:
            self._end(f"took longer than {self._allowed_s:g} s, the limit of this device")
        elif self._rests_at and time.monotonic() >= self._rests_at:
            self._end("was not needed")
        elif self._memory_bytes and self._deadline:
            taken = _taken_bytes(self.pid)
            if taken is not None and taken > self._memory_bytes:
                self._end(f"took {readable(taken)} of memory, this device allows {readable(self._memory_bytes)}")


def _taken_bytes(pid: int) -> int | None:
    import psutil  # only where the system itself does not limit memory

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


def environment_for(*, python_path: str, threads: int | None, accelerators: int = 1) -> dict[str, str]:
    """What a child sees of the environment: what JAX and the system need, and no secrets."""
    kept = {name: value for name, value in os.environ.items() if _is_kept(name.upper())}
    kept |= {"PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if threads is not None:
        kept |= {"NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}
    if accelerators > 1:
        kept |= {"JAX_NUM_CPU_DEVICES": str(accelerators)}  # where there are no others
    return kept


def python_path(own: str) -> str:
    """PYTHONPATH of a process that finds shoal as this one has, whatever folder it is started in; `own`: what else it is to hold."""
    home = Path(shoal.__file__).resolve().parent.parent
    # An installed shoal lies among other libraries, which must not take the place of the other interpreter's.
    return os.pathsep.join([*([] if (home / "numpy").exists() else [str(home)]), *filter(None, own.split(os.pathsep))])


def _is_kept(name: str) -> bool:
    if any(word in name for word in _SECRET):
        return False
    return name in _KEPT or name.startswith(_KEPT_PREFIXES)


def _exit_text(code: int) -> str:
    if code == -9:
        return "was killed by the system, most likely for want of memory"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def _last_line(errors: Any) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - LAST_WORDS_BYTES))
    lines = errors.read().decode(errors="replace").splitlines()
    printable = ["".join(c for c in line if c.isprintable()).strip() for line in lines]
    return next((line[:300] for line in reversed(printable) if line), "")
