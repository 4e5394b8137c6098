"""Noise that devices add themselves, each its share, before their masks: nobody sees a sum without it, the server neither.

Skellam noise: sums of it are of its kind, whoever is missing. A member knows from the roster how many of its group may be lost or may tell the
server what they have added; the rest, who are sure to be in any sum that is revealed, have together the noise that the task says. If
nobody is missing there is more. Each group's sum is a release of its own, and a device is in one of them in a version.

References:
    * Agarwal, Kairouz, Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning".
    * Dwork, Kenthapadi, McSherry, Mironov, Naor 2006, "Our Data, Ourselves": shares of noise.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from typing import Final

import numpy as np

from shoal.policy import Privacy, Secure
from shoal.privacy.clipping import rounded_bound
from shoal.privacy.neighbours import Assumptions, Graph, find
from shoal.privacy.noise import Source, share_variance, skellam

REACH: Final = 14.0
"""Standard deviations that a sum has room for; what is beyond has a chance of less than 2^-120 an element."""


@dataclass(frozen=True, kw_only=True)
class DeviceNoise:
    """What a task's members add to their updates."""

    noise_multiplier: float
    unit: float
    """Of the sums' grid."""
    l2: float
    """Largest norm of one member's integers, in units."""
    elements: int

    @property
    def variance(self) -> float:
        """Of the noise on each element that is sure to be in a group's sum, in units squared."""
        return (self.noise_multiplier * self.l2) ** 2

    def share(self, graph: Graph) -> float:
        """The variance of what each member of the group adds."""
        missing = graph.members - graph.least_survivors + graph.colluders
        return share_variance(self.variance, members=graph.members, dropouts=missing)

    def draw(self, graph: Graph, source: Source) -> np.ndarray:
        """One member's, (elements,) int64."""
        return skellam(self.share(graph), self.elements, source=source)

    def stddev(self, graph: Graph, survivors: int) -> float:
        """Of the noise of so many survivors together, in the elements' own units."""
        return self.unit * sqrt(self.share(graph) * survivors)


def device_noise(privacy: Privacy, *, units: set[float], elements: int) -> DeviceNoise | None:
    """What the members of a task with that privacy add; None: nothing.

    Args:
        privacy: of the task.
        units: of the sums' grids.
        elements: of all sums.

    Raises:
        ValueError: the grids differ, or are so coarse that rounding changes more than a device does.
    """
    if not privacy.distributed:
        return None
    norm = privacy.norm_bound
    assert norm is not None
    if len(units) != 1:
        raise ValueError(
            f"Expected one bound for all tensors where devices add the noise, got grids of {sorted(units)[:4]}: leave bounds={{}}."
        )
    (unit,) = units
    l2 = rounded_bound(norm, unit=unit, elements=elements)
    if l2 * unit > 2 * norm:
        raise ValueError(
            f"Expected sums so fine that rounding an update of {elements} elements changes its norm by at most the clip norm, got units of "
            f"{unit:g} for a clip norm of {norm:g}. Raise Secure(bits=…), or lower Secure(members=…) or the noise multiplier."
        )
    return DeviceNoise(noise_multiplier=privacy.noise_multiplier, unit=unit, l2=l2, elements=elements)


def noise_room(privacy: Privacy, minimum_group: int) -> float:
    """What a member's largest element has to be taken for, beyond its own, so that a group's sum has room for all members' noise."""
    if not privacy.distributed:
        return 0.0
    assert privacy.norm_bound is not None and privacy.secure is not None
    stddev = privacy.noise_multiplier * 2 * privacy.norm_bound * sqrt(_largest_surplus(privacy.secure, minimum_group))
    return REACH * stddev / privacy.secure.members


def graphs(secure: Secure, minimum_group: int) -> list[Graph]:
    """Of all sizes that a group can have."""
    assumptions, made = Assumptions(colluders=secure.colluders, dropouts=secure.dropouts), []
    for members in range(1, secure.members + 1):
        try:
            made.append(find(members, assumptions, minimum_group, secure.is_certified))
        except ValueError:  # too few
            continue
    return made


@lru_cache(64)
def _largest_surplus(secure: Secure, minimum_group: int) -> float:
    """The variance that a sum of all members has over what is sure to be there, at most."""
    found = graphs(secure, minimum_group)
    return max((graph.members / (graph.least_survivors - graph.colluders) for graph in found), default=1.0)
