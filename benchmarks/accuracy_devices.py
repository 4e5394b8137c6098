"""Quality on devices: what a device's local training has reached, measured on examples that the device holds out.

`measured(task)` is the task with two metrics more, of the devices of each round: `sent`, the quality of the model as it was
sent, and `reached`, of what the device has after its local training (as by `shoal.measured`, but both on the same examples, so
that they can be compared). Examples whose field `held_out` is 1 are masked out of training, whatever its local rule, and put
aside until it is over; they never move a parameter.
"""

from dataclasses import replace
from typing import Any, Final

import jax.numpy as jnp

from benchmarks.accuracy_problems import HELD_OUT
from shoal.local import LocalRule, Named, Report, evaluate_bounds, evaluator, local_rule, metric_sums
from shoal.task import Task

MOST: Final = 32
"""Held-out examples of a device that are measured on, the first that come in a round."""
STAGES: Final = ("reached", "sent")
_PARTS: Final = ("denominator", "numerator")
_ASIDE: Final = "aside"


def measured(task: Task, quality: str) -> Task:
    """The task, with `sent` and `reached`.

    Args:
        task: whose batches have the field `held_out`.
        quality: the metric of `evaluate` that is measured.
    """
    return task.replace(rule=lambda made: measured_rule(task, quality))


def measured_rule(task: Task, quality: str) -> LocalRule:
    """The task's local rule, with what is put aside and measured."""
    inner, evaluate = local_rule(task), evaluator(task)
    assert evaluate is not None
    own = inner.reached or (lambda carry: carry)
    fields = task.batch_spec(MOST)
    fields.pop("mask")
    bound = evaluate_bounds(task)[quality]

    def begin(broadcast: Named, device_state: Named) -> Named:
        aside = {f"{_ASIDE}/{name}": jnp.zeros(spec.shape, spec.dtype) for name, spec in fields.items()}
        return dict(
            sorted({**inner.begin(broadcast, device_state), **aside, "asides": jnp.zeros((), jnp.int32)}.items())
        )

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        is_held = mask & (batches[HELD_OUT] == 1)
        carry, aside = _without(carry)
        for k in range(mask.shape[0]):
            aside = _put(aside, {name: values[k] for name, values in batches.items()}, is_held[k])
        return dict(sorted({**inner.block(carry, batches, mask & ~is_held, key), **aside}.items()))

    def finish(carry: Named, broadcast: Named) -> Report:
        carry, aside = _without(carry)
        report = inner.finish(carry, broadcast)
        batch = {name: aside[f"{_ASIDE}/{name}"] for name in fields}
        mask = jnp.arange(MOST) < aside["asides"]
        models = {"sent": broadcast, "reached": own(carry)}
        metrics = dict(report.metrics)
        for stage in STAGES:
            found = evaluate(models[stage], batch, mask)
            metrics |= {f"{stage}/{part}": found[f"{quality}/{part}"] for part in _PARTS}
        return report._replace(metrics=dict(sorted(metrics.items())))

    more = metric_sums(dict.fromkeys(STAGES, bound), MOST)
    return replace(inner, begin=begin, block=block, finish=finish, sums=(*inner.sums, *more))


def _without(carry: Named) -> tuple[Named, Named]:
    """The carry of the rule within, and what is put aside."""
    is_aside = {name: name == "asides" or name.startswith(f"{_ASIDE}/") for name in carry}
    return (
        {name: value for name, value in carry.items() if not is_aside[name]},
        {name: value for name, value in carry.items() if is_aside[name]},
    )


def _put(aside: Named, batch: Named, is_held: Any) -> Named:
    """What is held of one batch, put after what is there; what finds no room is dropped."""
    counted = jnp.cumsum(is_held, dtype=jnp.int32)
    at = jnp.where(is_held, aside["asides"] + counted - 1, MOST)
    made = {
        name: aside[name].at[at].set(batch[name.removeprefix(f"{_ASIDE}/")], mode="drop")
        for name in aside
        if name != "asides"
    }
    return made | {"asides": aside["asides"] + counted[-1]}
