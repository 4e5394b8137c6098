"""The Runner: what runs a plan's programs. JAX in `jax_runner.py`; in a child process under limits in `child.py`.

A Runner holds one plan, at most one training at a time, and a few models by the root of their index. Calls block.
Whatever a program raises, and whatever kills the process that runs it, reaches the caller as `ProgramError`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

import numpy as np

from shoal.plan.manifest import Runtime
from shoal.tensors import Tensors

MODELS_HELD: Final = 2
"""Models that a runner keeps; of more, the one that was used longest ago is forgotten."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a plan may take on this machine."""

    memory_bytes: int = 8 << 30
    """Most memory of the process that runs programs, beyond what the runtime itself takes."""
    seconds: float = 600.0
    """Longest one call of a program (its compilation included)."""
    disk_bytes: int = 1 << 30
    """Largest file that the process may write."""
    program_bytes: int = 64 << 20
    """Largest program."""


@dataclass(frozen=True)
class Update:
    """What a device reports, and what it keeps."""

    sums: Tensors
    """Flat: `delta/params/…`, `metric/loss/numerator`, in the manifest's order."""
    weight: int
    device_state: Tensors
    """Kept on the device once the update is counted."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Where the time went: compute, compile, data."""
    padding: float = 0.0
    """Share of the computed examples that were padding."""


@runtime_checkable
class Runner(Protocol):
    """Runs the programs of one plan."""

    @property
    def runtime(self) -> Runtime:
        """What this runner can run."""
        ...

    @property
    def pid(self) -> int | None:
        """The process that runs programs, while there is one besides this."""
        ...

    def compile(self) -> float:
        """Makes the programs ready; returns the seconds it took. Programs are compiled once."""
        ...

    def set_model(self, root: str, tensors: Tensors) -> None:
        """Hands over a model, known from then on by its root; the oldest is forgotten."""
        ...

    def has_model(self, root: str) -> bool: ...

    def begin(self, root: str, device_state: Tensors) -> None:
        """Starts a training from a model. `device_state` has the manifest's tensors, zeros where the device has none."""
        ...

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        """Takes a few steps. batches: field -> (k, B, …); mask: (k, B) bool; key: (2,) uint32.

        It may return before they are done; a failure is raised by a later block or by `finish`.
        """
        ...

    def carry(self) -> Tensors:
        """The training as it stands, for `resume`: the manifest's carry. It goes on."""
        ...

    def resume(self, root: str, carry: Tensors) -> None:
        """Takes a training up where it stood, in place of `begin`."""
        ...

    def finish(self) -> Update:
        """Ends the training."""
        ...

    def evaluate(self, root: str, batch: Tensors, mask: np.ndarray) -> Tensors:
        """Metric sums over one batch. batch: field -> (B, …); mask: (B,) bool."""
        ...

    def predict(self, root: str, batch: Tensors, mask: np.ndarray) -> np.ndarray:
        """Predictions (B, …)."""
        ...

    def call(self, program: str, inputs: Tensors) -> Tensors:
        """Runs any program of the plan by name, flat names in and out."""
        ...

    def close(self) -> None:
        """Ends the runner; calls after it raise."""
        ...
