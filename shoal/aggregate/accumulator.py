"""The running sum of a group: integers, so that it has the same bits in whatever order updates come.

Holds 8 bytes per summed element and nothing per member; a single update cannot be read from it once two are in.

Guarantees:
    * Order: the totals depend on which updates were added, not on when.
    * Refusal: an update that is not finite or is out of bounds changes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import numpy as np

from shoal.errors import RoundError, UpdateRefused
from shoal.fixed import STEPS, FixedPoint, SumSpec, add, fixed_points, read, refuse_bad_values, refuse_bad_weight
from shoal.tensors import check


class Accumulator:
    """Integer totals of the updates of one group. Not thread-safe."""

    def __init__(
        self, sums: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], *, max_weight: int, max_members: int
    ) -> None:
        """
        Args:
            sums: what is added up.
            fixed: name of a sum -> its fixed point.
            max_weight: of one member.
            max_members: most that are added.
        """
        self.specs, self.fixed = tuple(sums), fixed
        self.totals = {spec.tensor.name: np.zeros(spec.tensor.shape, np.int64) for spec in sums}
        self.max_weight, self.max_members = max_weight, max_members
        self._by_name = {spec.tensor.name: spec for spec in sums}
        self._weighted = {spec.tensor.name: spec.weighted for spec in sums}
        self.weight = self.members = 0

    @classmethod
    def finest(cls, sums: Sequence[SumSpec], *, bits: int = 64, max_weight: int, max_members: int) -> Self:
        """With the finest fixed points that hold so many members. Raises ValueError where none does."""
        fixed = fixed_points(sums, bits=bits, max_weight=max_weight, max_members=max_members)
        return cls(sums, fixed, max_weight=max_weight, max_members=max_members)

    def emptied(self) -> "Accumulator":
        """Another, for the same sums, with nothing in it."""
        return Accumulator(self.specs, self.fixed, max_weight=self.max_weight, max_members=self.max_members)

    def add(self, update: Mapping[str, np.ndarray], *, weight: int) -> None:
        """Checks an update whole, then adds it.

        Raises:
            UpdateRefused: it is not finite, out of bounds, of a wrong shape, or has a wrong weight; nothing was added.
        """
        try:
            check(update, (spec.tensor for spec in self.specs), what="the update")
        except ValueError as error:
            raise UpdateRefused(str(error), reason="wrong tensors") from error
        refuse_bad_weight(weight, self.max_weight)
        for name, values in update.items():
            refuse_bad_values(values, self.fixed[name], name=name)
        self.add_checked(((name, 0, values.reshape(-1)) for name, values in update.items()), weight=weight)

    def add_checked(self, pieces: Iterable[tuple[str, int, np.ndarray]], *, weight: int, discount: float = 1.0) -> None:
        """Adds an update whose values were checked while they came in.

        Args:
            pieces: (tensor, first element, values (n,)); every element once.
            weight: of the update. The mean is over whole weights: what is discounted makes the step smaller, as in FedBuff.
            discount: what a late update counts, in (0, 1]; unweighted sums (metrics) are not discounted, nor are steps.
        """
        assert self.members < self.max_members, "the round closes before its group is full"
        for name, start, values in pieces:
            total = self.totals[name].reshape(-1)[start : start + values.size]
            times = weight if name == STEPS else weight * discount
            add(total, values, self.fixed[name], weight=times if self._weighted[name] else 1)
        self.weight += weight
        self.members += 1

    def merge(
        self, pieces: Iterable[tuple[str, int, np.ndarray]], *, weight: int, members: int, discount: float = 1.0
    ) -> None:
        """Adds the sum of another group with the same fixed points.

        Args:
            pieces: (tensor, first element, totals (n,) int64); every element once.
            weight: of its members together.
            members: how many they are.
            discount: what its members count, as in `add_checked`, in (0, 1].

        Raises:
            RoundError: there is no room for so many.
        """
        if self.members + members > self.max_members:
            raise RoundError(f"Expected at most {self.max_members} members in a sum, got {self.members} + {members}.")
        for name, start, values in pieces:
            is_discounted = discount != 1.0 and self._weighted[name] and name != STEPS
            counted = np.rint(values * discount).astype(np.int64) if is_discounted else values
            self.totals[name].reshape(-1)[start : start + values.size] += counted
        self.weight += weight
        self.members += members

    def merge_all(self, other: "Accumulator") -> None:
        """Adds the sum of another group of the same task."""
        pieces = ((name, 0, total.reshape(-1)) for name, total in other.totals.items())
        self.merge(pieces, weight=other.weight, members=other.members)

    def metrics(self) -> dict[str, float]:
        """The metrics over all members: sum(numerator) / sum(denominator) for those whose denominator is not zero."""
        values = {
            name.removeprefix("metric/"): self._scalar(name) for name in self.totals if name.startswith("metric/")
        }
        names = {name.rsplit("/", 1)[0] for name in values}
        return {
            name: values[f"{name}/numerator"] / values[f"{name}/denominator"]
            for name in sorted(names)
            if values[f"{name}/denominator"]
        }

    def spec(self, name: str) -> SumSpec:
        """Of one sum."""
        return self._by_name[name]

    def is_weighted(self, name: str) -> bool:
        """Whether a member's part in this sum was multiplied by its weight."""
        return self._weighted[name]

    def mean_steps(self) -> float:
        """What the mean update is multiplied by: the members' mean steps where updates are divided by them, else 1."""
        return self._scalar(STEPS) / self.weight if STEPS in self.totals else 1.0

    def _scalar(self, name: str) -> float:
        return float(read(self.totals[name], self.fixed[name]))
