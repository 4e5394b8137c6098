"""How metrics are distributed over users, in numbers and in a line of bars."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shoal.metric_names import higher_is_better
from shoal.record.distribution import Distribution

_BARS: Final = "▁▂▃▄▅▆▇█"
_NOBODY: Final = "·"


@dataclass(frozen=True, slots=True)
class OverUsers:
    """One metric of one version."""

    metric: str
    version: int
    users: int
    worst: float
    """What a tenth of the users are at, or worse."""
    median: float
    best: float
    """What a tenth of the users are at, or better."""
    least: float
    most: float
    bars: str
    """Users from the least value to the most; a dot is nobody."""

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "version": self.version, "users": self.users, "worst_tenth": self.worst,
            "median": self.median, "best_tenth": self.best,
        }  # fmt: skip


def over_users(distributions: Mapping[str, Mapping[int, Distribution]]) -> list[OverUsers]:
    """The newest distribution of each metric."""
    return [_told(metric, max(found), found[max(found)]) for metric, found in distributions.items()]


def bars(counts: Sequence[int]) -> str:
    """A line of bars.

    >>> bars([1, 0, 4, 2])
    '▂·█▅'
    """
    most = max(counts)
    top = len(_BARS) - 1
    return "".join(_BARS[round(count / most * top)] if count else _NOBODY for count in counts)


def _told(metric: str, version: int, one: Distribution) -> OverUsers:
    low, high = one.quantile(0.1), one.quantile(0.9)
    worst, best = (low, high) if higher_is_better(metric) else (high, low)
    return OverUsers(
        metric, version, one.users, worst, one.quantile(0.5), best, one.values[0], one.values[-1], bars(one.counts)
    )
