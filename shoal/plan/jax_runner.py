"""Runs a plan's StableHLO programs with the JAX at hand, in this process.

The simulator uses it as it is; a device runs it in a child process (`child.py`). Only here and in `stablehlo.py` does a
plan meet JAX.
"""

from collections.abc import Sequence
from typing import Any, final

import jax
import numpy as np

from shoal.plan.plan import Plan
from shoal.plan.program_runner import ProgramRunner
from shoal.plan.stablehlo import load_program, struct, this_runtime


@final
class JaxRunner(ProgramRunner):
    """A `Runner` on JAX. One training at a time; not thread-safe."""

    def __init__(self, plan: Plan) -> None:
        """Picks the variants that this JAX can run. Raises PlanError where one is missing."""
        super().__init__(plan, this_runtime())

    def _put(self, value: np.ndarray | np.generic) -> jax.Array:
        held: jax.Array = jax.device_put(value, may_alias=False)
        return held

    def _lend(self, value: np.ndarray | np.generic) -> np.ndarray | np.generic:
        return value

    def _make_ready(self, name: str) -> Any:
        program = self._chosen[name]
        # The carry is given away to each block: training needs one copy of it, not two.
        given_away = tuple(i for i, spec in enumerate(program.inputs) if spec.name.startswith("carry/"))
        function = load_program(program, self._bytes[name])
        jitted = jax.jit(function, donate_argnums=given_away if name == "block" else ())
        return jitted.lower(*(struct(spec) for spec in program.inputs)).compile()

    def _call(self, program: Any, name: str, inputs: Sequence[Any]) -> Sequence[jax.Array]:
        results: Sequence[jax.Array] = program(*inputs)
        return results

    def _array(self, value: jax.Array, dtype: "np.dtype[Any]") -> np.ndarray:
        return np.asarray(value)
