"""What releases spend of a population's privacy budget: entries of the ledger, and the epsilon that they come to.

The unit is a device. Every release may have every device in it, whatever runs it is of: they draw on one budget. Amplification by
sampling is counted only where a simulation draws its cohorts by Poisson sampling; a fleet's devices come when they can. What does bound how
often a device is in a run's releases is their separation; and rounds whose noise is correlated are one release together.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil
from typing import Any, Final, Self

import numpy as np

from shoal import validate
from shoal.errors import BudgetSpent
from shoal.policy import Privacy, RoundPolicy
from shoal.privacy.accounting import epsilon_of_rdp, gaussian_rdp, sampled_gaussian_rdp, skellam_rdp
from shoal.privacy.clipping import l1_bound
from shoal.privacy.device_noise import DeviceNoise
from shoal.record.ledger import standing
from shoal.record.store import LedgerRow, Spend

BUDGET: Final = "privacy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """A round's sum with discrete Gaussian noise, or with Skellam noise of the devices."""

    noise_multiplier: float
    """Standard deviation over the largest norm of one device's part."""
    sampling: float = 1.0
    """Chance of a device to be in it, drawn by one who is trusted; 1: none is counted on."""
    separation: int = 1
    """Rounds of the run from one that has a device to the next that may."""
    correlated: int = 0
    """Rounds of the run that are one release together, with this noise multiplier; 0: each is one."""
    run: str = ""
    """Whose rounds those are; empty where that does not matter."""
    l2: float = 0.0
    """Of Skellam noise: largest norm of one device's part, in units of the grid. 0: the noise is discrete Gaussian, of whatever grid."""
    elements: int = 0
    """Of the sum, where the noise is Skellam."""

    def __post_init__(self) -> None:
        validate.positive(noise_multiplier=self.noise_multiplier, separation=self.separation)
        validate.between(0.0, 1.0, sampling=self.sampling)

    @property
    def data(self) -> Mapping[str, Any]:
        """As it stands in the ledger, whose entries know their run."""
        mechanism = "skellam" if self.l2 else "discrete gaussian"
        optional = {
            "separation": self.separation,
            "correlated": self.correlated,
            "l2": self.l2,
            "elements": self.elements,
        }
        kept = {name: value for name, value in optional.items() if value > (name == "separation")}
        return {
            "mechanism": mechanism,
            "noise_multiplier": self.noise_multiplier,
            "sampling": self.sampling,
        } | kept

    @classmethod
    def of(cls, row: LedgerRow) -> Self:
        """What the entry is of."""
        settings = {name: value for name, value in row.data.items() if name != "mechanism"}
        return cls(**settings, run=row.run_id if settings.keys() & {"separation", "correlated"} else "")

    @property
    def alone(self) -> Self:
        """That of a round which has no version."""
        return self if self.correlated else replace(self, separation=1, run="")

    def times(self, rounds: float) -> float:
        """How often one device is in so many of these rounds, at most; rounds of one release are one."""
        if self.correlated:
            return min(rounds, 1)
        return rounds if self.separation == 1 else ceil(rounds / self.separation)

    def rdp(self) -> np.ndarray:
        """Its curve at `accounting.ORDERS`."""
        return _rdp(self)


@lru_cache(64)
def _rdp(release: Release) -> np.ndarray:
    if release.l2:
        variance = (release.noise_multiplier * release.l2) ** 2
        return skellam_rdp(variance, l2=release.l2, l1=l1_bound(release.l2, release.elements))
    if release.sampling == 1.0:
        return gaussian_rdp(release.noise_multiplier)
    return sampled_gaussian_rdp(release.sampling, release.noise_multiplier)


def epsilon(releases: Mapping[Release, float], delta: float) -> float:
    """What so many of each release come to at delta, chosen one after the other; 0 of none."""
    curves = [release.times(count) * release.rdp() for release, count in releases.items() if count]
    return epsilon_of_rdp(np.sum(curves, axis=0), delta) if curves else 0.0


def releases(rows: Sequence[LedgerRow]) -> list[Release]:
    """What a budget's reservations were for, in their order, but for those that were given back.

    A round without a version does not make its devices rest, so where it may have been seen it counts beside those that did. (One that is open counts so
    for the time being.) With correlated noise it is a step of the stream, whose noise nobody but the host has seen.
    """
    settled = {row.reservation for row in rows if row.entry == "settlement"}
    made = ((row.number in settled, Release.of(row)) for row in standing(rows))
    return [release if has_version else release.alone for has_version, release in made]


def counted(rows: Sequence[LedgerRow]) -> Counter[Release]:
    """How many there are of each of them."""
    return Counter(releases(rows))


def release_of(
    privacy: Privacy, rounds: RoundPolicy, *, run: str, sampling: float = 1.0, devices: DeviceNoise | None = None
) -> Release:
    """What one round of a task with noise releases; `devices`: what these add, where it is they who do."""
    correlated = privacy.correlated.rounds if privacy.correlated is not None else 0
    made = Release(
        noise_multiplier=privacy.noise_multiplier, sampling=sampling, separation=1 if correlated else rounds.min_separation,
        correlated=correlated,
    )  # fmt: skip
    if made.separation > 1 or correlated:
        made = replace(made, run=run)
    return made if devices is None else replace(made, l2=devices.l2, elements=devices.elements)


def spend_of(privacy: Privacy, release: Release) -> Spend:
    """What a round with that release takes."""
    return Spend(budget=BUDGET, amount=1.0, data=release.data, allows=_allows(privacy, release))


def _allows(privacy: Privacy, release: Release) -> Callable[[Sequence[LedgerRow]], None]:
    def allows(before: Sequence[LedgerRow]) -> None:
        if privacy.epsilon is not None:
            refuse_overspending(privacy, counted(before), release)

    return allows


def refuse_overspending(privacy: Privacy, before: Counter[Release], release: Release, *, rounds: int = 1) -> None:
    """Looks whether so many more releases keep to the task's budget.

    Raises:
        BudgetSpent: they do not; the message says how many would, and what noise would do for all.
    """
    if privacy.epsilon is None or rounds < 1:
        return
    spent = epsilon(before + Counter({release: rounds}), privacy.delta)
    if spent <= privacy.epsilon:
        return
    most = _most(privacy, before, release, rounds)
    raise BudgetSpent(
        f"{rounds} more {'release' if rounds == 1 else 'releases'} with a noise multiplier of {release.noise_multiplier:g} would bring the "
        f"population's epsilon to {spent:.3g} at delta {privacy.delta:g}, from {epsilon(before, privacy.delta):.3g}; its budget is "
        f"{privacy.epsilon:g}. It allows {most} more. Take fewer rounds, or more noise (shoal privacy --epsilon … --rounds … says how much)."
    )


def _most(privacy: Privacy, before: Counter[Release], release: Release, rounds: int) -> int:
    """How many more keep to the budget; fewer than `rounds`."""
    assert privacy.epsilon is not None
    low, high = 0, rounds
    while high - low > 1:
        middle = (low + high) // 2
        fits = epsilon(before + Counter({release: middle}), privacy.delta) <= privacy.epsilon
        low, high = (middle, high) if fits else (low, middle)
    return low
