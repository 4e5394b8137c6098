"""What is rounded is near, and the same whatever pieces it is rounded in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.codec.rounding import BLOCK, ROUNDINGS, Rounding, rounded, step_of


@given(st.integers(0, 3 * BLOCK), st.floats(1e-30, 1e30), st.integers(0, 9))
def test_no_number_moves_by_more_than_half_a_step(size: int, scale: float, seed: int) -> None:
    values = (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)
    for start in range(0, size, BLOCK):
        block = values[start : start + BLOCK]
        step = np.max(np.abs(block)) / 127 * (1 + 2**-7)
        assert np.max(np.abs(rounded(block, "int8") - block)) <= step / 2 * (1 + 1e-5)
    assert np.all(np.abs(rounded(values, "bfloat16") - values) <= np.abs(values) * 2.0**-8)


@given(st.floats(0.0, 2.0**125, width=32))
def test_a_step_has_eight_bits_and_reaches_the_largest(largest: float) -> None:
    step = step_of(np.float32(largest))
    assert not int(step.view(np.uint32)) & 0xFFFF
    assert float(step) * 127 >= largest * (1 - 2.0**-23) - 1e-43


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_pieces_of_whole_blocks_are_rounded_as_the_whole(rounding: Rounding) -> None:
    values = np.random.default_rng(0).normal(size=3 * BLOCK + 7).astype(np.float32)
    pieces = [rounded(values[start : start + 2 * BLOCK], rounding) for start in range(0, values.size, 2 * BLOCK)]
    assert np.array_equal(np.concatenate(pieces), rounded(values, rounding))
    assert np.array_equal(rounded(rounded(values, rounding), rounding), rounded(values, rounding)) or rounding == "int8"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_is_not_finite_stays_so_and_other_types_stay(rounding: Rounding) -> None:
    values = np.array([1.0, np.nan, np.inf, -np.inf, 0.0], np.float32)
    assert np.array_equal(np.isfinite(rounded(values, rounding)), np.isfinite(values))
    whole = np.arange(5)
    assert rounded(whole, rounding) is whole
    assert rounded(np.zeros((0, 3), np.float32), rounding).shape == (0, 3)
