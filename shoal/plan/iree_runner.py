"""Runs a plan's native programs with IREE, in this process. No JAX here.

A device runs it in a child process (`child.py`). Programs are native code: nothing but their hash and the signature over it
speaks for them, and what they do to the process's memory nobody bounds. What comes out is held against the manifest all the same, so
that a mistake is an error and not a wrong update.
"""

import time
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final, final

import iree.runtime as iree
import numpy as np

from shoal.errors import PlanError, ProgramError
from shoal.plan.iree_targets import this_runtime
from shoal.plan.plan import Plan
from shoal.plan.program_runner import Held, ProgramRunner, failures_of
from shoal.tensors import TensorSpec

TRIALS: Final = 4
"""Blocks that each way to compute is measured by; the shortest counts."""


@final
class IreeRunner(ProgramRunner):
    """A `Runner` on IREE. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan, *, threads: int | None = None) -> None:
        """Picks the variants that run on this machine. Raises PlanError where one is missing.

        Args:
            plan: verified.
            threads: to compute with, where that is faster than one: a short block is measured both ways, whose results are the same
                to the bit. None: one for each core. The first runner of a process decides for all how many.
        """
        super().__init__(plan, this_runtime())
        self._threads = threads
        self._instance = iree.VmInstance()

    @cached_property
    def _device(self) -> Any:
        """What computes: the caller's thread, or a pool where that is faster."""
        alone = open_device(1)
        if self._threads == 1 or "block" not in self._bytes:
            return alone
        return min((alone, open_device(self._threads)), key=self._block_s)

    def _block_s(self, device: Any) -> float:
        """How long a block takes, of zeros."""
        specs, taken = self._chosen["block"].inputs, []
        with failures_of("block"):
            context, function = self._load("block", device)
        given, made = iree.VmVariantList(len(specs)), iree.VmVariantList(len(specs))
        for spec in specs:
            given.push_ref(_put(device, np.zeros(spec.shape, spec.numpy_dtype)).ref)
        for _ in range(TRIALS):
            begun_s = time.perf_counter()
            with failures_of("block"):
                context.invoke(function, given, made)
            taken.append(time.perf_counter() - begun_s)
        return min(taken)

    def _load(self, name: str, device: Any) -> tuple[Any, Any]:
        """Context and function: programs share no state, not even by mistake."""
        module = iree.VmModule.copy_buffer(self._instance, self._bytes[name])
        hal = iree.create_hal_module(self._instance, device)
        context = iree.VmContext(self._instance, modules=[hal, module])
        function = module.lookup_function("main")
        if function is None:
            raise PlanError(f"Program {name!r} of task {self.manifest.task!r} has no function main.")
        return context, function

    def _put(self, value: np.ndarray | np.generic) -> Held:
        return _put(self._device, value)

    def _lend(self, value: np.ndarray | np.generic) -> Held:
        return _put(self._device, value)

    def _make_ready(self, name: str) -> tuple[Any, Any]:
        return self._load(name, self._device)

    def _call(self, program: Any, name: str, inputs: Sequence[Held]) -> Sequence[Held]:
        context, function = program
        outputs = self._chosen[name].outputs
        given, made = iree.VmVariantList(len(inputs)), iree.VmVariantList(len(outputs))
        for value in inputs:
            given.push_ref(value.ref)
        context.invoke(function, given, made)
        results = [made.get_as_object(at, iree.HalBufferView) for at in range(len(made))]
        if len(results) != len(outputs):
            raise ProgramError(
                f"Program {name!r} gave {len(results)} tensors, the plan names {len(outputs)}.", program=name
            )
        for spec, value in zip(outputs, results, strict=True):
            _check_like(name, spec, value)
        return results

    def _array(self, value: Held, dtype: "np.dtype[Any]") -> np.ndarray:
        return iree.DeviceArray(self._device, value, override_dtype=dtype).to_host().copy()  # type: ignore[no-any-return]


def open_device(threads: int | None) -> Any:
    """What computes: the caller's thread, or a pool of `threads`. The first call of a process decides how many."""
    if threads == 1:
        return iree.get_device("local-sync")
    if threads is not None:
        iree.flags.parse_flags(f"--task_topology_group_count={threads}")
    return iree.get_device("local-task")


def _put(device: Any, value: np.ndarray | np.generic) -> Held:
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
