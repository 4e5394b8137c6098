"""The batch that is proposed: arithmetic by hand, the noise scale against a problem whose noise is known."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.data.store import Examples
from shoal.pod.auto_batch import BatchTrial, noise_scale, try_batches
from shoal.pod.trainer import Trainer


def test_the_knee_and_the_noise_scale_decide() -> None:
    rates = {32: 100.0, 64: 190.0, 128: 300.0, 256: 320.0, 512: 330.0}
    assert BatchTrial(rates=rates, noise_scale=1e6).knee == 128
    assert BatchTrial(rates=rates, noise_scale=1e6).chosen == 128
    assert BatchTrial(rates=rates, noise_scale=100.0).chosen == 64
    assert BatchTrial(rates=rates, noise_scale=3.0).chosen == 32
    assert any("knee is at 128" in line for line in BatchTrial(rates=rates, noise_scale=1.0).lines())


def test_the_noise_scale_is_that_of_two_batch_sizes() -> None:
    gradient, covariance, batch, batches = 4.0, 200.0, 10, 8
    small, large = gradient + covariance / batch, gradient + covariance / (batch * batches)
    assert noise_scale(small, large, batch=batch, batches=batches) == pytest.approx(covariance / gradient)
    assert noise_scale(1.0, 0.01, batch=10, batches=8) == float("inf")


def test_it_is_found_on_a_problem_whose_noise_is_known() -> None:
    dims, mean, spread = 20, 0.2, 1.0
    x = np.random.default_rng(0).normal(mean, spread, size=(20_000, dims)).astype("f")

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return batch["x"] @ params["w"]  # the gradient of one example is the example

    task = shoal.Task(
        name="known", init=lambda key: {"w": jnp.zeros(dims)}, loss=loss, batch={"x": ((dims,), "float32")},
        local=shoal.Local(optimizer=optax.sgd(1e-6), batch_size=32),
    )  # fmt: skip

    def made(size: int) -> Trainer:
        return Trainer(task, mesh="data=2", devices=jax.devices()[:2], batch_size=size, steps_per_call=1)

    trial = try_batches(made, Examples({"x": x}), [64, 128])
    assert trial.noise_scale == pytest.approx((spread / mean) ** 2, rel=0.3)
    assert list(trial.rates) == [64, 128]
