"""Evaluation on devices: a task that measures the versions of another on examples that its training leaves out.

    train = shoal.Task(…, local=shoal.Local(holdout=0.2))
    measure = shoal.evaluation(train, every=5)

Served together (`shoal host file.py:train file.py:measure`), every fifth version of `train`, and the last, is sent to
devices, which evaluate it on the part of their examples that is held out; only sums leave them, added up over at least
the smallest group. The metrics go into the record of the training run, under the version that they are of, by the names
`evaluate/…`. Nothing is learned: the line of an evaluation repeats the versions that it has measured.

With `steps` the model is fine-tuned before: each device takes that many local steps on the part it trains on, by the task's
optimizer, and measures what came of them.
"""

from dataclasses import replace

import jax.numpy as jnp

from shoal import validate
from shoal.algorithms.measured import measuring_rule, with_both_parts
from shoal.local import (
    LocalRule,
    Named,
    Report,
    evaluate_bounds,
    evaluator,
    local_rule,
    metric_sums,
    model_specs,
    sgd_rule,
)
from shoal.lora import with_adapters
from shoal.plan.manifest import HELD_OUT
from shoal.policy import Late, Privacy, RoundPolicy, ServerRule
from shoal.task import Task


def evaluation(
    task: Task, *, every: int = 1, steps: int = 0, name: str = "", rounds: RoundPolicy | None = None
) -> Task:
    """A task that evaluates the versions of `task` on devices.

    Args:
        task: what is trained; it has `evaluate`, and `Local(holdout=…)` above 0.
        every: versions of the training run from one that is evaluated to the next; the last one always is.
        steps: that a device trains before it measures, as far as the task's epochs go; 0: it measures the model as it is sent.
        name: of the new task; `<task>-evaluate` if not given.
        rounds: how its rounds are run; like the task's own, without late updates, if not given.

    Raises:
        ValueError: the task has no `evaluate`, holds nothing out, or keeps part of the model on devices.
    """
    validate.positive(every=every)
    validate.not_negative(steps=steps)
    if task.local.part == "both":  # one that measures while it trains
        fields = {name: spec for name, spec in task.batch.items() if name != HELD_OUT}
        task = replace(task, batch=fields, local=replace(task.local, part="training"))
    if task.evaluate is None:
        raise ValueError(f"Task {task.name!r} has no `evaluate`: there is nothing to measure. Give it one.")
    if not task.local.holdout:
        raise ValueError(
            f"Task {task.name!r} trains on all examples: set local=shoal.Local(holdout=0.2, …), so that a fifth of each "
            "device's is left for evaluation."
        )
    if private := [spec.name for spec in model_specs(task) if with_adapters(task).leaf_rule(spec.name) == "private"]:
        raise ValueError(
            f"Expected a model that the server has whole; {private[0]} of task {task.name!r} stays on devices."
        )
    trained = task
    # What is measured has bounds of its own; it is added up in the clear, and without noise (docs/privacy.md).
    task = replace(task, privacy=Privacy(delta_bound=task.privacy.delta_bound))
    own = replace(task.rounds, late=Late(), buffer=0, concurrency=0, group_size=0)
    if steps:
        tuned = with_both_parts(task)
        return replace(
            tuned, name=name or f"{task.name}-evaluate", local=replace(tuned.local, drop_remainder=False, partial="drop"),
            rounds=rounds or own, server=ServerRule(), predict=None,
            rule=lambda made: _tuned_rule(trained, made, steps), algorithms={},
            aggregator="evaluation", options={"follows": task.name, "every": every},
        )  # fmt: skip
    return replace(
        task, name=name or f"{task.name}-evaluate", local=replace(task.local, epochs=1, part="held_out", drop_remainder=False, partial="drop"),
        rounds=rounds or own, server=ServerRule(), evaluate=None, predict=None, penalty=None, heeds_mask=True,
        rule=lambda made: evaluation_rule(task, trained, made.local.max_examples), algorithms={},
        aggregator="evaluation", options={"follows": task.name, "every": every},
    )  # fmt: skip


def _tuned_rule(trained: Task, made: Task, steps: int) -> LocalRule:
    """Plain local steps from the model as it was sent, and what came of them."""
    rule = measuring_rule(sgd_rule(made.replace(rule=None)), made, prefix="", learns=False, steps=steps)
    return replace(rule, broadcast=local_rule(trained).broadcast)


def evaluation_rule(task: Task, trained: Task, max_examples: int) -> LocalRule:
    """One pass over the examples, that adds up the metrics of the model as it was sent: with all that `trained` has in its line."""
    evaluate, bounds = evaluator(task), evaluate_bounds(task)
    assert evaluate is not None
    sums = [f"{name}/{part}" for name in bounds for part in ("denominator", "numerator")]

    def begin(broadcast: Named, device_state: Named) -> Named:
        zeros = {f"metric/{name}": jnp.zeros((), jnp.float32) for name in sums}
        return dict(sorted({**broadcast, **zeros, "weight": jnp.zeros((), jnp.int32)}.items()))

    def block(carry: Named, batches: Named, mask: jnp.ndarray, key: jnp.ndarray) -> Named:
        carry = dict(carry)
        for k in range(mask.shape[0]):
            made = evaluate(carry, {name: values[k] for name, values in batches.items()}, mask[k])
            live = jnp.any(mask[k])
            for name in sums:
                carry[f"metric/{name}"] += jnp.where(live, made[name], jnp.zeros((), jnp.float32))
            carry["weight"] += jnp.sum(mask[k], dtype=jnp.int32)
        return carry

    def finish(carry: Named, broadcast: Named) -> Report:
        return Report({}, carry["weight"], {name: carry[f"metric/{name}"] for name in sums}, {})

    return LocalRule(
        begin=begin, block=block, finish=finish, broadcast=local_rule(trained).broadcast, device_state=(),
        sums=metric_sums(bounds, max_examples),
    )  # fmt: skip
