import io
import lzma
import pickle
import sys
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from shoal.data import pickled
from shoal.errors import DataError


def objects(value: object) -> bytes:
    """A `.npy` of one Python object, as NumPy writes it."""
    file = io.BytesIO()
    np.save(file, np.array(value, dtype=object), allow_pickle=True)
    return file.getvalue()


class Trap:
    """Unpickled plainly, it calls what it likes."""

    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("trapped",))


class _Frame:
    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._mgr = _Blocks(columns)


class _Blocks:
    def __init__(self, columns: dict[str, np.ndarray]) -> None:
        self._columns = columns

    def __reduce__(self) -> tuple[object, ...]:
        blocks = tuple(_Block(column, place) for place, column in enumerate(self._columns.values()))
        return _Blocks, (blocks, [_Labels(list(self._columns)), _Labels([])])


class _Block:
    def __init__(self, column: np.ndarray, place: int) -> None:
        self._made = column[None], slice(place, place + 1), 2

    def __reduce__(self) -> tuple[object, ...]:
        return _unpickle_block, self._made


class _Labels:
    def __init__(self, names: list[str]) -> None:
        self._names = names

    def __reduce__(self) -> tuple[object, ...]:
        return _new_Index, (_Index, {"data": self._names})


class _Index: ...


def _unpickle_block() -> None: ...


def _new_Index() -> None: ...


@pytest.fixture
def pandas_like(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """Pickles a table as pandas does, under pandas' names: the package itself is not needed."""
    homes = {
        _Frame: "pandas.core.frame.DataFrame", _Blocks: "pandas.core.internals.managers.BlockManager",
        _Index: "pandas.core.indexes.base.Index", _new_Index: "pandas.core.indexes.base._new_Index",
        _unpickle_block: "pandas._libs.internals._unpickle_block",
    }  # fmt: skip
    for made, path in homes.items():
        module, _, name = path.rpartition(".")
        for end in (at for at, letter in enumerate(f"{module}.") if letter == "."):
            if (package := module[:end]) not in sys.modules:
                monkeypatch.setitem(sys.modules, package, ModuleType(package))
        monkeypatch.setattr(sys.modules[module], name, made, raising=False)
        made.__module__, made.__qualname__, made.__name__ = module, name, name
    return lambda **columns: lzma.compress(pickle.dumps(_Frame(columns)))


def test_tables_come_out_as_columns(pandas_like: Callable[..., bytes]) -> None:
    made = pickled.read_table(pandas_like(x=np.array([1.5, 2.5]), name=np.array(["a", "b"], object)))
    assert {name: column.tolist() for name, column in made.items()} == {"x": [1.5, 2.5], "name": ["a", "b"]}


def test_objects_come_out_as_arrays_lists_and_dictionaries() -> None:
    raw = objects({"X": [np.arange(6.0).reshape(3, 2)], "y": np.array([1, 2])})
    made = pickled.read_objects(raw)
    assert made["X"][0].tolist() == [[0, 1], [2, 3], [4, 5]] and made["y"].tolist() == [1, 2]


def test_nothing_is_called_that_data_does_not_need(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"asks for builtins.print, which no data needs"):
        pickled.read_objects(objects({"X": Trap()}))
    with pytest.raises(DataError, match=r"asks for builtins.print"):
        pickled.read_table(lzma.compress(pickle.dumps(Trap())))
    assert capsys.readouterr().out == ""


class Made:
    """Pickled, it is a call with a state, whatever they are."""

    def __init__(self, *made: object) -> None:
        self._made = made

    def __reduce__(self) -> tuple[object, ...]:
        return self._made


_MAKE = np.array([0]).__reduce__()[0]
_POINTER = (4096).to_bytes(8, "little")
_HIDDEN = Made(np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0))
"""A record of one object that says of itself that it has none."""


def array(*state: object) -> Made:
    return Made(_MAKE, (np.ndarray, (0,), b"b"), (1, *state))


@pytest.mark.parametrize(
    ("trap", "says"),
    [
        (Made(np.ndarray, ((1,), np.dtype("O"), _POINTER)), "must come with its state"),
        (array((1,), np.dtype("O"), False, _POINTER), "expected list to fill"),
        (array((9,), np.dtype("O"), False, [1]), "expected list to fill"),
        (array((9,), np.dtype("i8"), False, _POINTER), "expected bytes to fill"),
        (array((-1,), np.dtype("i8"), False, b""), "expected a shape"),
        (array((1,), _HIDDEN, False, _POINTER), "numbers or objects"),
        (array((1,), Made(np.dtype, ("O8",), (3, "|", None, ("a",), {}, 8, 1, 0)), False, [1]), "got records"),
        (np.array(["text"]), "numbers or objects, got 'U4'"),
    ],
)
def test_bytes_are_never_taken_for_objects(trap: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        pickled.read_objects(objects({"X": trap}))


def test_arrays_come_out_plain_in_either_byte_order() -> None:
    nested = np.empty(2, object)
    nested[:] = [np.arange(3, dtype=">i4"), {"deep": np.ones((2, 2), order="F")}]
    made = pickled.read_objects(objects({"X": nested}))["X"]
    assert type(made) is type(made[0]) is type(made[1]["deep"]) is np.ndarray
    assert made[0].tolist() == [0, 1, 2] and made[1]["deep"].tolist() == [[1, 1], [1, 1]]


def test_what_holds_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(DataError, match="recursion"):
        pickled.read_objects(objects({"X": endless}))


@pytest.mark.parametrize("raw", [b"", b"rubbish", objects([1])[:-4]])
def test_broken_files_are_data_errors(raw: bytes) -> None:
    with pytest.raises(DataError, match=r"Expected a \.npy"):
        pickled.read_objects(raw)
    with pytest.raises(DataError, match="Expected a pickled table"):
        pickled.read_table(raw)
    with pytest.raises(DataError, match="Expected a pickled table"):
        pickled.read_table(lzma.compress(raw))
