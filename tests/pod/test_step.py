"""Steps on meshes of 8 virtual devices: whatever is split and however it is added up, the result is that of one device."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.pod.collectives import Members
from shoal.pod.mesh import MeshSpec
from shoal.pod.placement import Update
from shoal.pod.rules import specs
from shoal.pod.step import Program

B, K, STEPS = 16, 2, 2
OPTIMIZERS = {
    "sgdm": optax.sgd(0.1, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
    "lars": optax.lars(0.1, weight_decay=1e-2),
    "lamb": optax.lamb(1e-2, weight_decay=1e-2),
    "clipped adam": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(1e-2)),
}


def init(key: jax.Array) -> Any:
    keys = jax.random.split(key, 3)
    return shoal.Variables(
        {
            "first": {"kernel": jax.random.normal(keys[0], (6, 8)) * 0.3, "bias": jnp.zeros(8)},
            "second": {"kernel": jax.random.normal(keys[1], (8, 3)) * 0.3, "bias": jnp.zeros(3), "scale": jnp.ones(())},
            "fixed": jax.random.normal(keys[2], (3,)),
        },
        {"mean": jnp.zeros(8)},
    )


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> shoal.Loss:
    hidden = jnp.tanh(batch["x"] @ params["first"]["kernel"] + params["first"]["bias"][None])
    out = (
        hidden @ params["second"]["kernel"] * params["second"]["scale"]
        + params["second"]["bias"][None]
        + params["fixed"][None]
    )
    per_example = jnp.sum(jnp.square(out - batch["y"]), axis=-1)
    right = (per_example < 1.0).astype(jnp.float32)
    real = batch["mask"].astype(jnp.float32)
    mean = real @ (batch["x"] @ jnp.ones((6, 8))) / jnp.sum(real)  # not a number where there is no real example
    metrics = {"right": shoal.Sum(right, jnp.ones_like(right), (0.0, 1.0))}
    return shoal.Loss(per_example, {"mean": 0.9 * state["mean"] + 0.1 * mean}, metrics)


def task(optimizer: optax.GradientTransformation) -> shoal.Task:
    return shoal.Task(
        name="net", init=init, loss=loss, batch={"x": ((6,), "float32"), "y": ((3,), "float32")},
        local=shoal.Local(optimizer=optimizer, batch_size=B), leaves={"params/fixed": "frozen"},
        penalty=lambda params: 1e-2 * jnp.sum(jnp.square(params["first"]["kernel"])),
    )  # fmt: skip


def batches(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    mask = np.ones((K, B), bool)
    mask[1, -5:] = False  # the last member has no real example at all in some meshes
    return {"x": rng.normal(size=(K, B, 6)).astype("f"), "y": rng.normal(size=(K, B, 3)).astype("f")}, mask


def trained(
    text: str, update: Update, optimizer: str, rules: dict[str, str] | None = None, **how: Any
) -> tuple[Any, Any]:
    """Whole parameters after some steps, and metrics."""
    spec = MeshSpec.parse(text)
    made = task(OPTIMIZERS[optimizer])
    mesh = spec.build(jax.devices()[: spec.num_devices])
    shapes = {
        name: leaf.shape for name, leaf in shoal.local.named(shoal.local.model_shape(made).params, "params").items()
    }
    program = Program(made, mesh, Members(spec, **how), update, specs(rules or {}, shapes, spec, what="rules"), {})
    state = program.begin(jax.random.key(7))
    step = jax.jit(program.steps, donate_argnums=0)
    for number in range(STEPS):
        fields, mask = batches(number)
        state, metrics = step(state, fields, mask, np.array([1, 2], np.uint32))
    whole = {}
    for name, value in state["params"].items():
        full = np.asarray(value)
        whole[name] = full.reshape(-1)[: int(np.prod(shapes[name]))].reshape(shapes[name])
    return whole | {n: np.asarray(v) for n, v in state["state"].items()}, jax.tree.map(np.asarray, metrics)


UPDATES = ("replicated", "sharded", "fully_sharded")
MESHES = ("data=8", "slow=2,data=4", "data=2,model=2", "slow=2")
QUICK = {("data=2,model=2", "lamb", "fully_sharded"), ("slow=2,data=4", "clipped adam", "sharded")}
CASES = [
    pytest.param(mesh, optimizer, update, marks=() if (mesh, optimizer, update) in QUICK else pytest.mark.slow)
    for mesh in MESHES
    for optimizer in OPTIMIZERS
    for update in UPDATES
]


@cache
def on_one_device(optimizer: str) -> tuple[Any, Any]:
    return trained("data=1", "replicated", optimizer)


@pytest.mark.parametrize(("mesh", "optimizer", "update"), CASES)
def test_the_result_is_that_of_one_device(mesh: str, optimizer: str, update: Update) -> None:
    rules = {"params/first/kernel": "-,model", "params/second/kernel": "model,-"} if "model" in mesh else {}
    expected, expected_metrics = on_one_device(optimizer)
    found, metrics = trained(mesh, update, optimizer, rules)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"how": "permute"}, {"how": "exchange"}, {"how": "whole"}])
def test_however_it_is_added_up(how: dict[str, Any]) -> None:
    expected, _ = on_one_device("lamb")
    found, _ = trained("slow=2,data=4", "sharded", "lamb", **how)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("update", [pytest.param("replicated", marks=pytest.mark.slow), "sharded"])
def test_sums_in_bfloat16_are_near(update: Update) -> None:
    expected, _ = on_one_device("sgdm")
    found, _ = trained("slow=2,data=4", update, "sgdm", sum_type="bfloat16")
    start = {
        name: np.asarray(value) for name, value in shoal.local.named(init(jax.random.key(7)).params, "params").items()
    }
    for name, before in start.items():
        moved = np.linalg.norm(expected[name] - before)
        assert np.linalg.norm(found[name] - expected[name]) <= 0.02 * moved + 1e-7, name
        if moved:
            assert not np.array_equal(found[name], expected[name]) or moved < 1e-6, "it is rounded"
