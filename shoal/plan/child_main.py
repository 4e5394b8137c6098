"""The child process: runs the programs of plans for the process that started it, under limits.

`python -m shoal.plan.child_main SETTINGS`, started by `child_process.py` and by nobody else. It speaks over what were its
standard input and output (`channel.py`), one request and one answer at a time; what a program prints goes to standard
error. It imports as little as a plan needs, so that an older JAX can stand behind it, or none (`child_engines.py`).

Order: take the pipes, bind the life to the parent's, set the limits that need no measure, start the engine, measure what
it takes by itself, set the limit of memory, say hello, serve.

Guarantees:
    * It ends when its parent ends, however that happens: end of file on the pipe everywhere, a signal on Linux.
    * No program is loaded whose hash, and with JAX whose operations, were not checked in this very process.
    * Whatever a program raises is an answer, not the end.
"""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.channel import Channel
from shoal.plan.child_engines import engine_of
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.priority import step_back
from shoal.plan.runner import Runner
from shoal.tensors import Tensors

WATCH_PARENT_S: Final = 0.5
"""How often it looks whether the process that started it is there."""
REQUEST_BYTES: Final = 1 << 30
"""Beyond the memory limit: most of one request."""

Answer = tuple[dict[str, Any], Tensors]
"""Header and tensors."""


def main(arguments: list[str]) -> None:
    """Serves until the pipe ends."""
    settings = json.loads(arguments[1])
    channel = Channel.of_standard_streams()
    _die_with_parent()
    _limit_process(settings)
    most_bytes = settings["memory_bytes"] + REQUEST_BYTES
    threading.Thread(target=_watch_parent, args=(os.getppid(),), daemon=True).start()
    session = Session(settings)
    channel.send(session.hello())
    while True:
        tensors, header = _next_request(channel, most_bytes)
        answer, results = session.answer(header, tensors)
        channel.send(answer, results)


@final
class Session:
    """What a child holds: its settings, its engine, the runner of the plan that was loaded last."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._engine = engine_of(settings)
        self._seen: set[str] = set()
        self._manifest: Manifest | None = None
        self._runner: Runner | None = None
        self._calls: dict[str, Callable[[dict[str, Any], Tensors], Answer]] = {
            "load": self._load, "compile": self._compile, "set_model": self._set_model,
            "begin": self._begin, "block": self._block, "carry": self._carry, "resume": self._resume, "finish": self._finish,
            "train": self._train, "evaluate": self._evaluate, "predict": self._predict, "call": self._call,
        }  # fmt: skip

    def hello(self) -> dict[str, Any]:
        """Starts the engine and says what it is; from then on memory is limited."""
        runtime, versions = self._engine.start()
        limited = _limit_memory(self._settings["memory_bytes"] + self._engine.own_bytes)
        return {"runtime": runtime.to_json(), "memory_limited": limited, "pid": os.getpid(), **versions}

    def answer(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        """Serves one request; every failure becomes an answer."""
        try:
            return self._calls[header["call"]](header, tensors)
        except PlanError as error:
            return {"error": "plan", "message": str(error)}, {}
        except ProgramError as error:
            return {"error": "program", "message": str(error), "program": error.program}, {}
        except Exception as error:  # a program of a stranger may fail in any way
            lines = str(error).strip().splitlines() or [""]
            message = f"{header.get('call')} failed: {type(error).__name__}: {lines[0][:300]}"
            return {"error": "program", "message": message, "program": str(header.get("program", ""))}, {}

    @property
    def _held(self) -> Runner:
        if self._runner is None:
            raise ProgramError("No plan was loaded.")
        return self._runner

    def _load(self, _: dict[str, Any], tensors: Tensors) -> Answer:
        self._runner, self._manifest, self._seen = None, None, set()
        plan = Plan.parse(tensors["plan"].tobytes())
        self._runner, self._manifest = self._engine.load(plan), plan.manifest
        return {}, {}

    def _compile(self, _: dict[str, Any], __: Tensors) -> Answer:
        with self._first("train"):
            return {"seconds": self._held.compile()}, {}

    def _set_model(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        self._held.set_model(header["root"], tensors)
        return {}, {}

    def _begin(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        if "train" not in self._seen:
            self._compile({}, {})
        self._held.begin(header["root"], tensors)
        return {}, {}

    def _block(self, _: dict[str, Any], tensors: Tensors) -> Answer:
        mask, key, batches = _feed(tensors)
        self._held.block(batches, mask, key)
        return {}, {}

    def _carry(self, _: dict[str, Any], __: Tensors) -> Answer:
        return {}, self._held.carry()

    def _resume(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        if "train" not in self._seen:
            self._compile({}, {})
        self._held.resume(header["root"], tensors)
        return {}, {}

    def _finish(self, _: dict[str, Any], __: Tensors) -> Answer:
        update = self._held.finish()
        sums = {f"sum/{name}": value for name, value in update.sums.items()}
        kept = {f"device_state/{name}": value for name, value in update.device_state.items()}
        header = {"weight": update.weight, "seconds": dict(update.seconds), "padding": update.padding}
        return header, sums | kept

    def _train(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        steps: list[Tensors] = [{} for _ in range(int(header["blocks"]) + 1)]
        for name, value in tensors.items():
            number, _, rest = name.partition("/")
            steps[int(number)][rest] = value
        self._begin(header, steps[0])
        for fed in steps[1:]:
            self._block({}, fed)
        return self._finish({}, {})

    def _evaluate(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        mask, _, batch = _feed(tensors)
        with self._first("evaluate"):
            return {}, self._held.evaluate(header["root"], batch, mask)

    def _predict(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        mask, _, batch = _feed(tensors)
        with self._first("predict"):
            return {}, {"prediction": self._held.predict(header["root"], batch, mask)}

    def _call(self, header: dict[str, Any], tensors: Tensors) -> Answer:
        name = header["program"]
        if self._manifest is None or not self._manifest.variants(name):
            raise PlanError(f"The plan has no program {name[:80]!r}.")
        with self._first(name):
            return {}, self._held.call(name, tensors)

    def _first(self, what: str) -> AbstractContextManager[None]:
        """Around what may compile when it is first called."""
        if self._manifest is None or what in self._seen:
            return nullcontext()
        self._seen.add(what)
        return self._engine.compiling(f"{self._manifest.hash}-{what}")


def _feed(tensors: Tensors) -> tuple[np.ndarray, np.ndarray, Tensors]:
    fields = {name.removeprefix("batch/"): value for name, value in tensors.items() if name.startswith("batch/")}
    return tensors["mask"], tensors.get("key", np.zeros(2, np.uint32)), fields


def _next_request(channel: Channel, most_bytes: int) -> tuple[Tensors, dict[str, Any]]:
    try:
        return channel.receive(most_bytes=most_bytes)
    except EOFError:  # the parent closed the pipe or is gone: nobody wants an answer any more
        os._exit(0)
    except BaseException as error:
        print(f"The request could not be read: {error!r}", file=sys.stderr, flush=True)
        os._exit(3)


def _watch_parent(parent: int) -> None:
    # The pipe's end is seen only between two requests; this sees the parent's in the middle of a long program too.
    while _is_there(parent):
        time.sleep(WATCH_PARENT_S)
    os._exit(0)


def _is_there(parent: int) -> bool:
    if sys.platform == "win32":  # where a process keeps the number of a parent that is gone
        import psutil

        return psutil.pid_exists(parent)
    return os.getppid() == parent


def _die_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us in its own way
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)


def _limit_process(settings: Mapping[str, Any]) -> None:
    """The limits that need no measure: file size, core files, priority."""
    if sys.platform != "win32":
        import resource

        _set_limit(resource.RLIMIT_CORE, 0)
        _set_limit(resource.RLIMIT_FSIZE, settings["disk_bytes"])
    step_back(settings["priority"])


def _limit_memory(more_bytes: int) -> bool:
    """Limits the private memory to what is taken now and so much more; False where the system cannot."""
    limited = False
    if sys.platform == "linux":  # macOS accepts the call and does nothing
        import resource

        # Not RLIMIT_AS: the runtime reserves address space that it never uses. RLIMIT_DATA counts what may be written.
        status = Path("/proc/self/status").read_text().splitlines()
        taken = next(line for line in status if line.startswith("VmData:"))
        limited = _set_limit(resource.RLIMIT_DATA, (int(taken.split()[1]) << 10) + more_bytes)
    return limited


def _set_limit(which: int, value: int) -> bool:
    """Sets a limit, or leaves a lower one that was set before."""
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(which)
        allowed = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(which, (allowed, allowed))
            return True
        except (OSError, ValueError):  # a sandbox forbids it: the parent watches instead
            pass
    return False


if __name__ == "__main__":
    main(sys.argv)
