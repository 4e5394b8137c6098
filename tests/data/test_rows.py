"""Populations of data sets that give one example at a time."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from shoal.data import from_dataset, from_hugging_face
from shoal.errors import DataError


class Tensor:
    """What PyTorch gives, as far as NumPy sees it."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values if dtype is None else self._values.astype(dtype)


class Pictures:
    """A data set in PyTorch's way."""

    def __init__(self, count: int = 6) -> None:
        self.count, self.asked = count, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked += 1
        return Tensor(np.full((2, 2), index, np.float32)), index % 3


def test_tuples_by_index_lists_are_made_when_asked_for() -> None:
    pictures = Pictures()
    made = from_dataset(pictures, users={"ben": [1, 2, 5], "ann": np.array([0]), "nobody": []})
    assert pictures.asked == 1
    assert made.sizes() == {"ben": 3, "ann": 1, "nobody": 0}
    assert made.spec() == {"image": ((2, 2), "float32"), "label": ((), "int32")}
    fields = made["ben"].fields
    assert fields["image"][:, 0, 0].tolist() == [1, 2, 5] and fields["label"].tolist() == [1, 2, 2]
    assert pictures.asked == 4 and len(made["nobody"]) == 0


def test_mappings_by_function_or_by_list() -> None:
    rows = [{"who": who, "x": np.float32(number)} for number, who in enumerate(["b", "a", "b"])]

    @dataclass
    class Rows:
        with_who: bool

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            return rows[index] if self.with_who else {"x": rows[index]["x"]}

    class Asked(Rows):
        pass

    numbered = from_dataset(Rows(False), users=np.array([10, 9, 10]))
    assert numbered.sizes() == {"10": 2, "9": 1} and numbered["10"].fields["x"].tolist() == [0, 2]
    by_function = from_dataset(Pictures(), users=lambda example: f"class {example[1]}")
    assert by_function.sizes() == {f"class {label}": 2 for label in range(3)}
    with pytest.raises(DataError, match="Field 'who' of example 1 is str, expected numbers"):
        from_dataset(Asked(True), users={"a": [1]})


def test_mistakes_are_named() -> None:
    class Uneven(Pictures):
        def __getitem__(self, index: int) -> tuple[Any, int]:
            return np.zeros(index + 1), 0

    with pytest.raises(
        DataError, match=r"Example 1 of the data set is not like the first: field 'image' is float64 \(2,\)"
    ):
        from_dataset(Uneven(), users={"a": [0, 1]})["a"]
    with pytest.raises(
        DataError, match=r"Example 0 of the data set has 2 values, expected one for each of fields=\(x\)"
    ):
        from_dataset(Pictures(), users={"a": [0]}, fields=("x",))
    with pytest.raises(ValueError, match=r"Expected indices in \[0, 6\) for user 'a', got 6"):
        from_dataset(Pictures(), users={"a": [0, 6]})
    with pytest.raises(ValueError, match="a user for each of 6 examples, got 1"):
        from_dataset(Pictures(), users=["a"])
    with pytest.raises(DataError, match=r"user of example 0 to be text or an integer, got 0.5"):
        from_dataset(Pictures(), users=lambda example: 0.5)
    with pytest.raises(ValueError, match="at least one example"):
        from_dataset(Pictures(0), users=[])
    with pytest.raises(ValueError, match="at least one user"):
        from_dataset(Pictures(), users={})


class Columns:
    """As much of `datasets.Dataset` as is used."""

    def __init__(self, columns: dict[str, list[Any]], format: str | None = None) -> None:
        self._columns, self._format = columns, format

    @classmethod
    def from_dict(cls, columns: dict[str, list[Any]]) -> "Columns":
        return cls(columns)

    @property
    def column_names(self) -> list[str]:
        return list(self._columns)

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def select_columns(self, names: list[str]) -> "Columns":
        return Columns({name: self._columns[name] for name in names}, self._format)

    def with_format(self, format: str | None) -> "Columns":
        return Columns(self._columns, format)

    def __getitem__(self, index: Any) -> dict[str, Any]:
        rows = range(len(self))[index] if isinstance(index, slice) else index
        return {name: self._values([column[row] for row in rows]) for name, column in self._columns.items()}

    def _values(self, values: list[Any]) -> Any:
        if self._format is None:
            return values
        try:
            return np.array(values)
        except ValueError:
            return np.array([np.array(value) for value in values], object)


@pytest.fixture(params=["stand-in", "datasets"])
def of_columns(request: pytest.FixtureRequest) -> Any:
    """Makes a data set: the real library's where it is installed."""
    if request.param == "stand-in":
        return Columns.from_dict
    return pytest.importorskip("datasets").Dataset.from_dict


def test_hugging_face_by_column(of_columns: Any) -> None:
    given = {"who": ["b", "a", "b"], "x": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], "y": [0, 1, 2], "text": ["p", "q", "r"]}
    made = from_hugging_face(of_columns(given), user="who", fields={"vector": "x", "label": "y"})
    assert made.sizes() == {"a": 1, "b": 2} and list(made.spec()) == ["vector", "label"]
    assert made["b"].fields["vector"].tolist() == [[1, 2], [5, 6]] and made["b"].fields["label"].tolist() == [0, 2]
    numbered = from_hugging_face(of_columns({"user": [7, 7, 8], "y": [1, 2, 3]}))
    assert numbered.sizes() == {"7": 2, "8": 1} and numbered["8"].fields["y"].tolist() == [3]


def test_hugging_face_mistakes_are_named(of_columns: Any) -> None:
    good = {"user": ["a", "a", "b"], "x": [1, 2, 3]}
    with pytest.raises(DataError, match="no column 'who'; it has user, x"):
        from_hugging_face(of_columns(good), user="who")
    with pytest.raises(TypeError, match=r"got dict. Choose one of its splits: train"):
        from_hugging_face({"train": of_columns(good)})
    with pytest.raises(TypeError, match=r"Expected a datasets.Dataset, got list"):
        from_hugging_face([1])
    with pytest.raises(DataError, match="at least one row and one column"):
        from_hugging_face(of_columns({"user": ["a"]}))
    with pytest.raises(DataError, match=r"Column 't' .* row 0 of user 'a' is .*p"):
        from_hugging_face(of_columns({"user": ["a"], "t": ["p"]}))
    ragged = of_columns({"user": ["a", "a", "b"], "x": [[1, 2], [1, 2, 3], [4, 5]]})
    with pytest.raises(DataError, match=r"Column 'x' .* row 1 of user 'a' is shape \(3,\), the user's first \(2,\)"):
        from_hugging_face(ragged)
    with pytest.raises(
        DataError, match="Column 'user': Expected the user of example 1 to be text or an integer, got None"
    ):
        from_hugging_face(of_columns({"user": ["a", None], "x": [1, 2]}))


def test_the_real_library_maps_its_files(tmp_path: Any) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"user": ["a", "b"], "x": [1, 2]}).save_to_disk(tmp_path / "kept")
    made = from_hugging_face(importlib.import_module("datasets").load_from_disk(tmp_path / "kept"))
    assert made["b"].fields["x"].tolist() == [2]
