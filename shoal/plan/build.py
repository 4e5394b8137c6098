"""Makes a plan of a task: traces its functions, exports them, writes the manifest. Needs JAX and the task's source."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shoal.aggregate.choose import check_noise
from shoal.errors import PlanError
from shoal.forms.convolutions import faster_convolutions
from shoal.local import (
    LocalRule,
    Named,
    Report,
    Shape,
    evaluate_bounds,
    evaluator,
    local_rule,
    metric_sums,
    model_shape,
    named,
    predictor,
)
from shoal.lora import with_adapters
from shoal.plan.iree_variants import compiled
from shoal.plan.manifest import Manifest, Program, Promises, ServerHalf, Training
from shoal.plan.operations import refuse_callbacks
from shoal.plan.plan import Plan
from shoal.plan.secure import check_secure
from shoal.plan.stablehlo import PLATFORMS, export_program, struct
from shoal.policy import ServerRule
from shoal.task import Batch, Task
from shoal.tensors import Tensors, TensorSpec, sha256

EVALUATE_BATCH_SIZE: Final = 200


@dataclass(frozen=True)
class Built:
    """A plan and the model it starts from."""

    plan: Plan
    model: Tensors
    """Version 0, in the manifest's order."""


def build(
    task: Task, *, seed: int = 0, iree: Sequence[str] = (), progress: Callable[[str], None] = lambda text: None
) -> Built:
    """Makes the (unsigned) plan of a task and its initial model.

    Args:
        task: the task.
        seed: of the initial model.
        iree: targets (`iree_targets.TARGETS`) that devices' programs are compiled for as well, for devices without JAX.
        progress: is told what is being compiled for them.

    Raises:
        MissingExtra: targets are named, and IREE's compiler is not installed.
        PlanError: it cannot compile a program.
        ValueError: a function of the task does not keep its contract; the text says which and how. Or an unknown target.
    """
    task = with_adapters(task)
    rule = local_rule(task)
    refuse_callbacks(_traces(task), task=task.name)
    made = [*_training_programs(task, rule), *_model_programs(task, rule)]
    _refuse_other_sums(rule, [program for program, _ in made])
    if not isinstance(task.server, ServerRule):
        made += _server_programs(task.server, rule)
    if iree:
        made += _native_programs(task, iree, progress)
    batch = tuple(
        TensorSpec(name=n, shape=tuple(shape), dtype=dtype) for n, (shape, dtype) in sorted(task.batch.items())
    )
    half = ServerHalf(
        rounds=task.rounds, rule=server_rule(task), about=task.about, aggregator=task.aggregator, options=task.options,
        algorithms=task.algorithms, down=task.down,
    )  # fmt: skip
    manifest = Manifest(
        task=task.name,
        programs=tuple(program for program, _ in made),
        broadcast=rule.broadcast,
        device_state=rule.device_state,
        sums=rule.sums,
        metrics=metric_sums(evaluate_bounds(task), task.local.max_examples),
        batch=batch,
        training=_training(task),
        promises=Promises.of(task.privacy, minimum_group=task.rounds.minimum_group),
        server_hash=sha256(half.data),
        half=half,
    )
    check_secure(manifest)
    if task.privacy.noise_multiplier:
        check_noise(task.privacy, task.rounds, manifest.sums, manifest.fixed_points(task.rounds.max_members))
    return Built(Plan(manifest, {program.hash: data for program, data in made}), initial_model(task, rule, seed=seed))


def _native_programs(
    task: Task, targets: Sequence[str], progress: Callable[[str], None]
) -> list[tuple[Program, bytes]]:
    # IREE takes no gradient of max pooling as XLA writes it, and is slow where XLA has convolutions of its own.
    task = task.replace(loss=faster_convolutions(task.loss, platform="cpu"))
    rule = local_rule(task)
    exported = [*_training_programs(task, rule, ("cpu",)), *_model_programs(task, rule, ("cpu",))]
    return compiled(exported, targets, progress=progress)


def server_rule(task: Task) -> ServerRule:
    """The rule that the plan names: the task's own, or that it is a program."""
    return task.server if isinstance(task.server, ServerRule) else ServerRule(kind="program")


def refuse_other_task(task: Task, plan: Plan) -> list[str]:
    """Looks whether a task is the one that a plan was made of.

    Returns:
        Settings of the server's half in which it differs, in words: those of the plan hold.

    Raises:
        PlanError: it does not train as the plan says.
    """
    made = {program.hash for program, _ in _training_programs(with_adapters(task), local_rule(task))}
    if not made <= {program.hash for program in plan.manifest.programs}:
        raise PlanError(
            f"Task {task.name!r} is not the one that this run was begun with: its model, its loss or its local training (optimizer, "
            "rates, batch size, an algorithm's arguments) has changed. Give the task as it was, leave it out to go on with the run's own "
            "copy, or begin another run."
        )
    half = plan.manifest.server
    pairs = {
        "rounds": (half.rounds.to_json(), task.rounds.to_json()), "server": (half.rule.to_json(), server_rule(task).to_json()),
    }  # fmt: skip
    down = [f"down is {half.down!r} (the task has {task.down!r})"] if half.down != task.down else []
    return down + [
        f"{part}.{name} is {kept!r} (the task has {other!r})"
        for part, (ours, theirs) in pairs.items()
        for name in sorted(ours | theirs)
        if (kept := ours.get(name)) != (other := theirs.get(name))
    ]


def _traces(task: Task) -> dict[str, Callable[[], Any]]:
    """What `refuse_callbacks` looks at: the task's functions as they stand, before a gradient is taken of them."""
    like, key = model_shape(task), jax.random.key(0)
    train, score = task.batch_spec(task.local.batch_size), task.batch_spec(EVALUATE_BATCH_SIZE)
    functions: dict[str, tuple[Callable[..., Any] | None, tuple[Any, ...]]] = {
        "loss": (task.losses, (like.params, like.state, train, key)),
        "evaluate": (task.evaluate, (like.params, like.state, score)),
        "predict": (task.predict, (like.params, like.state, score)),
        "penalty": (task.penalty, (like.params,)),
    }
    return {
        name: partial(jax.make_jaxpr(function), *arguments)
        for name, (function, arguments) in functions.items()
        if function is not None
    }


def _refuse_other_sums(rule: LocalRule, programs: Sequence[Program]) -> None:
    """A rule of one's own must report just the sums that it says it does."""
    finish = next(program for program in programs if program.name == "finish")
    made = {s.name.removeprefix("sum/"): (s.shape, s.dtype) for s in finish.outputs if s.name.startswith("sum/")}
    said = {spec.tensor.name: (spec.tensor.shape, spec.tensor.dtype) for spec in rule.sums}
    if made != said:
        raise ValueError(
            f"Expected the rule's finish to report the sums that it names, {sorted(said)[:5]}, got {sorted(made)[:5]}."
        )


def initial_model(task: Task, rule: LocalRule, *, seed: int) -> Tensors:
    """Version 0 of the task's line, in the manifest's order; what the rule adds to the model begins as zeros."""
    variables = task.variables(jax.random.key(seed))
    flat = named(variables.params, "params") | named(variables.state, "state")
    zeros = {spec.name: np.zeros(spec.shape, spec.numpy_dtype) for spec in rule.broadcast if spec.name not in flat}
    return {spec.name: np.asarray((flat | zeros)[spec.name]) for spec in rule.broadcast}


def _training(task: Task) -> Training:
    return Training(
        batch_size=task.local.batch_size,
        steps_per_block=task.local.steps_per_block,
        epochs=task.local.epochs,
        max_examples=task.local.max_examples,
        max_weight=task.local.max_weight,
        whole_batches=not task.heeds_mask,
        drop_remainder=task.local.drop_remainder,
        evaluate_batch_size=EVALUATE_BATCH_SIZE,
        holdout=task.local.holdout,
        part=task.local.part,
    )


def _training_programs(
    task: Task, rule: LocalRule, platforms: tuple[str, ...] = PLATFORMS
) -> list[tuple[Program, bytes]]:
    k, size = task.local.steps_per_block, task.local.batch_size
    broadcast = {f"broadcast/{spec.name}": struct(spec) for spec in rule.broadcast}
    kept = {f"device_state/{spec.name}": struct(spec) for spec in rule.device_state}
    fields = {
        f"batch/{n}": jax.ShapeDtypeStruct((k, size, *shape), jnp.dtype(dtype))
        for n, (shape, dtype) in sorted(task.batch.items())
    }
    feed = {
        **fields,
        "mask": jax.ShapeDtypeStruct((k, size), jnp.bool_),
        "key": jax.ShapeDtypeStruct((task.privacy.key_words,), jnp.uint32),
    }
    carry_like = jax.eval_shape(rule.begin, _strip(broadcast), _strip(kept))
    carry = _prefix(carry_like, "carry")

    def begin(given: Named, state: Named) -> Named:
        return rule.begin(_strip(given), _strip(state))

    def block(carry: Named, given: Named) -> Named:
        batches = _strip({name: value for name, value in given.items() if name.startswith("batch/")})
        return rule.block(_strip(carry), batches, given["mask"], given["key"])

    def finish(carry: Named, given: Named) -> Report:
        return rule.finish(_strip(carry), _strip(given))

    def as_carry(values: Named) -> Named:
        return _prefix(values, "carry")

    def as_report(report: Report) -> Named:
        deltas = {
            f"sum/{kind}/{name}": value for kind, tensors in report.sums.items() for name, value in tensors.items()
        }
        metrics = _prefix(report.metrics, "sum/metric")
        return {**deltas, **metrics, "weight": report.weight, **_prefix(report.device_state, "device_state")}

    return [
        export_program("begin", begin, broadcast, kept, outputs=as_carry, platforms=platforms),
        export_program("block", block, carry, feed, outputs=as_carry, platforms=platforms),
        export_program("finish", finish, carry, broadcast, outputs=as_report, platforms=platforms),
    ]


def _model_programs(task: Task, rule: LocalRule, platforms: tuple[str, ...] = PLATFORMS) -> list[tuple[Program, bytes]]:
    broadcast = {f"broadcast/{spec.name}": struct(spec) for spec in rule.broadcast}
    size = EVALUATE_BATCH_SIZE
    feed = {
        f"batch/{n}": jax.ShapeDtypeStruct((size, *shape), jnp.dtype(d)) for n, (shape, d) in sorted(task.batch.items())
    }
    feed["mask"] = jax.ShapeDtypeStruct((size,), jnp.bool_)
    made = []
    for name, function, prefix in (
        ("evaluate", evaluator(task), "metric"),
        ("predict", predictor(task), "output"),
    ):
        if function is not None:
            made.append(_model_program(name, function, prefix, broadcast, feed, platforms))
    if task.keys is not None:
        made.append(_keys_program(task, task.keys, feed))
    return made


def _keys_program(task: Task, keys: Callable[[Batch], Mapping[str, Any]], feed: Named) -> tuple[Program, bytes]:
    """The rows of tables that a batch needs, for members that take only those."""

    def run(batch: Named) -> Named:
        ids = dict(keys({**_strip({n: v for n, v in batch.items() if n != "mask"}), "mask": batch["mask"]}))
        if set(ids) != set(task.tables):
            raise ValueError(f"Expected keys of task {task.name!r} to give ids for {set(task.tables)}, got {set(ids)}.")
        return ids

    return export_program("keys", run, feed, outputs=lambda values: _prefix(values, "keys"))


def _model_program(
    name: str, function: Any, prefix: str, broadcast: Named, feed: Named, platforms: tuple[str, ...]
) -> tuple[Program, bytes]:
    def run(given: Named, batch: Named) -> Named:
        fields = _strip({key: value for key, value in batch.items() if key != "mask"})
        result: Named = function(_strip(given), fields, batch["mask"])
        return result

    return export_program(
        name, run, broadcast, feed, outputs=lambda values: _prefix(values, prefix), platforms=platforms
    )


def _server_programs(optimizer: optax.GradientTransformation, rule: LocalRule) -> list[tuple[Program, bytes]]:
    """An optax transformation as the server rule: the mean update is taken as the negative gradient."""
    averaged = {spec.tensor.name.removeprefix("delta/") for spec in rule.sums if spec.tensor.name.startswith("delta/")}
    learned = [spec for spec in rule.broadcast if spec.name in averaged and spec.name.startswith("params/")]
    model = {f"model/{spec.name}": struct(spec) for spec in learned}
    mean = {f"mean/{spec.name}": jax.ShapeDtypeStruct(spec.shape, jnp.float32) for spec in learned}
    state_like = jax.eval_shape(optimizer.init, _strip(model))
    shape = Shape(state_like, "server_state")

    def begin(given: Named) -> Any:
        return optimizer.init(_strip(given))

    def step(given: Named, mean: Named, state: Named) -> tuple[Named, Any]:
        params = _strip(given)
        gradient = {name: -value.astype(params[name].dtype) for name, value in _strip(mean).items()}
        with jax.numpy_dtype_promotion("standard"):
            updates, after = optimizer.update(gradient, shape.tree(state), params)
            reached = {name: (params[name] + updates[name]).astype(params[name].dtype) for name in params}
        return reached, after

    def as_state(tree: Any) -> Named:
        return named(tree, "server_state")

    return [
        export_program("server_begin", begin, model, outputs=as_state),
        export_program(
            "server_step", step, model, mean, as_state(state_like),
            outputs=lambda result: {**_prefix(result[0], "model"), **as_state(result[1])},
        ),
    ]  # fmt: skip


def _prefix(values: Named, prefix: str) -> Named:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def _strip(values: Named) -> Named:
    return {name.split("/", 1)[1]: value for name, value in values.items()}
