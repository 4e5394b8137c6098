"""Runs a plan's StableHLO programs with the JAX at hand, in this process.

The simulator uses it as it is; a device runs it in a child process (`child.py`). Only here and in `stablehlo.py` does a
plan meet JAX.
"""

from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shoal.errors import ProgramError
from shoal.plan.manifest import Program
from shoal.plan.plan import Plan
from shoal.plan.program_runner import ProgramRunner
from shoal.plan.stablehlo import load_program, struct, this_runtime
from shoal.tensors import TensorSpec


def mesh_of(accelerators: int) -> Mesh | None:
    """The first so many devices of this machine, which share each batch; None: one by itself.

    Raises:
        ProgramError: there are not so many.
    """
    if accelerators == 1:
        return None
    found = jax.devices()
    if len(found) < accelerators:
        raise ProgramError(
            f"Expected {accelerators} accelerators, got {len(found)} of {found[0].platform}. On a CPU set JAX_NUM_CPU_DEVICES={accelerators}."
        )
    return jax.make_mesh((accelerators,), ("data",), devices=found[:accelerators])


@final
class JaxRunner(ProgramRunner):
    """A `Runner` on JAX, on one device or on a mesh. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan, mesh: Mesh | None = None) -> None:
        """Picks the variants that this JAX can run.

        Args:
            plan: whose programs it runs.
            mesh: devices that share each batch, along all its axes; the model is whole on each. None: one device.

        Raises:
            PlanError: a variant is missing.
        """
        super().__init__(plan, this_runtime())
        self._mesh = mesh

    def _put(self, value: np.ndarray | np.generic) -> jax.Array:
        where = None if self._mesh is None else NamedSharding(self._mesh, PartitionSpec())
        held: jax.Array = jax.device_put(value, where, may_alias=False)
        return held

    def _lend(self, value: np.ndarray | np.generic) -> np.ndarray | np.generic:
        return value

    def _make_ready(self, name: str) -> Any:
        program = self._chosen[name]
        # The carry is given away to each block: training needs one copy of it, not two.
        given_away = tuple(i for i, spec in enumerate(program.inputs) if spec.name.startswith("carry/"))
        function = load_program(program, self._bytes[name])
        jitted = jax.jit(function, donate_argnums=given_away if name == "block" else (), **self._shardings(program))
        return jitted.lower(*(struct(spec) for spec in program.inputs)).compile()

    def _shardings(self, program: Program) -> dict[str, Any]:
        """Where a program's inputs and outputs lie: dimension 1 of a block's batches (k, B, …) and mask is split, if that can be."""
        if self._mesh is None:
            return {}
        whole, split = (NamedSharding(self._mesh, PartitionSpec(*p)) for p in ((), (None, self._mesh.axis_names)))

        def place(spec: TensorSpec) -> NamedSharding:
            is_rows = program.name == "block" and (spec.name == "mask" or spec.name.startswith("batch/"))
            return split if is_rows and spec.shape[1] % self._mesh.size == 0 else whole  # type: ignore[union-attr]

        return {"in_shardings": tuple(map(place, program.inputs)), "out_shardings": whole}

    def _call(self, program: Any, name: str, inputs: Sequence[Any]) -> Sequence[jax.Array]:
        results: Sequence[jax.Array] = program(*inputs)
        return results

    def _array(self, value: jax.Array, dtype: "np.dtype[Any]") -> np.ndarray:
        return np.asarray(value)
