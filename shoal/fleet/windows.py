"""When a round stops waiting: once what is still likely to come is worth less than the time it takes.

A round that closes t seconds after its devices were assigned, with n updates, makes n / (t + s) updates a second, s being
what a round costs besides (selection, commit). Of m devices that are still out a share F(u) will have reported by u, so
that to wait until u makes (n + m F(u)) / (u + s). The round is closed when no u in the window makes more than now does
(the stopping rule of renewal-reward processes; Charnov 1976 has it as the "marginal value theorem").

Nothing is assumed of the times but that the next round's are like the last ones': they are counted in bins that grow by
a fifth, older rounds fading. A device that was still out when its round closed is known to have taken longer than that,
and no more (Kaplan and Meier 1958); so devices that drop out, and those that we let go, need no telling apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import exp, log
from typing import Any, Final

SMALLEST_S: Final = 1e-3
GROWTH: Final = 1.2
_LOG_GROWTH: Final = log(GROWTH)
FADE: Final = 0.9
"""What a round's times weigh when another is over."""
ENOUGH: Final = 20.0
"""Times that must have been seen before anything is concluded from them."""
NOTHING: Final = 1e-3
"""Counts below are forgotten."""


@dataclass(slots=True)
class ReportTimes:
    """How long devices took from assignment to update, in the rounds before. No device is told from another."""

    _reported: dict[int, float] = field(default_factory=dict)
    _still_out: dict[int, float] = field(default_factory=dict)

    def reported(self, seconds: float) -> None:
        """One that reported after so long."""
        number = _bin(seconds)
        self._reported[number] = self._reported.get(number, 0.0) + 1.0

    def still_out(self, seconds: float) -> None:
        """One that had not reported after so long, and is not waited for any more."""
        number = _bin(seconds)
        self._still_out[number] = self._still_out.get(number, 0.0) + 1.0

    def fade(self) -> None:
        """A round is over."""
        for counts in (self._reported, self._still_out):
            for number in list(counts):
                counts[number] *= FADE
                if counts[number] < NOTHING:
                    del counts[number]

    def copy(self) -> "ReportTimes":
        return ReportTimes(dict(self._reported), dict(self._still_out))

    def to_json(self) -> dict[str, Any]:
        return {"reported": sorted(self._reported.items()), "still_out": sorted(self._still_out.items())}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ReportTimes":
        """Raises KeyError, TypeError or ValueError for what `to_json` would not have written."""
        return cls(*({int(number): float(count) for number, count in data[part]} for part in ("reported", "still_out")))

    @property
    def known(self) -> bool:
        """Whether enough was seen to conclude anything."""
        return sum(self._reported.values()) >= ENOUGH

    def pays_to_wait(self, at_s: float, *, counted: int, outstanding: int, overhead_s: float, until_s: float) -> bool:
        """Whether waiting from `at_s` on, until some time up to `until_s`, makes more updates a second than closing."""
        first = _bin(at_s)
        ends = [number for number in {*self._reported, *self._still_out} if number >= first]
        out = sum(self._reported.get(number, 0.0) + self._still_out.get(number, 0.0) for number in ends)
        rate, missing = counted / (at_s + overhead_s), 1.0
        for number in sorted(ends):
            come = self._reported.get(number, 0.0)
            missing *= 1.0 - come / out
            wait_until_s = min(_start(number + 1), until_s)
            if counted + outstanding * (1.0 - missing) > rate * (wait_until_s + overhead_s):
                return True
            if wait_until_s >= until_s:
                break
            out -= come + self._still_out.get(number, 0.0)
        return False


def closes_at(
    times: ReportTimes, *, counted: int, outstanding: int, since_s: float, overhead_s: float, until_s: float
) -> float:
    """Seconds after the assignment at which waiting stops paying if nothing comes until then; at most `until_s`.

    Args:
        times: of earlier rounds.
        counted: n, updates in hand.
        outstanding: m, devices that may still report.
        since_s: seconds from the assignment to now.
        overhead_s: s, what a round takes besides; above 0.
        until_s: the window that the policy sets.
    """
    at_s = since_s
    while at_s < until_s and times.known:
        if not times.pays_to_wait(
            at_s, counted=counted, outstanding=outstanding, overhead_s=overhead_s, until_s=until_s
        ):
            return at_s
        at_s = _start(_bin(at_s) + 1)
    return until_s


def _bin(seconds: float) -> int:
    return max(0, int(log(max(seconds, SMALLEST_S) / SMALLEST_S) / _LOG_GROWTH + 1e-9))


def _start(number: int) -> float:
    return SMALLEST_S * exp(number * _LOG_GROWTH) if number else 0.0
