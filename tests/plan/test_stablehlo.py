"""Programs as artifacts: what is loaded computes what was exported."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shoal.errors import PlanError, ProgramError
from shoal.local import local_rule
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.runner import Runner, Update
from shoal.plan.stablehlo import OLDEST_VERSIONS, export_program, load_program, this_runtime
from shoal.task import Local
from shoal.tensors import Tensors
from tests.plan.plan_tasks import B, K, evaluate_feed, feed, linear_predict, noisy_task, tiny_task, zero_state

Shape = jax.ShapeDtypeStruct


@pytest.fixture(scope="module")
def runner(noisy: Built) -> JaxRunner:
    """Compiled once for all tests."""
    made = JaxRunner(noisy.plan)
    made.compile()
    return made


def train(runner: JaxRunner, built: Built, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> Update:
    """Feeds all steps, in blocks of the plan's length."""
    k = built.plan.manifest.training.steps_per_block
    runner.set_model("a", built.model)
    runner.begin("a", zero_state(built.plan.manifest))
    for start in range(0, len(mask), k):
        part = {name: value[start : start + k] for name, value in batches.items()}
        runner.block(part, mask[start : start + k], key)
    return runner.finish()


def assert_close(one: Tensors, other: Tensors, *, tolerance: float) -> None:
    assert list(one) == list(other)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int32", "float16", "bfloat16", "float32"])
def test_a_loaded_program_computes_what_was_exported(dtype: str) -> None:
    def function(given: Any) -> Any:
        return {"z": jnp.where(given["a"] == given["b"], given["a"], given["b"])[::-1], "a": given["a"]}

    values = {"b": jnp.arange(6).reshape(3, 2).astype(dtype), "a": jnp.ones((3, 2), dtype)}
    specs = {name: Shape(value.shape, value.dtype) for name, value in values.items()}
    program, data = export_program("begin", function, specs, outputs=lambda result: result)
    assert [spec.name for spec in program.inputs] == ["b", "a"]
    assert [spec.name for spec in program.outputs] == ["a", "z"]
    loaded = load_program(program, data)(*values.values())
    direct = function(values)
    for spec, value in zip(program.outputs, loaded, strict=True):
        assert value.dtype == spec.numpy_dtype and np.array_equal(value, direct[spec.name])


def test_it_is_written_for_the_oldest_version_that_holds_it(tiny: Built) -> None:
    assert {program.needs.version for program in tiny.plan.manifest.programs} <= set(OLDEST_VERSIONS)
    assert this_runtime().version >= max(OLDEST_VERSIONS)


def test_unused_inputs_stay() -> None:
    specs = {"used": Shape((2,), jnp.float32), "unused": Shape((5,), jnp.int32)}
    program, data = export_program("begin", lambda given: given["used"] * 2.0, specs, outputs=lambda x: {"x": x})
    (made,) = load_program(program, data)(jnp.ones(2), jnp.zeros(5, jnp.int32))
    assert np.array_equal(made, [2.0, 2.0])


def test_a_program_that_is_none_is_a_program_error(tiny: Built) -> None:
    runner = JaxRunner(tiny.plan)
    runner._bytes["begin"] = b"nothing"
    runner.set_model("a", tiny.model)
    with pytest.raises(ProgramError, match="Program 'begin' failed"):
        runner.begin("a", {})


@pytest.mark.slow
def test_the_plan_agrees_with_a_direct_call(noisy: Built, runner: JaxRunner, rng: np.random.Generator) -> None:
    batches, mask, key = feed(rng)
    mask[1, 2:] = False
    update = train(runner, noisy, batches, mask, key)
    rule = local_rule(noisy_task())
    state = zero_state(noisy.plan.manifest)
    model = {name: jnp.asarray(value) for name, value in noisy.model.items()}
    carry = rule.block(rule.begin(model, state), batches, jnp.asarray(mask), jnp.asarray(key))
    report = rule.finish(carry, model)
    expected = {f"delta/{name}": value for name, value in report.sums["delta"].items()}
    expected |= {f"metric/{name}": value for name, value in report.metrics.items()}
    assert_close(update.sums, expected, tolerance=1e-5)
    assert update.weight == report.weight == 6 and update.padding == 0.25
    assert update.device_state["rounds"] == 1


def test_what_is_masked_counts_for_nothing_bit_for_bit(
    noisy: Built, runner: JaxRunner, rng: np.random.Generator
) -> None:
    batches, mask, key = feed(rng, k=2 * K)
    mask[1, 3:], mask[3] = False, False
    others = {name: np.where(_along(mask, value), value, np.ones_like(value)) for name, value in batches.items()}
    assert_close(
        train(runner, noisy, batches, mask, key).sums, train(runner, noisy, others, mask, key).sums, tolerance=0.0
    )


def test_wholly_masked_blocks_change_nothing_bit_for_bit(
    noisy: Built, runner: JaxRunner, rng: np.random.Generator
) -> None:
    batches, mask, key = feed(rng, k=2 * K)
    mask[K:] = False
    short = train(runner, noisy, {name: value[:K] for name, value in batches.items()}, mask[:K], key)
    assert_close(train(runner, noisy, batches, mask, key).sums, short.sums, tolerance=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2, 4])
def test_blocks_of_any_length_give_the_same_result(
    noisy: Built, runner: JaxRunner, rng: np.random.Generator, k: int
) -> None:
    """Guarantee of local.py: step t draws its randomness from (key, t) alone."""
    local = noisy_task().local
    other = build(noisy_task(local=Local(batch_size=B, steps_per_block=k, optimizer=local.optimizer)))
    batches, mask, key = feed(rng, k=8)
    assert_close(
        train(JaxRunner(other.plan), other, batches, mask, key).sums,
        train(runner, noisy, batches, mask, key).sums,
        tolerance=1e-6,
    )


def test_evaluate_and_predict(noisy: Built, runner: JaxRunner, rng: np.random.Generator) -> None:
    runner.set_model("a", noisy.model)
    batch, mask = evaluate_feed(rng, noisy.plan.manifest.training.evaluate_batch_size)
    mask[50:] = False
    sums = runner.evaluate("a", batch, mask)
    assert sums["loss/denominator"] == 50.0 and sums["loss/numerator"] > 0
    params = {"w": noisy.model["params/w"], "b": noisy.model["params/b"]}
    expected = linear_predict(params, {}, batch)
    np.testing.assert_allclose(runner.predict("a", batch, mask), expected, rtol=1e-5, atol=1e-6)


def test_the_runner_in_process_keeps_the_protocol(tiny: Built, rng: np.random.Generator) -> None:
    runner = JaxRunner(tiny.plan)
    assert isinstance(runner, Runner) and runner.compile() > 0
    with pytest.raises(PlanError, match="has no program 'predict'"):
        batch, mask = evaluate_feed(rng, 200)
        runner.predict("a", batch, mask)
    with pytest.raises(ProgramError, match="is not held"):
        runner.begin("a", {})
    runner.set_model("a", tiny.model)
    with pytest.raises(ValueError, match="the device state"):
        runner.begin("a", {"more": np.zeros(1)})


def test_the_server_s_optimizer_travels_too(rng: np.random.Generator) -> None:
    import optax

    built = build(tiny_task(server=optax.sgd(0.5, momentum=0.9)))
    runner = JaxRunner(built.plan)
    model = {f"model/{name}": value for name, value in built.model.items()}
    state = runner.call("server_begin", model)
    mean = {f"mean/{name}": rng.normal(size=v.shape).astype(np.float32) for name, v in built.model.items()}
    after = runner.call("server_step", model | mean | state)
    for name, value in built.model.items():
        np.testing.assert_allclose(after[f"model/{name}"], value + 0.5 * mean[f"mean/{name}"], rtol=1e-6)


def _along(mask: np.ndarray, value: np.ndarray) -> np.ndarray:
    return mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
