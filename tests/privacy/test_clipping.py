"""Clipping and rounding keep their bounds against what is made to pass them."""

from collections.abc import Callable
from math import sqrt

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shoal.clip_norm import norm_bound
from shoal.errors import UpdateRefused
from shoal.privacy import clipping
from shoal.privacy.accounting import gaussian_zcdp
from shoal.privacy.noise import seeded

SEED = bytes(range(32))
VALUES = arrays(np.float32, st.integers(1, 30), elements=st.floats(-(2.0**100), 2.0**100, width=32))


def exact_norm(tensors: dict[str, np.ndarray]) -> float:
    """By a sum of whole numbers or float64 of any size."""
    return sqrt(
        sum(int(v) ** 2 if isinstance(v, int) else v**2 for t in tensors.values() for v in t.reshape(-1).tolist())
    )


@given(first=VALUES, second=VALUES, bound=st.floats(1e-3, 1e3))
def test_a_clipped_update_is_within_its_bound_and_points_where_it_did(
    first: np.ndarray, second: np.ndarray, bound: float
) -> None:
    tensors = {"a": first, "b": second}
    clipped, norms = clipping.clip(tensors, {"*": bound})
    assert norms["*"] == pytest.approx(exact_norm(tensors))
    assert exact_norm(clipped) <= bound
    scale = min(1.0, bound / max(norms["*"], 1e-300))
    for name, values in tensors.items():
        assert clipped[name].dtype == np.float32
        assert clipped[name] == pytest.approx(values.astype(np.float64) * scale, rel=1e-5, abs=1e-30)


def test_what_is_within_its_bound_stays_to_the_bit() -> None:
    tensors = {"a": np.array([0.1, -0.2], np.float32), "b": np.array([[0.3]])}
    clipped, _ = clipping.clip(tensors, {"*": 1.0})
    assert all(
        clipped[name].dtype == tensors[name].dtype and np.array_equal(clipped[name], tensors[name]) for name in tensors
    )


def test_a_scale_below_the_normal_numbers_clips_too() -> None:
    clipped, _ = clipping.clip({"a": np.full(3, 3e38, np.float32)}, {"*": 7e-4})
    assert 6.999e-4 < exact_norm(clipped) <= 7e-4


@given(first=VALUES, second=VALUES, third=VALUES)
def test_layers_are_clipped_by_the_first_pattern_that_they_match(
    first: np.ndarray, second: np.ndarray, third: np.ndarray
) -> None:
    tensors = {"delta/dense/kernel": first, "delta/dense/bias": second, "delta/head": third}
    bounds = {"delta/dense/*": 1.0, "*": 2.0}
    clipped, norms = clipping.clip(tensors, bounds)
    assert list(clipped) == list(tensors)
    dense = {name: values for name, values in clipped.items() if "dense" in name}
    assert exact_norm(dense) <= 1.0
    assert exact_norm({"head": clipped["delta/head"]}) <= 2.0
    assert exact_norm(clipped) <= norm_bound(bounds) == sqrt(5)
    assert norms["delta/dense/*"] == pytest.approx(exact_norm({"a": first, "b": second}))


def test_narrow_types_are_clipped_in_float32() -> None:
    values = np.full(1000, 1.0, ml_dtypes.bfloat16)
    clipped, _ = clipping.clip({"a": values}, {"*": 1.0})
    assert clipped["a"].dtype == np.float32
    assert 0.999 < exact_norm(clipped) <= 1.0


@settings(deadline=None)
@given(values=arrays(np.float64, st.integers(1, 60), elements=st.floats(-10, 10)), exponent=st.integers(-20, 3))
def test_integers_keep_the_bounds_of_their_rounding(values: np.ndarray, exponent: int) -> None:
    unit, l2 = 2.0**exponent, max(float(np.linalg.norm(values)), 1e-3)
    nearest = np.rint(values / unit).astype(np.int64)
    assert exact_norm({"a": nearest}) <= clipping.rounded_bound(l2, unit=unit, elements=values.size)
    bound = clipping.conditional_bound(l2, unit=unit, elements=values.size)
    rounded = clipping.round_to_grid({"a": values}, unit=unit, bound=bound, source=seeded(SEED, b"round"))["a"]
    assert rounded.dtype == np.int64
    assert exact_norm({"a": rounded}) <= bound <= l2 / unit + sqrt(values.size) + 1e-9
    assert np.max(np.abs(rounded - values / unit)) < 1 + 1e-6
    assert np.sum(np.abs(rounded)) <= clipping.l1_bound(exact_norm({"a": rounded}), values.size) + 1e-6


def test_the_worst_vector_reaches_the_bound_of_rounding_to_the_nearest() -> None:
    values = np.full(400, 0.5 + 1e-9)
    assert np.linalg.norm(np.rint(values)) == pytest.approx(
        clipping.rounded_bound(10.0, unit=1.0, elements=400), rel=1e-6
    )


def test_rounding_is_without_bias_and_seeded() -> None:
    values, source = {"a": np.full(10_000, 0.3), "b": np.full((2, 5000), -1.75)}, seeded(SEED, b"round")
    rounded = clipping.round_to_grid(values, unit=0.5, bound=1e9, source=source)
    assert rounded["b"].shape == (2, 5000)
    assert rounded["a"].mean() == pytest.approx(0.6, abs=0.02)
    assert rounded["b"].mean() == pytest.approx(-3.5, abs=0.02)
    again = clipping.round_to_grid(values, unit=0.5, bound=1e9, source=seeded(SEED, b"round"))
    assert all(np.array_equal(rounded[name], again[name]) for name in values)


def test_a_rounding_that_is_too_long_is_drawn_again() -> None:
    values = {"a": np.full(4, 0.5)}
    for seed in range(20):
        rounded = clipping.round_to_grid(values, unit=1.0, bound=sqrt(2) + 1e-6, source=seeded(SEED, b"%d" % seed))
        assert rounded["a"].sum() <= 2


@given(st.data())
def test_the_integers_l1_bound_holds(data: st.DataObject) -> None:
    values = data.draw(arrays(np.int64, st.integers(1, 50), elements=st.integers(-5, 5)))
    assert np.sum(np.abs(values)) <= clipping.l1_bound(float(np.linalg.norm(values)), values.size) + 1e-9


@given(noise=st.floats(0.1, 50), factor=st.floats(1.01, 100))
def test_update_and_bit_together_cost_what_was_said(noise: float, factor: float) -> None:
    rest = clipping.update_noise_multiplier(noise, bit=noise * factor)
    assert gaussian_zcdp(rest) + gaussian_zcdp(noise * factor) == pytest.approx(gaussian_zcdp(noise))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e200])
def test_an_update_without_a_norm_is_refused(bad: float) -> None:
    with pytest.raises(UpdateRefused, match="finite norm"):
        clipping.clip({"a": np.array([0.0, bad])}, {"*": 1.0})


def test_tensors_that_were_not_clipped_are_refused() -> None:
    with pytest.raises(UpdateRefused, match="Clip them first"):
        clipping.round_to_grid({"a": np.full(4, 100.0)}, unit=1.0, bound=10.0, source=seeded(SEED, b""))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: clipping.clip({"a": np.ones(1), "b": np.ones(1)}, {"a": 1.0}), "got b. Add"),
        (lambda: clipping.clip({"a": np.ones(1)}, {"*": 1.0, "a": 1.0}), "got 'a', which is that for none of a"),
        (lambda: clipping.clip({"a": np.ones(1)}, {"*": 0.0}), "> 0"),
        (lambda: clipping.update_noise_multiplier(2.0, bit=2.0), "the bit alone would spend all"),
    ],
)
def test_what_is_wrong_is_refused(wrong: Callable[[], object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        wrong()
