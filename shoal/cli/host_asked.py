"""What `shoal host` is asked to begin: tasks, settings of all of them, settings of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from shoal.cli.late_argument import parse_late
from shoal.record.retention import SETTING, Retention

_NUMBERS: Final[Mapping[str, type]] = {
    "goal": int, "minimum_group": int, "over_selection": float, "selection_window_s": float,
    "reporting_window_s": float, "buffer": int, "concurrency": int, "rounds": int,
}  # fmt: skip


@dataclass(frozen=True)
class Each:
    """What was said of single tasks, by name."""

    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    populations: Mapping[str, str] = field(default_factory=dict)
    """"" stands for all tasks that are not named."""

    @property
    def tasks(self) -> set[str]:
        return {*self.settings, *self.weights, *self.populations} - {""}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """See the module's text."""

    tasks: tuple[str, ...]
    rounds: int | None
    seed: int | None
    order: bool
    policy: Mapping[str, Any]
    """Fields of `RoundPolicy` of all tasks that are not as the tasks say."""
    each: Each
    events_kept: int | None = None
    keep: str = ""
    """`Retention.parse`'s; empty: all."""
    iree: tuple[str, ...] = ()
    """Targets that the plans are compiled for besides, for devices without JAX."""

    def check(self, *, resume: bool) -> None:
        """Raises ValueError for what does not go together."""
        given = [*self.policy, *(["seed"] if self.seed else []), *(["order"] if self.order else [])]
        given += ["events_kept"] if self.events_kept is not None else []
        given += ["keep"] if self.keep else []
        given += ["iree"] if self.iree else []
        given += ["set"] if self.each.settings else []
        given += ["weight"] if self.each.weights else []
        given += ["population"] if self.each.populations else []
        if resume and given:
            named = ", ".join(f"--{name.removesuffix('_s').replace('_', '-')}" for name in given)
            raise ValueError(f"With --resume the settings are those of the run: leave out {named}.")
        all_counted = self.rounds or (self.tasks and len(self.each.settings) >= len(self.tasks))
        if not resume and not (self.tasks and all_counted):
            raise ValueError("Expected TASK and --rounds for a new run, or --resume --run DIR to go on with one.")
        if self.keep:
            Retention.parse(self.keep)
        if self.iree:
            from shoal.plan.iree_targets import find_target

            for name in self.iree:
                find_target(name)
        if self.order and self.each.weights:
            raise ValueError(
                "Expected --order or --weight, not both: by order the first task that wants devices has them."
            )
        if len(self.tasks) == 1 and (self.order or self.each.weights):
            raise ValueError("--order and --weight are for several tasks.")

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """Task -> fields of its own."""
        return {
            task: {name: value for name, value in given.items() if name != "rounds"}
            for task, given in self.each.settings.items()
        }

    def config_of(self, task: str) -> dict[str, Any]:
        """What the task's run is to remember besides."""
        shares = {"weight": self.each.weights.get(task, 1.0), "order": self.order} if len(self.tasks) > 1 else {}
        kept = {SETTING: Retention.parse(self.keep).to_json()} if self.keep else {}
        return shares | kept | ({} if self.events_kept is None else {"events_kept": self.events_kept})

    def rounds_of(self, task: str) -> int:
        """Raises ValueError where nobody said how many."""
        found = self.each.settings.get(task, {}).get("rounds", self.rounds)
        if found is None:
            raise ValueError(f"Expected --rounds, or --set {task}.rounds=NUMBER.")
        return int(found)

    def population_of(self, task: str) -> str:
        return self.each.populations.get(task, self.each.populations.get("", "default"))

    def refuse_strangers(self, names: Sequence[str]) -> None:
        """Raises ValueError where a setting names a task that there is none of, or two tasks have one name."""
        if strangers := sorted(self.each.tasks - set(names)):
            raise ValueError(
                f"Expected --set, --weight and --population to name {' | '.join(names)}, got {strangers[0]!r}."
            )
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"Expected tasks of different names, got {twice[0]!r} twice: give one another name=….")


def parse_each(settings: Sequence[str], weights: Sequence[str], populations: Sequence[str]) -> Each:
    """Reads --set, --weight and --population.

    >>> parse_each(["digits.goal=5"], ["digits=3"], ["watches", "digits=phones"])
    Each(settings={'digits': {'goal': 5}}, weights={'digits': 3.0}, populations={'': 'watches', 'digits': 'phones'})

    Raises:
        ValueError: one is not of its form.
    """
    made: dict[str, dict[str, Any]] = {}
    for text in settings:
        task, name, value = _setting(text)
        made.setdefault(task, {})[name] = value
    return Each(made, dict(map(_weight, weights)), dict(map(_population, populations)))


def _setting(text: str) -> tuple[str, str, Any]:
    where, equal, value = text.partition("=")
    task, dot, name = where.rpartition(".")
    name = name.replace("-", "_")
    name = f"{name}_s" if f"{name}_s" in _NUMBERS else name
    if not (task and dot and equal) or (name not in _NUMBERS and name != "late"):
        known = ", ".join(sorted([*(n.removesuffix("_s").replace("_", "-") for n in _NUMBERS), "late"]))
        raise ValueError(f"Expected --set TASK.NAME=VALUE with a NAME of {known}, got {text!r}.")
    if name == "late":
        return task, name, parse_late(value).to_json()
    try:
        return task, name, _NUMBERS[name](value)
    except ValueError as error:
        raise ValueError(f"Expected --set {where}=NUMBER, got {value!r}.") from error


def _weight(text: str) -> tuple[str, float]:
    task, _, value = text.partition("=")
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not (task and 0.0 < weight < float("inf")):
        raise ValueError(f"Expected --weight TASK=NUMBER with a NUMBER above 0, got {text!r}.")
    return task, weight


def _population(text: str) -> tuple[str, str]:
    task, equal, name = text.rpartition("=")
    if not name or bool(equal) != bool(task):
        raise ValueError(f"Expected --population NAME or TASK=NAME, got {text!r}.")
    return task, name
