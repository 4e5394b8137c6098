"""Reptile: a model from which few local steps lead far (Nichol et al. 2018, "On first-order meta-learning algorithms",
algorithm 2 in its batched form).

phi <- phi + step x mean over devices of (reached - phi): federated averaging with a step at the server, every device counting
alike. With step = 1 it is FedAvg. What it is for shows after local steps: `shoal.evaluation(task, steps=…)`.
"""

from dataclasses import replace

from shoal import validate
from shoal.algorithms.compose import applied
from shoal.policy import ServerRule
from shoal.task import Task


def reptile(task: Task, *, step: float = 0.5) -> Task:
    """Reptile (Nichol et al. 2018).

    Args:
        task: with the plain mean as its server rule.
        step: along the mean update, above 0; the paper lowers it from 1 to 0 over training. 1 is FedAvg with
            `Local(weighting="uniform")`, which this sets: devices count alike, whatever they hold.

    Raises:
        ValueError: step is not above 0, or the task has another server rule.
    """
    validate.positive(step=step)
    if task.server != ServerRule():
        raise ValueError(
            f"Expected the plain mean as server rule of task {task.name!r}, got {task.server}: Reptile is one itself."
        )
    return applied(
        task,
        "reptile",
        {"step": step},
        server=ServerRule(learning_rate=step),
        local=replace(task.local, weighting="uniform"),
    )
