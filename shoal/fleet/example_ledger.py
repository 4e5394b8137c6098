"""What the examples of a device have spent of privacy, by its own account: the zCDP of every update that it made, of any task with
noise on examples (`privacy.examples`). It is written down before an update leaves the device; one that then never left is counted all the same.
"""

import os
from dataclasses import dataclass
from math import fsum, isfinite
from pathlib import Path
from typing import Final

from shoal import validate
from shoal.errors import StoreError
from shoal.fleet.spent import append_for_good
from shoal.plan.manifest import Manifest

DELTA: Final = 1e-6
"""What epsilon is stated at, where nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class ExampleBudget:
    """How much a device lets anybody learn of one of its examples, over all rounds and tasks."""

    epsilon: float
    """Above 0."""
    delta: float = DELTA
    """What epsilon is stated at; well below one in the number of the device's examples."""

    def __post_init__(self) -> None:
        validate.positive(epsilon=self.epsilon)
        if not 0.0 < self.delta < 1.0:
            raise ValueError(f"Expected 0 < delta < 1, got delta={self.delta!r}.")

    def allows(self, rho: float) -> bool:
        """Whether so much may be spent in all."""
        return epsilon(rho, self.delta) <= self.epsilon


class ExampleLedger:
    """See the module's text. Not for several processes at once."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: its file, a number a line; None: in memory, so that a device that starts again has forgotten.

        Raises:
            StoreError: the file cannot be read.
        """
        self._path = path
        self._entries: list[float] = []
        if path is None or not path.exists():
            return
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # what was being written when the device fell was not sent
            if whole != data:
                os.truncate(path, len(whole))
            self._entries = [float(line) for line in whole.decode().splitlines()]
        except (OSError, ValueError) as error:
            raise StoreError(f"What this device's examples have spent cannot be read from {path}: {error}") from error
        if not all(isfinite(entry) and entry >= 0 for entry in self._entries):
            raise StoreError(
                f"What this device's examples have spent cannot be read from {path}: expected numbers from 0 on."
            )

    @property
    def rho(self) -> float:
        """The zCDP of all that was spent."""
        return fsum(self._entries)

    def overspent(self, manifest: Manifest, budget: ExampleBudget) -> str:
        """How an update of that plan would bring the device above its budget, in words; empty: it would not."""
        spent, after = self.rho, self.rho + cost(manifest)
        if budget.allows(after):
            return ""
        return (
            f"its examples have spent epsilon {epsilon(spent, budget.delta):.3g} at delta {budget.delta:g}; an update of task {manifest.task!r} would "
            f"bring it to {epsilon(after, budget.delta):.3g}, allowed are {budget.epsilon:g} (--max-epsilon)"
        )

    def add(self, rho: float) -> None:
        """Writes it down for good. Raises StoreError: it could not be; nothing may be sent then."""
        if self._path is not None:
            try:
                append_for_good(self._path, f"{rho!r}\n".encode())
            except OSError as error:
                raise StoreError(
                    f"What this device's examples have spent cannot be written to {self._path}: {error}"
                ) from error
        self._entries.append(rho)


def epsilon(rho: float, delta: float = DELTA) -> float:
    """What so much zCDP comes to."""
    from shoal.privacy.accounting import epsilon_of_zcdp  # SciPy, which most devices do without

    return epsilon_of_zcdp(rho, delta)


def cost(manifest: Manifest) -> float:
    """The zCDP of one update of a plan; 0 of one without noise on examples, of which nothing is promised."""
    privacy = manifest.promises.privacy.examples
    if privacy is None:
        return 0.0
    from shoal.privacy.examples import rho

    return rho(privacy, epochs=manifest.training.epochs)
