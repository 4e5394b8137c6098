"""Optimizers for large batches: schedules, lookahead against its paper's loop, all on pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shoal.pod.optimizers import lamb, lars, lookahead, ranger, warmed_up
from shoal.pod.piecewise import check


def test_the_rate_rises_and_falls() -> None:
    rate = warmed_up(2.0, steps=110, warmup=10, power=2)
    assert [float(rate(step)) for step in (0, 5, 10, 60, 110)] == pytest.approx([0.0, 1.0, 2.0, 0.5, 0.0])
    assert float(warmed_up(1.0, steps=10, warmup=0, power=1)(5)) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="0 <= warmup < steps=5, got warmup=5"):
        warmed_up(1.0, steps=5, warmup=5, power=1)


def test_lookahead_is_that_of_the_paper() -> None:
    optimizer, rng = lookahead(optax.sgd(0.1), slow_step=0.5, period=3), np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=4), jnp.float32)
    slow, fast, state = np.asarray(params), np.asarray(params), optimizer.init(params)
    for number in range(1, 8):
        gradient = rng.normal(size=4).astype("f")
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = params + updates
        fast = fast - 0.1 * gradient
        if number % 3 == 0:
            slow = fast = slow + 0.5 * (fast - slow)
        np.testing.assert_allclose(params, fast, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", [lars(0.1), lamb(1e-3), ranger(1e-3)], ids=["lars", "lamb", "ranger"])
def test_all_act_on_pieces(optimizer: optax.GradientTransformation) -> None:
    params = {"kernel": jnp.ones((64, 30)), "bias": jnp.ones((30,))}
    check(optimizer, params, {"kernel": jnp.ones((240, 1)), "bias": jnp.ones((4,))})


def test_biases_have_no_decay_and_no_trust_ratio() -> None:
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((4,))}
    optimizer = lamb(1.0, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        updates = jax.jit(lambda p: optimizer.update(jax.tree.map(jnp.zeros_like, p), optimizer.init(p), p)[0])(params)
    assert not np.any(updates["bias"])
    np.testing.assert_allclose(updates["kernel"], -1.0, rtol=1e-6)  # its norm is the parameters'
