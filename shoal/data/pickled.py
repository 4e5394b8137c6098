"""Numbers out of pickled arrays and tables, without doing what a pickle asks for.

Some packages carry their data as a pickle of NumPy arrays or of one pandas table. A pickle names functions to call; here
it gets only stand-ins of ours, a dozen, that build arrays and do nothing else, and any other name is refused. NumPy's own
types are not among them: fed by hand, they take bytes for pointers. Nothing of pandas is imported. shoal itself writes no
pickles, and the files read so are checked by hash before.

References:
    Python library, `pickle`, "Restricting Globals"; NumPy, `numpy.lib.format` (the header before an object array).
"""

import io
import lzma
import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import DataError


def read_table(packed: bytes) -> dict[str, np.ndarray]:
    """The columns of a pandas table, pickled and packed with xz: name -> array (N,); text comes as objects.

    Raises:
        DataError: it is no such file, or it asks for more than a table needs.
    """
    try:
        frame = _Reader(io.BytesIO(lzma.decompress(packed))).load()
        return _columns(frame.state["_mgr"])
    except _BROKEN as error:
        raise DataError(f"Expected a pickled table packed with xz: {error}.") from error


def read_objects(raw: bytes) -> Any:
    """What a `.npy` of one Python object holds: arrays, lists and dictionaries of them.

    Raises:
        DataError: it is no such file, or it asks for more than arrays need.
    """
    file = io.BytesIO(raw)
    try:
        if np.lib.format.read_magic(file) != (1, 0) or np.lib.format.read_array_header_1_0(file)[2] != np.dtype("O"):
            raise ValueError("it is no .npy 1.0 of objects")
        return _plain(_Reader(file, encoding="latin1").load().item())
    except _BROKEN as error:
        raise DataError(f"Expected a .npy of Python objects: {error}.") from error


_BROKEN = (
    pickle.UnpicklingError, lzma.LZMAError, ValueError, TypeError, LookupError, AttributeError, EOFError, OverflowError,
    MemoryError, RecursionError,
)  # fmt: skip


@dataclass
class _Frame:
    """In place of a table: keeps what it was made of."""

    state: Mapping[str, Any] | None = None

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.state = state


@dataclass(frozen=True)
class _Blocks:
    """In place of pandas' block manager: blocks (values (k, N), which columns), and the labels of both dims."""

    blocks: tuple[tuple[np.ndarray, Any], ...]
    axes: list[Any]


def _columns(made: _Blocks) -> dict[str, np.ndarray]:
    names = [str(name) for name in made.axes[0]]
    found = {}
    for values, placement in made.blocks:
        places = range(len(names))[placement] if isinstance(placement, slice) else placement
        found.update({names[int(place)]: row for place, row in zip(places, values, strict=True)})
    return {name: _plain(found[name]) for name in names}


def _plain(value: Any) -> Any:
    """The value with arrays as arrays, in dictionaries, lists and arrays of objects too."""
    if isinstance(value, np.ndarray):
        made = np.asarray(value)
        if made.dtype.hasobject:
            made[...] = np.fromiter((_plain(each) for each in made.flat), object, made.size).reshape(made.shape)
        return made
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


class _Dtype:
    """In place of a dtype: numbers and objects. The state of NumPy's own may say of objects that they are none."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        if not isinstance(code, str) or not re.fullmatch("b1|[iu][1248]|f[248]|O8", code):
            raise ValueError(f"expected arrays of numbers or objects, got {str(code)[:40]!r}")
        self.made = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _, order, base, names, fields, *_ = state
        if order not in ("<", ">", "|", "=") or (base, names, fields) != (None, None, None):
            raise ValueError("expected arrays of numbers or objects, got records")
        self.made = self.made.newbyteorder(order)


class _Array(np.ndarray):
    """An array that is filled with as many bytes or objects as it has room for."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, values = state
        made: np.dtype[Any] = dtype.made
        kind, size = (list, 1) if made.hasobject else (bytes, made.itemsize)
        if type(values) is not kind or len(values) != size * _count(shape):
            raise ValueError(f"expected {kind.__name__} to fill {shape} of {made}")
        # The stub asks for a bool of NumPy, which NumPy refuses.
        super().__setstate__((1, shape, made, bool(is_fortran), values))  # type: ignore[arg-type]


def _count(shape: Any) -> int:
    if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"expected a shape, got {shape!r}"[:100])
    return math.prod(shape)


def _empty(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An array that its state is then put into."""
    return np.empty(0, np.int8).view(_Array)


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    # Of objects, NumPy makes none from bytes.
    return np.frombuffer(raw, dtype.made).reshape(shape, order=order)


def _not_made(*given: Any) -> Any:
    """In place of a type that is only named, never called."""
    raise ValueError("an array must come with its state")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _block(values: np.ndarray, placement: Any, ndim: int) -> tuple[np.ndarray, Any]:
    return values, placement


def _labels(kind: Any, state: Mapping[str, Any]) -> Any:
    return state.get("data", ())


_ALLOWED: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("builtins", "slice"): slice,
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _not_made,
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.multiarray", "_reconstruct"): _empty,  # the same two as NumPy 2 calls them
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("pandas._libs.internals", "_unpickle_block"): _block,
    ("pandas.core.frame", "DataFrame"): _Frame,
    ("pandas.core.indexes.base", "Index"): tuple,
    ("pandas.core.indexes.base", "_new_Index"): _labels,
    ("pandas.core.indexes.range", "RangeIndex"): range,
    ("pandas.core.internals.managers", "BlockManager"): _Blocks,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data needs")
        return _ALLOWED[module, name]
