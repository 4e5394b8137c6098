"""Per-FedAvg: a model that is good after one step on a device's data (Fallah et al. 2020, "Personalized federated learning with
theoretical guarantees: a model-agnostic meta-learning approach", algorithm 1 and section 4.2).

A local step goes along the gradient of F(w - alpha grad F(w)), on independent batches D, D', D''::

    adapted = w - alpha grad f(w, D)
    v       = grad f(adapted, D')
    FO:  w <- w - beta v
    HF:  w <- w - beta (v - alpha [grad f(w + delta v, D'') - grad f(w - delta v, D'')] / (2 delta))

beta is the task's optimizer, whatever it is. The batches are parts of the step's batch: every second example of it (FO), or
every third (HF). So a device with one batch learns too, and a step costs about as much as two (FO) or four thirds (HF) of plain
ones on parts. Metrics are those of the adapted model on D': how good it is after a step, on other examples of the device.

With alpha = 0 it is FedAvg on D'.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax

from shoal import validate
from shoal.algorithms.compose import applied, without_rule
from shoal.gradients import Gradient, Objective
from shoal.local import sgd_rule
from shoal.task import Loss, Task, Tree


def per_fedavg(
    task: Task,
    *,
    alpha: float = 0.01,
    variant: Literal["first_order", "hessian_free"] = "first_order",
    delta: float = 1e-3,
) -> Task:
    """Per-FedAvg (Fallah et al. 2020).

    Args:
        task: with plain local training.
        alpha: step of the adaptation, at least 0.
        variant: `first_order` leaves the second derivative out; `hessian_free` takes it along v by a difference of gradients.
        delta: of that difference, above 0; in float32 not much below 1e-3.

    Raises:
        ValueError: a setting is out of range, a batch has not two (three) examples, or the task trains by a local rule of its own.
    """
    validate.not_negative(alpha=alpha)
    validate.positive(delta=delta)
    validate.one_of(("first_order", "hessian_free"), variant=variant)
    without_rule(task, "per_fedavg")
    parts = 2 if variant == "first_order" else 3
    if task.local.batch_size < parts:
        raise ValueError(
            f"Expected batch_size >= {parts} for {variant}, got {task.local.batch_size}: a batch is divided."
        )
    gradient_of = meta_gradient(alpha, delta if variant == "hessian_free" else None)
    arguments = {"alpha": alpha, "variant": variant} | ({"delta": delta} if variant == "hessian_free" else {})
    return applied(task, "per_fedavg", arguments, rule=lambda made: sgd_rule(made, gradient_of=gradient_of))


def meta_gradient(alpha: float, delta: float | None) -> Gradient:
    """The gradient of the loss after a step; without a delta to first order."""
    parts = 2 if delta is None else 3

    def gradient_of(objective: Objective, params: Tree, batch: Mapping[str, Any]) -> tuple[Tree, Loss, Any]:
        gradient = jax.grad(objective, has_aux=True)
        first, second, *third = ({name: values[i::parts] for name, values in batch.items()} for i in range(parts))
        adapted = _moved(params, gradient(params, first)[0], -alpha)
        made, result = gradient(adapted, second)
        for rest in third:
            assert delta is not None
            ahead, behind = (gradient(_moved(params, made, times), rest)[0] for times in (delta, -delta))
            turn = jax.tree.map(lambda a, b: (a - b) / (2.0 * delta), ahead, behind)
            made = _moved(made, turn, -alpha)
        return made, result, second["mask"]

    return gradient_of


def _moved(tree: Tree, along: Tree, times: float) -> Tree:
    return jax.tree.map(lambda value, way: value + times * way, tree, along)
