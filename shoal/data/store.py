"""What devices hold: `Examples`, and a `Population` of users who each hold some.

`Examples` is named arrays of one length, in memory or memory-mapped; it is no data frame (numbers only, no
missing values) and knows nothing of batches (`batch.py`) or files (`disk.py`). `Population` maps user ids to
examples and makes them when asked: 100,000 users over one array cost their index lists, nothing else. Nothing
is kept of what was handed out, so hold on to examples that are needed twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from shoal.errors import DataError

Spec = dict[str, tuple[tuple[int, ...], str]]
"""What one example looks like: field -> (shape without the leading dim, dtype name)."""

Layout = Mapping[str, tuple[tuple[int, ...], np.dtype]]
"""What arrays look like before they are read: field -> (whole shape, dtype)."""

_NOT_NUMBERS = {"O": "Python objects", "U": "text", "S": "bytes", "M": "dates", "m": "time spans"}


@final
@dataclass(frozen=True, eq=False)
class Examples:
    """Named arrays whose leading dim counts examples.

    Example:
        >>> Examples({"image": np.zeros((3, 8, 8, 1), np.uint8), "label": np.zeros(3, np.int32)}).spec()
        {'image': ((8, 8, 1), 'uint8'), 'label': ((), 'int32')}
    """

    fields: dict[str, np.ndarray]
    """Field name -> array (N, ...) of numbers, all with the same N; memory-mapped arrays stay so."""

    def __post_init__(self) -> None:
        """Checks the arrays.

        Raises:
            TypeError: A field is no array.
            ValueError: No field, no leading dim, unequal lengths, or a dtype that is not a number.
        """
        for name, array in self.fields.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(f"Expected field {name!r} to be a NumPy array, got {type(array).__name__}.")
        num_examples({name: (array.shape, array.dtype) for name, array in self.fields.items()})
        object.__setattr__(self, "fields", {name: _native(array) for name, array in self.fields.items()})

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def take(self, indices: np.ndarray | Sequence[int] | slice) -> dict[str, np.ndarray]:
        """Returns the arrays at these indices.

        Args:
            indices: Integers of any shape S in [-N, N), or a slice.

        Returns:
            Field -> array (*S, ...); a copy, except that a slice gives a view.

        Raises:
            ValueError: The indices are not integers (a mask is not an index: use `np.flatnonzero`).
            IndexError: An index is out of range.
        """
        where = indices if isinstance(indices, slice) else _as_indices(indices)
        return {name: array[where] for name, array in self.fields.items()}

    def spec(self) -> Spec:
        """Field -> (shape of one example, dtype name)."""
        return {name: (array.shape[1:], array.dtype.name) for name, array in self.fields.items()}

    @staticmethod
    def concatenate(parts: Sequence["Examples"]) -> "Examples":
        """Joins examples of one spec, in order.

        Raises:
            ValueError: No parts, or parts that do not agree; the message names the part and the field.
        """
        if not parts:
            raise ValueError("Expected at least one Examples to concatenate, got none.")
        spec = parts[0].spec()
        for number, part in enumerate(parts):
            if problem := difference(part.spec(), spec):
                raise ValueError(f"Part {number} does not agree with part 0: {problem}.")
        return Examples({name: np.concatenate([part.fields[name] for part in parts]) for name in spec})


@final
class Population:
    """An ordered mapping from user id to `Examples`, made when asked for.

    Most callers want `from_split`, `from_arrays` or `disk.open_population`.
    """

    def __init__(self, sizes: Mapping[str, int], fetch: Callable[[str], Examples], *, spec: Spec) -> None:
        """Describes a population without making any of it.

        Args:
            sizes: User id -> number of examples, in the order of the population. Zero is allowed.
            fetch: Makes the examples of one user id. Kept, called at each access, never called here.
            spec: What every user's examples look like.

        Raises:
            ValueError: No users, or an empty id.
        """
        if not sizes:
            raise ValueError("Expected at least one user, got none.")
        if "" in sizes:
            raise ValueError("Expected user ids of at least one character, got ''.")
        self._sizes, self._fetch, self._spec = dict(sizes), fetch, spec

    @staticmethod
    def from_split(examples: Examples, split: Mapping[str, np.ndarray]) -> "Population":
        """A population whose users hold parts of one array; see `split.py`.

        Args:
            examples: All examples, N of them.
            split: User id -> indices (n,) in [0, N). Parts may overlap.

        Raises:
            ValueError: No users, or an index out of range; the message names the user.
        """
        _check_range(split, len(examples))
        sizes = {user: len(indices) for user, indices in split.items()}
        return Population(sizes, _SplitView(examples, split), spec=examples.spec())

    @staticmethod
    def from_arrays(users: Mapping[Any, Examples | Mapping[str, np.ndarray]]) -> "Population":
        """A population whose examples are at hand: user id (text or number) -> examples, or its arrays by field.

        Raises:
            ValueError: No users, or examples that do not agree; the message names the user and the field.
        """
        if not users:
            raise ValueError("Expected at least one user, got none.")
        made = {str(user): _as_examples(str(user), given) for user, given in users.items()}
        first = next(iter(made))
        for user, examples in made.items():
            if problem := difference(examples.spec(), made[first].spec()):
                raise ValueError(f"User {user!r} does not agree with user {first!r}: {problem}.")
        return Population({u: len(e) for u, e in made.items()}, made.__getitem__, spec=made[first].spec())

    def whole(self) -> tuple[Examples, Mapping[str, np.ndarray]] | None:
        """The one array that all users hold parts of, and user id -> indices; None where there is none such."""
        return (self._fetch.examples, self._fetch.split) if isinstance(self._fetch, _SplitView) else None

    @property
    def ids(self) -> tuple[str, ...]:
        """The user ids, in order."""
        return tuple(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {dtype}{list(shape)}" for name, (shape, dtype) in self._spec.items())
        return f"Population({len(self):,} users, {sum(self._sizes.values()):,} examples of {fields})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __contains__(self, user: object) -> bool:
        return user in self._sizes

    def __getitem__(self, user: str) -> Examples:
        """Makes the examples of a user.

        Raises:
            KeyError: No such user.
            DataError: What was made is not what the population said (a file changed, for instance).
        """
        if user not in self._sizes:
            raise KeyError(f"No user {user!r} among {len(self)}; the first is {next(iter(self))!r}.")
        examples = self._fetch(user)
        problem = difference(examples.spec(), self._spec)
        if not problem and len(examples) != self._sizes[user]:
            problem = f"it has {len(examples)} examples, expected {self._sizes[user]}"
        if problem:
            raise DataError(f"User {user!r} is not as described: {problem}. Open the population again.")
        return examples

    def items(self) -> Iterator[tuple[str, Examples]]:
        """Every user id with its examples, made one at a time."""
        return ((user, self[user]) for user in self)

    def sizes(self) -> dict[str, int]:
        """User id -> number of examples, in order; makes no examples."""
        return dict(self._sizes)

    def spec(self) -> Spec:
        """Field -> (shape of one example, dtype name), the same for every user."""
        return dict(self._spec)


def num_examples(layout: Layout) -> int:
    """Returns the common length of arrays, given only what they look like.

    Raises:
        ValueError: No field, no leading dim, unequal lengths, or a dtype that is not a number.
    """
    if not layout:
        raise ValueError("Expected at least one field, got none.")
    for name, (shape, dtype) in layout.items():
        if dtype.kind in _NOT_NUMBERS or dtype.names:
            kind = _NOT_NUMBERS.get(dtype.kind, "records")
            raise ValueError(f"Expected numbers in field {name!r}, got {kind} ({dtype}). Encode them first.")
        if not shape:
            raise ValueError(f"Expected field {name!r} to have a leading dim of examples, got one number.")
    lengths = {name: shape[0] for name, (shape, _) in layout.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"Expected fields of one length, got {lengths}.")
    return next(iter(lengths.values()))


def difference(spec: Spec, expected: Spec) -> str:
    """Says the first thing in which two specs differ, naming the field; '' when they agree."""
    if missing := expected.keys() - spec.keys():
        return f"field {min(missing)!r} is missing"
    if extra := spec.keys() - expected.keys():
        return f"field {min(extra)!r} is not expected (fields: {', '.join(expected)})"
    for name, (shape, dtype) in spec.items():
        if (shape, dtype) != expected[name]:
            wanted_shape, wanted_dtype = expected[name]
            return f"field {name!r} is {dtype} {shape}, expected {wanted_dtype} {wanted_shape}"
    return ""


@dataclass(frozen=True, eq=False)
class _SplitView:
    """Makes a user's part of one `Examples`; a class rather than a closure so that it can be pickled."""

    examples: Examples
    split: Mapping[str, np.ndarray]

    def __call__(self, user: str) -> Examples:
        return Examples(self.examples.take(self.split[user]))


def _as_examples(user: str, given: Examples | Mapping[str, np.ndarray]) -> Examples:
    try:
        return given if isinstance(given, Examples) else Examples(dict(given))
    except ValueError as error:
        raise ValueError(f"User {user!r}: {error}") from error


def _as_indices(indices: np.ndarray | Sequence[int]) -> np.ndarray:
    where = np.asarray(indices)
    if where.dtype.kind not in "iu" and where.size:
        raise ValueError(f"Expected integer indices, got {where.dtype}. For a mask, pass np.flatnonzero(mask).")
    return where.astype(np.intp, copy=False)


def _native(array: np.ndarray) -> np.ndarray:
    """Arrays in the other byte order are copied: accelerators and `Spec` know only the machine's own."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _check_range(split: Mapping[str, np.ndarray], length: int) -> None:
    """One pass over all indices at once; the culprit is looked for only on failure."""
    everything = np.concatenate([_as_indices(indices) for indices in split.values()]) if split else np.zeros(0)
    if not everything.size or (everything.min() >= 0 and everything.max() < length):
        return
    for user, indices in split.items():
        wrong = [int(i) for i in indices if not 0 <= i < length]
        if wrong:
            raise ValueError(f"Expected indices in [0, {length}) for user {user!r}, got {wrong[0]}.")
