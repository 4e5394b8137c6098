"""What a run and its population have spent of privacy: in numbers, and in a statement that can stand alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.clip_norm import described
from shoal.policy import Privacy
from shoal.privacy.accounting import participations
from shoal.privacy.spending import Release, counted, epsilon, releases
from shoal.record.store import LedgerRow


@dataclass(frozen=True, kw_only=True)
class Spent:
    """The spend of a population's budget, as one run's record has it."""

    run: str
    privacy: Privacy
    min_separation: int
    """Of the run's rounds: see `RoundPolicy`."""
    ledger: Sequence[LedgerRow]
    """Of the population, all runs."""

    @property
    def here(self) -> Counter[Release]:
        """Releases of the run, those of rounds that crashed among them."""
        return counted([row for row in self.ledger if row.run_id == self.run])

    @property
    def elsewhere(self) -> Counter[Release]:
        """Releases of the population's other runs in the record."""
        return counted([row for row in self.ledger if row.run_id != self.run])

    @property
    def unsettled(self) -> int:
        """Releases of rounds that gave no version: they may have been seen."""
        answered = {row.reservation for row in self.ledger}
        return sum(row.number not in answered for row in self.ledger if row.entry == "reservation")

    @property
    def epsilon(self) -> float:
        """Of all the population's releases, at the task's delta."""
        return epsilon(self.here + self.elsewhere, self.privacy.delta)

    def curve(self) -> list[float]:
        """Epsilon after each release, all runs' in order."""
        made: list[float] = []
        so_far: Counter[Release] = Counter()
        for release in releases(self.ledger):
            so_far[release] += 1
            made.append(epsilon(so_far, self.privacy.delta))
        return made


def _noise(privacy: Privacy) -> str:
    size = f"{privacy.noise_multiplier:g} times"
    if privacy.distributed:
        return (
            f"Skellam noise of {size} that norm (and of what rounding adds to it), of which each device added a share before its masks: those who "
            "neither colluded nor went away sufficed for it in each secure group"
        )
    if privacy.adaptive_clip is not None:
        return (
            "discrete Gaussian noise on the updates and on the count of devices within the norm, which it follows; both together are one release "
            f"with noise of {size} that norm (and of what rounding adds to it)"
        )
    if privacy.correlated is None:
        return f"discrete Gaussian noise of {size} that norm (and of what rounding adds to it)"
    name = {"blt": "a buffered linear Toeplitz matrix", "tree": "a binary tree"}[privacy.correlated.kind]
    return (
        f"noise that cancels over the rounds (DP-FTRL), made from discrete Gaussian noise by {name} for {privacy.correlated.rounds} rounds: "
        f"{size} the most that one device's clipped updates can come to in all of them together"
    )


def _trusted(spent: Spent) -> str:
    privacy = spent.privacy
    if not privacy.distributed or privacy.secure is None:
        return "whoever holds the server's memory and its keys saw sums without noise, and is trusted"
    secure = privacy.secure
    resting = " and kept them resting" if spent.min_separation > 1 else ""
    told = (
        f"in each secure group the server, which {'may lie there' if secure.is_certified else 'followed the protocol'}, worked with at most "
        f"{secure.colluders:.0%} of the members and saw no sum without noise; epsilon holds if it counted truly, in a ledger of its own, which devices "
        f"were in how many versions{resting}"
    )
    if not secure.is_certified:
        return told
    return f"{told}: against a server that lies about that, the noise of each sum holds, and no more"


def _participation(spent: Spent) -> str:
    """How often a device may have been in what was released."""
    correlated, made = spent.privacy.correlated, []
    rounds = spent.here.total() if correlated is None else correlated.rounds
    if any(release.sampling < 1 for release in spent.here):
        made.append("amplified by Poisson sampling of cohorts that only the simulation knew.")
    if correlated is not None:
        made.append(f"all rounds of the run, {rounds} at most, are one release.")
    if spent.min_separation > 1:
        made.append(
            f"a device that was in a version rested for the next {spent.min_separation - 1} at least, so one device was in at most "
            f"{participations(rounds, spent.min_separation)} of {rounds} rounds: epsilon rests on that, and the server saw to it."
        )
    elif not any(release.sampling < 1 for release in spent.here):
        made.append("every device may have been in every round, no amplification by sampling is claimed.")
    return " ".join([made[0], *(text[0].upper() + text[1:] for text in made[1:])])


def statement(spent: Spent) -> str:
    """Mechanism, unit, assumptions, epsilon at delta, accountant: what somebody needs to judge the claim."""
    privacy, here = spent.privacy, spent.here
    assert privacy.clip_norm is not None
    lines = [
        f"The model is differentially private: **epsilon {spent.epsilon:.3g} at delta {privacy.delta:g}**"
        + (f", of a budget of {privacy.epsilon:g}." if privacy.epsilon is not None else "; there was no limit."),
        "Unit: a device with all its examples. Neighbours differ in one device, whose updates are there or are zero.",
        f"Mechanism: each device clipped its update to {described(privacy.clip_norm)}; the sum of each of "
        f"{sum(here.values())} rounds had {_noise(privacy)}; means were over a number fixed beforehand; no metrics of training were "
        "collected.",
        "Accountant: Rényi divergences of all releases added up (adaptive composition), converted at the best order; "
        + _participation(spent),
        f"Assumptions: devices run the signed program; {_trusted(spent)}; "
        "what was measured on examples held out by the server is not covered, nor are times and counts of devices.",
    ]
    if spent.unsettled:
        lines.append(
            f"{spent.unsettled} of the releases counted are of rounds that ended without a version: they may have been seen."
        )
    if spent.elsewhere:
        lines.append(f"{sum(spent.elsewhere.values())} of them are of other runs of the population.")
    return "\n\n".join(lines)
