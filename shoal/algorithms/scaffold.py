"""SCAFFOLD: local steps corrected by how a device's gradients differ from everybody's (Karimireddy et al. 2020, "SCAFFOLD:
stochastic controlled averaging for federated learning", algorithm 1 with option II).

Devices with unlike data pull the model to unlike places, the further the more steps they take. Each keeps a *control
variate* c_i, about the gradient of its own loss; the server keeps c, their mean, which travels with the model. A local step
goes along g - c_i + c. When the round is over::

    c_i' = the mean of the gradients of its steps         stays on the device
    delta/params/… = reached - received                   the mean is taken, as ever
    delta/control/params/… = (c_i' - c_i) / devices       the sum is added to c

which keeps c the mean of all devices' c_i, those that never took part having zeros. The paper's option II says
c_i' = c_i - c + (x - y_i) / (K eta): with SGD at rate eta that is the mean of the K gradients, and this form holds for any
optimizer. Updates count alike, as in the paper (`weighting="uniform"`): c is a plain mean, and would draw a weighted one
elsewhere. The first round, where all controls are zeros, has the bits of FedAvg.

Cost: the model is sent twice over both ways; a device keeps one copy of it, and holds three more while it trains.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shoal.algorithms.compose import applied, without_rule
from shoal.fixed import SumSpec
from shoal.local import LocalRule, Named, Report, sgd_rule
from shoal.task import Task
from shoal.tensors import TensorSpec

PREFIX = "control/"
"""Of the control variates: in the model c, on the device c_i."""


def scaffold(task: Task, *, devices: int) -> Task:
    """SCAFFOLD (Karimireddy et al. 2020).

    Args:
        task: with plain local training.
        devices: how many there are in all, not only in a round: N in the paper. Too high a number corrects too little, too
            low a one too much.

    Raises:
        ValueError: devices is below the rounds' goal, or the task trains by a local rule of its own.
    """
    without_rule(task, "scaffold")
    if devices < task.rounds.goal:
        raise ValueError(
            f"Expected devices >= goal={task.rounds.goal}, got devices={devices}: a round has no more of them."
        )
    local = replace(task.local, weighting="uniform")
    return applied(task, "scaffold", {"devices": devices}, local=local, rule=lambda made: scaffold_rule(made, devices))


class Correction(NamedTuple):
    """What the transformation keeps; its leaves go by the parameters' names in the carry."""

    shift: Any
    """c - c_i, float32."""
    total: Any
    """Sum of the gradients so far, float32."""


def corrected() -> optax.GradientTransformation:
    """Adds a shift, zero unless it is set, to each gradient, and adds the gradients up."""

    def init(params: Any) -> Correction:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        return Correction(zeros, zeros)

    def update(gradient: Any, state: Correction, params: Any = None) -> tuple[Any, Correction]:
        total = jax.tree.map(lambda t, g: t + g.astype(jnp.float32), state.total, gradient)
        shifted = jax.tree.map(lambda g, s: g + s.astype(g.dtype), gradient, state.shift)
        return shifted, Correction(state.shift, total)

    return optax.GradientTransformation(init, update)


def scaffold_rule(task: Task, devices: int) -> LocalRule:
    """Local SGD with corrected gradients, and its control variates."""
    optimizer = optax.chain(corrected(), task.local.optimizer)
    inner = sgd_rule(task.replace(local=replace(task.local, optimizer=optimizer)))
    reported = {spec.tensor.name for spec in inner.sums}
    learned = [s for s in inner.broadcast if s.name.startswith("params/") and f"delta/{s.name}" in reported]

    def in_carry(part: str, name: str) -> str:
        return f"opt/0/{part}/{name.removeprefix('params/')}"

    def begin(broadcast: Named, device_state: Named) -> Named:
        carry = dict(inner.begin(broadcast, device_state))
        for spec in learned:
            control = PREFIX + spec.name
            carry[control] = device_state[control]
            carry[in_carry("shift", spec.name)] = broadcast[control] - device_state[control]
        return dict(sorted(carry.items()))

    def finish(carry: Named, broadcast: Named) -> Report:
        report = inner.finish(carry, broadcast)
        steps = jnp.maximum(carry["step"], 1).astype(jnp.float32)
        mean = {PREFIX + s.name: carry[in_carry("total", s.name)] / steps for s in learned}
        change = {name: (value - carry[name]) / devices for name, value in mean.items()}
        sums = {**report.sums, "delta": {**report.sums["delta"], **change}}
        return Report(sums, report.weight, report.metrics, dict(sorted({**report.device_state, **mean}.items())))

    controls = tuple(TensorSpec(name=PREFIX + spec.name, shape=spec.shape, dtype="float32") for spec in learned)
    changes = (
        SumSpec(tensor=replace(s, name=f"delta/{s.name}"), bound=task.bound(s.name) / devices, weighted=False)
        for s in controls
    )
    return LocalRule(
        begin=begin,
        block=inner.block,
        finish=finish,
        broadcast=_by_name(inner.broadcast + controls),
        device_state=_by_name(inner.device_state + controls),
        sums=(*inner.sums, *changes),
        hides_examples=inner.hides_examples,
    )


def _by_name(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(sorted(specs, key=lambda spec: spec.name))
