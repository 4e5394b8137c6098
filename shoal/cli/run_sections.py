"""The parts of `shoal runs show`: each reads the record and prints one thing."""

import time
from collections import Counter
from typing import Any, Final

from shoal.cli import analytics_section, members_section, over_users_section, statistics_section, words
from shoal.cli.run_summary import summarize
from shoal.cli.screen import Screen
from shoal.clip_norm import described
from shoal.errors import StoreError
from shoal.plan.plan import Plan
from shoal.plan.run_plan import load_plan
from shoal.policy import Privacy, RoundPolicy
from shoal.record.run import Run, shown_status
from shoal.record.store import MetricRow, RoundRow, UsageRow

ROUNDS_SHOWN: Final = 10
_SHOWN_PROVENANCE: Final = (
    "shoal",
    "python",
    "platform",
    "machine",
    "processor",
    "cores",
    "accelerators",
    "commit",
    "dirty",
)


def show(run: Run, screen: Screen) -> None:
    """Everything of a run."""
    row, store = run.row, run.store
    plan, rounds = _plan(run), list(store.rounds(run.id))
    usage, metrics = list(store.usage(run.id)), list(store.metrics(run.id))
    version = store.last_version(run.id)
    status = shown_status(run.folder, row)
    screen.line(f"run {row.id}  {row.name}  {row.kind}  {status}  version {'-' if version is None else version}")
    screen.line(f"made {_when(row.created_s)}{f', ended {_when(row.finished_s)}' if row.finished_s else ''}")
    settings = {name: value for name, value in row.config.items() if name != "plan_blob"}
    _pairs(screen, "config", settings)
    _pairs(screen, "provenance", {name: row.provenance[name] for name in _SHOWN_PROVENANCE if row.provenance.get(name)})
    if plan is not None:
        _pairs(screen, "plan", _plan_facts(plan, row.kind))
    _rounds(screen, rounds)
    analytics = analytics_section.show(rounds, screen)
    members = members_section.show(rounds, screen)
    _metrics(screen, metrics)
    users = over_users_section.show(store, run.id, screen)
    found = statistics_section.show(run, screen)
    _usage(screen, usage)
    screen.line(f"\nrun: {run.folder}")
    document: dict[str, Any] = summarize(store, run.id).to_json() | {
        "status": status, "analytics": analytics, "statistics": found, "over_users": users, "processes": members, "folder": str(run.folder), "created_s": row.created_s, "finished_s": row.finished_s, "config": settings,
        "provenance": dict(row.provenance), "plan": None if plan is None else _plan_facts(plan, row.kind),
        "rounds": [{"number": r.number, "state": r.state, "base_version": r.base_version, "selected": r.selected,
                    "counted": r.counted, "released": r.released, "reason": r.reason} for r in rounds],
        "curves": {f"{scope} {name}": [list(point) for point in points] for (scope, name), points in _curves(metrics).items()},
    }  # fmt: skip
    screen.document(document)


def _plan(run: Run) -> Plan | None:
    try:
        return load_plan(run.store, run.id).plan
    except StoreError:  # a run of `shoal.record.init` has none
        return None


def _plan_facts(plan: Plan, kind: str) -> dict[str, Any]:
    manifest, rounds = plan.manifest, plan.manifest.server.rounds
    selected = f" of {rounds.num_selected} selected" if kind == "host" else ""
    algorithms = {name: arguments or "yes" for name, arguments in manifest.server.algorithms.items()}
    return ({"algorithms": algorithms} if algorithms else {}) | {
        "hash": plan.hash, "programs": ", ".join(dict.fromkeys(p.name for p in manifest.programs)),
        "program size": words.size(sum(p.size_bytes for p in manifest.programs)),
        "down": words.size(manifest.model_bytes), "up": words.size(manifest.update_bytes),
        "server rule": f"{manifest.server.rule.kind}, rate {manifest.server.rule.learning_rate:g}",
        "rounds": f"goal {rounds.goal}{selected}, smallest group {rounds.minimum_group}{_resting(rounds)}",
        **_protection(manifest.promises.privacy),
        "purpose": manifest.server.about.purpose or "(not said)",
    }  # fmt: skip


def _resting(rounds: RoundPolicy) -> str:
    if rounds.min_separation == 1:
        return ""
    return f", min_separation {rounds.min_separation} (a device that was in a version is in none of the next {rounds.min_separation - 1})"


def _protection(privacy: Privacy) -> dict[str, str]:
    """What keeps a device's part from being seen, in words; nothing where nothing does."""
    made = {} if privacy.clip_norm is None else {"clipped": f"updates to {described(privacy.clip_norm)}"}
    if privacy.noise_multiplier:
        budget = (
            "no limit" if privacy.epsilon is None else f"epsilon at most {privacy.epsilon:g} at delta {privacy.delta:g}"
        )
        made["noise"] = (
            f"{privacy.noise_multiplier:g} times {_noised(privacy)}; {budget} (shoal privacy says what is spent)"
        )
    if (hides := privacy.examples) is not None:
        made["noise on examples"] = (
            f"{hides.noise_multiplier:g} times {hides.clip_norm:g}, the norm of an example's gradient, in each local step (shoal privacy says what it is "
            "worth)"
        )
    if privacy.secure is None:
        return made
    trust = "the server may lie" if privacy.secure.is_certified else "the server follows the protocol"
    secure = f"up to {privacy.secure.members} members, {privacy.secure.colluders:.0%} colluders, {privacy.secure.dropouts:.0%} drop-outs; {trust}"
    return made | {"secure groups": secure}


def _noised(privacy: Privacy) -> str:
    """What noise is in proportion to, and where it is."""
    if privacy.distributed:
        return "that norm on each secure group's sum, by the devices of a group together"
    if privacy.correlated is None:
        return "that norm on each round's sum"
    rounds, kind = privacy.correlated.rounds, privacy.correlated.kind
    return (
        f"what a device's updates can come to in all {rounds} rounds together, cancelling from round to round ({kind})"
    )


def _pairs(screen: Screen, title: str, values: dict[str, Any]) -> None:
    if values:
        screen.line(f"\n{title}")
        width = max(map(len, values))
        for name, value in values.items():
            screen.line(f"  {name:{width}}  {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return str(value)


def _rounds(screen: Screen, rounds: list[RoundRow]) -> None:
    if not rounds:
        return
    states = Counter(row.state for row in rounds)
    told = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
    last = max(row.number for row in rounds)
    screen.line(f"\nrounds: {told}" + (f" (kept of {last}; the others are swept)" if last > len(rounds) else ""))
    reasons = Counter(row.reason or "-" for row in rounds if row.state != "open")
    screen.line(f"  closed by: {', '.join(f'{reason} ({number})' for reason, number in reasons.most_common())}")
    columns = ("round", "from version", "state", "selected", "counted", "released", "took", "reason")
    screen.table(columns, [_round_cells(row) for row in rounds[-ROUNDS_SHOWN:]], indent="  ")
    if len(rounds) > ROUNDS_SHOWN:
        screen.line(f"  (the last {ROUNDS_SHOWN} of {len(rounds)}; --json has all)")


def _round_cells(row: RoundRow) -> tuple[str, ...]:
    took = "-" if row.closed_s is None else words.duration(max(0.0, row.closed_s - row.opened_s))
    numbers = (row.number, row.base_version, row.state, row.selected, row.counted, row.released)
    return (*map(str, numbers), took, row.reason or "-")


def _curves(metrics: list[MetricRow]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in metrics:
        scope = f"{row.scope} {row.device_class}".strip()
        curves.setdefault((scope, row.name), []).append((row.version, row.value))
    return curves


def _metrics(screen: Screen, metrics: list[MetricRow]) -> None:
    curves = _curves(metrics)
    if not curves:
        return
    screen.line("\nmetrics")
    rows = []
    for (scope, name), points in sorted(curves.items(), reverse=True):
        numbers = [value for _, value in sorted(points)]
        ends = (words.value(numbers[0]), words.value(numbers[-1]), words.value(min(numbers)), words.value(max(numbers)))
        rows.append((name, scope, words.sparkline(numbers), *ends))
    screen.table(("metric", "scope", "curve", "first", "last", "least", "most"), rows, indent="  ")


def _usage(screen: Screen, usage: list[UsageRow]) -> None:
    phases: dict[str, list[float]] = {}
    for row in usage:
        sums = phases.setdefault(row.phase, [0.0, 0.0, 0.0, 0.0])
        for place, value in enumerate((row.seconds, row.bytes_down, row.bytes_up, row.joules or 0.0)):
            sums[place] += value
    told = {phase: sums for phase, sums in phases.items() if any(sums)}
    if not told:
        return
    screen.line("\nuse, over all rounds and members (padding is a part of compute)")
    rows = [
        (phase, words.duration(s) if s else "-", words.size(down) if down else "-", words.size(up) if up else "-")
        for phase, (s, down, up, _) in sorted(told.items(), key=lambda item: -item[1][0])
    ]
    screen.table(("phase", "time", "down", "up"), rows, indent="  ")


def _when(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
