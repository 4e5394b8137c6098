"""The guarantees of `shoal/local.py`, of every kind of model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from shoal.local import LocalRule, Named, Report, local_rule, model_specs
from shoal.task import Local, Loss, Task, Variables
from shoal.tensors import Tensors
from tests.plan.plan_tasks import B, C, D, K, feed, linear_init, noisy_task, tiny_task


def start(task: Task, rule: LocalRule, *, rounds: int = 0) -> tuple[Named, Named]:
    """A model and a device state."""
    variables = task.variables(jax.random.key(0))
    from shoal.local import named

    model = named(variables.params, "params") | named(variables.state, "state")
    kept = {spec.name: jnp.zeros(spec.shape, spec.dtype) for spec in rule.device_state}
    if "rounds" in kept:
        kept["rounds"] = jnp.int32(rounds)
    return dict(sorted(model.items())), kept


def run(task: Task, batches: Tensors, mask: np.ndarray, key: np.ndarray, *, k: int = 0) -> tuple[Named, Report]:
    """begin, block…, finish; returns the last carry too."""
    rule = local_rule(task)
    model, kept = start(task, rule)
    carry, block, step = rule.begin(model, kept), jax.jit(rule.block), k or len(mask)
    for first in range(0, len(mask), step):
        part = {name: jnp.asarray(value[first : first + step]) for name, value in batches.items()}
        carry = block(carry, part, jnp.asarray(mask[first : first + step]), jnp.asarray(key))
    return carry, rule.finish(carry, model)


def assert_equal(one: Named, other: Named) -> None:
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_close(one: Named, other: Named) -> None:
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, atol=1e-6, err_msg=name)


class Norm(nnx.Module):
    """Batch norm that heeds the mask; dropout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(D, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(D, C, rngs=rngs)

    def __call__(self, x: Any, mask: Any) -> Any:
        return self.dense(self.dropout(self.norm(x, mask=mask[:, None])))


class MaskedLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool, mask: Any) -> Any:
        x = linen.BatchNorm(use_running_average=not train)(x, mask=mask[:, None])
        return linen.Dense(C)(linen.Dropout(0.5, deterministic=not train)(x))


class PlainLinen(linen.Module):
    @linen.compact
    def __call__(self, x: Any, train: bool) -> Any:
        return linen.Dense(C)(linen.BatchNorm(use_running_average=not train)(x))


FIELDS: dict[str, tuple[tuple[int, ...], str]] = {"x": ((D,), "float32"), "y": ((), "int32")}


def flax_task(module: Any, **settings: Any) -> Task:
    settings = {"local": Local(batch_size=B, steps_per_block=K, optimizer=optax.adam(0.1)), **settings}
    return Task.from_flax(module, loss="softmax_cross_entropy", batch=FIELDS, labels="y", name="flax", **settings)


def tasks() -> dict[str, Task]:
    momentum = Local(batch_size=B, steps_per_block=K, optimizer=optax.sgd(0.1, momentum=0.9))
    return {
        "linear": tiny_task(local=momentum),
        "noisy": noisy_task(),
        "penalty": tiny_task(penalty=lambda params: 0.1 * jnp.sum(jnp.square(params["w"]))),
        "nnx": flax_task(Norm),
        "linen": flax_task(MaskedLinen()),
    }


@pytest.fixture(scope="module", params=["linear", "noisy", "penalty", "nnx", "linen"])
def task(request: pytest.FixtureRequest) -> Task:
    return tasks()[request.param]


@pytest.mark.slow
def test_a_wholly_masked_step_changes_nothing(task: Task, rng: np.random.Generator) -> None:
    """Guarantee 1: not a parameter, a counter, a statistic or an optimizer's state."""
    rule = local_rule(task)
    carry = rule.begin(*start(task, rule))
    batches, mask, key = feed(rng)
    block = jax.jit(rule.block)
    before = block(carry, batches, jnp.asarray(mask), key)
    after = block(before, batches, jnp.zeros_like(mask), key)
    assert_equal(before, after)
    assert int(after["step"]) == K and int(after["weight"]) == K * B


@pytest.mark.slow
def test_masked_examples_count_for_nothing(task: Task, rng: np.random.Generator) -> None:
    """Guarantee 2, whatever (finite) stands in their place."""
    batches, mask, key = feed(rng)
    mask[0, 3:], mask[1, 1:] = False, False
    fields = {name: jnp.asarray(value) for name, value in batches.items()}
    junk = {
        name: np.where(mask.reshape(mask.shape + (1,) * (value.ndim - 2)), value, np.ones_like(value))
        for name, value in fields.items()
    }
    _, one = run(task, batches, mask, key)
    _, other = run(task, junk, mask, key)
    assert_equal(one.sums["delta"], other.sums["delta"])
    assert_equal(one.metrics, other.metrics)
    assert int(one.weight) == int(other.weight) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "penalty", "linen without dropout"])
def test_a_padded_batch_equals_an_unpadded_one(name: str, rng: np.random.Generator) -> None:
    """Guarantee 2 against a run that knows of no padding (without noise: its shape is the batch's)."""

    class NormOnly(linen.Module):
        @linen.compact
        def __call__(self, x: Any, train: bool, mask: Any) -> Any:
            return linen.Dense(C)(linen.BatchNorm(use_running_average=not train)(x, mask=mask[:, None]))

    task = flax_task(NormOnly()) if name.startswith("linen") else tasks()[name]
    batches, mask, key = feed(rng)
    mask[:, 3:] = False
    small = task.replace(local=Local(batch_size=3, steps_per_block=K, optimizer=task.local.optimizer))
    padded, one = run(task, batches, mask, key)
    plain, other = run(small, {name: value[:, :3] for name, value in batches.items()}, mask[:, :3], key)
    assert_close(padded, plain)
    assert_close(one.sums["delta"], other.sums["delta"])
    assert_close(one.metrics, other.metrics)


@pytest.mark.slow
def test_blocks_of_any_length_give_the_same_result(task: Task, rng: np.random.Generator) -> None:
    """Guarantee 3."""
    batches, mask, key = feed(rng, k=4)
    _, whole = run(task, batches, mask, key)
    for k in (1, 2):
        _, parts = run(task, batches, mask, key, k=k)
        assert_close(whole.sums["delta"], parts.sums["delta"])
        assert_close(whole.metrics, parts.metrics)


@pytest.mark.slow
def test_another_key_gives_another_result_only_where_there_is_noise(rng: np.random.Generator) -> None:
    batches, mask, key = feed(rng)
    for name, differs in (("linear", False), ("noisy", True), ("linen", True)):
        _, one = run(tasks()[name], batches, mask, key)
        _, other = run(tasks()[name], batches, mask, key + np.uint32(1))
        changed = any(not np.array_equal(one.sums["delta"][n], other.sums["delta"][n]) for n in one.sums["delta"])
        assert changed == differs, name


@pytest.mark.slow
def test_a_step_is_the_optimizer_s(rng: np.random.Generator) -> None:
    """One step of plain SGD, written out."""
    batches, mask, key = feed(rng, k=1)
    task = tiny_task(local=Local(batch_size=B, steps_per_block=1, optimizer=optax.sgd(0.1)))
    _, report = run(task, batches, mask, key)
    model, _ = start(task, local_rule(task))

    def mean(params: Any) -> Any:
        logits = batches["x"][0] @ params["params/w"] + params["params/b"][None, :]
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(batches["y"][0])).mean()

    gradient = jax.grad(mean)(model)
    assert_close(report.sums["delta"], {name: -0.1 * value for name, value in gradient.items()})
    np.testing.assert_allclose(report.metrics["loss/numerator"], B * mean(model), rtol=1e-5)
    assert float(report.metrics["loss/denominator"]) == B


def test_uniform_weighting_counts_once(rng: np.random.Generator) -> None:
    task = tiny_task(local=Local(batch_size=B, weighting="uniform"))
    batches, mask, key = feed(rng)
    assert int(run(task, batches, mask, key)[1].weight) == 1
    assert int(run(task, batches, mask & False, key)[1].weight) == 0


def test_frozen_leaves_stay_and_are_not_sent(rng: np.random.Generator) -> None:
    task = tiny_task(leaves={"params/b": "frozen"}, local=Local(batch_size=B, optimizer=optax.adam(0.1)))
    rule = local_rule(task)
    carry, report = run(task, *feed(rng))
    assert list(report.sums["delta"]) == ["params/w"] and not rule.device_state
    assert [spec.name for spec in rule.broadcast] == ["params/b", "params/w"]
    np.testing.assert_array_equal(carry["params/b"], np.zeros(C))
    assert not any(name.startswith("opt/") and name.endswith("/b") for name in carry)


def test_private_leaves_stay_on_the_device_and_are_used_again(rng: np.random.Generator) -> None:
    task = tiny_task(leaves={"params/b": "private"})
    rule = local_rule(task)
    assert [spec.name for spec in rule.device_state] == ["private/params/b", "rounds"]
    model, kept = start(task, rule)
    _, report = run(task, *feed(rng))
    assert list(report.sums["delta"]) == ["params/w"]
    assert np.any(np.asarray(report.device_state["private/params/b"]) != 0)
    assert int(report.device_state["rounds"]) == 1
    again = rule.begin(model, report.device_state)
    np.testing.assert_array_equal(again["params/b"], report.device_state["private/params/b"])
    first = rule.begin(model | {"params/b": jnp.full(C, 7.0)}, kept)  # a new device takes what was broadcast
    np.testing.assert_array_equal(first["params/b"], np.full(C, 7.0))


def test_a_scalar_loss_is_refused_with_the_way_out() -> None:
    task = tiny_task(loss=lambda params, state, batch, key: jnp.mean(batch["x"] @ params["w"]))
    with pytest.raises(ValueError) as caught:
        local_rule(task)
    assert str(caught.value) == (
        "Expected the loss of task 'tiny' to return one loss per example, shape (4,), got a scalar. "
        "Do not take the mean: shoal masks padding and takes it."
    )


def test_a_state_of_another_shape_is_refused() -> None:
    def loss(params: Any, state: Any, batch: Any, key: Any) -> Loss:
        return Loss(batch["x"] @ params["w"][:, 0], {"seen": jnp.zeros(3)}, {})

    task = tiny_task(init=lambda key: Variables(linear_init(key), {"seen": jnp.zeros(())}), loss=loss)
    with pytest.raises(ValueError, match="to return state like it was given"):
        local_rule(task)


def test_a_counter_cannot_be_averaged() -> None:
    task = tiny_task(init=lambda key: Variables(linear_init(key), {"seen": jnp.int32(0)}))
    with pytest.raises(ValueError, match="state/seen to be of a floating type"):
        model_specs(task)


def test_a_module_that_mixes_examples_must_take_the_mask() -> None:
    assert not flax_task(PlainLinen()).heeds_mask
    assert flax_task(MaskedLinen()).heeds_mask
    assert flax_task(Norm).heeds_mask
    assert flax_task(lambda rngs: nnx.Linear(D, C, rngs=rngs)).heeds_mask


def test_statistics_of_flax_models_are_state(rng: np.random.Generator) -> None:
    for module in (MaskedLinen(), Norm):
        names = [spec.name for spec in model_specs(flax_task(module))]
        assert any(name.startswith("state/") and name.endswith("mean") for name in names), names
        assert not any("dropout" in name or "count" in name for name in names), names
