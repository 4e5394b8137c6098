"""What the child process runs programs with: JAX, or IREE without JAX. Each imports its own library only."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Final, Literal, Protocol, final, runtime_checkable

import numpy as np

from shoal.plan.manifest import Runtime
from shoal.plan.plan import Plan
from shoal.plan.runner import Runner

EngineName = Literal["jax", "iree"]

COMPILER_BYTES: Final = 256 << 20
"""Memory that JAX's compiler may take beyond what JAX takes when idle; no part of a plan's allowance."""


@runtime_checkable
class Engine(Protocol):
    """One library."""

    own_bytes: int
    """Memory that it may take beside a plan's allowance."""

    def start(self) -> tuple[Runtime, Mapping[str, str]]:
        """Makes it take the memory that it takes by itself; what it runs, and its versions."""
        ...

    def load(self, plan: Plan) -> Runner:
        """Checks a plan and makes its runner. Raises PlanError."""
        ...

    def compiling(self, what: str) -> AbstractContextManager[None]:
        """Around what may compile: `what` names it, the same in every process that has the plan."""
        ...


def engine_of(settings: Mapping[str, Any]) -> Engine:
    """The one that the settings of a child name."""
    return IreeEngine(settings["threads"]) if settings["engine"] == "iree" else JaxEngine(settings)


@final
class JaxEngine:
    """StableHLO, compiled here."""

    own_bytes = COMPILER_BYTES

    def __init__(self, settings: Mapping[str, Any]) -> None:
        from shoal.plan import compile_cache

        self._wait_s: float = settings["lock_wait_s"]
        self._accelerators: int = settings["accelerators"]
        self._folder = Path(settings["cache"])
        self._caches = compile_cache.switch_on(self._folder)

    def start(self) -> tuple[Runtime, Mapping[str, str]]:
        import jax
        import jax.numpy as jnp

        from shoal.plan.stablehlo import this_runtime

        # One small program makes the runtime start its threads and load its compiler, so that they are measured.
        jax.jit(jnp.add)(np.float32(1), np.float32(1)).block_until_ready()
        return this_runtime(), {"jax": jax.__version__}

    def load(self, plan: Plan) -> Runner:
        from shoal.plan.jax_runner import JaxRunner, mesh_of
        from shoal.plan.operations import check_operations
        from shoal.plan.stablehlo import this_runtime

        for program in plan.manifest.pick(this_runtime()).values():
            if program.hash in plan.programs:
                check_operations(program, plan.program(program))
        return JaxRunner(plan, mesh_of(self._accelerators))

    def compiling(self, what: str) -> AbstractContextManager[None]:
        import jax

        from shoal.plan.compile_cache import compiled_once

        if not self._caches:
            return nullcontext()
        return compiled_once(self._folder, f"{what}-jax{jax.__version__}-{jax.default_backend()}", wait_s=self._wait_s)


@final
class IreeEngine:
    """Native code, compiled where the plan was made: there is nothing in it that could be checked but its hash."""

    own_bytes = 0

    def __init__(self, threads: int | None) -> None:
        self._threads = threads

    def start(self) -> tuple[Runtime, Mapping[str, str]]:
        from shoal.plan.iree_runner import open_device
        from shoal.plan.iree_targets import this_runtime

        open_device(self._threads)  # starts its threads
        return this_runtime(), {}

    def load(self, plan: Plan) -> Runner:
        from shoal.plan.iree_runner import IreeRunner

        return IreeRunner(plan, threads=self._threads)

    def compiling(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()
