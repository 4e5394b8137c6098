"""Local training as three pure programs over named tensors: begin, block, finish.

``begin`` turns what was broadcast (and what the device kept) into a carry; ``block`` takes a few unrolled steps of
fixed shape; ``finish`` turns the carry into a report. No pytree crosses a boundary: everything is a flat mapping of
names, in sorted order, so that a program can be exported, signed, and run where there is no Python object of ours.

Data flow of the default rule, local SGD (McMahan et al. 2017, algorithm 1, ClientUpdate; any optax transformation)::

    broadcast {params/…, state/…} ─begin─> carry {params/…, state/…, opt/…, metric/…, step, weight}
    batches (k, B, …), mask (k, B), key (2,) ─block─> carry, as often as the examples last
    carry, broadcast ─finish─> delta/… = reached - received, weight, metric sums, device state

With `Local(partial="fednova")` it is delta/params/… = (reached - received) / steps, and the steps are a sum of their own: the
server multiplies the mean by the mean number of steps (Wang et al. 2020, "Tackling the objective inconsistency problem",
equation 7 with tau_eff as for FedAvg). So devices that take few steps, because they have little data or were interrupted, draw the
model to their data as strongly as their weight says. Departure: steps are counted alike whatever the optimizer, which is the
paper's normalisation for plain SGD; with momentum or decay its ||a||_1 is another number.

Guarantees:
    * A wholly masked step changes nothing: not a parameter, a counter or a statistic.
    * Masked examples count for nothing: not in the loss, the gradient, the metrics or the weight. They repeat real ones
      (`data/batch.py` sees to it): a made-up row may have a loss that is not finite, which no mask takes out of a gradient.
    * Step t draws its randomness from (key, t) alone, so the same examples give the same result in blocks of any length.
"""

import fnmatch
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shoal.clip_norm import LOG_SCALE, AdaptiveClip, ClipNorm, groups_of
from shoal.clip_update import clip_update, log_scale_step
from shoal.codec.linear import SPREAD
from shoal.fixed import STEPS, SumSpec
from shoal.gradients import Gradient, noisy_gradient, plain_gradient
from shoal.lora import with_adapters
from shoal.task import LOSS_BOUND, Loss, Sum, Task, Tree, Variables, called, check_metrics
from shoal.tensors import TensorSpec, is_of_model, specs_of

Named = dict[str, Any]
"""Name -> array or tracer, sorted by name."""


class Report(NamedTuple):
    """What a member reports of one round."""

    sums: dict[str, Named]
    """Kind (FedAvg: `delta`) -> named tensors that will be summed over members."""
    weight: Any
    """int32 scalar: how many times the weighted sums count."""
    metrics: Named
    """`loss/numerator`, `loss/denominator`, …: float32 scalars."""
    device_state: Named
    """What the device keeps for the next round."""


@dataclass(frozen=True, kw_only=True)
class LocalRule:
    """Three pure functions and what goes in and out of them."""

    begin: Callable[[Named, Named], Named]
    """(broadcast, device state) -> carry."""
    block: Callable[[Named, Named, Any, Any], Named]
    """(carry, batches {field: (k, B, …)}, mask (k, B) bool, key (2,) uint32) -> carry; with noise on examples the key is longer, as
    `Privacy.key_words` says."""
    finish: Callable[[Named, Named], Report]
    """(carry, broadcast) -> report."""
    broadcast: tuple[TensorSpec, ...]
    """What the server sends, sorted by name: the model (`params/…`, `state/…`), and what the rule adds to it under a prefix of
    its own, which begins as zeros and is no part of evaluation, prediction or export."""
    device_state: tuple[TensorSpec, ...]
    """What the device keeps; a device without it passes zeros."""
    sums: tuple[SumSpec, ...]
    """What is reported for summing, by flat name (`delta/params/…`, `metric/loss/numerator`)."""
    reached: Callable[[Named], Named] | None = None
    """carry -> the model that the device holds by now, by name; None: the tensors of that name in the carry."""

    on_grid: bool = False
    """Whether updates have been rounded to few significant bits: what scales them later has few, too."""
    hides_examples: bool = False
    """Whether what leaves `block` follows from examples by the steps of `gradients.noisy_gradient` alone, metrics aside."""

    @property
    def model(self) -> tuple[TensorSpec, ...]:
        """What is broadcast without what the rule adds to it."""
        return tuple(spec for spec in self.broadcast if is_of_model(spec.name))


def seed_key(key: Any) -> jax.Array:
    """A typed key from the two words that travel."""
    made: jax.Array = jax.random.wrap_key_data(key, impl="threefry2x32")
    return made


def public_words(key: Any) -> Any:
    """(2,): of a key of any length those that are not for the noise on examples."""
    return key if key.shape[-1] == 2 else key[:2]


def name_of(path: Any) -> str:
    """`params/dense/kernel` for a path of `jax.tree_util`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Tree, prefix: str) -> Named:
    """A pytree as named leaves, sorted by name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    pairs = [(f"{prefix}/{name_of(path)}" if path else prefix, leaf) for path, leaf in leaves]
    made = dict(sorted(pairs, key=lambda pair: pair[0]))
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"Expected each leaf to have a name of its own, got {twice[:3]} twice ('/' separates): rename one."
        )
    return made


def named_tree(tree: Tree, prefix: str, make: Callable[[str, Any], Any]) -> Tree:
    """A pytree of the same structure, each leaf made from its name and itself."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: make(f"{prefix}/{name_of(path)}", leaf), tree)


class Shape:
    """How a pytree is taken apart into names and put together again."""

    def __init__(self, tree: Tree, prefix: str) -> None:
        paths, self._treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.names = [f"{prefix}/{name_of(path)}" if path else prefix for path, _ in paths]

    def tree(self, values: Mapping[str, Any]) -> Tree:
        """The pytree whose leaves are found by name; a name that is missing becomes None."""
        return jax.tree_util.tree_unflatten(self._treedef, [values.get(name) for name in self.names])


def model_shape(task: Task) -> Variables:
    """Shapes of the task's variables, without computing them."""
    like: Variables = jax.eval_shape(with_adapters(task).variables, jax.random.key(0))
    return like


def model_specs(task: Task) -> tuple[TensorSpec, ...]:
    """What the server broadcasts, sorted by name. Tables are of kind `rows`.

    Raises:
        ValueError: a table or a leaf rule names no tensor, or a learned leaf is not of a floating type.
    """
    task = with_adapters(task)
    like = model_shape(task)
    flat = dict(sorted((named(like.params, "params") | named(like.state, "state")).items()))
    for setting, patterns in (("leaves", task.leaves), ("bounds", task.bounds)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in flat):
                raise ValueError(
                    f"Expected {setting} of task {task.name!r} to match a tensor, got {pattern!r}, which matches none of "
                    f"{', '.join(flat)}."
                )
    tables = {tensor: table for table, tensor in task.tables.items()}
    if len(tables) != len(task.tables):
        raise ValueError(f"Expected each table of task {task.name!r} to name another tensor, got {dict(task.tables)}.")
    if missing := sorted(set(tables) - set(flat)):
        raise ValueError(f"Expected tables of task {task.name!r} to name tensors among {sorted(flat)}, got {missing}.")
    for name, leaf in flat.items():
        if task.leaf_rule(name) == "mean" and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"Expected {name} to be of a floating type to be averaged, got {leaf.dtype}. "
                f"Keep it on the device or fixed: leaves={{{name!r}: 'private'}} or 'frozen'."
            )
    return tuple(
        TensorSpec(
            name=name, shape=tuple(leaf.shape), dtype=str(leaf.dtype), kind="rows" if name in tables else "dense",
            table=tables.get(name, ""), first_use=rank, last_ready=len(flat) - 1 - rank,
        )
        for rank, (name, leaf) in enumerate(flat.items())
    )  # fmt: skip


def local_rule(task: Task) -> LocalRule:
    """The task's local rule: its own, or local SGD; its updates clipped where the task's privacy says so.

    Raises:
        ValueError: noise on examples is asked for, and the rule has none.
    """
    task = with_adapters(task)
    rule = task.rule(task) if task.rule is not None else sgd_rule(task)
    if task.privacy.examples is not None and not rule.hides_examples:
        made = ", ".join(task.algorithms) or "a rule of its own"
        raise ValueError(
            f"Expected a local rule that hides examples with Privacy(examples=…), got {made} in task {task.name!r}, of which that is not known. "
            "Train by plain local steps; fedprox, reptile, scaffold and compressed go with it."
        )
    if task.privacy.clip_norm is not None:
        rule = clipped(rule, task.privacy.clip_norm, one_grid=task.privacy.distributed)
    is_noisy = task.privacy.noise_multiplier or task.privacy.examples is not None
    return without_metrics(rule) if is_noisy else rule


def without_metrics(rule: LocalRule) -> LocalRule:
    """The rule whose devices tell of their training nothing but their update: what has no noise must not leave them."""

    def finish(carry: Named, broadcast: Named) -> Report:
        return rule.finish(carry, broadcast)._replace(metrics={})

    kept = tuple(spec for spec in rule.sums if not spec.tensor.name.startswith("metric/"))
    return replace(rule, finish=finish, sums=kept)


def clipped(rule: LocalRule, clip_norm: ClipNorm, *, one_grid: bool = False) -> LocalRule:
    """The rule with `delta` scaled to an L2 norm of at most `clip_norm`, over all its tensors or over those of each group, before its
    weight (McMahan et al. 2018, "Learning differentially private recurrent language models", equation 1 and per-layer clipping). The metric
    `clipped` is the share of members of whose update something was scaled.

    With an adaptive bound one more tensor is broadcast, `LOG_SCALE`. What is sent is divided by its exponential, so that its norm is at most
    the initial one whatever the round: grids and noise stay as they are. The server's commit multiplies by it again. `one_grid`: elements have one bound,
    whatever rotation makes of them, as where devices add noise.

    Raises:
        ValueError: the rule sends no updates, patterns and tensors do not match, or elements have a bound below an adaptive norm's.
    """
    names = [spec.tensor.name.removeprefix("delta/") for spec in rule.sums if spec.tensor.name.startswith("delta/")]
    if not names:
        raise ValueError(
            f"Expected privacy.clip_norm=None for a task that sends no updates of a model, got {clip_norm}."
        )
    groups = groups_of(names, clip_norm)
    sums = _bounded(rule.sums, groups, clip_norm if isinstance(clip_norm, AdaptiveClip) else None, one_grid=one_grid)
    held = {spec.tensor.name.removeprefix("delta/"): spec.bound for spec in sums if spec.rotated}
    adaptive = clip_norm if isinstance(clip_norm, AdaptiveClip) else None

    def finish(carry: Named, broadcast: Named) -> Report:
        report = rule.finish(carry, without_scale(broadcast))
        delta, scale = report.sums["delta"], None if adaptive is None else jnp.exp(broadcast[LOG_SCALE])
        parts = [
            clip_update(
                {name: delta[name] for name in delta if name in group}, bound, scale=scale, on_grid=rule.on_grid
            )
            for group, bound in groups
        ]
        made = {name: value for part, _ in parts for name, value in part.items()}
        made |= {name: jnp.clip(made[name], -bound, bound) for name, bound in held.items()}
        is_over = reduce(jnp.logical_or, [is_over for _, is_over in parts])
        if adaptive is not None:
            made[LOG_SCALE] = log_scale_step(adaptive, broadcast[LOG_SCALE], is_over)
        counted = {"clipped/numerator": is_over.astype(jnp.float32), "clipped/denominator": jnp.ones((), jnp.float32)}
        return report._replace(sums={**report.sums, "delta": made}, metrics=_sorted({**report.metrics, **counted}))

    made = replace(rule, finish=finish, sums=(*sums, *metric_sums({"clipped": (0.0, 1.0)}, 1)))
    return made if adaptive is None else _with_log_scale(made, adaptive)


def without_scale(broadcast: Named) -> Named:
    """What is broadcast, less what clipping has added to it."""
    return {name: value for name, value in broadcast.items() if name != LOG_SCALE}


def _with_log_scale(rule: LocalRule, clip: AdaptiveClip) -> LocalRule:
    """The rule, which is sent `LOG_SCALE` and reports a step of it."""
    spec = TensorSpec(name=LOG_SCALE, shape=(), dtype="float32")
    step = SumSpec(tensor=replace(spec, name=f"delta/{LOG_SCALE}"), bound=clip.largest_step, weighted=True)

    def begin(broadcast: Named, device_state: Named) -> Named:
        return rule.begin(without_scale(broadcast), device_state)

    broadcast = tuple(sorted((*rule.broadcast, spec), key=lambda spec: spec.name))
    return replace(rule, begin=begin, broadcast=broadcast, sums=(*rule.sums, step))


def _bounded(
    sums: tuple[SumSpec, ...],
    groups: list[tuple[tuple[str, ...], float]],
    adaptive: AdaptiveClip | None,
    *,
    one_grid: bool,
) -> tuple[SumSpec, ...]:
    """The sums, no element of which is larger than the norm that it is a part of."""
    bounds = {f"delta/{name}": bound for group, bound in groups for name in group}
    low = [spec for spec in sums if spec.bound < bounds.get(spec.tensor.name, 0.0)]
    if adaptive is not None and low:
        raise ValueError(
            f"Expected no element's bound below the initial norm of an adaptive clip, {adaptive.initial:g}, got {low[0].bound:g} for "
            f"{low[0].tensor.name}: what is refused would change with the norm. Raise Privacy(delta_bound=…) or Task(bounds=…)."
        )
    return tuple(
        replace(spec, bound=_bound_of(spec, bounds.get(spec.tensor.name, spec.bound), one_grid=one_grid))
        for spec in sums
    )


def _bound_of(spec: SumSpec, norm: float, *, one_grid: bool) -> float:
    """Of an element, where the norm of all is bounded: no larger than that; in a rotated block as large as chance makes it."""
    if not spec.rotated or one_grid:
        return min(spec.bound, norm)
    return min(spec.bound, float(np.float32(norm * min(1.0, SPREAD * spec.rotated**-0.5))))


def sgd_rule(task: Task, *, gradient_of: Gradient = plain_gradient) -> LocalRule:
    """Local training by the task's optax transformation, along the gradient that `gradient_of` takes of each batch."""
    task = with_adapters(task)
    like, specs = model_shape(task), model_specs(task)
    params_shape, state_shape = Shape(like.params, "params"), Shape(like.state, "state")
    learned = [name for name in params_shape.names if task.leaf_rule(name) != "frozen"]
    private = [spec for spec in specs if task.leaf_rule(spec.name) == "private"]
    averaged = [spec for spec in specs if task.leaf_rule(spec.name) == "mean"]
    if params_shape.names and not learned:
        raise ValueError(
            f"Expected a parameter of task {task.name!r} that is learned, got leaves={dict(task.leaves)!r}, by which all are "
            "frozen."
        )
    metric_bounds = _metric_bounds(task, like)
    if (hidden := task.privacy.examples) is not None:
        _refuse_what_tells_of_examples(task, state_shape, gradient_of)
        metric_bounds = {}

    def learned_tree(values: Named) -> Tree:
        # Frozen leaves become None, which optax passes over: no gradient, no optimizer state.
        return params_shape.tree({name: values[name] for name in learned})

    opt_like = jax.eval_shape(task.local.optimizer.init, learned_tree({s.name: _struct(s) for s in specs}))
    _refuse_keys(named(opt_like, "opt"), what="optimizer")
    opt_shape = Shape(opt_like, "opt")

    def begin(broadcast: Named, device_state: Named) -> Named:
        values = dict(broadcast)
        for spec in private:
            kept = device_state[f"private/{spec.name}"]
            values[spec.name] = jnp.where(device_state["rounds"] > 0, kept, values[spec.name])
        opt = named(task.local.optimizer.init(learned_tree(values)), "opt")
        zeros = {f"metric/{name}/{part}": jnp.zeros((), jnp.float32) for name in metric_bounds for part in PARTS}
        counters = {"step": jnp.zeros((), jnp.int32), "weight": jnp.zeros((), jnp.int32)}
        if private:
            counters["rounds"] = device_state["rounds"]
        return _sorted(values | opt | zeros | counters)

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        for k in range(mask.shape[0]):
            batch = {name: values[k] for name, values in batches.items()} | {"mask": mask[k]}
            carry = step(carry, batch, key)
        return carry

    def step(carry: Named, batch: Named, key: Any) -> Named:
        count = jnp.sum(batch["mask"], dtype=jnp.int32)
        step_key = jax.random.fold_in(seed_key(public_words(key)), carry["step"])

        def params_of(chosen: Tree) -> Tree:
            return params_shape.tree(carry | dict(zip(learned, _leaves(chosen), strict=True)))

        def objective(chosen: Tree, batch: Mapping[str, Any]) -> tuple[Any, Loss]:
            mask, params = batch["mask"], params_of(chosen)
            result = task.losses(params, state_shape.tree(carry), batch, step_key)
            total = jnp.sum(jnp.where(mask, result.per_example, jnp.zeros_like(result.per_example)))
            mean = total / jnp.maximum(jnp.sum(mask, dtype=jnp.int32), 1).astype(total.dtype)
            if task.penalty is not None:
                mean = mean + task.penalty(params)
            return mean, result

        def one_loss(chosen: Tree, alone: Mapping[str, Any], number: Any) -> Any:
            own_key = jax.random.fold_in(step_key, number)
            return task.losses(params_of(chosen), state_shape.tree(carry), alone, own_key).per_example[0]

        chosen = learned_tree(carry)
        if hidden is None:
            gradient, result, seen = gradient_of(objective, chosen, batch)
        else:
            gradient = noisy_gradient(one_loss, chosen, batch, hidden, key=key[2:], step=carry["step"])
            if (penalty := task.penalty) is not None:  # it is about no example, so it is not clipped
                pull = jax.grad(lambda chosen: penalty(params_of(chosen)))(chosen)
                gradient = jax.tree.map(jnp.add, gradient, pull)
            result, seen = Loss(jnp.zeros(()), state_shape.tree(carry), {}), batch["mask"]
        with jax.numpy_dtype_promotion("standard"):  # optax promotes in some of its transformations
            updates, opt = task.local.optimizer.update(gradient, opt_shape.tree(carry), chosen)
            reached = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), chosen, updates)
        state = {n: v for n, v in named(result.state, "state").items() if task.leaf_rule(n) != "frozen"}
        after = dict(zip(learned, _leaves(reached), strict=True)) | named(opt, "opt") | state
        after |= {"step": carry["step"] + 1, "weight": carry["weight"] + count}
        for name, metric in _with_loss(result, metric_bounds).items():
            for part, value in zip(PARTS, masked_sums(metric, seen), strict=True):
                after[f"metric/{name}/{part}"] = carry[f"metric/{name}/{part}"] + value
        live = count > 0
        kept = {name: jnp.where(live, value, carry[name]) for name, value in after.items()}
        return _sorted(carry | kept)

    def finish(carry: Named, broadcast: Named) -> Report:
        delta = {s.name: carry[s.name].astype(jnp.float32) - broadcast[s.name].astype(jnp.float32) for s in averaged}
        sums: dict[str, Named] = {"delta": delta}
        if task.local.partial == "fednova":
            steps = carry["step"].astype(jnp.float32)
            for name in [name for name in delta if name.startswith("params/")]:
                delta[name] = delta[name] / jnp.maximum(steps, 1.0)
            sums |= {"steps": {"taken": steps}}
        metrics = {f"{name}/{part}": carry[f"metric/{name}/{part}"] for name in metric_bounds for part in PARTS}
        weight = carry["weight"] if task.local.weighting == "examples" else jnp.minimum(carry["weight"], 1)
        kept = {f"private/{spec.name}": carry[spec.name] for spec in private}
        if private:
            kept["rounds"] = carry["rounds"] + 1
        return Report(sums, weight, _sorted(metrics), _sorted(kept))

    return LocalRule(
        begin=begin,
        block=block,
        finish=finish,
        broadcast=specs,
        device_state=_device_state_specs(private),
        sums=(
            *_delta_sums(task, averaged),
            *metric_sums(metric_bounds, task.local.max_examples),
            *(_steps_sums(task) if task.local.partial == "fednova" else ()),
        ),
        hides_examples=hidden is not None,
    )


def _refuse_what_tells_of_examples(task: Task, state: Shape, gradient_of: Gradient) -> None:
    """Raises ValueError where more than a gradient of each example alone would reach what a device reports."""
    if carried := [name for name in state.names if task.leaf_rule(name) != "frozen"]:
        raise ValueError(
            f"Expected a model without state with Privacy(examples=…), got {carried[0]} in task {task.name!r}: what examples do to it (statistics "
            f"of a batch, say) has no noise. Take a layer without state (layer or group norm), or keep it as it is: leaves={{{carried[0]!r}: "
            "'frozen'}."
        )
    if gradient_of is not plain_gradient:
        made = ", ".join(task.algorithms) or "a gradient of its own"
        raise ValueError(
            f"Expected plain local steps with Privacy(examples=…), got {made} in task {task.name!r}: its gradients are not of one example each."
        )


PARTS: Final = ("denominator", "numerator")


def _refuse_keys(values: Named, *, what: str) -> None:
    for name, leaf in values.items():
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"Expected the state of the {what} to hold numbers, got a random key in {name}: it cannot travel."
            )


def _sorted(values: Named) -> Named:
    return dict(sorted(values.items()))


def _leaves(tree: Tree) -> list[Any]:
    return jax.tree.leaves(tree)


def _struct(spec: TensorSpec) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype)


def _device_state_specs(private: list[TensorSpec]) -> tuple[TensorSpec, ...]:
    if not private:
        return ()
    kept = {f"private/{spec.name}": _struct(spec) for spec in private} | {"rounds": jax.ShapeDtypeStruct((), jnp.int32)}
    return specs_of(_sorted(kept))


def _metric_bounds(task: Task, like: Variables) -> dict[str, tuple[float, float]]:
    # Shapes alone are traced: a wrong loss is refused here, before anything is compiled.
    batch = task.batch_spec(task.local.batch_size)
    result = jax.eval_shape(task.losses, like.params, like.state, batch, jax.random.key(0))
    before, after = named(like.state, "state"), named(result.state, "state")
    if {n: (x.shape, x.dtype) for n, x in before.items()} != {n: (x.shape, x.dtype) for n, x in after.items()}:
        raise ValueError(
            f"Expected the loss of task {task.name!r} to return state like it was given, {sorted(before)}, got {sorted(after)}."
        )
    bounds = {name: metric.bound for name, metric in result.metrics.items()}
    return dict(sorted(({"loss": LOSS_BOUND} | bounds).items()))


def _with_loss(result: Loss, bounds: Mapping[str, tuple[float, float]]) -> dict[str, Sum]:
    if not bounds:
        return {}
    ones = jnp.ones_like(result.per_example)
    return {"loss": Sum(result.per_example, ones, bounds["loss"])} | result.metrics


def masked_sums(metric: Sum, mask: Any) -> tuple[Any, Any]:
    """What the examples under a mask add to a metric, clipped to its bounds, in the order of `PARTS`."""
    denominator, numerator = _masked(metric, mask)
    return jnp.sum(denominator), jnp.sum(numerator)


def added(
    metrics: Mapping[str, Sum], mask: Any, *, parts_of: Callable[[Sum, Any], tuple[Any, Any]] = masked_sums
) -> Named:
    """What examples add to each metric: "{metric}/{part}" -> a number, or what `parts_of` makes of it."""
    made = {}
    for name, metric in sorted(metrics.items()):
        for part, value in zip(PARTS, parts_of(metric, mask), strict=True):
            made[f"{name}/{part}"] = value
    return made


def _masked(metric: Sum, mask: Any) -> tuple[Any, Any]:
    """What each example adds to the sums, (B,) twice: within the bounds, and nothing where it is padding."""
    low, high = metric.bound
    numerator = jnp.clip(metric.numerator.astype(jnp.float32), low, high)
    denominator = jnp.clip(metric.denominator.astype(jnp.float32), 0.0, 1.0)
    zero = jnp.zeros((), jnp.float32)
    return jnp.where(mask, denominator, zero), jnp.where(mask, numerator, zero)


def _delta_sums(task: Task, averaged: list[TensorSpec]) -> tuple[SumSpec, ...]:
    return tuple(
        SumSpec(
            tensor=TensorSpec(
                name=f"delta/{spec.name}", shape=spec.shape, dtype="float32", kind=spec.kind, table=spec.table,
                first_use=spec.first_use, last_ready=spec.last_ready,
            ),
            bound=task.bound(spec.name),
            weighted=True,
        )
        for spec in averaged
    )  # fmt: skip


def _steps_sums(task: Task) -> tuple[SumSpec, ...]:
    local = task.local
    most = local.epochs * -(-(local.max_examples // local.epochs) // local.batch_size)
    return (SumSpec(tensor=TensorSpec(name=STEPS, shape=(), dtype="float32"), bound=float(most), weighted=True),)


def metric_sums(bounds: Mapping[str, tuple[float, float]], max_examples: int) -> tuple[SumSpec, ...]:
    """What is summed of metrics with these bounds over at most `max_examples` examples each."""
    return tuple(
        SumSpec(
            tensor=TensorSpec(name=f"metric/{name}/{part}", shape=(), dtype="float32"),
            bound=(max(abs(low), abs(high)) if part == "numerator" else 1.0) * max_examples * _FLOAT32_SLACK,
            weighted=False,
        )
        for name, (low, high) in sorted(bounds.items())
        for part in PARTS
    )


_FLOAT32_SLACK: Final = 1.0 + 2.0**-10  # a member adds its examples up in float32, which may round upwards


def evaluate_bounds(task: Task) -> dict[str, tuple[float, float]]:
    """Name -> bound of the metrics that `evaluate` gives; none without it."""
    task = with_adapters(task)
    if task.evaluate is None:
        return {}
    like = model_shape(task)
    evaluate = partial(_evaluated, task)
    made = jax.eval_shape(evaluate, like.params, like.state, task.batch_spec(task.local.batch_size))
    check_metrics(made, task.local.batch_size, what=f"evaluate of task {task.name!r}")
    return {name: metric.bound for name, metric in sorted(made.items())}


def _evaluated(task: Task, params: Tree, state: Tree, batch: Mapping[str, Any]) -> dict[str, Sum]:
    assert task.evaluate is not None
    made: dict[str, Sum] = called(f"evaluate of task {task.name!r}", task.evaluate, (params, state, batch), batch)
    return made


def evaluator(task: Task) -> Callable[[Named, Named, Any], Named] | None:
    """(broadcast, batch {field: (B, …)}, mask (B,)) -> metric sums `loss/numerator`, …; None without `evaluate`."""
    return _evaluating(task, masked_sums)


def scorer(task: Task) -> Callable[[Named, Named, Any], Named] | None:
    """The same before it is summed: `loss/numerator` (B,), …, so that examples of several users go through it together."""
    return _evaluating(task, _masked)


def _evaluating(
    task: Task, parts_of: Callable[[Sum, Any], tuple[Any, Any]]
) -> Callable[[Named, Named, Any], Named] | None:
    task = with_adapters(task)
    if task.evaluate is None:
        return None
    like = model_shape(task)
    params_shape, state_shape = Shape(like.params, "params"), Shape(like.state, "state")

    def run(broadcast: Named, batch: Named, mask: Any) -> Named:
        made = _evaluated(task, params_shape.tree(broadcast), state_shape.tree(broadcast), batch | {"mask": mask})
        check_metrics(made, mask.shape[0], what=f"evaluate of task {task.name!r}")
        return added(made, mask, parts_of=parts_of)

    return run


def predictor(task: Task) -> Callable[[Named, Named, Any], Any] | None:
    """(broadcast, batch {field: (B, …)}, mask (B,)) -> {"prediction": (B, …)}; None without `predict`."""
    task = with_adapters(task)
    if task.predict is None:
        return None
    predict, like = task.predict, model_shape(task)
    params_shape, state_shape = Shape(like.params, "params"), Shape(like.state, "state")

    def run(broadcast: Named, batch: Named, mask: Any) -> Named:
        return {
            "prediction": predict(params_shape.tree(broadcast), state_shape.tree(broadcast), batch | {"mask": mask})
        }

    return run
