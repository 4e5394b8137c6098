"""Integer noise has the laws that it says: exact probabilities where they are few, moments and shape where they are many."""

import contextlib
import hashlib
import os
from bisect import bisect_right
from collections.abc import Callable
from decimal import Decimal, localcontext
from math import sqrt
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import ive
from scipy.stats import chisquare, kstest, norm

from shoal.privacy import noise

SEED = bytes(range(32))


def source(purpose: str = "") -> noise.Source:
    return noise.seeded(SEED, purpose.encode())


def gaussian_mass(x: np.ndarray, stddev: float) -> np.ndarray:
    everything = np.arange(-1000, 1001)
    return np.exp(-(x**2) / (2 * stddev**2)) / np.sum(np.exp(-(everything**2) / (2 * stddev**2)))


def check_masses(drawn: np.ndarray, mass: Callable[[np.ndarray], np.ndarray]) -> None:
    """Chi-squared over every integer that is expected 20 times; the others are one."""
    x = np.arange(-300, 301)
    expected = mass(x) * drawn.size
    usual = expected >= 20
    counts = np.array([np.sum(drawn == value) for value in x[usual]])
    rest, expected_rest = drawn.size - counts.sum(), drawn.size - expected[usual].sum()
    found = chisquare([*counts, rest], [*expected[usual], expected_rest]) if expected_rest > 5 else None
    found = found or chisquare(counts, expected[usual] * counts.sum() / expected[usual].sum())
    assert found.pvalue > 1e-3


@pytest.mark.parametrize("stddev", [0.25, 0.5, 1.0, 2.7, 8.0, 16.5, 40.0])  # from 8 on in layers of 2, 4, 8
def test_the_discrete_gaussian_has_its_probabilities(stddev: float) -> None:
    drawn = noise.discrete_gaussian(stddev, 200_000, source=source(f"gaussian {stddev}"))
    check_masses(drawn, lambda x: gaussian_mass(x, stddev))


@pytest.mark.parametrize("variance", [0.01, 0.5, 4.0, 90.0, 1600.0])
def test_skellam_has_its_probabilities(variance: float) -> None:
    drawn = noise.skellam(variance, 200_000, source=source(f"skellam {variance}"))
    check_masses(drawn, lambda x: ive(np.abs(x), variance))


@pytest.mark.parametrize("stddev", [1000.0, 1e5, 1e8, 2.0**40])
@pytest.mark.parametrize("law", ["gaussian", "skellam"])
def test_wide_noise_has_moments_and_shape_of_a_normal(stddev: float, law: str) -> None:
    size, bytes_ = 200_000, source(f"{law} {stddev}")
    if law == "gaussian":
        drawn = noise.discrete_gaussian(stddev, size, source=bytes_)
    else:
        drawn = noise.skellam(stddev**2, size, source=bytes_)
    z = drawn / stddev
    errors = 4 * np.sqrt(np.array([1, 2, 15, 96]) / size)  # four standard errors of the first four moments
    assert np.all(np.abs([z.mean(), (z**2).mean() - 1, (z**3).mean(), (z**4).mean() - 3]) < errors)
    assert kstest(z, norm.cdf).pvalue > 1e-3
    assert abs(np.mean(drawn % 2) - 0.5) < 4 * 0.5 / sqrt(size), "the last bit is as random as the first"


@settings(deadline=None, max_examples=20)
@given(stddev=st.floats(0.25, 1e9), size=st.integers(0, 300), seed=st.binary(min_size=32, max_size=32))
def test_a_seed_gives_the_same_integers_again_and_another_others(stddev: float, size: int, seed: bytes) -> None:
    drawn = [noise.discrete_gaussian(stddev, size, source=noise.seeded(seed, b"a")) for _ in range(2)]
    assert drawn[0].dtype == np.int64
    assert drawn[0].shape == (size,)
    assert np.array_equal(*drawn)
    assert np.max(np.abs(drawn[0]), initial=0) < 14 * max(stddev, 1)
    if size > 100 and stddev > 5:
        assert not np.array_equal(drawn[0], noise.discrete_gaussian(stddev, size, source=noise.seeded(seed, b"b")))


def test_what_a_seed_gives_stays() -> None:
    """A stream that is drawn again after a crash must be the same in every version."""
    drawn = [noise.discrete_gaussian(s, 100_000, source=source()) for s in (0.5, 30.0, 1e8)]
    drawn += [noise.skellam(v, 100_000, source=source()) for v in (0.5, 900.0, 1e16)]
    digest = hashlib.sha256(b"".join(part.astype("<i8").tobytes() for part in drawn)).hexdigest()
    assert digest == "2d956b2c0a78a7d85e85624dd264cd50cfde9a95fb2e780b4f0611ca38d84026"


def test_draws_side_by_side_are_those_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = noise.discrete_gaussian(30.0, 200_000, source=source())
    assert abs(np.corrcoef(fast[:65_536], fast[65_536:131_072])[0, 1]) < 5 / np.sqrt(65_536), "pieces are their own"
    monkeypatch.setattr(noise, "ThreadPoolExecutor", lambda threads: contextlib.nullcontext(SimpleNamespace(map=map)))
    np.testing.assert_array_equal(noise.discrete_gaussian(30.0, 200_000, source=source()), fast)


def test_production_takes_bytes_of_the_system() -> None:
    drawn = noise.discrete_gaussian(100.0, 10_000, source=os.urandom)
    assert 95 < drawn.std() < 105


@pytest.mark.parametrize(
    ("draw", "width"),
    [(noise.discrete_gaussian, 30.0), (noise.discrete_gaussian, 1e8), (noise.skellam, 2.0**21), (noise.skellam, 1e16)],
)
def test_decisions_in_floating_point_are_those_in_decimals(
    draw: Callable[..., np.ndarray], width: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = draw(width, 500, source=source())
    monkeypatch.setattr(noise, "_DOUBT", 2.0)  # nothing is sure
    assert np.array_equal(draw(width, 500, source=source()), fast)


@pytest.mark.parametrize("variance", [2.0**20, 1e9, 2.0**80])
def test_the_fall_in_floating_point_is_within_its_error(variance: float) -> None:
    rng = np.random.default_rng(0)
    start, rest = rng.integers(0, int(13 * sqrt(variance)), 200), rng.integers(0, int(sqrt(variance) / 4), 200)
    found = noise._debye_fall(variance, start.astype(float), rest.astype(float))
    with localcontext(prec=60):
        exact = [
            noise._log_debye(int(a), variance) - noise._log_debye(int(a + b), variance)
            for a, b in zip(start, rest, strict=True)
        ]
        errors = [abs(float(Decimal(float(value)) - sure)) for value, sure in zip(found, exact, strict=True)]
    assert max(errors) < 2.0**-49


def test_the_expansion_of_skellam_is_within_its_distance_where_it_begins() -> None:
    with localcontext(prec=60):
        weights = noise._bessel(noise._LARGE)
        for x in range(0, int(13.5 * sqrt(noise._LARGE)), 499):
            ratio = (noise._log_debye(x, noise._LARGE) - noise._log_debye(0, noise._LARGE)).exp()
            assert abs(ratio * weights[0] / weights[x] - 1) < Decimal(2) ** -80


@pytest.mark.parametrize("seed", range(8))
def test_a_word_on_a_threshold_is_decided_by_more_bits(seed: int) -> None:
    law = noise._gaussian_law(1.0)
    spare = bytes([seed]) * 32
    words = np.array([[law.thresholds[1] >> 64], [0], [0]], "<u8").tobytes()
    drawn = noise._accepted(law, 1, lambda size: words if size == 24 else spare)
    low = int.from_bytes(noise.seeded(spare, b"more bits")(8), "little")
    assert drawn.tolist() == [bisect_right(law.thresholds, (law.thresholds[1] >> 64) << 64 | low)]
    assert drawn[0] in (1, 2)


@settings(deadline=None)
@given(variance=st.floats(1e-6, 1e12), members=st.integers(1, 1000), data=st.data())
def test_survivors_bring_the_noise_that_is_needed(variance: float, members: int, data: st.DataObject) -> None:
    dropouts = data.draw(st.integers(0, members - 1))
    share = noise.share_variance(variance, members=members, dropouts=dropouts)
    assert variance <= share * (members - dropouts) <= variance * (1 + 1e-9)


def test_shares_of_skellam_noise_add_up_to_it() -> None:
    share = noise.share_variance(9.0, members=8, dropouts=3)
    total = sum(noise.skellam(share, 100_000, source=source(f"member {member}")) for member in range(5))
    check_masses(np.asarray(total), lambda x: ive(np.abs(x), 9.0))


@pytest.mark.parametrize("stddev", [0.0, 0.2, -1.0, float("nan"), 2.0**41])
def test_a_stddev_that_is_none_is_refused(stddev: float) -> None:
    with pytest.raises(ValueError, match="stddev"):
        noise.discrete_gaussian(stddev, 1, source=os.urandom)
    with pytest.raises(ValueError, match="variance"):
        noise.skellam(-abs(stddev) if stddev < 1 else stddev**2, 1, source=os.urandom)


def test_what_else_is_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, got 5"):
        noise.seeded(b"short", b"")
    with pytest.raises(ValueError, match="fewer dropouts than members, got 3 of 3"):
        noise.share_variance(1.0, members=3, dropouts=3)
