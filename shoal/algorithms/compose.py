"""Which algorithms go together: any two, but for those that are named here, with the reason."""

from collections.abc import Mapping
from typing import Any, Final

from shoal.task import Task

_APART: Final = {
    frozenset(("ditto", "fedprox")): "Ditto's personal model is drawn to the global one by a term of its own",
}
"""Two that do not go together, and why."""


def applied(task: Task, name: str, arguments: Mapping[str, Any] | None = None, **changes: Any) -> Task:
    """The task with an algorithm applied.

    Args:
        task: to which it is applied.
        name: of the algorithm.
        arguments: what it was called with, for people to read.
        **changes: fields of the task that it changes. A `rule` is a local rule of its own: it is the first that is applied.

    Raises:
        ValueError: the task does not train, or has been made by an algorithm that does not go with this one.
    """
    if task.aggregator != "weighted_mean":
        raise ValueError(
            f"Expected a task that trains, got {task.name!r}, which does {task.aggregator}: apply {name} to the task that is "
            "trained."
        )
    for other in task.algorithms:
        if other == name:
            raise ValueError(f"Task {task.name!r} has {name} already: apply it once.")
        if why := _APART.get(frozenset((name, other))):
            raise ValueError(f"{name} does not go with {other}, which task {task.name!r} has: {why}.")
    return task.replace(algorithms={**task.algorithms, name: dict(arguments or {})}, **changes)


def without_rule(task: Task, name: str) -> None:
    """Raises ValueError where local training is another already than the frame's own."""
    if task.rule is not None:
        made = ", ".join(task.algorithms) or "a rule of its own"
        raise ValueError(
            f"Expected a task with plain local training for {name}, got {task.name!r}, which has {made}: a task trains by one "
            "local rule. What wraps one (compressed) is applied after it."
        )
