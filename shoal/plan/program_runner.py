"""What runners of a plan's programs in this process have in common; how tensors are held and programs are run is for each to say.

Inputs are checked against the manifest before they reach a program, outputs take its names. A program of a stranger may fail in any
way: whatever it raises is a `ProgramError`.
"""

import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.manifest import Program, Runtime
from shoal.plan.plan import Plan
from shoal.plan.runner import MODELS_HELD, Update
from shoal.tensors import Tensors, check

Held = Any
"""A tensor where programs want it."""


class ProgramRunner(ABC):
    """A `Runner` in this process. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        """Picks the variants that the runtime can run. Raises PlanError where one is missing."""
        self.manifest, self._runtime = plan.manifest, runtime
        chosen = plan.manifest.pick(runtime)
        self._chosen = {name: program for name, program in chosen.items() if program.hash in plan.programs}
        self._bytes = {name: plan.program(program) for name, program in self._chosen.items()}
        self._ready: dict[str, Any] = {}
        self._models: OrderedDict[str, list[Held]] = OrderedDict()
        self._training: tuple[list[Held], list[Held]] | None = None  # model and carry
        self._seconds = 0.0
        self._steps = self._live = 0

    # What each says.

    @abstractmethod
    def _put(self, value: np.ndarray | np.generic) -> Held:
        """Takes a tensor over: what becomes of `value` afterwards changes it no more."""

    @abstractmethod
    def _lend(self, value: np.ndarray | np.generic) -> Held:
        """A tensor for one call, which nobody changes meanwhile."""

    @abstractmethod
    def _make_ready(self, name: str) -> Any:
        """Compiles or loads a program, once."""

    @abstractmethod
    def _call(self, program: Any, name: str, inputs: Sequence[Held]) -> Sequence[Held]:
        """Runs what `_make_ready` gave. It may return before the results are there."""

    @abstractmethod
    def _array(self, value: Held, dtype: "np.dtype[Any]") -> np.ndarray:
        """A result, once it is there."""

    # What follows from that.

    @property
    def runtime(self) -> Runtime:
        return self._runtime

    @property
    def pid(self) -> int | None:
        return None

    def compile(self) -> float:
        """Makes the three training programs ready; the others are when first called."""
        start = time.perf_counter()
        for name in ("begin", "block", "finish"):
            self._program(name)
        return time.perf_counter() - start

    def set_model(self, root: str, tensors: Tensors) -> None:
        check(tensors, self.manifest.broadcast, what="the model")
        self._models[root] = [self._put(tensors[spec.name]) for spec in self.manifest.broadcast]
        while len(self._models) > MODELS_HELD:
            self._models.popitem(last=False)

    def has_model(self, root: str) -> bool:
        return root in self._models

    def begin(self, root: str, device_state: Tensors) -> None:
        check(device_state, self.manifest.device_state, what="the device state")
        start = time.perf_counter()
        model = self._model(root)
        self._start(model, self._run("begin", [*model, *map(self._lend, device_state.values())]))
        self._seconds = time.perf_counter() - start

    def resume(self, root: str, carry: Tensors) -> None:
        check(carry, self._chosen_program("begin").outputs, what="the training")
        self._start(self._model(root), list(map(self._put, carry.values())))

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        start = time.perf_counter()
        model, carry = self._under_way("block")
        feed = self._feed("block", batches, mask=mask, key=key)
        self._training = (model, self._run("block", [*carry, *feed]))
        self._steps += mask.size
        self._live += int(np.count_nonzero(mask))
        self._seconds += time.perf_counter() - start

    def carry(self) -> Tensors:
        # Copies, as the next block may be given the memory.
        return {name: value.copy() for name, value in self._read("begin", self._under_way("carry")[1]).items()}

    def finish(self) -> Update:
        start = time.perf_counter()
        (model, carry), self._training = self._under_way("finish"), None
        # Reading the results waits for blocks that run behind the calls: here their failures come up.
        read = self._read("finish", self._run("finish", [*carry, *model]))
        sums = {spec.name: read[f"sum/{spec.name}"] for spec in self.manifest.update}
        kept = {spec.name: read[f"device_state/{spec.name}"] for spec in self.manifest.device_state}
        seconds = self._seconds + time.perf_counter() - start
        padding = 1.0 - self._live / self._steps if self._steps else 0.0
        return Update(sums, int(read["weight"]), kept, {"compute": seconds}, padding)

    def evaluate(self, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        outputs = self._over_batch("evaluate", root, batch, mask)
        return {name.removeprefix("metric/"): value for name, value in outputs.items()}

    def predict(self, root: str, batch: Tensors, mask: np.ndarray) -> np.ndarray:
        return self._over_batch("predict", root, batch, mask)["output/prediction"]

    def call(self, program: str, inputs: Tensors) -> Tensors:
        check(inputs, self._chosen_program(program).inputs, what=f"inputs of {program}")
        return self._read(program, self._run(program, list(map(self._lend, inputs.values()))))

    def close(self) -> None:
        self._ready.clear()
        self._models.clear()
        self._training = None

    def _start(self, model: list[Held], carry: list[Held]) -> None:
        self._training = (model, carry)
        self._steps = self._live = 0
        self._seconds = 0.0

    def _under_way(self, what: str) -> tuple[list[Held], list[Held]]:
        if self._training is None:
            raise ProgramError(f"{what} was called before begin.", program=what)
        return self._training

    def _over_batch(self, name: str, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        feed = self._feed(name, batch, mask=mask)
        return self._read(name, self._run(name, [*self._model(root), *feed]))

    def _model(self, root: str) -> list[Held]:
        try:
            self._models.move_to_end(root)
            return self._models[root]
        except KeyError:
            raise ProgramError(
                f"Model {root[:12]}… is not held; hand it over with set_model.", program="begin"
            ) from None

    def _chosen_program(self, name: str) -> Program:
        if name not in self._chosen:
            raise PlanError(
                f"Task {self.manifest.task!r} has no program {name!r} for {self._runtime.kind}; it has {' | '.join(self._chosen)}."
            )
        return self._chosen[name]

    def _program(self, name: str) -> Any:
        if name not in self._ready:
            self._chosen_program(name)
            with failures_of(name):
                self._ready[name] = self._make_ready(name)
        return self._ready[name]

    def _run(self, name: str, inputs: Sequence[Held]) -> list[Held]:
        program = self._program(name)
        with failures_of(name):
            return list(self._call(program, name, inputs))

    def _read(self, name: str, outputs: Sequence[Held]) -> Tensors:
        with failures_of(name):
            specs = self._chosen_program(name).outputs
            return {s.name: self._array(value, s.numpy_dtype) for s, value in zip(specs, outputs, strict=True)}

    def _feed(self, name: str, batch: Tensors, **others: np.ndarray) -> list[Held]:
        """The last inputs of a program, in their order, each as the program says."""
        given = {f"batch/{field}": value for field, value in batch.items()} | others
        specs = self._chosen_program(name).inputs[-len(self.manifest.batch) - len(others) :]
        for spec in specs:
            got = given.get(spec.name)
            if got is None or got.shape != spec.shape or got.dtype != spec.numpy_dtype:
                text = "nothing" if got is None else f"{got.dtype}{list(got.shape)}"
                raise ProgramError(
                    f"Expected {spec.name} to be {spec.dtype}{list(spec.shape)}, got {text}.", program=name
                )
        return [self._lend(given[spec.name]) for spec in specs]


@contextmanager
def failures_of(name: str) -> Iterator[None]:
    """Makes whatever a program raises, at the call or when its results are read, one error."""
    try:
        yield
    except (PlanError, ProgramError):
        raise
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ProgramError(f"Program {name!r} failed: {text[0][:300]}", program=name) from error
