"""What a device asks of any task before it trains for it, whatever the server says."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoal import validate
from shoal.errors import TaskRefused
from shoal.fleet.example_ledger import ExampleBudget, cost, epsilon
from shoal.plan.manifest import Manifest

if TYPE_CHECKING:
    from shoal.privacy.identity import Trusted


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The least that a plan must promise."""

    secure: bool = False
    """Only tasks whose updates nobody sees singly."""
    minimum_group: int = 1
    """Fewest (in secure groups: honest) members in any sum that somebody sees."""
    colluders: int = 0
    """Members of a secure group, at least, that may work with the server without learning more than the sum."""
    noise: float = 0.0
    """Standard deviation, at least, over the clip norm, of the noise that a group's members add to their sum themselves."""
    authority: "Trusted | None" = None
    """Only secure groups of members that this authority certifies: for a server that may lie. None: also others."""

    examples: ExampleBudget | None = None
    """Only tasks with noise on examples, none of which is to spend more than that. None: also others."""
    pseudonymous: bool = False
    """The device checks in under names that change: no tasks whose noise is for a device that is known by one."""

    def __post_init__(self) -> None:
        validate.positive(minimum_group=self.minimum_group)
        validate.not_negative(colluders=self.colluders, noise=self.noise)

    def check(self, manifest: Manifest) -> None:
        """Raises TaskRefused: the plan promises less."""
        if why := self._too_little(manifest):
            raise TaskRefused(f"Task {manifest.task!r} {why}. It was not run.", task=manifest.task)

    def _too_little(self, manifest: Manifest) -> str:
        """What is wrong with it; empty: nothing."""
        return (
            self._of_names(manifest)
            or self._of_examples(manifest)
            or self._of_groups(manifest)
            or self._of_noise(manifest)
        )

    def _of_names(self, manifest: Manifest) -> str:
        if not self.pseudonymous or not manifest.promises.privacy.noise_multiplier:
            return ""
        return (
            "has noise that hides a device which is in a version once at most, and this device comes under pseudonyms, of which two may be in "
            "one version: start it without --pseudonyms for this task"
        )

    def _of_noise(self, manifest: Manifest) -> str:
        privacy = manifest.promises.privacy
        if self.noise and not privacy.distributed:
            return "has no noise that its members add themselves, which this device asks for"
        if privacy.noise_multiplier < self.noise:
            return (
                f"has members add noise of {privacy.noise_multiplier:g} clip norms, this device asks for {self.noise:g}"
            )
        return ""

    def _of_examples(self, manifest: Manifest) -> str:
        if self.examples is None:
            return ""
        if manifest.promises.privacy.examples is None:
            return "has no noise on single examples, which this device asks for"
        if not self.examples.allows(cost(manifest)):
            return (
                f"spends epsilon {epsilon(cost(manifest), self.examples.delta):.3g} of an example in one round at delta "
                f"{self.examples.delta:g}, this device allows {self.examples.epsilon:g} in all"
            )
        return ""

    def _of_groups(self, manifest: Manifest) -> str:
        promises, secure = manifest.promises, manifest.promises.privacy.secure
        if secure is None and (self.secure or self.authority is not None or self.colluders):
            return "lets the server see single updates; this device takes part in secure groups only"
        if promises.minimum_group < self.minimum_group:
            return f"promises sums over at least {promises.minimum_group} members, this device asks for {self.minimum_group}"
        if secure is None:
            return ""
        from shoal.plan.secure import LEAST_MINIMUM  # what it needs is much, and most tasks need none of it

        if promises.minimum_group < LEAST_MINIMUM:
            return "has secure groups whose sums may be one member's own"
        withstood = int(secure.colluders * secure.members)
        if withstood < self.colluders:
            return (
                f"has secure groups of at most {secure.members} members that withstand {withstood} colluders, this device asks for "
                f"{self.colluders}"
            )
        if secure.authority and self.authority is None:
            return f"is for members with a certificate of {secure.authority}; this device has been given none"
        if self.authority is not None and secure.authority != self.authority.key.public_bytes_raw().hex():
            other = f"certified by {secure.authority}" if secure.authority else "that nobody certifies"
            return f"makes groups of members {other}, which this device does not trust"
        return ""
