"""Populations from data sets that give one example at a time: PyTorch's, Hugging Face's, any with a length and an index.

    from_dataset(dataset, users=lambda example: example["writer"])       any object with __len__ and __getitem__
    from_dataset(dataset, users={"anna": [0, 1], "ben": [2]})
    from_hugging_face(dataset, user="writer")                            datasets.Dataset, of its columns

Neither PyTorch nor `datasets` is imported here: who has such a data set has its library. What is kept is the list of each
user's examples; the examples are made when a user is asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from shoal.data.split import by_user
from shoal.data.store import Examples, Population, Spec, difference
from shoal.errors import DataError

_ROWS_AT_ONCE = 1 << 16


@runtime_checkable
class Rows(Protocol):
    """A data set in PyTorch's way ("map-style"): example number -> what it is."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def from_dataset(
    dataset: Rows,
    *,
    users: Callable[[Any], object] | Mapping[str, Sequence[int]] | Sequence[object] | np.ndarray,
    fields: Sequence[str] = ("image", "label"),
) -> Population:
    """A population from any data set with a length and an index.

    Args:
        dataset: Of N examples: mappings, or tuples (one value for each of `fields`); values are numbers or arrays (or
            tensors) of one shape and type. Python's int becomes int32, its float float32.
        users: Whose each example is: a function of the example (asked once for each, at the beginning), the users of the
            N examples in order, or user -> numbers of examples in [0, N).
        fields: Names of a tuple's values.

    Raises:
        ValueError: No examples or users, or an index out of range.
        DataError: An example that is not like the first; the message names its number and the field.
    """
    count = len(dataset)
    if not count:
        raise ValueError("Expected a data set of at least one example, got none.")
    split = _split(dataset, count, users)
    if not split:
        raise ValueError("Expected at least one user, got none.")
    first = next((int(indices[0]) for indices in split.values() if len(indices)), 0)
    spec = spec_of(_example(dataset, fields, first))
    view = _RowsView(dataset, split, tuple(fields), spec)
    return Population({user: len(indices) for user, indices in split.items()}, view, spec=spec)


def from_hugging_face(dataset: Any, *, user: str = "user", fields: Mapping[str, str] | None = None) -> Population:
    """A population from a data set of Hugging Face's library `datasets`.

    Args:
        dataset: A `datasets.Dataset` (a split, such as `load_dataset(…)["train"]`), in memory or memory-mapped.
        user: The column that names the user: text or integers.
        fields: Field name -> column of numbers, or of lists or pictures of one size; None takes all other columns.

    Raises:
        TypeError: Not such a data set (a dictionary of splits, for instance).
        DataError: A column that is missing or cannot be used; the message names it, and the row where it can.
    """
    if isinstance(dataset, Mapping) or not hasattr(dataset, "column_names") or not hasattr(dataset, "with_format"):
        hint = f" Choose one of its splits: {', '.join(map(str, dataset))}." if isinstance(dataset, Mapping) else ""
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}.{hint}")
    chosen = dict(fields) if fields is not None else {name: name for name in dataset.column_names if name != user}
    for column in (user, *chosen.values()):
        if column not in dataset.column_names:
            raise DataError(f"The data set has no column {column!r}; it has {', '.join(dataset.column_names)}.")
    if not chosen or not len(dataset):
        raise DataError("Expected at least one row and one column besides the user's.")
    split = _columns_users(dataset, user)
    view = _ColumnsView(
        dataset.select_columns(list(dict.fromkeys(chosen.values()))).with_format("numpy"), split, chosen
    )
    spec = view(next(iter(split))).spec()
    return Population({name: len(indices) for name, indices in split.items()}, view, spec=spec)


def _split(dataset: Rows, count: int, users: Any) -> dict[str, np.ndarray]:
    if isinstance(users, Mapping):
        split = {str(user): np.asarray(indices, np.int64).reshape(-1) for user, indices in users.items()}
        for user, indices in split.items():
            if wrong := [int(index) for index in indices if not 0 <= index < count]:
                raise ValueError(f"Expected indices in [0, {count}) for user {user!r}, got {wrong[0]}.")
        return split
    if callable(users):
        return _grouped(_name(users(dataset[number]), number) for number in range(count))
    if len(users) != count:
        raise ValueError(f"Expected a user for each of {count} examples, got {len(users)}.")
    return _grouped(_name(user, number) for number, user in enumerate(users))


def _grouped(names: Iterable[str]) -> dict[str, np.ndarray]:
    """User -> numbers of examples, users in order of name; 8 bytes an example."""
    found: dict[str, int] = {}
    owner = np.fromiter((found.setdefault(name, len(found)) for name in names), np.int64)
    parts = by_user(owner)
    return {name: parts[str(found[name])] for name in sorted(found)}


def _name(user: object, number: int) -> str:
    plain = user.item() if hasattr(user, "item") else user
    if isinstance(plain, bytes):
        plain = plain.decode(errors="replace")
    if isinstance(plain, bool) or not isinstance(plain, str | int) or plain == "":
        raise DataError(f"Expected the user of example {number} to be text or an integer, got {plain!r}.")
    return str(plain)


@dataclass(frozen=True)
class _RowsView:
    """Makes a user's examples when asked; a class rather than a closure so that it can be pickled."""

    dataset: Rows
    split: dict[str, np.ndarray]
    fields: tuple[str, ...]
    spec: Spec

    def __call__(self, user: str) -> Examples:
        indices = self.split[user].tolist()
        rows = ((f"Example {index} of the data set", _example(self.dataset, self.fields, index)) for index in indices)
        return stacked(rows, len(indices), self.spec, like="the first")


def stacked(rows: Iterable[tuple[str, Mapping[str, np.ndarray]]], count: int, spec: Spec, *, like: str) -> Examples:
    """So many rows, each with what it is called in an error, as one; DataError at the first that is not as `like`."""
    made = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in spec.items()}
    for place, (what, row) in enumerate(rows):
        if problem := difference(spec_of(row), spec):
            raise DataError(f"{what} is not like {like}: {problem}.")
        for name, array in row.items():
            made[name][place] = array
    return Examples(made)


def spec_of(row: Mapping[str, np.ndarray]) -> Spec:
    """What an example looks like, by one of them."""
    return {name: (array.shape, array.dtype.name) for name, array in row.items()}


def _example(dataset: Rows, fields: Sequence[str], index: int) -> dict[str, np.ndarray]:
    given = dataset[index]
    if not isinstance(given, Mapping):
        values = tuple(given) if isinstance(given, tuple | list) else (given,)
        if len(values) != len(fields):
            raise DataError(
                f"Example {index} of the data set has {len(values)} values, expected one for each of fields="
                f"({', '.join(fields)}). Name them with fields=."
            )
        given = dict(zip(fields, values, strict=True))
    return {str(name): _array(value, str(name), index) for name, value in given.items()}


def _array(value: Any, field: str, index: int) -> np.ndarray:
    array = np.asarray(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        array = array.astype(np.int32 if isinstance(value, int) else np.float32)
    if array.dtype.kind not in "biuf":
        raise DataError(
            f"Field {field!r} of example {index} is {type(value).__name__}, expected numbers. Encode it, or leave it out."
        )
    return array


def _columns_users(dataset: Any, user: str) -> dict[str, np.ndarray]:
    """Reads the one column, a part at a time."""
    column = dataset.select_columns([user]).with_format(None)

    def names() -> Iterable[str]:
        for start in range(0, len(column), _ROWS_AT_ONCE):
            for number, value in enumerate(column[start : start + _ROWS_AT_ONCE][user], start=start):
                try:
                    yield _name(value, number)
                except DataError as error:
                    raise DataError(f"Column {user!r}: {error}") from error

    return _grouped(names())


@dataclass(frozen=True)
class _ColumnsView:
    dataset: Any
    split: dict[str, np.ndarray]
    fields: Mapping[str, str]

    def __call__(self, user: str) -> Examples:
        rows = self.dataset[self.split[user].tolist()]
        return Examples(
            {field: self._column(np.asarray(rows[column]), user, column) for field, column in self.fields.items()}
        )

    def _column(self, array: np.ndarray, user: str, column: str) -> np.ndarray:
        if array.dtype.kind in "biuf":
            return array
        # Rows of unequal shapes come as objects, text as text: name the first row that is to blame.
        shape = np.shape(array[0])
        for row, value in zip(self.split[user], array, strict=True):
            if np.asarray(value).dtype.kind not in "biuf" or np.shape(value) != shape:
                got = (
                    f"shape {np.shape(value)}, the user's first {shape}"
                    if np.shape(value) != shape
                    else repr(value)[:60]
                )
                raise DataError(
                    f"Column {column!r} of the data set cannot be used: row {row} of user {user!r} is {got}."
                )
        return np.stack([np.asarray(value) for value in array])
