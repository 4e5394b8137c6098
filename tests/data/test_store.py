import pickle

import numpy as np
import pytest

from shoal.data import Examples, Population
from shoal.errors import DataError


def examples(size: int, *, offset: int = 0) -> Examples:
    x = np.arange(size * 6, dtype=np.float32).reshape(size, 2, 3) + offset
    return Examples({"x": x, "y": np.arange(size, dtype=np.int32)})


def test_length_spec_and_take():
    held = examples(5)
    assert len(held) == 5
    assert held.spec() == {"x": ((2, 3), "float32"), "y": ((), "int32")}
    np.testing.assert_array_equal(held.take([3, 0])["y"], [3, 0])
    assert held.take(np.array([[0, 1, 2], [4, 4, 4]]))["x"].shape == (2, 3, 2, 3)
    assert held.take([])["x"].shape == (0, 2, 3)
    assert np.shares_memory(held.take(slice(1, 3))["x"], held.fields["x"])


def test_memory_mapped_arrays_stay_so(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(4))
    held = Examples({"x": np.load(tmp_path / "x.npy", mmap_mode="r")})
    assert isinstance(held.fields["x"], np.memmap)
    assert held.take([2])["x"].tolist() == [2]


def test_the_other_byte_order_is_turned():
    held = Examples({"x": np.arange(3, dtype=np.dtype(np.int32).newbyteorder("S"))})
    assert held.fields["x"].dtype.isnative and held.fields["x"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "at least one field"),
        ({"x": np.zeros(3), "y": np.zeros(2)}, r"one length, got {'x': 3, 'y': 2}"),
        ({"x": np.array(1.0)}, "leading dim"),
        ({"x": np.array([None, 1])}, "Python objects"),
        ({"x": np.array(["a"])}, "text"),
        ({"x": np.zeros(2, "M8[s]")}, "dates"),
        ({"x": np.zeros(2, [("a", int)])}, "records"),
    ],
)
def test_bad_fields_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Examples(fields)


def test_a_mask_is_no_index():
    with pytest.raises(ValueError, match="flatnonzero"):
        examples(3).take(np.array([True, False, True]))
    with pytest.raises(IndexError, match="out of bounds"):
        examples(3).take([3])


def test_concatenate():
    joined = Examples.concatenate([examples(2), examples(3, offset=100)])
    assert len(joined) == 5
    np.testing.assert_array_equal(joined.fields["x"][2:], examples(3, offset=100).fields["x"])
    with pytest.raises(ValueError, match="at least one"):
        Examples.concatenate([])
    with pytest.raises(ValueError, match=r"Part 1 .* field 'x' is missing"):
        Examples.concatenate([examples(2), Examples({"y": np.zeros(2, np.int32)})])


def test_population_from_split_is_lazy_and_ordered():
    population = Population.from_split(examples(6), {"b": np.array([5, 0]), "a": np.array([1]), "c": np.array([], int)})
    assert population.ids == ("b", "a", "c") == tuple(population)
    assert len(population) == 3 and "a" in population and "z" not in population
    assert population.sizes() == {"b": 2, "a": 1, "c": 0}
    assert population["b"].fields["y"].tolist() == [5, 0]
    assert population["b"] is not population["b"]
    assert [user for user, held in population.items() if len(held)] == ["b", "a"]
    assert population.spec() == examples(1).spec()


def test_a_population_survives_pickling():
    population = Population.from_split(examples(4), {"a": np.array([2])})
    assert pickle.loads(pickle.dumps(population))["a"].fields["y"].tolist() == [2]


def test_a_hundred_thousand_users_cost_little():
    made = []
    population = Population(
        dict.fromkeys(map(str, range(100_000)), 2), lambda u: made.append(u) or examples(2), spec=examples(2).spec()
    )
    assert len(population) == 100_000 and not made
    population["77"]
    assert made == ["77"]


def test_population_from_arrays():
    population = Population.from_arrays({"a": {"x": np.zeros((2, 3))}, "b": Examples({"x": np.ones((1, 3))})})
    assert population.sizes() == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    ("b", "says"),
    [
        ({"x": np.zeros((2, 4))}, r"User 'b' .* 'a': field 'x' is float64 \(4,\), expected float64 \(3,\)"),
        ({"x": np.zeros((2, 3), np.float32)}, "field 'x' is float32"),
        ({"z": np.zeros((2, 3))}, "field 'x' is missing"),
        ({"x": np.zeros((2, 3)), "z": np.zeros(2)}, "field 'z' is not expected"),
        ({"x": np.zeros((2, 3)), "z": np.zeros(3)}, "User 'b': Expected fields of one length"),
    ],
)
def test_users_that_do_not_agree_are_named(b, says):
    with pytest.raises(ValueError, match=says):
        Population.from_arrays({"a": {"x": np.zeros((2, 3))}, "b": b})


def test_bad_populations_are_refused():
    with pytest.raises(ValueError, match="at least one user"):
        Population.from_arrays({})
    with pytest.raises(ValueError, match="at least one user"):
        Population.from_split(examples(2), {})
    with pytest.raises(ValueError, match="at least one character"):
        Population.from_arrays({"": examples(1)})
    with pytest.raises(ValueError, match=r"\[0, 2\) for user 'b', got 2"):
        Population.from_split(examples(2), {"a": np.array([1]), "b": np.array([0, 2])})
    with pytest.raises(KeyError, match="No user 'z' among 1"):
        Population.from_arrays({"a": examples(1)})["z"]


def test_what_is_made_must_be_what_was_said():
    short = Population({"a": 3}, lambda user: examples(2), spec=examples(2).spec())
    with pytest.raises(DataError, match=r"User 'a' .* 2 examples, expected 3"):
        short["a"]
    other = Population({"a": 2}, lambda user: examples(2), spec={"x": ((2, 3), "float32")})
    with pytest.raises(DataError, match=r"User 'a' .* field 'y'"):
        other["a"]
