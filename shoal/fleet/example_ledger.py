"""What the examples of a device have spent of privacy, by its own account: the zCDP of every update that it made, of any task with
noise on examples (`privacy.examples`). It is written down before an update leaves the device; one that then never left is counted all the same.
"""

from dataclasses import dataclass
from math import fsum
from typing import Final

from shoal import validate
from shoal.fleet.device_file import DeviceFile
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


@dataclass(frozen=True)
class ExampleLedger:
    """Of one device's examples; see the module's text."""

    file: DeviceFile
    device: str

    @property
    def rho(self) -> float:
        """The zCDP of all that was spent."""
        return fsum(self.file.rhos(self.device))

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
        self.file.add_rho(self.device, rho)


def epsilon(rho: float, delta: float = DELTA) -> float:
    """What so much zCDP comes to."""
    from shoal.privacy.zcdp import epsilon_of_zcdp

    return epsilon_of_zcdp(rho, delta)


def cost(manifest: Manifest) -> float:
    """The zCDP of one update of a plan; 0 of one without noise on examples, of which nothing is promised."""
    privacy = manifest.promises.privacy.examples
    if privacy is None:
        return 0.0
    from shoal.privacy.examples import rho

    return rho(privacy, epochs=manifest.training.epochs)
