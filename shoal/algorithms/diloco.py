"""DiLoCo: whole pods as devices, which send an update only every so many steps (Douillard et al. 2023, "DiLoCo: distributed low-communication
training of language models", algorithm 1).

A device takes `inner_steps` steps by the task's own optimizer (the paper: AdamW), whose state it keeps from round to round; the server takes a step of
Nesterov momentum along the mean of what they moved. So a round of 500 steps sends 1/500 of what summing up every gradient sends, and the
round's policy says what becomes of those that are late or lost: `late`, `over_selection`, `buffer`.

Departure: a device that holds more examples than a round takes draws anew each round, rather than going on where it was in its data.
"""

from dataclasses import replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

from shoal import validate
from shoal.algorithms.compose import applied, without_rule
from shoal.local import LocalRule, Named, Report, sgd_rule
from shoal.policy import ServerRule
from shoal.task import Task
from shoal.tensors import TensorSpec, specs_of

INNER: Final = "inner/"
_ROUNDS: Final = f"{INNER}rounds"
_OPT: Final = "opt/"


def diloco(task: Task, *, inner_steps: int | None = None, outer_rate: float = 0.7, outer_momentum: float = 0.9) -> Task:
    """DiLoCo (Douillard et al. 2023).

    Args:
        task: with plain local training; its `Local.optimizer` is the inner one.
        inner_steps: of a device in a round, as far as its examples last; None: as the task's `Local` says.
        outer_rate: of the server's step; the paper's is 0.7.
        outer_momentum: of Nesterov's kind, in [0, 1); the paper's is 0.9.

    Raises:
        ValueError: a number is out of range, or the task has another algorithm or server rule.
    """
    validate.positive(outer_rate=outer_rate)
    if not 0 <= outer_momentum < 1:
        raise ValueError(f"Expected 0 <= outer_momentum < 1, got outer_momentum={outer_momentum!r}.")
    without_rule(task, "diloco")
    if task.server != ServerRule():
        raise ValueError(
            f"Expected the plain mean as server rule of task {task.name!r}, got {task.server}: DiLoCo's outer step is one itself."
        )
    local = replace(task.local, weighting="uniform")
    if inner_steps is not None:
        validate.whole(1, inner_steps=inner_steps)
        local = replace(local, epochs=1, max_examples=inner_steps * task.local.batch_size)
    return applied(
        task,
        "diloco",
        {"inner_steps": inner_steps, "outer_rate": outer_rate, "outer_momentum": outer_momentum},
        local=local,
        server=optax.sgd(outer_rate, momentum=outer_momentum or None, nesterov=bool(outer_momentum)),
        rule=diloco_rule,
    )


def diloco_rule(task: Task) -> LocalRule:
    """Local training whose optimizer goes on where it was."""
    plain = sgd_rule(task)
    like = _carry(plain)
    kept = {INNER + name: spec for name, spec in like.items() if name.startswith(_OPT)}

    def begin(broadcast: Named, device_state: Named) -> Named:
        carry = dict(plain.begin(broadcast, {n: v for n, v in device_state.items() if not n.startswith(INNER)}))
        is_known = device_state[_ROUNDS] > 0
        for name in kept:
            own = name.removeprefix(INNER)
            carry[own] = jnp.where(is_known, device_state[name], carry[own])
        return dict(sorted((carry | {_ROUNDS: device_state[_ROUNDS]}).items()))

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        inner = {name: value for name, value in carry.items() if name != _ROUNDS}
        return dict(sorted((plain.block(inner, batches, mask, key) | {_ROUNDS: carry[_ROUNDS]}).items()))

    def finish(carry: Named, broadcast: Named) -> Report:
        report = plain.finish({name: value for name, value in carry.items() if name != _ROUNDS}, broadcast)
        state = {name: carry[name.removeprefix(INNER)] for name in kept} | {_ROUNDS: carry[_ROUNDS] + 1}
        return report._replace(device_state=dict(sorted((report.device_state | state).items())))

    state_specs = specs_of(dict(sorted({**kept, _ROUNDS: jax.ShapeDtypeStruct((), jnp.int32)}.items())))
    return replace(
        plain,
        begin=begin,
        block=block,
        finish=finish,
        device_state=tuple(sorted((*plain.device_state, *state_specs), key=lambda spec: spec.name)),
    )


def _carry(rule: LocalRule) -> Named:
    """Shapes of what a rule begins with."""

    def like(specs: tuple[TensorSpec, ...]) -> Named:
        return {spec.name: jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype) for spec in specs}

    made: Named = jax.eval_shape(rule.begin, like(rule.broadcast), like(rule.device_state))
    return made
