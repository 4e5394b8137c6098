"""Runs beside one another: in what they differ, how good they became, and what it took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.data.fingerprint import CONFIG as POPULATION
from shoal.errors import DataError
from shoal.metric_names import higher_is_better, is_tail
from shoal.report.facts import Facts, Point

_NOT_SETTINGS = ("plan_blob",)


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a comparison."""

    label: str
    run_id: str
    version: int
    """Rounds committed."""
    last: Point | None
    """The newest value of the metric; None where it has no finite one."""
    best: Point | None
    reached: int | None
    """The first version at the target."""
    reached_s: float | None
    """Seconds at work until then."""
    seconds: float
    """At work, until the last version."""
    bytes_down: int
    """To all members."""
    bytes_up: int
    is_reckoned: bool
    """The bytes are what a fleet's devices would have moved, uncompressed, each fetching once what rounds do not change: none
    were."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found."""

    metric: str
    higher: bool
    """Whether more of it is better."""
    target: float | None
    results: tuple[Result, ...]
    settings: Mapping[str, tuple[str, ...]]
    """Those in which the runs differ: name -> a text for each run, '–' where it has none."""

    def to_json(self) -> dict[str, Any]:
        return {
            "metric": self.metric, "better": "higher" if self.higher else "lower", "target": self.target,
            "settings": {name: list(values) for name, values in self.settings.items()},
            "runs": [
                {
                    "label": each.label, "run": each.run_id, "version": each.version, "last": _point(each.last),
                    "best": _point(each.best), "rounds_to_target": each.reached, "seconds_to_target": each.reached_s,
                    "seconds": each.seconds, "bytes_down": each.bytes_down, "bytes_up": each.bytes_up,
                    "bytes_are_reckoned": each.is_reckoned,
                }
                for each in self.results
            ],
        }  # fmt: skip


def compare(
    runs: Sequence[tuple[str, Facts]], *, metric: str = "", target: float | None = None, higher: bool | None = None
) -> Comparison:
    """Compares runs.

    Args:
        runs: what each is called by, and its facts; at least one.
        metric: by which; empty: the first that all of them have (`shared_metrics`).
        target: of which the rounds are told; None: the best that every run has reached.
        higher: whether more is better; None: as the metric's name says.

    Raises:
        DataError: a run does not have the metric, or they have none in common.
    """
    chosen = metric or next(iter(shared_metrics([facts for _, facts in runs])), "")
    if not chosen:
        raise DataError(
            "The runs have no metric in common. Name one with --metric; `shoal runs show RUN` lists a run's."
        )
    for label, facts in runs:
        if not facts.metrics.get(chosen):
            raise DataError(
                f"Expected a metric of {label} ({', '.join(facts.metrics) or 'it has none'}), got {chosen!r}."
            )
    rising = higher_is_better(chosen) if higher is None else higher
    best = [_best(facts.metrics[chosen], rising) for _, facts in runs]
    reached_by_all = [point.value for point in best if point is not None]
    goal = target
    if goal is None and len(reached_by_all) == len(runs):
        goal = min(reached_by_all) if rising else max(reached_by_all)
    results = tuple(_result(label, facts, chosen, rising, goal) for label, facts in runs)
    return Comparison(chosen, rising, goal, results, _differences([settings(facts) for _, facts in runs]))


def shared_metrics(runs: Sequence[Facts]) -> list[str]:
    """The metrics that all runs have, those that matter most first: the server's, then of users left out, then of cohorts."""
    shared = set(runs[0].metrics).intersection(*(facts.metrics for facts in runs))
    return sorted((name for name in shared if not is_tail(name)), key=lambda name: (_rank(name), name))


def settings(facts: Facts) -> dict[str, str]:
    """A run's settings by dotted names, as text."""
    found: dict[str, Any] = {"plan": facts.run.plan_hash[:8], **facts.run.config}
    manifest = facts.manifest
    if manifest is not None:
        found["model.numbers"] = facts.parameters
        found["local"] = manifest.training.to_json()
        found["promises"] = manifest.promises.to_json()
        if manifest.half is not None:
            half = manifest.half
            found["round"] = half.rounds.to_json()
            found["algorithms"] = {name: arguments or "yes" for name, arguments in half.algorithms.items()}
            found["server"] = {**half.rule.to_json(), "aggregator": half.aggregator, **half.options}
    return {name: text for name, text in _flat(found) if name not in _NOT_SETTINGS}


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    flat = []
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            flat += _flat(inner, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", _text(inner)))
    return flat


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)


def _differences(each: Sequence[Mapping[str, str]]) -> dict[str, tuple[str, ...]]:
    names = dict.fromkeys(name for one in each for name in one)
    rows = {name: tuple(one.get(name, "–") for one in each) for name in names}
    return {name: row for name, row in rows.items() if len(set(row)) > 1}


def _result(label: str, facts: Facts, metric: str, rising: bool, target: float | None) -> Result:
    points = facts.metrics[metric]
    reached = None
    if target is not None:
        reached = next((p.version for p in points if (p.value >= target if rising else p.value <= target)), None)
    down, up, is_reckoned = _bytes(facts)
    return Result(
        label=label, run_id=facts.run.id, version=facts.version or 0, last=_best(points[-1:], rising), best=_best(points, rising),
        reached=reached, reached_s=None if reached is None else _seconds_at(facts, reached),
        seconds=max(facts.seconds.values(), default=0.0), bytes_down=down, bytes_up=up,
        is_reckoned=is_reckoned,
    )  # fmt: skip


def _seconds_at(facts: Facts, version: int) -> float | None:
    """A cohort's metric of version 0 was known with version 1."""
    return next((seconds for at, seconds in facts.seconds.items() if at >= version), None)


def _bytes(facts: Facts) -> tuple[int, int, bool]:
    down = sum(usage.bytes_down for usage in facts.usage.values())
    up = sum(usage.bytes_up for usage in facts.usage.values())
    if down or up or facts.run.kind != "simulate" or facts.manifest is None:
        return down, up, False
    manifest, draws = facts.manifest, sum(members for members, _ in facts.commits)
    once = manifest.constant_bytes
    devices = min(draws, int(facts.run.config.get(POPULATION, {}).get("users", draws)))
    return draws * (manifest.model_bytes - once) + devices * once, draws * manifest.update_bytes, True


def _best(points: Sequence[Point], rising: bool) -> Point | None:
    finite = [point for point in points if abs(point.value) < float("inf")]
    if not finite:
        return None
    return (max if rising else min)(finite, key=lambda point: point.value)


def _rank(name: str) -> int:
    first = name.split("/")[0] if "/" in name else ""
    return {"": 0, "left_out": 1, "evaluate": 2}.get(first, 3)


def _point(point: Point | None) -> dict[str, float] | None:
    return None if point is None else {"version": point.version, "value": point.value}
