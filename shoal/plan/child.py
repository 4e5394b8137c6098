"""A Runner whose programs run in a child process under limits: what a device uses. No JAX in this process.

    caller ── ChildRunner ── Child (thread, pipes) ══ child_main ── JaxRunner or IreeRunner

The plan's signature is for the caller to verify (`Plan.verify`); the sizes are checked here before anything is
started, hashes and operations in the child before anything is loaded. A child that is gone is replaced at the next
call: the plan is handed over again, models and a training in flight are lost, and `has_model` says so. So is one that
was ended because nobody needed it for a while (`idle_s`).

Guarantees:
    * Whatever a program raises, and whatever ends its process (a crash, want of memory, the deadline), is a
      `ProgramError` of one line. The caller's process goes on.
    * A child does not outlive its parent, however that ends.
    * What comes back has the manifest's names, shapes and types, whatever the child says.

Cost: 1 to 2 s to start a child; then about 0.3 ms a call, and a copy through a pipe (1 GB/s or so) of what is handed over.
"""

import json
import os
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self, final

import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.check import check_plan
from shoal.plan.child_engines import EngineName
from shoal.plan.child_process import Child, ChildEnded, environment_for, python_path
from shoal.plan.compile_cache import cache_folder
from shoal.plan.manifest import Runtime
from shoal.plan.plan import Plan
from shoal.plan.priority import Priority
from shoal.plan.runner import MODELS_HELD, Limits, Update
from shoal.tensors import Tensors, TensorSpec, check, total_bytes

WHOLE_BYTES: Final = 32 << 10
"""A training of no more data is sent in one message."""
START_S: Final = 120.0
"""Longest start of a child; importing JAX from a cold disk takes its time."""
LOCK_WAIT_S: Final = 60.0
"""Longest wait for another process that compiles the same plan."""


@final
class ChildRunner:
    """A `Runner` in a child process. Calls block and may come from any thread; one is served at a time."""

    def __init__(
        self,
        plan: Plan,
        limits: Limits | None = None,
        threads: int | None = None,
        *,
        python: str | None = None,
        priority: Priority = "low",
        cache: Path | None = None,
        engine: EngineName = "jax",
        idle_s: float | None = None,
        accelerators: int = 1,
    ) -> None:
        """Checks the plan's sizes; the child is started by the first call.

        Args:
            plan: verified; with the programs that the child's runtime can run.
            limits: what it may take.
            threads: of the CPU; None: all.
            python: interpreter of the child, for a JAX of another version; it needs JAX, NumPy, cryptography.
            priority: how much the child steps back for other processes.
            cache: folder of compiled programs; None: the platform's.
            engine: what runs the programs.
            idle_s: the child is ended when nothing was asked of it for so long, outside of a training; None: it stays.
            accelerators: of this machine, that share each batch: with JAX.

        Raises:
            PlanError: the plan is too large for the limits, or does not fit together.
        """
        self._limits = limits or Limits()
        check_plan(plan.manifest, self._limits)
        # The child has no use for the server half.
        self._plan = replace(plan, manifest=replace(plan.manifest, half=None))
        self._command = child_command(
            self._limits, python=python, priority=priority, cache=cache, engine=engine, threads=threads, accelerators=accelerators,
        )  # fmt: skip
        self._idle_s = idle_s
        self._environment = environment_for(python_path=_path_of(python), threads=threads, accelerators=accelerators)
        self._most_bytes = max(total_bytes(program.outputs) for program in plan.manifest.programs)
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._runtime: Runtime | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._steps: list[tuple[dict[str, str], Tensors]] = []  # of a training that is not sent yet
        self._models: OrderedDict[str, None] = OrderedDict()  # what the child holds, so that it need not be asked
        self._is_training = self._is_closed = self._is_compiled = False

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            with self._lock:
                self._ready("")
        assert self._runtime is not None
        return self._runtime

    @property
    def pid(self) -> int | None:
        """Process id of the child; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.is_alive() else None

    def compile(self) -> float:
        if self._is_compiled and self.pid is not None:
            return 0.0
        seconds = float(self._ask("compile")[0]["seconds"])
        self._is_compiled = True
        return seconds

    def set_model(self, root: str, tensors: Tensors) -> None:
        check(tensors, self._plan.manifest.broadcast, what="the model")
        self._ask("set_model", tensors, root=root)
        self._models[root] = None
        while len(self._models) > MODELS_HELD:
            self._models.popitem(last=False)

    def has_model(self, root: str) -> bool:
        # Whoever asks is about to use it.
        return root in self._models and self._child is not None and self._keeps(self._child)

    def begin(self, root: str, device_state: Tensors) -> None:
        check(device_state, self._plan.manifest.device_state, what="the device state")
        if not self.has_model(root):
            raise ProgramError(f"Model {root[:12]}… is not held; hand it over with set_model.", program="begin")
        self._use(root)
        self._steps = [({"call": "begin", "root": root}, dict(device_state))]
        self.has_model(root)  # the child rests later now
        self._send_if_large()

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        fed = {**self._fields(batches), "mask": mask, "key": key}
        if self._steps:
            self._steps.append(({"call": "block"}, fed))
            self._send_if_large()
        else:
            self._ask("block", fed, wait=False)

    def carry(self) -> Tensors:
        self._send()
        tensors = self._ask("carry")[1]
        _expect(tensors, self._outputs("begin", ""), "begin")
        return tensors

    def resume(self, root: str, carry: Tensors) -> None:
        check(carry, self._outputs("begin", ""), what="the training")
        if not self.has_model(root):
            raise ProgramError(f"Model {root[:12]}… is not held; hand it over with set_model.", program="begin")
        self._use(root)
        self._steps = []
        self._ask("resume", carry, root=root)

    def finish(self) -> Update:
        if self._steps:
            header, tensors = self._ask_whole()
        else:
            header, tensors = self._ask("finish")
        manifest = self._plan.manifest
        sums, kept = _under("sum/", tensors), _under("device_state/", tensors)
        _expect(sums, manifest.update, "finish")
        _expect(kept, manifest.device_state, "finish")
        return Update(sums, int(header["weight"]), kept, dict(header["seconds"]), float(header["padding"]))

    def evaluate(self, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        self._use(root)
        tensors = self._ask("evaluate", {**self._fields(batch), "mask": mask}, root=root)[1]
        _expect(tensors, self._outputs("evaluate", "metric/"), "evaluate")
        return tensors

    def predict(self, root: str, batch: Tensors, mask: np.ndarray) -> np.ndarray:
        self._use(root)
        tensors = self._ask("predict", {**self._fields(batch), "mask": mask}, root=root)[1]
        _expect(tensors, self._outputs("predict", "output/"), "predict")
        return tensors["prediction"]

    def call(self, program: str, inputs: Tensors) -> Tensors:
        tensors = self._ask("call", inputs, program=program)[1]
        _expect(tensors, self._outputs(program, ""), program)
        return tensors

    def close(self) -> None:
        # Not under the lock: a call that is running should not hold this up, it fails instead.
        self._is_closed = True
        if (finalizer := self._finalizer) is not None:
            finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_if_large(self) -> None:
        """A short training is sent whole, by `finish`; a longer one is on its way from here on."""
        if sum(value.nbytes for _, tensors in self._steps for value in tensors.values()) > WHOLE_BYTES:
            self._send()

    def _send(self) -> None:
        steps, self._steps = self._steps, []
        for header, tensors in steps:
            # What a training that was given up still owes must not be taken for an answer to this one.
            child = self._child
            owes = header["call"] == "begin" and child is not None and child.owes
            self._ask(header.pop("call"), tensors, wait=owes, **header)

    def _ask_whole(self) -> tuple[dict[str, Any], Tensors]:
        steps, self._steps = self._steps, []
        if not self.has_model(steps[0][0]["root"]):
            raise ProgramError(self._text("ended while nothing ran in it"), program="begin")
        tensors = {f"{n}/{name}": value for n, (_, given) in enumerate(steps) for name, value in given.items()}
        return self._ask("train", tensors, root=steps[0][0]["root"], blocks=str(len(steps) - 1))

    def _use(self, root: str) -> None:
        if root in self._models:
            self._models.move_to_end(root)  # as the child does: the one that was used last is kept

    def _ask(
        self, call: str, tensors: Mapping[str, np.ndarray] | None = None, *, wait: bool = True, **header: str
    ) -> tuple[dict[str, Any], Tensors]:
        program = header.get("program", call if self._plan.manifest.variants(call) else "")
        with self._lock:
            child = self._ready(program)
            try:
                answer = self._exchange(child, {"call": call, **header}, tensors or {}, program, wait=wait)
                if call in ("begin", "resume", "finish"):
                    self._is_training = call != "finish"
                return answer
            finally:
                self._keeps(child)

    def _keeps(self, child: Child) -> bool:
        """Begins a child's time of rest anew; whether it is there. A training that is not gone on with may have been given up."""
        training_s = self._limits.seconds if self._is_training or self._steps else 0.0
        return child.rest_after(None if self._idle_s is None else self._idle_s + training_s)

    def _ready(self, program: str) -> Child:
        """The child, started and with the plan; a new one where the last is gone."""
        if self._is_closed:
            raise ProgramError("The runner is closed.", program=program)
        if self._child is not None and self._child.is_claimed():
            return self._child
        was_training, self._is_training = self._is_training, False
        if self._child is not None:
            self._drop()
            if was_training:
                raise ProgramError(self._text("ended while nothing ran in it"), program=program)
        child = self._start(program)
        try:
            plan = {"plan": np.frombuffer(self._plan.to_bytes(), np.uint8)}
            self._exchange(child, {"call": "load"}, plan, program)
        except (PlanError, ProgramError):
            self._drop()
            raise
        return child

    def _start(self, program: str) -> Child:
        try:
            child = Child(self._command, self._environment)
            self._child, self._finalizer = child, weakref.finalize(self, child.stop)
            hello = child.hello(timeout_s=START_S)
        except ChildEnded as error:
            self._drop()
            raise ProgramError(self._text(str(error), done="when it started"), program=program) from error
        self._runtime = Runtime.from_json(hello["runtime"])
        if not hello["memory_limited"]:
            child.watch_memory(self._limits.memory_bytes)
        if self._is_closed:  # `close` came while the child was starting and did not see it
            self._drop()
            raise ProgramError("The runner is closed.", program=program)
        return child

    def _exchange(
        self,
        child: Child,
        header: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        program: str,
        *,
        wait: bool = True,
    ) -> tuple[dict[str, Any], Tensors]:
        try:
            answer, results = child.request(
                header, tensors, timeout_s=self._limits.seconds, most_bytes=self._most_bytes, wait=wait
            )
        except ChildEnded as error:
            self._drop()
            raise ProgramError(self._text(str(error), done=f"in {header['call']!r}"), program=program) from error
        if header["call"] in ("begin", "resume", "train"):
            child.owed_failure = None  # of a training that was given up
        elif header["call"] in ("block", "carry", "finish"):
            answer = child.owed_failure or answer
        if answer.get("error") == "plan":
            raise PlanError(answer["message"])
        if "error" in answer:
            raise ProgramError(answer["message"], program=answer["program"] or program)
        return answer, results

    def _drop(self) -> None:
        self._child, self._is_training, self._is_compiled = None, False, False
        self._models.clear()
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None

    def _text(self, story: str, *, done: str = "") -> str:
        return (
            f"The process that runs task {self._plan.manifest.task!r} {story}{' ' + done if done else ''}. "
            "The next call starts another; hand the model over again."
        )

    def _fields(self, batch: Tensors) -> Tensors:
        return {f"batch/{name}": value for name, value in batch.items()}

    def _outputs(self, name: str, prefix: str) -> list[TensorSpec]:
        # Every variant of a program has the same outputs: `check_plan` has seen to it.
        return [
            TensorSpec(name=spec.name.removeprefix(prefix), shape=spec.shape, dtype=spec.dtype)
            for spec in self._plan.manifest.variants(name)[0].outputs
        ]


def probe(*, python: str | None = None, threads: int | None = None) -> Runtime:
    """What a child on this machine can run: what a device says at check-in, before it has a plan.

    Raises:
        ProgramError: no child can be started.
    """
    command = child_command(Limits(), python=python, priority="normal", cache=None, engine="jax", threads=threads)
    try:
        child = Child(command, environment_for(python_path=_path_of(python), threads=threads))
        try:
            return Runtime.from_json(child.hello(timeout_s=START_S)["runtime"])
        finally:
            child.stop()
    except ChildEnded as error:
        raise ProgramError(f"The process that runs programs {error} when it started.") from error


def child_command(
    limits: Limits,
    *,
    python: str | None,
    priority: Priority,
    cache: Path | None,
    engine: EngineName,
    threads: int | None,
    accelerators: int = 1,
) -> list[str]:
    """The command line of a child."""
    settings = {
        "memory_bytes": limits.memory_bytes, "disk_bytes": limits.disk_bytes, "priority": priority,
        "cache": str(cache or cache_folder()), "lock_wait_s": min(LOCK_WAIT_S, limits.seconds / 4),
        "engine": engine, "threads": threads, "accelerators": accelerators,
    }  # fmt: skip
    # -P: no module of the working directory takes the place of a library.
    return [python or sys.executable, "-P", "-m", "shoal.plan.child_main", json.dumps(settings)]


def _path_of(python: str | None) -> str:
    return python_path("" if python is not None else os.environ.get("PYTHONPATH", ""))


def _under(prefix: str, tensors: Tensors) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _expect(tensors: Tensors, specs: "tuple[TensorSpec, ...] | list[TensorSpec]", program: str) -> None:
    try:
        check(tensors, specs, what=f"the result of {program}")
    except ValueError as error:
        raise ProgramError(
            f"The child process gave another result than the plan says: {error}", program=program
        ) from error
