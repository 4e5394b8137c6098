"""FedProx: a term that draws local training back to where it began (Li et al. 2020, "Federated optimization in heterogeneous
networks", equation 2).

Each device minimises F(w) + mu/2 |w - w_t|^2, w_t being the model that it was sent: of many local steps on data unlike the
others' the model drifts less far. The term's gradient, mu (w - w_t), is added before the task's optimizer; the reported loss is
that of the task, without it. With mu = 0 the updates have the bits of FedAvg.

Departures: the paper also lets devices solve their problem as exactly as they have time for; `Local(partial=…)` is about
that. A private leaf is drawn to where it stood when the round began.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import optax

from shoal import validate
from shoal.algorithms.compose import applied
from shoal.task import Task


def fedprox(task: Task, *, mu: float = 0.01) -> Task:
    """FedProx (Li et al. 2020).

    Args:
        task: any that trains.
        mu: how strongly local training is drawn back, at least 0; the paper tries 0.001, 0.01, 0.1 and 1. With 0 it is FedAvg.

    Raises:
        ValueError: mu is below 0, or the task has an algorithm that this one does not go with.
    """
    validate.not_negative(mu=mu)
    optimizer = optax.chain(proximal(mu), task.local.optimizer)
    return applied(task, "fedprox", {"mu": mu}, local=replace(task.local, optimizer=optimizer))


class ProximalState(NamedTuple):
    """What the transformation keeps."""

    anchor: Any
    """The parameters that the round began with."""


def proximal(mu: float) -> optax.GradientTransformation:
    """Adds mu times the way from the first parameters to the gradient."""

    def init(params: Any) -> ProximalState:
        return ProximalState(params)

    def update(gradient: Any, state: ProximalState, params: Any = None) -> tuple[Any, ProximalState]:
        return jax.tree.map(lambda g, p, a: g + mu * (p - a), gradient, params, state.anchor), state

    return optax.GradientTransformation(init, update)
