"""A training that is interrupted between two blocks and gone on with makes the update of one that was not, bit for bit."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from shoal.data.store import Examples
from shoal.errors import ProgramError
from shoal.plan.build import Built
from shoal.plan.child import ChildRunner
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.runner import Runner, Update
from shoal.plan.train import Interrupted, Paused, train
from tests.plan.plan_tasks import B, C, D, K

ROOT = "a" * 64
BLOCKS = 4


def examples() -> Examples:
    rng, num = np.random.default_rng(2), BLOCKS * B * K - 3
    return Examples({"x": rng.normal(size=(num, D)).astype(np.float32), "y": rng.integers(0, C, num).astype(np.int32)})


def trained(runner: Runner, built: Built, *, after: int | None = None, paused: Paused | None = None) -> Update:
    """Interrupted after so many blocks."""
    asked = itertools.count(0 if paused is None else paused.blocks)
    return train(
        runner, built.plan.manifest, ROOT, examples(), None, seed=bytes(32), member="anna",
        is_interrupted=lambda: next(asked) == after, paused=paused,
    )  # fmt: skip


def interrupted(runner: Runner, built: Built, *, after: int, paused: Paused | None = None) -> Paused | None:
    with pytest.raises(Interrupted) as raised:
        trained(runner, built, after=after, paused=paused)
    return raised.value.paused


def with_model(make: Callable[[], Runner], built: Built) -> Runner:
    runner = make()
    runner.set_model(ROOT, built.model)
    return runner


@pytest.mark.parametrize("make", [JaxRunner, pytest.param(lambda p: ChildRunner(p, threads=1), marks=pytest.mark.slow)])
def test_it_is_the_same_update_bit_for_bit(noisy: Built, make: Callable[..., Runner]) -> None:
    runner = with_model(lambda: make(noisy.plan), noisy)
    whole = trained(runner, noisy)
    once = interrupted(runner, noisy, after=1)
    assert once is not None and once.blocks == 1
    runner.close()
    other = with_model(lambda: make(noisy.plan), noisy)  # as after a restart
    twice = interrupted(other, noisy, after=3, paused=once)
    assert twice is not None and twice.blocks == 3
    made = trained(other, noisy, paused=twice)
    other.close()
    assert made.weight == whole.weight
    for one, two in ((made.sums, whole.sums), (made.device_state, whole.device_state)):
        assert list(one) == list(two)
        for name in one:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)


def test_before_the_first_block_there_is_nothing_to_go_on_from(noisy: Built) -> None:
    assert interrupted(with_model(lambda: JaxRunner(noisy.plan), noisy), noisy, after=0) is None


def test_a_carry_of_something_else_is_refused(noisy: Built) -> None:
    runner = with_model(lambda: JaxRunner(noisy.plan), noisy)
    with pytest.raises(ProgramError, match="carry was called before begin"):
        runner.carry()
    paused = interrupted(runner, noisy, after=1)
    assert paused is not None
    wrong = {name: value for name, value in list(paused.carry.items())[1:]}
    with pytest.raises(ValueError, match="the training"):
        runner.resume(ROOT, wrong)
