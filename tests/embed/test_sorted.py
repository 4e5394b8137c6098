import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed._sorted import distinct, first_at, order_of

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


@given(st.lists(st.integers(-20, 20), max_size=80), st.integers(-25, 25))
@settings(max_examples=100, deadline=None)
def test_as_numpy_does(numbers: list[int], key: int) -> None:
    keys = np.array(numbers, np.int64)
    np.testing.assert_array_equal(order_of(keys), np.argsort(keys, kind="stable"))
    np.testing.assert_array_equal(distinct(keys), np.unique(keys))
    rising = np.sort(keys)
    assert first_at(rising, key) == np.searchsorted(rising, key)
    np.testing.assert_array_equal(keys, np.array(numbers, np.int64))
