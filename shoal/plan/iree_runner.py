"""Runs a plan's native programs with IREE, in this process. No JAX here.

A device runs it in a child process (`child.py`). Programs are native code: nothing but their hash and the signature over it
speaks for them, and what they do to the process's memory nobody bounds. What goes in and what comes out is held
against the manifest all the same, so that a mistake is an error and not a wrong update.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final

import iree.runtime as iree
import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.iree_targets import this_runtime
from shoal.plan.manifest import Program, Runtime
from shoal.plan.plan import Plan
from shoal.plan.runner import MODELS_HELD, Update
from shoal.tensors import Tensors, TensorSpec, check

Held = Any
"""A tensor in IREE's memory (`iree.HalBufferView`)."""

TRIALS: Final = 4
"""Blocks that each way to compute is measured by; the shortest counts."""


class IreeRunner:
    """A `Runner` on IREE. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan, *, threads: int | None = None) -> None:
        """Picks the variants that run on this machine. Raises PlanError where one is missing.

        Args:
            plan: verified.
            threads: to compute with, where that is faster than one: a short block is measured both ways, whose results are the same
                to the bit. None: one for each core. The first runner of a process decides for all how many.
        """
        self.manifest = plan.manifest
        self._runtime = this_runtime()
        self._chosen = plan.manifest.pick(self._runtime)
        self._bytes = {
            name: plan.program(program) for name, program in self._chosen.items() if program.hash in plan.programs
        }
        self._threads = threads
        self._instance = iree.VmInstance()
        self._loaded: dict[str, tuple[Any, Any]] = {}  # context and function
        self._models: OrderedDict[str, list[Held]] = OrderedDict()
        self._training: tuple[list[Held], list[Held]] | None = None  # model and carry
        self._seconds = 0.0
        self._steps = self._live = 0

    @property
    def runtime(self) -> Runtime:
        return self._runtime

    @property
    def pid(self) -> int | None:
        return None

    def compile(self) -> float:
        """Loads the three training programs; the others are loaded when first called."""
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
        self._training = (model, self._run("begin", [*model, *map(self._put, device_state.values())]))
        self._steps = self._live = 0
        self._seconds = time.perf_counter() - start

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        if self._training is None:
            raise ProgramError("block was called before begin.", program="block")
        start = time.perf_counter()
        model, carry = self._training
        feed = self._feed("block", batches, mask=mask, key=key)
        self._training = (model, self._run("block", [*carry, *feed]))
        self._steps += mask.size
        self._live += int(np.count_nonzero(mask))
        self._seconds += time.perf_counter() - start

    def carry(self) -> Tensors:
        if self._training is None:
            raise ProgramError("carry was called before begin.", program="begin")
        return self._read("begin", self._training[1])

    def resume(self, root: str, carry: Tensors) -> None:
        check(carry, self._chosen_program("begin").outputs, what="the training")
        self._training = (self._model(root), [self._put(value) for value in carry.values()])
        self._steps = self._live = 0
        self._seconds = 0.0

    def finish(self) -> Update:
        if self._training is None:
            raise ProgramError("finish was called before begin.", program="finish")
        start = time.perf_counter()
        (model, carry), self._training = self._training, None
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
        return self._read(program, self._run(program, [self._put(value) for value in inputs.values()]))

    def close(self) -> None:
        self._loaded.clear()
        self._models.clear()
        self._training = None

    def _over_batch(self, name: str, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        self._chosen_program(name)
        return self._read(name, self._run(name, [*self._model(root), *self._feed(name, batch, mask=mask)]))

    def _model(self, root: str) -> list[Held]:
        try:
            self._models.move_to_end(root)
            return self._models[root]
        except KeyError:
            raise ProgramError(
                f"Model {root[:12]}… is not held; hand it over with set_model.", program="begin"
            ) from None

    def _chosen_program(self, name: str) -> Program:
        if name not in self._bytes:
            raise PlanError(
                f"Task {self.manifest.task!r} has no program {name!r} for {self._runtime.kind}; it has {' | '.join(self._bytes)}."
            )
        return self._chosen[name]

    def _program(self, name: str) -> Any:
        """Its function, in a context of its own: programs share no state, not even by mistake."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name, self._device)
        return self._loaded[name]

    def _load(self, name: str, device: Any) -> tuple[Any, Any]:
        self._chosen_program(name)
        with _failures_of(name):
            module = iree.VmModule.copy_buffer(self._instance, self._bytes[name])
            hal = iree.create_hal_module(self._instance, device)
            context = iree.VmContext(self._instance, modules=[hal, module])
            function = module.lookup_function("main")
        if function is None:
            raise PlanError(f"Program {name!r} of task {self.manifest.task!r} has no function main.")
        return context, function

    @cached_property
    def _device(self) -> Any:
        """What computes: the caller's thread, or a pool where that is faster."""
        alone = open_device(1)
        if self._threads == 1 or "block" not in self._bytes:
            return alone
        return min((alone, open_device(self._threads)), key=self._block_s)

    def _block_s(self, device: Any) -> float:
        """How long a block takes, of zeros."""
        context, function = self._load("block", device)
        specs, taken = self._chosen["block"].inputs, []
        given, made = iree.VmVariantList(len(specs)), iree.VmVariantList(len(specs))
        for spec in specs:
            given.push_ref(_put(device, np.zeros(spec.shape, spec.numpy_dtype)).ref)
        for _ in range(TRIALS):
            begun_s = time.perf_counter()
            with _failures_of("block"):
                context.invoke(function, given, made)
            taken.append(time.perf_counter() - begun_s)
        return min(taken)

    def _run(self, name: str, inputs: Sequence[Held]) -> list[Held]:
        context, function = self._program(name)
        outputs = self._chosen[name].outputs
        given, made = iree.VmVariantList(len(inputs)), iree.VmVariantList(len(outputs))
        for value in inputs:
            given.push_ref(value.ref)
        with _failures_of(name):
            context.invoke(function, given, made)
            results = [made.get_as_object(at, iree.HalBufferView) for at in range(len(made))]
        if len(results) != len(outputs):
            raise ProgramError(
                f"Program {name!r} gave {len(results)} tensors, the plan names {len(outputs)}.", program=name
            )
        for spec, value in zip(outputs, results, strict=True):
            _check_like(name, spec, value)
        return results

    def _put(self, value: np.ndarray) -> Held:
        return _put(self._device, value)

    def _read(self, name: str, outputs: Sequence[Held]) -> Tensors:
        with _failures_of(name):
            return {
                spec.name: iree.DeviceArray(self._device, value, override_dtype=spec.numpy_dtype).to_host().copy()
                for spec, value in zip(self._chosen[name].outputs, outputs, strict=True)
            }

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
        return [self._put(given[spec.name]) for spec in specs]


def open_device(threads: int | None) -> Any:
    """What computes: the caller's thread, or a pool of `threads`. The first call of a process decides how many."""
    if threads == 1:
        return iree.get_device("local-sync")
    if threads is not None:
        iree.flags.parse_flags(f"--task_topology_group_count={threads}")
    return iree.get_device("local-task")


def _put(device: Any, value: np.ndarray) -> Held:
    return device.allocator.allocate_buffer_copy(
        memory_type=iree.MemoryType.DEVICE_LOCAL, allowed_usage=iree.BufferUsage.DEFAULT, device=device,
        buffer=np.ascontiguousarray(value).reshape(value.shape),
        element_type=iree.array_interop.map_dtype_to_element_type(value.dtype),
    )  # fmt: skip


def _check_like(name: str, spec: TensorSpec, value: Held) -> None:
    size = spec.numpy_dtype.itemsize * int(np.prod(spec.shape, dtype=np.int64))
    if tuple(value.shape) != spec.shape or value.byte_length != size:
        raise ProgramError(
            f"Program {name!r} gave {spec.name} as {list(value.shape)} of {value.byte_length} bytes, the plan says "
            f"{spec.dtype}{list(spec.shape)}.",
            program=name,
        )


@contextmanager
def _failures_of(name: str) -> Iterator[None]:
    """A program of a stranger may fail in any way: all are this one error."""
    try:
        yield
    except (PlanError, ProgramError):
        raise
    except Exception as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ProgramError(f"Program {name!r} failed: {text[0][:300]}", program=name) from error
