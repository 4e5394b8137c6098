"""Vectors as bytes: exact in float32, within the stated bound in the others."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed.codec import DTYPES, Codec


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 32, 65])
def test_a_vector_comes_back_within_the_bound(dtype: Any, dim: int) -> None:
    codec = Codec(dim, dtype)
    rng = np.random.default_rng(dim)
    vectors = (rng.normal(size=(200, dim)) * 10.0 ** rng.integers(-3, 3, (200, 1))).astype(np.float32)
    rows = codec.encode(vectors)
    assert rows.shape == (200, codec.words) and rows.dtype == np.uint32
    error = np.abs(codec.decode(rows) - vectors).max(axis=1)
    assert np.all(error <= codec.error_bound(vectors))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-30000, 30000, width=32), min_size=2, max_size=20))
def test_int8_keeps_its_bound_for_any_row(values: list[float]) -> None:
    codec, vectors = Codec(len(values), "int8"), np.array([values], np.float32)
    assert np.all(np.abs(codec.decode(codec.encode(vectors)) - vectors).max(axis=1) <= codec.error_bound(vectors))


def test_row_sizes() -> None:
    assert [Codec(32, dtype).row_bytes for dtype in DTYPES] == [128, 64, 36]
    assert Codec(3, "float16").row_bytes == 8 and Codec(1, "int8").row_bytes == 8


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_bytes_are_zeros(dtype: Any) -> None:
    codec = Codec(5, dtype)
    assert not codec.decode(np.zeros((2, codec.words), np.uint32)).any()


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "int8"), (70_000.0, "float16")])
def test_what_cannot_be_kept_is_refused(value: float, dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"Expected finite values of at most .* for {dtype}, got .*first in vector 1"):
        Codec(2, dtype).encode(np.array([[0, 1], [value, 2]], np.float32))


def test_no_vectors() -> None:
    assert Codec(4, "int8").decode(Codec(4, "int8").encode(np.empty((0, 4), np.float32))).shape == (0, 4)
