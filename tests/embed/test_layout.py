from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import Layout
from shoal.errors import DataError


@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_ids_of_and_slot_of_are_inverse(rows, size, seed):
    layout = Layout.at_random(rows, size, seed=seed)
    ids = layout.ids_of()
    assert ids.shape == (layout.num_blocks, size) == (-(-rows // size), size)
    assert (ids.reshape(-1)[layout.slot_of] == np.arange(rows)).all()
    assert (ids >= 0).sum() == rows
    again = Layout.from_blocks(ids, rows)
    assert (again.slot_of == layout.slot_of).all()
    hot = layout.hot_first(np.arange(rows) % 7)
    assert (hot.block_of == layout.block_of).all()
    heat = np.where(hot.ids_of() >= 0, hot.ids_of() % 7, -1)
    assert (np.diff(heat, axis=1) <= 0).all()


def test_replicas_have_slots_of_their_own():
    layout = Layout(np.array([0, 1, 2]), 2, np.array([0, 0]), np.array([3, 5]))
    assert layout.ids_of().tolist() == [[0, 1], [2, 0], [-1, 0]]
    assert layout.space == 2.0
    assert layout.replica_bounds().tolist() == [0, 2, 2, 2]
    hot = layout.hot_first(np.array([5.0, 1.0, 9.0]))
    assert hot.ids_of().tolist() == [[0, 1], [2, 0], [0, -1]]
    assert hot.block_of.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.array([0, 0]), 2), "taken twice"),
        ((np.array([-1, 0]), 2), "slots >= 0"),
        ((np.array([0.0]), 2), "int64"),
        ((np.array([], np.int64), 2), "at least one row"),
        ((np.array([0]), 0), "vectors_per_block to be a whole number of at least 1"),
        ((np.array([0]), 2, np.array([1]), np.array([1])), "from 0 to 0"),
        ((np.array([0, 1]), 2, np.array([1, 0]), np.array([2, 3])), "sorted"),
        ((np.array([0, 1]), 2, np.array([1]), np.array([2, 3])), "one slot a replica"),
    ],
)
def test_bad_layouts_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says):
        Layout(*arguments)


def test_from_order_wants_a_permutation():
    with pytest.raises(ValueError, match="permutation"):
        Layout.from_order(np.array([0, 0, 1]), 2)
    with pytest.raises(ValueError, match="home block"):
        Layout.from_blocks(np.array([[0, -1]]), 2)


def test_it_is_saved_without_pickle(tmp_path: Path):
    layout = Layout(np.array([0, 1, 2]), 2, np.array([0]), np.array([5]))
    layout.save(tmp_path / "layout.npz")
    again = Layout.load(tmp_path / "layout.npz")
    assert (again.ids_of() == layout.ids_of()).all()
    (tmp_path / "bad.npz").write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"bad\.npz"):
        Layout.load(tmp_path / "bad.npz")
