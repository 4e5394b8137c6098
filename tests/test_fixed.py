"""Fixed point: exact, in any order, and never wrapped (guarantees of `shoal/fixed.py`)."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import UpdateRefused
from shoal.fixed import FixedPoint, add, read, refuse_bad_values, refuse_bad_weight

bounds = st.one_of(
    st.floats(1e-6, 1e6),
    st.sampled_from([1.0, 2.0, 256.0, float(np.nextafter(1, 0)), float(np.nextafter(256, 0)), 1 - 2.0**-40]),
)
counts = st.one_of(st.integers(1, 1 << 20), st.sampled_from([1, 2, 3, 64, 65, 1 << 16, (1 << 16) + 1]))


@given(bits=st.sampled_from([16, 32, 64]), bound=bounds, weight=counts, members=st.integers(1, 64))
def test_range_the_largest_sum_is_held(bits: int, bound: float, weight: int, members: int) -> None:
    """Guarantee: Range."""
    fixed = FixedPoint.finest(bits=bits, bound=bound, max_weight=weight, max_members=members)
    for sign in (1.0, -1.0):
        total = np.zeros(1, np.int64)
        for _ in range(members):
            add(total, np.array([sign * bound]), fixed, weight=weight)
        assert abs(int(total[0])) < 1 << (bits - 1)
        assert (int(total[0]) > 0) == (sign > 0) or total[0] == 0


@given(bound=bounds, weight=counts, members=counts)
def test_finest_is_within_two_bits_of_the_limit(bound: float, weight: int, members: int) -> None:
    fixed = FixedPoint.finest(bits=64, bound=bound, max_weight=weight, max_members=members)
    assert fixed.largest_sum >= 1 << 59


@settings(max_examples=50)
@given(values=st.lists(st.floats(-256, 256, width=32), min_size=1, max_size=20), seed=st.integers(0, 99))
def test_order_the_bits_do_not_depend_on_it(values: list[float], seed: int) -> None:
    """Guarantee: Order. And each contribution is the integer that exact arithmetic gives."""
    fixed = FixedPoint.finest(bits=64, bound=256.0, max_weight=1 << 16, max_members=20)
    weights = np.random.default_rng(seed).integers(1, 1 << 16, len(values))
    exact = sum(
        _rounded(Fraction(v) * int(w) / Fraction(2) ** fixed.exponent) for v, w in zip(values, weights, strict=True)
    )
    for order in (range(len(values)), reversed(range(len(values)))):
        total = np.zeros(1, np.int64)
        for i in order:
            add(total, np.array([values[i]], np.float32), fixed, weight=int(weights[i]))
        assert int(total[0]) == exact


def _rounded(value: Fraction) -> int:
    return round(value)  # half to even, as IEEE 754


def test_error_of_the_mean_is_as_small_as_it_says() -> None:
    """Guarantee: Error."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((7, 1000)).astype(np.float32)
    weights = rng.integers(1, 500, 7)
    fixed = FixedPoint.finest(bits=64, bound=256.0, max_weight=1 << 16, max_members=7)
    total = np.zeros(1000, np.int64)
    for row, weight in zip(values, weights, strict=True):
        add(total, row, fixed, weight=int(weight))
    mean = read(total, fixed, divisor=float(weights.sum()))
    exact = np.average(values.astype(np.float64), axis=0, weights=weights)
    assert np.max(np.abs(mean - exact)) <= fixed.unit / 2 * 7 / weights.sum() + 1e-15


def test_an_update_larger_than_a_chunk() -> None:
    fixed = FixedPoint.finest(bits=64, bound=1.0, max_weight=1, max_members=2)
    values = np.linspace(-1, 1, (1 << 18) * 2 + 17, dtype=np.float32)
    total = np.zeros(values.shape, np.int64)
    add(total, values, fixed, weight=1)
    assert np.array_equal(read(total, fixed).astype(np.float32), values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"exponent": -63},
        {"exponent": -3.5},
        {"exponent": float("nan")},
        {"exponent": 2000},
        {"bound": 0.0},
        {"bound": float("inf")},
        {"max_weight": True},
        {"max_members": 1.5},
        {"max_weight": 0},
        {"bits": 20},
    ],
)
def test_what_cannot_be_held_is_refused(wrong: dict[str, float]) -> None:
    good = {"bits": 64, "exponent": -30, "bound": 256.0, "max_weight": 100, "max_members": 10}
    FixedPoint.from_json(good)
    with pytest.raises((ValueError, TypeError)):
        FixedPoint.from_json({**good, **wrong})


def test_bad_values_and_weights_are_refused_with_the_value() -> None:
    fixed = FixedPoint.finest(bits=64, bound=1.0, max_weight=10, max_members=2)
    for bad in (np.nan, np.inf, -np.inf, 1.5, -1.5):
        with pytest.raises(UpdateRefused, match=r"NaN or infinity|<= 1, got 1.5"):
            refuse_bad_values(np.array([0.0, bad], np.float32), fixed, name="delta/w")
    for weight in (0, -1, 11, 1 << 63):
        with pytest.raises(UpdateRefused, match=str(weight)):
            refuse_bad_weight(weight, 10)


def test_a_total_that_would_be_copied_is_refused() -> None:
    fixed = FixedPoint.finest(bits=64, bound=1.0, max_weight=1, max_members=2)
    with pytest.raises(ValueError, match="C order"):
        add(np.zeros((2, 3), np.int64).T, np.ones((3, 2), np.float32), fixed, weight=1)
