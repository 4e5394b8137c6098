"""An audit trains by the task's own noise: no more of it, no less, and as often as that is made for."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.audit.audited import audited, everybody
from shoal.audit.learned import learned
from shoal.errors import DataError
from shoal.privacy.accounting import epsilon_of_rdp, gaussian_rdp
from shoal.simulate.engine import RoundResult

from .conftest import stddev_of

WIDTH = 300
REST = shoal.Correlated(rounds=8, kind="tree")
"""With min_separation=4 a device is in two of the rounds."""


def wide_task(*, min_separation: int = 4, **privacy: Any) -> shoal.Task:
    """A dense layer of 300 inputs, whose updates are nothing but noise and canaries."""

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return jnp.square(batch["x"] @ params["kernel"] + params["bias"][None, :]).sum(axis=1)

    return shoal.Task(
        name="wide", init=lambda key: {"kernel": jnp.zeros((WIDTH, 1)), "bias": jnp.zeros(1)}, loss=loss,
        batch={"x": ((WIDTH,), "float32")}, local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, weighting="uniform"),
        rounds=shoal.RoundPolicy(goal=4, minimum_group=4, min_separation=min_separation),
        privacy=shoal.Privacy(**{"clip_norm": 0.5, "noise_multiplier": 2.0, **privacy}),
    )  # fmt: skip


def users_of(count: int, *, examples: int = 1) -> shoal.data.Population:
    rng = np.random.default_rng(0)
    made = {f"u{i:02d}": {"x": rng.standard_normal((examples, WIDTH)).astype(np.float32)} for i in range(count)}
    return shoal.data.Population.from_arrays(made)


@pytest.mark.slow
def test_devices_that_rest_are_audited_as_such_with_the_task_s_noise(drawn: list[float]) -> None:
    task, rounds = wide_task(correlated=REST), list[RoundResult]()
    found = audited(task, users_of(8), rounds=3, canaries=40, on_round=rounds.append)
    assert drawn[0] == pytest.approx(stddev_of(task), rel=0.15)
    assert stddev_of(wide_task(correlated=REST, min_separation=1)) > 1.3 * stddev_of(task), "or it would show nothing"
    taken = {member for result in rounds for member in result.members}
    assert [len(result.members) for result in rounds] == [12] * 3 and len(taken) == 36, "nobody is in two of them"
    guessed_about = sum(member.startswith("canary") for member in taken)
    assert found.bound.canaries == guessed_about < 40 and not found.refutes
    assert found.claimed == pytest.approx(epsilon_of_rdp(gaussian_rdp(2.0), 1e-6))


@pytest.mark.slow
def test_noise_that_devices_add_is_audited_too() -> None:
    task = wide_task(min_separation=1, distributed=True, secure=shoal.Secure(members=60))
    found = audited(task, users_of(8), rounds=1, canaries=40)
    assert found.claimed is not None and not found.refutes


def test_noise_of_each_round_s_own_is_audited_with_every_device_in_every_round() -> None:
    policy = everybody(wide_task(), 50)
    assert (policy.goal, policy.min_separation, policy.num_selected) == (50, 1, 50)


def test_too_few_devices_or_rounds_for_so_many_to_rest_are_refused() -> None:
    with pytest.raises(DataError, match=r"at least 16 devices .* got 15: the noise is made for min_separation=4"):
        everybody(wide_task(correlated=REST), 15)
    with pytest.raises(ValueError, match="rounds >= 4, got 3"):
        learned(wide_task(correlated=REST), users_of(16, examples=2), rounds=3)
