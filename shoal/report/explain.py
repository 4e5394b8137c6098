"""What a round came to, in words: how it ended, what failed first and where, and what took longer than it does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any, Final

from shoal.errors import DataError
from shoal.fleet.analytics import OTHER, Seen
from shoal.record.store import RoundRow

SLOW: Final = 2.0
"""Times the median of the committed rounds that a round may take before it is called slow."""
ENOUGH: Final = 5
"""Committed rounds that such a median needs."""
PHASES: Final = ("selecting", "reporting")

_WORDS: Final = {
    "stream broke": "connections lost by devices with work in hand",
    "incompatible": "check-ins of devices that cannot serve the task (runtime, population)",
    "protocol": "messages that break the protocol",
    "server busy": "messages that the server could not take",
    "server failed": "messages that the server failed at (its log says why)",
    "commit failed": "updates lost with a commit that failed",
    OTHER: "errors of kinds that too few devices had for them to be named",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Errors of one kind in a round."""

    kind: str
    count: int
    first_s: float | None
    """Of the first, in seconds since the round was opened; None: not told, since too few devices had them."""
    phase: str
    """selecting | reporting | committing: where the round was at the first; empty where that is not told."""
    edge: str
    """Where the first was; empty where there is one Edge."""

    @property
    def words(self) -> str:
        """What failed, and how often."""
        what = _WORDS.get(self.kind, self.kind)
        if self.kind.startswith("refused: "):
            what = f"updates refused ({self.kind.removeprefix('refused: ')})"
        elif self.kind.startswith("gave up "):
            what = f"devices that gave up ({self.kind.removeprefix('gave up ')})"
        return f"{what}: {self.count}"

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "count": self.count, "first_s": self.first_s, "phase": self.phase, "edge": self.edge,
            "words": self.words,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """See the module's text."""

    round: RoundRow
    took_s: float | None
    """None while it is open."""
    usual_s: float | None
    """Median of the other committed rounds; None where there are too few."""
    longer: Mapping[str, tuple[float, float]]
    """Of a slow round: phase -> (seconds, the median), most added first."""
    failures: tuple[Failure, ...]
    """First one first."""
    counts: Mapping[str, int]

    @property
    def is_slow(self) -> bool:
        """Whether it took much longer than others."""
        return self.took_s is not None and self.usual_s is not None and self.took_s > SLOW * self.usual_s

    def lines(self) -> list[str]:
        """In words."""
        return [self._end(), *self._slowness(), *self._missing(), self._funnel(), *self._failed()]

    def _end(self) -> str:
        row = self.round
        head = f"Round {row.number}, from version {row.base_version},"
        if self.took_s is None:
            return f"{head} is open."
        if row.state == "committed":
            why = {"goal": "its goal was met", "window": "its window was over"}.get(row.reason, row.reason)
            return f"{head} was committed after {self.took_s:.3g} s: {why}."
        return f"{head} was abandoned after {self.took_s:.3g} s: {row.reason.removeprefix('abandoned: ')}."

    def _slowness(self) -> list[str]:
        if not self.is_slow:
            return []
        assert self.took_s is not None and self.usual_s is not None
        told = [f"It took {self.took_s / self.usual_s:.1f} times as long as the median round ({self.usual_s:.3g} s)."]
        for phase, (seconds, usual_s) in list(self.longer.items())[:1]:
            told.append(f"Most of that went into {phase}: {seconds:.3g} s, where the median is {usual_s:.3g} s.")
        return told

    def _missing(self) -> list[str]:
        row, counts = self.round, self.counts
        if row.state != "abandoned" or not counts:
            return []
        out = (
            row.selected
            - counts.get("counted", 0)
            - sum(counts.get(name, 0) for name in ("refused", "gave_up", "lost"))
        )
        if row.selected == 0:
            return [f"No device was taken; {counts.get('check_ins', 0)} checked in while it was open."]
        return (
            [f"{out} of the {row.selected} devices that were taken had not reported when it ended."] if out > 0 else []
        )

    def _funnel(self) -> str:
        named = (
            ("told_later", "told to come later"), ("selected", "taken"), ("counted", "counted"), ("patched", "of these patched in late"),
            ("discounted", "of these late, at a discount"), ("released", "told to stop"), ("refused_late", "too late"),
            ("refused", "refused"), ("gave_up", "gave up"), ("lost", "lost"),
        )  # fmt: skip
        told = [f"{self.counts[name]} {words}" for name, words in named if self.counts.get(name)]
        return f"Devices: {', '.join(told)}." if told else "Nothing is recorded of its devices."

    def _failed(self) -> list[str]:
        if not self.failures:
            return ["Nothing failed."]
        told = []
        for each in self.failures:
            if each.first_s is None:
                told.append(f"At times that are not told: {each.words}.")
            elif told:
                told.append(f"Then, from {each.first_s:.3g} s on, while {each.phase}: {each.words}.")
            else:
                where = f"while {each.phase}{f', at Edge {each.edge}' if each.edge else ''}"
                told.append(f"What failed first, {each.first_s:.3g} s after it was opened, {where}: {each.words}.")
        return told

    def to_json(self) -> dict[str, Any]:
        row = self.round
        return {
            "round": row.number, "base_version": row.base_version, "state": row.state, "reason": row.reason,
            "selected": row.selected, "counted": row.counted, "released": row.released, "took_s": self.took_s,
            "usual_s": self.usual_s, "slow": self.is_slow,
            "longer": {phase: {"seconds": s, "median": usual} for phase, (s, usual) in self.longer.items()},
            "failures": [failure.to_json() for failure in self.failures], "counts": dict(self.counts),
            "words": self.lines(),
        }  # fmt: skip


def find_round(rounds: Sequence[RoundRow], number: int) -> RoundRow:
    """The round of that number.

    Raises:
        DataError: the run has no such round, or keeps it no more.
    """
    row = next((row for row in rounds if row.number == number), None)
    if row is not None:
        return row
    if not rounds:
        raise DataError(f"Expected a round of this run, which has no rounds yet, got {number}.")
    last = rounds[-1].number
    if number > last:
        raise DataError(f"Expected a round of this run, which has rounds 1 to {last}, got {number}.")
    since = max(each.number for each in rounds if each.number - 1 not in {other.number for other in rounds})
    raise DataError(
        f"Round {number} is not kept (`--keep`): of this run's, rounds {since} to {last} are, and some older ones. "
        "`shoal runs show --json` lists them."
    )


def explain(rounds: Sequence[RoundRow], number: int) -> Explanation:
    """Explains one round of a run.

    Args:
        rounds: all of the run's.
        number: which.

    Raises:
        DataError: the run has no such round.
    """
    row = find_round(rounds, number)
    seen = Seen.from_json(row.analytics) if "counts" in row.analytics else Seen()
    others = [other for other in rounds if other.state == "committed" and other.number != number]
    times = [took_s for other in others if (took_s := _took_s(other)) is not None]
    usual_s = median(times) if len(times) >= ENOUGH else None
    seconds: Mapping[str, float] = row.analytics.get("seconds", {})
    failures = [
        Failure(kind=kind, count=e.count, first_s=e.first_s, phase=_phase(seconds, e.first_s), edge=e.edge)
        for kind, e in seen.errors.items()
    ]
    made = Explanation(
        round=row, took_s=_took_s(row), usual_s=usual_s, longer={}, counts=seen.counts,
        failures=tuple(sorted(failures, key=lambda failure: inf if failure.first_s is None else failure.first_s)),
    )  # fmt: skip
    if not made.is_slow:
        return made
    longer = {p: (seconds[p], _usual(others, p)) for p in PHASES if p in seconds and seconds[p] > _usual(others, p)}
    ordered = dict(sorted(longer.items(), key=lambda item: item[1][1] - item[1][0]))
    return Explanation(
        round=row, took_s=made.took_s, usual_s=usual_s, longer=ordered, counts=seen.counts, failures=made.failures
    )


def _took_s(row: RoundRow) -> float | None:
    return None if row.closed_s is None else max(0.0, row.closed_s - row.opened_s)


def _usual(rounds: Sequence[RoundRow], phase: str) -> float:
    times = [float(row.analytics["seconds"][phase]) for row in rounds if phase in row.analytics.get("seconds", {})]
    return median(times) if times else 0.0


def _phase(seconds: Mapping[str, float], at_s: float | None) -> str:
    if at_s is None:
        return ""
    end_s = 0.0
    for phase in PHASES:
        end_s += seconds.get(phase, float("inf"))
        if at_s <= end_s:
            return phase
    return "committing"
