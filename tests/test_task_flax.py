"""Flax modules of every kind as tasks. How batch norm heeds the mask: tests/plan/test_local.py."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import shoal
from shoal.local import model_specs

FIELDS: dict[str, tuple[tuple[int, ...], str]] = {"x": ((3,), "float32"), "label": ((), "int32")}
KEY = jax.random.key(1)


def task(module: Any, **settings: Any) -> shoal.Task:
    settings = {"loss": "softmax_cross_entropy", "batch": FIELDS, "name": "flax", **settings}
    return shoal.Task.from_flax(module, **settings)


def batch(rng: np.random.Generator, size: int = 4) -> dict[str, Any]:
    x = rng.normal(size=(size, 3)).astype(np.float32)
    return {"x": jnp.asarray(x), "label": jnp.zeros(size, jnp.int32), "mask": jnp.ones(size, bool)}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


class Dropped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

    def __call__(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class Streams(linen.Module):
    """Randomness from streams of other names."""

    @linen.compact
    def __call__(self, x: Any, training: bool) -> Any:
        x = linen.Dropout(0.5, rng_collection="noise", deterministic=not training)(x)
        return linen.Dense(2)(x + jax.random.normal(self.make_rng("other"), x.shape) if training else x)


@pytest.mark.parametrize("module", [Dropped, Streams()], ids=["nnx", "linen"])
def test_noise_comes_from_the_key_and_is_for_training(module: Any, rng: np.random.Generator) -> None:
    made, examples = task(module), batch(rng)
    params, state = made.variables(KEY)
    one, same, other = (made.losses(params, state, examples, jax.random.key(k)).per_example for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert made.predict is not None
    np.testing.assert_array_equal(made.predict(params, state, examples), made.predict(params, state, examples))
    assert not state and not any("count" in spec.name for spec in model_specs(made))


def test_an_nnx_module_s_own_weights_are_the_first_ones(rng: np.random.Generator) -> None:
    module = Dropped(rngs=nnx.Rngs(5))
    made, examples = task(module), batch(rng)
    params, state = made.variables(KEY)
    np.testing.assert_array_equal(params["layers"][0]["kernel"], module.layers[0].kernel[...])
    made.losses(params, state, examples, KEY)
    module.eval()
    assert made.predict is not None
    np.testing.assert_allclose(made.predict(params, state, examples), module(examples["x"]), rtol=1e-6)


class Two(linen.Module):
    @linen.compact
    def __call__(self, left: Any, right: Any) -> Any:
        return jnp.repeat(linen.Dense(1)(left) - jnp.expand_dims(right, -1), 2, axis=1)


def test_several_inputs_and_made_up_labels(rng: np.random.Generator) -> None:
    fields = {"x": ((3,), "float32"), "y": ((), "float32")}
    settings = {"inputs": ["x", "y"], "outputs": lambda found: found[:, :1], "labels": lambda batch: batch["y"] * 2}
    made = task(Two, batch=fields, loss="squared_error", **settings)
    examples = {**batch(rng), "y": jnp.ones(4)}
    params, state = made.variables(KEY)
    expected = (examples["x"] @ params["Dense_0"]["kernel"])[:, 0] - 1 - 2
    np.testing.assert_allclose(made.losses(params, state, examples, KEY).per_example, expected**2, rtol=1e-5)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ValueError, match="loss='mse'"):
        task(Two, loss="mse")
    with pytest.raises(ValueError, match="labels='y'"):
        task(Two, labels="y")
    for inputs in ("z", ["x", "z"], []):
        with pytest.raises(ValueError, match="Expected inputs to be among the fields"):
            task(Two, inputs=inputs)
    with pytest.raises(ValueError, match=r"Expected a Flax module or a function of nnx\.Rngs.*got dict"):
        task(lambda rngs: {})
