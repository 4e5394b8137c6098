"""Rematerialization by path: the same numbers, less kept."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from shoal.pod.remat import paths, rematerialized


class Net(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        for number in range(3):
            hidden = linen.Dense(64, name=f"up_{number}")(x)
            x = x + linen.Dense(8, name=f"down_{number}")(jnp.sin(jnp.cos(hidden)))
        return x


X = np.random.default_rng(0).normal(size=(16, 8)).astype("f")


def loss(params: Any, x: Any) -> Any:
    return jnp.sum(jnp.square(Net().apply({"params": params}, x)))


def saved_bytes(function: Any, params: Any) -> int:
    """What is kept from the way forwards for the way back."""
    _, back = jax.eval_shape(lambda p: jax.vjp(lambda q: function(q, X), p), params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))


def test_gradients_are_the_same_and_less_is_kept() -> None:
    params = Net().init(jax.random.key(0), X)["params"]
    found = paths(loss, params, X)
    assert "Net/up_0" in found, found
    less = rematerialized(loss, ["Net/up_*", "Net/down_1"])
    expected, got = jax.jit(jax.grad(loss))(params, X), jax.jit(jax.grad(less))(params, X)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    whole = rematerialized(loss, ["Net"])
    assert saved_bytes(whole, params) < 0.5 * saved_bytes(loss, params)


def test_a_path_that_is_not_there_is_said() -> None:
    params = Net().init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"got 'Net/block_\*', which matches none of Net.*Net/down_0"):
        rematerialized(loss, ["Net/block_*"])(params, X)
