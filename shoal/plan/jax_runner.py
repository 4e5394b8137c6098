"""Runs a plan's StableHLO programs with the JAX at hand, in this process.

The simulator uses it as it is; a device runs it in a child process (`child.py`). Only here and in `stablehlo.py` does a
plan meet JAX. Inputs are checked against the manifest before they reach a program.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.manifest import Program, Runtime
from shoal.plan.plan import Plan
from shoal.plan.runner import MODELS_HELD, Update
from shoal.plan.stablehlo import load_program, struct, this_runtime
from shoal.tensors import Tensors, check


class JaxRunner:
    """A `Runner` on JAX. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan) -> None:
        """Picks the variants that this JAX can run. Raises PlanError where one is missing."""
        self.manifest = plan.manifest
        self._chosen = plan.manifest.pick(this_runtime())
        self._bytes = {
            name: plan.program(program) for name, program in self._chosen.items() if program.hash in plan.programs
        }
        self._compiled: dict[str, Any] = {}
        self._models: OrderedDict[str, list[jax.Array]] = OrderedDict()
        self._training: tuple[list[jax.Array], list[jax.Array]] | None = None  # model and carry
        self._seconds: dict[str, float] = {}
        self._steps = self._live = 0

    @property
    def runtime(self) -> Runtime:
        return this_runtime()

    @property
    def pid(self) -> int | None:
        return None

    def compile(self) -> float:
        """Compiles the three training programs; the others are compiled when first called."""
        start = time.perf_counter()
        for name in ("begin", "block", "finish"):
            self._program(name)
        return time.perf_counter() - start

    def set_model(self, root: str, tensors: Tensors) -> None:
        check(tensors, self.manifest.broadcast, what="the model")
        self._models[root] = [jax.device_put(tensors[spec.name], may_alias=False) for spec in self.manifest.broadcast]
        while len(self._models) > MODELS_HELD:
            self._models.popitem(last=False)

    def has_model(self, root: str) -> bool:
        return root in self._models

    def begin(self, root: str, device_state: Tensors) -> None:
        check(device_state, self.manifest.device_state, what="the device state")
        start = time.perf_counter()
        model = self._model(root)
        self._training = (model, self._run("begin", [*model, *device_state.values()]))
        self._steps = self._live = 0
        self._seconds = {"compute": time.perf_counter() - start}

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        if self._training is None:
            raise ProgramError("block was called before begin.", program="block")
        start = time.perf_counter()
        model, carry = self._training
        feed = self._feed("block", batches, mask=mask, key=key)
        self._training = (model, self._run("block", [*carry, *feed]))
        self._steps += mask.size
        self._live += int(np.count_nonzero(mask))
        self._seconds["compute"] += time.perf_counter() - start

    def carry(self) -> Tensors:
        if self._training is None:
            raise ProgramError("carry was called before begin.", program="begin")
        return _read("block", self._named("begin", self._training[1]))

    def resume(self, root: str, carry: Tensors) -> None:
        check(carry, self._chosen_program("begin").outputs, what="the training")
        self._training = (self._model(root), [jax.device_put(value, may_alias=False) for value in carry.values()])
        self._steps = self._live = 0
        self._seconds = {"compute": 0.0}

    def finish(self) -> Update:
        if self._training is None:
            raise ProgramError("finish was called before begin.", program="finish")
        start = time.perf_counter()
        (model, carry), self._training = self._training, None
        outputs = self._named("finish", self._run("finish", [*carry, *model]))
        # Reading the results waits for the blocks, which run behind the calls: here their failures come up.
        read = _read("finish", outputs)
        sums = {spec.name: read[f"sum/{spec.name}"] for spec in self.manifest.update}
        kept = {spec.name: read[f"device_state/{spec.name}"] for spec in self.manifest.device_state}
        weight = int(read["weight"])
        self._seconds["compute"] += time.perf_counter() - start
        padding = 1.0 - self._live / self._steps if self._steps else 0.0
        return Update(sums, weight, kept, dict(self._seconds), padding)

    def evaluate(self, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        outputs = self._over_batch("evaluate", root, batch, mask)
        return {name.removeprefix("metric/"): value for name, value in outputs.items()}

    def predict(self, root: str, batch: Tensors, mask: np.ndarray) -> np.ndarray:
        return self._over_batch("predict", root, batch, mask)["output/prediction"]

    def call(self, program: str, inputs: Tensors) -> Tensors:
        check(inputs, self._chosen_program(program).inputs, what=f"inputs of {program}")
        return _read(program, self._named(program, self._run(program, list(inputs.values()))))

    def close(self) -> None:
        self._compiled.clear()
        self._models.clear()
        self._training = None

    def _over_batch(self, name: str, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        feed = self._feed(name, batch, mask=mask)
        return _read(name, self._named(name, self._run(name, [*self._model(root), *feed])))

    def _model(self, root: str) -> list[jax.Array]:
        try:
            self._models.move_to_end(root)
            return self._models[root]
        except KeyError:
            raise ProgramError(
                f"Model {root[:12]}… is not held; hand it over with set_model.", program="begin"
            ) from None

    def _chosen_program(self, name: str) -> Program:
        if name not in self._chosen:
            raise PlanError(f"Task {self.manifest.task!r} has no program {name!r}; it has {' | '.join(self._chosen)}.")
        return self._chosen[name]

    def _program(self, name: str) -> Any:
        if name not in self._compiled:
            program = self._chosen_program(name)
            # The carry is given away to each block: training needs one copy of it, not two.
            given_away = tuple(i for i, spec in enumerate(program.inputs) if spec.name.startswith("carry/"))
            function = load_program(program, self._bytes[name])
            jitted = jax.jit(function, donate_argnums=given_away if name == "block" else ())
            self._compiled[name] = jitted.lower(*(struct(spec) for spec in program.inputs)).compile()
        return self._compiled[name]

    def _run(self, name: str, inputs: list[Any]) -> list[jax.Array]:
        with _failures_of(name):
            return list(self._program(name)(*inputs))

    def _named(self, name: str, outputs: list[jax.Array]) -> dict[str, jax.Array]:
        return {spec.name: value for spec, value in zip(self._chosen_program(name).outputs, outputs, strict=True)}

    def _feed(self, name: str, batch: Tensors, **others: np.ndarray) -> list[np.ndarray]:
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
        return [given[spec.name] for spec in specs]


def _read(name: str, outputs: dict[str, jax.Array]) -> Tensors:
    with _failures_of(name):
        return {key: np.asarray(value) for key, value in outputs.items()}


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """A program of a stranger may fail in any way, at the call or when its results are read: all are this one error."""
    try:
        yield
    except (PlanError, ProgramError):
        raise
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ProgramError(f"Program {name!r} failed: {text[0][:300]}", program=name) from error
