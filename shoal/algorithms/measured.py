"""How good a model is on a device after that has trained on it: on what training leaves out, by the device itself.

    training part of the examples ──> the local rule's steps ──> what the device holds
    part held out, afterwards      ──> `evaluate` of that, added up         (a field says which part an example is of)

`shoal.measured(task)` does so in every round of the training itself: what it measures is what a device is left with, its
personal model (Ditto), its private leaves (FedBN), or plainly the model after local training. `shoal.evaluation(task, steps=…)`
does so in rounds of its own, after a few steps (local fine-tuning), and learns nothing.
"""

from dataclasses import replace
from typing import Any, Final

import jax.numpy as jnp

from shoal.algorithms.compose import applied
from shoal.local import LocalRule, Named, Report, evaluate_bounds, evaluator, metric_sums, sgd_rule
from shoal.plan.manifest import HELD_OUT
from shoal.task import Task

OWN: Final = "measured/"
"""Of what it adds to the carry."""


def measured(task: Task) -> Task:
    """Training rounds that also measure what devices are left with, on the examples that they hold out.

    The metrics of `evaluate` come as `train/held_out/…`, over the cohort, of the model after local training.

    Args:
        task: any that trains, with `evaluate`, and `Local(holdout=…)` above 0.

    Raises:
        ValueError: it has no `evaluate`, or holds nothing out.
    """
    inner = task.rule or sgd_rule
    made = with_both_parts(task)
    return applied(
        made, "measured", rule=lambda made: measuring_rule(inner(made), made, prefix="held_out/"), local=made.local
    )


def with_both_parts(task: Task) -> Task:
    """The task, fed with what is held out after what it trains on; `HELD_OUT` says which is which."""
    if task.evaluate is None:
        raise ValueError(f"Task {task.name!r} has no `evaluate`: there is nothing to measure. Give it one.")
    if not task.local.holdout:
        raise ValueError(
            f"Task {task.name!r} trains on all examples: set local=shoal.Local(holdout=0.2, …), so that a fifth of each "
            "device's is left for evaluation."
        )
    if HELD_OUT in task.batch and task.local.part != "both":
        raise ValueError(
            f"Expected another name for field {HELD_OUT!r} of task {task.name!r}: it says what is held out."
        )
    return task.replace(batch={**task.batch, HELD_OUT: ((), "bool")}, local=replace(task.local, part="both"))


def measuring_rule(
    inner: LocalRule, task: Task, *, prefix: str, learns: bool = True, steps: int | None = None
) -> LocalRule:
    """A local rule that measures afterwards.

    Args:
        inner: how a device trains.
        task: of `with_both_parts`.
        prefix: before the metrics' names.
        learns: its report is the inner one, with more metrics; else metrics are all there is.
        steps: the most that the device trains; None: as many as its examples give.
    """
    evaluate, bounds = evaluator(task), evaluate_bounds(task)
    assert evaluate is not None
    parts = [f"{name}/{part}" for name in bounds for part in ("denominator", "numerator")]
    reached = inner.reached or (lambda carry: carry)

    def begin(broadcast: Named, device_state: Named) -> Named:
        kept = device_state if learns else {s.name: jnp.zeros(s.shape, s.numpy_dtype) for s in inner.device_state}
        zeros = {f"{OWN}{name}": jnp.zeros((), jnp.float32) for name in parts}
        counts = {f"{OWN}steps": jnp.zeros((), jnp.int32), f"{OWN}examples": jnp.zeros((), jnp.int32)}
        return dict(sorted({**inner.begin(broadcast, kept), **zeros, **counts}.items()))

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        own = {name: value for name, value in carry.items() if name.startswith(OWN)}
        theirs = {name: value for name, value in carry.items() if name not in own}
        for k in range(mask.shape[0]):
            at = {name: values[k : k + 1] for name, values in batches.items()}
            held = batches[HELD_OUT][k]
            trains = mask[k] & ~held
            if steps is not None:
                trains = trains & (own[f"{OWN}steps"] < steps)
            theirs = inner.block(theirs, at, trains[None], key)
            own[f"{OWN}steps"] += jnp.any(trains).astype(jnp.int32)
            counts = mask[k] & held
            made = evaluate(reached(theirs), {name: values[0] for name, values in at.items()}, counts)
            for name in parts:
                own[OWN + name] += jnp.where(jnp.any(counts), made[name], jnp.zeros((), jnp.float32))
            own[f"{OWN}examples"] += jnp.sum(counts, dtype=jnp.int32)
        return dict(sorted({**theirs, **own}.items()))

    def finish(carry: Named, broadcast: Named) -> Report:
        metrics = {prefix + name: carry[OWN + name] for name in parts}
        if not learns:
            # Who holds nothing out has measured nothing, which adds nothing.
            return Report({}, jnp.maximum(carry[f"{OWN}examples"], 1), metrics, {})
        report = inner.finish({n: v for n, v in carry.items() if not n.startswith(OWN)}, broadcast)
        return report._replace(metrics=dict(sorted({**report.metrics, **metrics}.items())))

    sums = metric_sums({prefix + name: bound for name, bound in bounds.items()}, task.local.max_examples)
    return replace(
        inner, begin=begin, block=block, finish=finish, device_state=inner.device_state if learns else (),
        sums=(*inner.sums, *sums) if learns else sums,
    )  # fmt: skip
