from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed.divide import divide, lower_hull, reads_of, redivide


def test_the_hull_leaves_out_what_bulges():
    assert lower_hull([(0, 10), (1, 9), (2, 4), (3, 5), (4, 3)]) == [(0, 10), (2, 4), (4, 3)]


@given(st.lists(st.lists(st.integers(0, 100), min_size=2, max_size=5), min_size=1, max_size=3), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_no_other_division_of_whole_steps_reads_less(drops, total):
    curves = {
        f"t{i}": [(k, float(1000 - v)) for k, v in enumerate(np.cumsum(drop).tolist())] for i, drop in enumerate(drops)
    }
    given_bytes = divide(curves, total)
    assert sum(given_bytes.values()) <= total + 1e-9
    best = reads_of(curves, given_bytes)
    for other in product(range(5), repeat=len(curves)):
        if sum(other) <= total:
            assert best <= reads_of(curves, dict(zip(curves, other, strict=True))) + 1e-6


def test_a_small_gain_moves_nothing():
    curves = {"a": [(0, 100.0), (10, 50.0)], "b": [(0, 100.0), (10, 49.0)]}
    current = {"a": 10.0, "b": 0.0}
    assert redivide(curves, current) == current
    assert redivide(curves, current, least_gain=0.001) == {"a": 0.0, "b": 10.0}


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="smallest budgets"):
        divide({"a": [(5, 1.0)]}, 4)
    with pytest.raises(ValueError, match="a point or more"):
        divide({"a": []}, 4)
