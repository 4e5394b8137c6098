"""Noise that could not be drawn is found out before anybody trains."""

import optax
import pytest

import shoal
from shoal.plan.build import build
from tests.plan.plan_tasks import tiny_task


def noisy_task(noise_multiplier: float, correlated: shoal.Correlated | None = None) -> shoal.Task:
    return tiny_task().replace(
        local=shoal.Local(optimizer=optax.sgd(0.1), weighting="uniform"),
        privacy=shoal.Privacy(clip_norm=1.0, noise_multiplier=noise_multiplier, correlated=correlated),
    )


@pytest.mark.parametrize("kind", [None, "tree", "blt"])
def test_noise_below_the_sums_grid_is_refused(kind: str | None) -> None:
    correlated = None if kind is None else shoal.Correlated(rounds=4, kind=kind)  # type: ignore[arg-type]
    build(noisy_task(1.0, correlated))
    with pytest.raises(ValueError, match=r"noise of 0\.25 to .* units of a sum's grid.*usual size"):
        build(noisy_task(1e-10 if kind != "blt" else 1e13, correlated))


def test_a_strategy_that_float64_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected decays that float64 can hold"):
        build(noisy_task(1e30, shoal.Correlated(rounds=4)))
