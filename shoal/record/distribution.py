"""How a metric is distributed over users: what the record keeps of it, which is a histogram and never a user's value.

Each value is rounded to a step of 1, 2 or 5 times a power of ten that leaves at most 25 different ones; what is kept is how
many users have each. Quantiles are read off that, so they are off by half a step at most and tell no more than it does. A
histogram of fewer users than the task's smallest group is not made.

The 10th percentile over devices is what Caldas et al. 2018, "LEAF", https://arxiv.org/abs/1812.01097, report beside the mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import floor, log10
from typing import Any, Final, Self, final

import numpy as np

from shoal.record.store import EventRow, Store

MOST_VALUES: Final = 25
_KIND: Final = "distribution"


@final
@dataclass(frozen=True, slots=True)
class Distribution:
    """A metric over users, rounded."""

    step: float
    """What values are rounded to."""
    first: int
    """The least value, in steps."""
    counts: tuple[int, ...]
    """Users at `first`, `first + 1`, … steps."""

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Self:
        """Of users' values (N,), at least one of them finite; the others are left out."""
        chosen = np.asarray(values, np.float64)
        chosen = chosen[np.isfinite(chosen)]
        if not chosen.size:
            raise ValueError("Expected at least one finite value, got none.")
        step = _step(float(chosen.min()), float(chosen.max()))
        places = np.rint(chosen / step).astype(np.int64)
        return cls(step, int(places.min()), tuple(np.bincount(places - places.min()).tolist()))

    @property
    def users(self) -> int:
        """How many have a value."""
        return sum(self.counts)

    @property
    def values(self) -> tuple[float, ...]:
        """What is counted, rising."""
        return tuple(float(f"{(self.first + place) * self.step:.12g}") for place in range(len(self.counts)))

    def quantile(self, share: float) -> float:
        """The least value that this share of the users do not exceed."""
        reached = np.cumsum(self.counts) >= share * self.users - 1e-9
        return self.values[int(np.argmax(reached))]


def _step(low: float, high: float) -> float:
    """The smallest of 1, 2, 5, 10, … that leaves at most so many different values from low to high."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** floor(log10(span / MOST_VALUES))
    made = next(
        size * power
        for size in (1, 2, 5, 10, 20)
        if np.rint(high / (size * power)) - np.rint(low / (size * power)) < MOST_VALUES
    )
    return float(f"{made:.1g}")


def write_distributions(
    store: Store, run_id: str, version: int, found: Mapping[str, Distribution], *, time_s: float
) -> None:
    """Writes metrics' distributions of a version into the record; `time_s` is seconds since the run was created."""
    rows = [
        EventRow(time_s=time_s, kind=_KIND, data={"version": version, "metric": metric, **asdict(one)})
        for metric, one in found.items()
    ]
    store.journal(run_id, rows)


def read_distributions(events: Sequence[EventRow]) -> dict[str, dict[int, Distribution]]:
    """Metric -> version -> distribution, of a run's events."""
    found: dict[str, dict[int, Distribution]] = {}
    for event in events:
        if event.kind == _KIND:
            data: Mapping[str, Any] = event.data
            made = Distribution(float(data["step"]), int(data["first"]), tuple(map(int, data["counts"])))
            found.setdefault(str(data["metric"]), {})[int(data["version"])] = made
    return {metric: dict(sorted(versions.items())) for metric, versions in sorted(found.items())}
