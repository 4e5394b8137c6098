"""What noise on examples is worth, against numbers by hand and an accountant of others."""

from math import log, sqrt

import numpy as np
import pytest

from shoal.policy import ExamplePrivacy
from shoal.privacy.accounting import ORDERS, epsilon_of_rdp, gaussian_delta, gaussian_rdp
from shoal.privacy.examples import epsilon, rho


def test_steps_add_up_by_hand() -> None:
    privacy = ExamplePrivacy(clip_norm=3.0, noise_multiplier=2.0)
    assert rho(privacy, epochs=1) == 1 / 8
    assert rho(privacy, epochs=3, rounds=10) == 30 / 8
    assert rho(privacy, epochs=3, rounds=0) == 0.0


@pytest.mark.parametrize(("noise", "epochs", "rounds"), [(1.0, 1, 1), (5.0, 2, 10), (20.0, 1, 100)])
def test_epsilon_is_that_of_so_many_gaussian_releases(noise: float, epochs: int, rounds: int) -> None:
    privacy = ExamplePrivacy(clip_norm=1.0, noise_multiplier=noise, delta=1e-5)
    made, spent = epsilon(privacy, epochs=epochs, rounds=rounds), epochs * rounds / (2 * noise**2)
    releases = sum(gaussian_rdp(noise) for _ in range(epochs * rounds))
    assert made == pytest.approx(epsilon_of_rdp(np.asarray(releases), 1e-5, ORDERS), rel=0.02)
    assert made <= spent + 2 * sqrt(spent * log(1e5)), "the simpler bound of Bun and Steinke"
    # T releases are one with 1 / sqrt(T) of the noise, whose delta is known exactly: the bound is above it, and not by much.
    assert gaussian_delta(made, noise / sqrt(epochs * rounds)) <= 1e-5
    assert gaussian_delta(0.8 * made, noise / sqrt(epochs * rounds)) > 1e-5


def test_numbers_of_which_nobody_can_make_sense_are_refused() -> None:
    privacy = ExamplePrivacy(clip_norm=1.0, noise_multiplier=1.0)
    with pytest.raises(ValueError, match="epochs"):
        rho(privacy, epochs=0)
    with pytest.raises(ValueError, match="rounds"):
        rho(privacy, epochs=1, rounds=-1)
