"""A worker's side of a pod: what it is told by the supervisor that started it, and what it says to it.

    from shoal.pod import worker

    with worker.attached(prepare=imports) as pod:      # a spare waits here for its assignment, when it has imported all
        pod.initialize()                    # jax.distributed, where there are others
        pod.marks.doing("compiling")
        ...
        pod.marks.doing("training")
        for step in range(first, last):
            pod.marks.begin(step)
            state = train(state)
            pod.marks.done(step)
            if step % 100 == 0:
                save(state)
                pod.marks.saved(step)
                if pod.agree_to_pause():    # others have come, or some are to leave: the next life goes on from here
                    pod.pause()

Without a supervisor the same code trains alone: marks go nowhere, nobody asks for a pause.

Two pipes join it to its supervisor. On standard input come its assignment, where the environment does not say it, and the request to
pause; when that pipe ends the supervisor is dead, and the worker ends itself with all that it started. Into the descriptor SHOAL_POD_MARKS_FD it
writes where it is, a line of JSON twice a second and whenever that changes, but never waits for anybody to read it.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, NoReturn, Self, final

from shoal import validate
from shoal.pod.membership_events import PAUSED, Doing, Mark

LIFE: Final = "SHOAL_POD_LIFE"
COORDINATOR: Final = "SHOAL_POD_COORDINATOR"
PROCESSES: Final = "SHOAL_POD_PROCESSES"
PROCESS: Final = "SHOAL_POD_PROCESS"
MARKS_FD: Final = "SHOAL_POD_MARKS_FD"

HEARTBEAT_S: Final = 10
"""After so long without a word XLA's coordination service takes a member for dead, and the others end."""
GATHER_S: Final = 120
"""So long members wait for one another at the beginning of a life, and at its end."""
BEAT_S: Final = 0.5
LOOK_S: Final = 0.01
"""Between two looks for the first process."""
SHORTEST_S: Final = 0.05
"""Between two marks: those in between are left out."""
LOWEST: Final = 19
"""Priority (nice) of a spare's imports."""
AUTOGROUP: Final = "autogroup"
"""Of a process, in /proc: the priority of its session, where the system shares processors between sessions first (`man 7 sched`). What its threads have
counts among themselves then."""
PATIENCE_S: Final = 1.0
"""So long a spare that is assigned waits for them."""
_LAST_STEPS: Final = 32
_LINE_BYTES: Final = 4096


@dataclass(frozen=True)
class Assignment:
    """A worker's part in a life."""

    life: int
    coordinator: str
    """HOST:PORT of the coordination service, which process 0 has."""
    num_processes: int
    process_id: int

    def __post_init__(self) -> None:
        validate.types(self)
        validate.whole(1, life=self.life, num_processes=self.num_processes)
        validate.between(0, self.num_processes - 1, process_id=self.process_id)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Self | None:
        """What the environment says; None where it says nothing of a life.

        Raises:
            ValueError: a part of it is missing or no number.
        """
        environ = os.environ if environ is None else environ
        if LIFE not in environ:
            return None
        missing = [name for name in (COORDINATOR, PROCESSES, PROCESS) if name not in environ]
        if missing:
            raise ValueError(f"Expected {', '.join(missing)} beside {LIFE}={environ[LIFE]}, got no such variable.")
        numbers = [environ[name] for name in (LIFE, PROCESSES, PROCESS)]
        if not all(number.isascii() and number.isdigit() for number in numbers):
            raise ValueError(f"Expected {LIFE}, {PROCESSES} and {PROCESS} to be whole numbers, got {numbers}.")
        life, processes, process = map(int, numbers)
        return cls(life, environ[COORDINATOR], processes, process)

    def to_environ(self) -> dict[str, str]:
        """The variables that say it."""
        return {
            LIFE: str(self.life), COORDINATOR: self.coordinator, PROCESSES: str(self.num_processes), PROCESS: str(self.process_id),
        }  # fmt: skip

    def initialize(self) -> None:
        """Joins the others: `jax.distributed`, with limits that are short. Alone there is nothing to join.

        Must come before JAX does anything on a device.
        """
        if self.num_processes == 1:
            return
        import jax

        from shoal.pod.compiled import keep_by_all

        keep_by_all()
        if self.process_id:
            _until_listening(self.coordinator)
        # It would take SIGTERM for itself, which is how the supervisor ends a worker.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            self.coordinator,
            num_processes=self.num_processes,
            process_id=self.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=GATHER_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=GATHER_S,
        )


def _until_listening(address: str) -> None:
    """Waits for somebody to listen there, `GATHER_S` at most: a client of gRPC that comes too early tries again after a second."""
    host, _, port = address.rpartition(":")
    deadline_s = time.monotonic() + GATHER_S
    while time.monotonic() < deadline_s:
        with suppress(OSError), socket.create_connection((host, int(port)), HEARTBEAT_S):
            return
        time.sleep(LOOK_S)


@final
class Marks:
    """Says where this worker is. Cheap: a step more than `SHORTEST_S` after the last costs one write to a pipe, others none."""

    def __init__(self, descriptor: int | None, *, now_s: Callable[[], float] = time.monotonic) -> None:
        """`descriptor`: of a pipe; None: nobody listens."""
        self._descriptor, self._now_s = descriptor, now_s
        self._mark = Mark("starting")
        self._seconds: deque[float] = deque(maxlen=_LAST_STEPS)
        self._done_s: float | None = None
        self._written_s = float("-inf")
        self._lock = threading.Lock()

    @property
    def mark(self) -> Mark:
        """The present one."""
        return self._mark

    def doing(self, what: Doing) -> None:
        """From now on it does this."""
        self._done_s = None  # what comes now is no step's time
        self._change(doing=what)

    def begin(self, step: int) -> None:
        """A step, or a call of several of which this is the last, is about to be taken; say it before it waits for others."""
        self._change(begun=step)

    def done(self, step: int) -> None:
        """It is done."""
        now_s = self._now_s()
        if self._done_s is not None:
            self._seconds.append(now_s - self._done_s)
        self._done_s = now_s
        self._change(step=step, step_s=median(self._seconds) if self._seconds else 0.0)

    def saved(self, step: int) -> None:
        """A checkpoint of this step is whole."""
        self._change(saved=step)

    def beat(self) -> None:
        """Says where it is though nothing has changed."""
        with self._lock:
            self._write()

    def _change(self, **changed: Any) -> None:
        with self._lock:
            before, self._mark = self._mark, replace(self._mark, **changed)
            if before.doing != self._mark.doing or self._now_s() - self._written_s >= SHORTEST_S:
                self._write()  # else the next beat says it

    def _write(self) -> None:
        if self._descriptor is None:
            return
        self._written_s = self._now_s()
        try:
            os.write(self._descriptor, json.dumps(asdict(self._mark)).encode() + b"\n")
        except BlockingIOError:
            pass  # the pipe is full: a later mark says more
        except OSError:
            self._descriptor = None  # nobody reads any more; standard input has ended, too


@final
class Worker:
    """This process as a member of a pod; see the module's text."""

    def __init__(self, assignment: Assignment | None, marks: Marks) -> None:
        """`assignment`: None without a supervisor."""
        self.assignment, self.marks = assignment, marks
        self._was_asked = threading.Event()
        self._at_end: Callable[[], None] | None = None
        self._ending = threading.Lock()

    @property
    def life(self) -> int:
        """Its number; 1 without a supervisor."""
        return self.assignment.life if self.assignment else 1

    def initialize(self) -> None:
        """Joins the others of its life."""
        if self.assignment is not None:
            self.assignment.initialize()

    def ask(self) -> None:
        """It is to pause at its next checkpoint. From any thread."""
        self._was_asked.set()

    @property
    def was_asked(self) -> bool:
        """Whether this one has been asked to pause; where there are others they may not have heard of it yet: see `agree_to_pause`."""
        return self._was_asked.is_set()

    def agree_to_pause(self) -> bool:
        """Whether any member was asked to pause: the same answer for all, who must all call it at the same place. A small collective."""
        asked = self.was_asked
        if self.assignment is None or self.assignment.num_processes == 1:
            return asked
        import numpy as np
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(asked, np.int32))))

    def at_end(self, run: Callable[[], None]) -> None:
        """What is to be done when this process is about to end unwell, by a fault of its own or because its supervisor says so (SIGTERM): quickly, the next
        life waits for it. For the main thread; without a supervisor nothing comes of it."""
        if self.assignment is None:
            return
        if self._at_end is None:
            self._heed_signals()
        self._at_end = run

    def end(self) -> None:
        """Does it, once; whoever comes meanwhile waits until it is done."""
        with self._ending:
            run, self._at_end = self._at_end or (lambda: None), None
            try:
                run()
            except Exception:  # it ends anyway, with the fault that it has
                traceback.print_exc()

    def _heed_signals(self) -> None:
        """SIGTERM in a thread: the main one may be waiting for others in XLA, where no handler of Python's runs. SIGABRT in the thread that aborts: XLA's runtime ends a
        process so when the one that coordinates them is gone."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_as_usual)

        def heed() -> None:
            while signal.SIGTERM not in os.read(read, 1):
                pass
            self.end()
            os._exit(128 + signal.SIGTERM)

        def aborted(number: int) -> None:
            self.end()
            os._exit(128 + number)

        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
        ctypes.CDLL(None).signal(int(signal.SIGABRT), self._aborted)
        threading.Thread(target=heed, daemon=True, name="shoal-pod-heed").start()

    def pause(self) -> NoReturn:
        """Ends this process: its state is saved, and the next life goes on."""
        raise SystemExit(PAUSED)


@contextmanager
def attached(prepare: Callable[[], None] = lambda: None) -> Iterator[Worker]:
    """The worker that this process is, while the block runs. A failure in it ends the process, where it has a supervisor, at once: the others
    wait for it in a collective, and good-byes through `jax.distributed` would keep them waiting.

    Args:
        prepare: imports what the block needs; a spare does it in a thread that takes nothing from those who train meanwhile.

    Raises:
        ValueError: the environment says something of a pod, but not all that is needed.
    """
    assignment = Assignment.from_environ()
    if MARKS_FD not in os.environ or assignment is not None:
        prepare()
    if MARKS_FD not in os.environ:
        worker = Worker(assignment, Marks(None))
        worker.marks.doing("starting")
        yield worker
        return
    descriptor = int(os.environ[MARKS_FD])
    os.set_inheritable(descriptor, False)
    os.set_blocking(descriptor, False)
    worker = Worker(assignment, Marks(descriptor))
    preparing = None if assignment else _prepared_beside(prepare)
    worker.assignment = _follow(worker)
    if preparing is not None:
        preparing.join(PATIENCE_S)
        if preparing.is_alive():  # it has too little of the processor: anew, with the usual priority
            _begin_anew(worker.assignment, descriptor)
    try:
        yield worker
        worker.marks.beat()
    except SystemExit:
        worker.marks.beat()
        raise
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        worker.end()
        os._exit(1)


def _as_usual() -> None:
    """In a process that was forked: SIGTERM ends it, and is nobody else's affair."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGABRT):
        signal.signal(number, signal.SIG_DFL)


def _prepared_beside(prepare: Callable[[], None]) -> threading.Thread:
    """Runs it in a thread of the lowest priority, where a thread can have its own. What fails is found out when it is needed."""
    import numpy  # noqa: F401 (its threads are to be of the usual priority)

    def run() -> None:
        if sys.platform == "linux":  # elsewhere it would be the whole process's, for ever
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST)
        with suppress(Exception):
            prepare()

    thread = threading.Thread(target=run, daemon=True, name="shoal-pod-prepare")
    thread.start()
    return thread


def _raise_session() -> None:
    """To the usual priority: its supervisor lowered it when it started this process as a spare. The system takes ten changes a second from all together."""
    while True:
        try:
            Path("/proc/self", AUTOGROUP).write_text("0")
        except BlockingIOError:
            time.sleep(BEAT_S)
        except OSError:  # the system has no such thing
            return
        else:
            return


def _begin_anew(assignment: Assignment, descriptor: int) -> NoReturn:
    """The same program in the same process, with its assignment from the beginning."""
    os.set_inheritable(descriptor, True)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **assignment.to_environ()})


def _follow(worker: Worker) -> Assignment:
    """Listens to the supervisor from now on, and speaks; returns when there is an assignment."""
    assigned: list[Assignment] = [worker.assignment] if worker.assignment else []
    is_assigned = threading.Event()
    if assigned:
        is_assigned.set()

    def listen() -> None:
        with os.fdopen(0, "rb", buffering=0, closefd=False) as pipe:
            while line := pipe.readline(_LINE_BYTES):
                told = json.loads(line)
                if "assign" in told and not assigned:
                    assigned.append(Assignment(**told["assign"]))
                    is_assigned.set()
                    threading.Thread(target=_raise_session, daemon=True, name="shoal-pod-raise").start()
                if "ask" in told:
                    worker.ask()
        _end_with_all()

    def beat() -> None:
        while True:
            worker.marks.beat()
            time.sleep(BEAT_S)

    for run in (listen, beat):
        threading.Thread(target=run, daemon=True, name=f"shoal-pod-{run.__name__}").start()
    is_assigned.wait()
    return assigned[0]


def _end_with_all() -> NoReturn:
    """The supervisor is dead."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
