"""Named tensors: the one form in which numbers cross a program's, a file's or a wire's boundary.

`Tensors` is a flat mapping from a name (`params/dense/kernel`) to a NumPy array. A `TensorSpec` says what one of
them is; an `Index` says what a set of them holds, by hash, and has one root over all: it is what a commit and an
update are known by. Bytes are little-endian, C order, nothing else. No pytree, no pickle.

Cost: hashing reads each byte once (SHA-256, 1-2 GB/s with hardware support).
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isfinite, prod
from typing import Any, Final, Literal, Self

import ml_dtypes
import numpy as np

from shoal import validate
from shoal.errors import ProtocolError

Tensors = dict[str, np.ndarray]
"""Name -> array, in the order of the manifest."""

Kind = Literal["dense", "rows"]

DTYPES: Final[dict[str, np.dtype[Any]]] = {
    **{
        name: np.dtype(name)
        for name in (
            "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
        )
    },
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}  # fmt: skip
"""Every element type that may cross a boundary."""
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

MAX_NAME_BYTES: Final = 512
MAX_RANK: Final = 16
MAX_SIZE: Final = 1 << 40
"""Of one dimension."""
MAX_BYTES: Final = 1 << 44
MAX_HEAD_BYTES: Final = 64 << 20
"""Of a frame that is read from a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """What one named tensor is, without its numbers."""

    name: str
    """Path of the tensor, for example `params/conv/kernel`."""
    shape: tuple[int, ...]
    """Sizes of the dimensions; () for a scalar."""
    dtype: str
    """A key of `DTYPES`."""
    kind: Kind = "dense"
    """`dense`, or `rows`: an embedding table of which a member may take only the rows it needs."""
    table: str = ""
    """The table's name where kind is `rows`, else empty."""
    first_use: int = 0
    """Rank of the first operation that reads it: the order in which it should arrive."""
    last_ready: int = 0
    """Rank of the operation that makes it: the order in which it can leave."""

    def __post_init__(self) -> None:
        validate.types(self)
        if not self.name or len(self.name.encode()) > MAX_NAME_BYTES:
            raise ValueError(f"Expected a tensor name of 1 to {MAX_NAME_BYTES} bytes, got {self.name[:80]!r}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"Expected dtype of {self.name} to be one of {' | '.join(DTYPES)}, got {self.dtype!r}.")
        if len(self.shape) > MAX_RANK or not all(0 <= size <= MAX_SIZE for size in self.shape):
            raise ValueError(
                f"Expected at most {MAX_RANK} sizes from 0 to {MAX_SIZE} for {self.name}, got shape {self.shape}."
            )
        validate.between(0, MAX_SIZE, first_use=self.first_use, last_ready=self.last_ready)
        if (self.kind == "rows") != bool(self.table):
            raise ValueError(
                f"Expected {self.name} to name a table if and only if its kind is rows, got {self.table!r}."
            )
        if self.size_bytes > MAX_BYTES:
            raise ValueError(f"Expected {self.name} to have at most {MAX_BYTES} bytes, got {self.size_bytes}.")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return DTYPES[self.dtype]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.numpy_dtype.itemsize

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it back."""
        return {
            "name": self.name, "shape": list(self.shape), "dtype": self.dtype, "kind": self.kind, "table": self.table,
            "first_use": self.first_use, "last_ready": self.last_ready,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` would not have written."""
        fields = {key: value for key, value in data.items() if key != "shape"}
        return cls._of_fields(*data["shape"], **fields)

    @classmethod
    @lru_cache(maxsize=4096, typed=True)
    def _of_fields(cls, *shape: Any, **fields: Any) -> Self:
        """The same few specs are read with every message: each is checked once."""
        return cls(shape=shape, **fields)

    @classmethod
    def of(cls, name: str, array: Any) -> Self:
        """The spec of an array, or of anything with `shape` and `dtype`."""
        return cls._of_fields(*map(int, array.shape), name=name, dtype=dtype_name(np.dtype(array.dtype)))


def dtype_name(dtype: "np.dtype[Any]") -> str:
    """The key of `DTYPES` for a type; the type's own name where there is none."""
    return _DTYPE_NAMES.get(dtype) or dtype.name


def is_of_model(name: str) -> bool:
    """Whether a tensor of a line is the task's own, not one that its local rule added (`control/…`, `clip/log_scale`, `drawn/version`)."""
    return name.split("/", 1)[0] in ("params", "state")


def specs_of(tensors: Mapping[str, Any]) -> tuple[TensorSpec, ...]:
    """The specs of named arrays, in their order."""
    return tuple(TensorSpec.of(name, array) for name, array in tensors.items())


def total_bytes(specs: Iterable[TensorSpec]) -> int:
    """Bytes of all the tensors together."""
    return sum(spec.size_bytes for spec in specs)


def check(tensors: Mapping[str, np.ndarray], specs: Iterable[TensorSpec], *, what: str) -> None:
    """Raises ValueError unless the tensors are exactly those of the specs: names, order, shapes, dtypes."""
    expected = {spec.name: spec for spec in specs}
    if list(tensors) != list(expected):
        missing = [name for name in expected if name not in tensors]
        extra = [name for name in tensors if name not in expected]
        raise ValueError(
            f"Expected {what} to have {len(expected)} tensors in order; missing {missing[:5]}, extra {extra[:5]}."
        )
    for name, spec in expected.items():
        got = tensors[name]
        if got.shape != spec.shape or got.dtype != spec.numpy_dtype:
            raise ValueError(
                f"Expected {what} {name} to be {spec.dtype}{list(spec.shape)}, got {got.dtype}{list(got.shape)}."
            )


def to_bytes(array: np.ndarray) -> bytes:
    """The bytes of an array: little-endian, C order."""
    return bytes(_byte_view(array))


def from_bytes(data: bytes | bytearray | memoryview, spec: TensorSpec) -> np.ndarray:
    """The array that `to_bytes` wrote; read-only. Raises ProtocolError if the length is wrong."""
    if len(data) != spec.size_bytes:
        raise ProtocolError(
            f"Expected {spec.size_bytes} bytes for {spec.name} {spec.dtype}{list(spec.shape)}, got {len(data)}."
        )
    if spec.dtype == "bool" and bytes(data).strip(b"\0\1"):
        raise ProtocolError(f"Expected bytes 0 and 1 for {spec.name}, which is bool.")
    return np.frombuffer(bytes(data), dtype=spec.numpy_dtype).reshape(spec.shape)


def sha256(data: bytes | bytearray | memoryview) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()


_HASH: Final = re.compile("[0-9a-f]{64}")


def check_hash(value: object) -> None:
    """Raises ValueError unless it is a hexadecimal SHA-256: then it is also safe as a file's name."""
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise ValueError(f"Expected a hexadecimal SHA-256, got {repr(value)[:80]}.")


PARSE_ERRORS: Final = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a stranger's JSON into our types may raise."""


def parse_json(data: bytes) -> Any:
    """Strict JSON: NaN, infinities and numbers too large for a float are refused with ValueError."""
    return _DECODER.decode(data.decode())


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    return value if isfinite(value) else _refuse_number(text)


_DECODER: Final = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)
_ENCODER: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_json(value: object) -> bytes:
    """JSON with sorted keys and no spaces: equal values give equal bytes. NaN and infinities are refused."""
    return _ENCODER.encode(value).encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of an index: what it is and the hash of its bytes."""

    spec: TensorSpec
    hash: str

    def __post_init__(self) -> None:
        check_hash(self.hash)


@dataclass(frozen=True)
class Index:
    """What a set of tensors holds, by hash. `root` stands for all of them.

    Format: canonical JSON `{"shoal": "index/1", "tensors": [{…spec, "hash"}, …]}`; the root is its SHA-256.
    """

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, np.ndarray], specs: Iterable[TensorSpec] | None = None) -> Self:
        """The index of tensors, hashed here. With `specs`, their kinds and ranks are kept."""
        chosen = specs_of(tensors) if specs is None else tuple(specs)
        return cls(tuple(Entry(spec, sha256(to_bytes(tensors[spec.name]))) for spec in chosen))

    @cached_property
    def data(self) -> bytes:
        """The index as bytes."""
        return canonical_json(
            {
                "shoal": "index/1",
                "tensors": [{**entry.spec.to_json(), "hash": entry.hash} for entry in self.entries],
            }
        )

    @cached_property
    def root(self) -> str:
        """SHA-256 of the bytes: equal roots mean equal tensors."""
        return sha256(self.data)

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tuple(entry.spec for entry in self.entries)

    @property
    def size_bytes(self) -> int:
        return total_bytes(self.specs)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads what `data` wrote. Raises ProtocolError for anything else."""
        try:
            value = parse_json(data)
            if value["shoal"] != "index/1":
                raise ValueError(f"format is {value['shoal']!r}, this version reads index/1")
            rows = [dict(row) for row in value["tensors"]]
            index = cls(tuple(Entry(hash=row.pop("hash"), spec=TensorSpec.from_json(row)) for row in rows))
            if index.data != data or len({spec.name for spec in index.specs}) != len(index.entries):
                raise ValueError("it is not in canonical form with each name once")
        except PARSE_ERRORS as error:
            raise ProtocolError(f"Expected an index of tensors, got {data[:40]!r}…: {error}.") from error
        return index


def pack(tensors: Mapping[str, np.ndarray], header: Mapping[str, Any] | None = None) -> bytes:
    """One frame: 8 bytes length of the head, the head as JSON (specs and `header`), then each tensor's bytes."""
    return b"".join(frame_parts(tensors, header))


def frame_parts(
    tensors: Mapping[str, np.ndarray], header: Mapping[str, Any] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of `pack`, piece by piece: no copy is made of an array that lies in C order."""
    specs = specs_of(tensors)
    head = canonical_json({"tensors": [spec.to_json() for spec in specs], "header": dict(header or {})})
    yield len(head).to_bytes(8, "little")
    yield head
    for spec in specs:
        yield _byte_view(tensors[spec.name])


def unpack(data: bytes | bytearray | memoryview) -> tuple[Tensors, dict[str, Any]]:
    """Reads a frame of `pack`. Raises ProtocolError unless it is whole and of the right length."""
    view = memoryview(data)
    start = 8 + int.from_bytes(view[:8], "little")
    specs, header = _parse_head(bytes(view[8:start]))
    if start + total_bytes(specs) != len(view):
        raise ProtocolError(f"Expected a frame of {start + total_bytes(specs)} bytes, got {len(view)}.")
    tensors: Tensors = {}
    for spec in specs:
        tensors[spec.name] = from_bytes(view[start : start + spec.size_bytes], spec)
        start += spec.size_bytes
    return tensors, header


def read_frame(fill: Callable[[memoryview], None], *, most_bytes: int) -> tuple[Tensors, dict[str, Any]]:
    """Reads one frame of `pack` from a stream into new arrays: one copy of each in memory, none of the frame.

    Args:
        fill: fills the whole buffer that it is given with the stream's next bytes, or raises.
        most_bytes: of all the tensors together.

    Raises:
        ProtocolError: what comes is no frame, or a larger one. Nothing of that size was allocated.
    """
    specs, header = read_head(fill)
    if total_bytes(specs) > most_bytes:
        raise ProtocolError(f"Expected a frame of at most {most_bytes} bytes, got {total_bytes(specs)}.")
    tensors: Tensors = {}
    for spec in specs:
        tensors[spec.name] = np.empty(spec.shape, spec.numpy_dtype)
        fill(_byte_view(tensors[spec.name]))
    return tensors, header


def read_head(fill: Callable[[memoryview], None]) -> tuple[list[TensorSpec], dict[str, Any]]:
    """Reads the head of a frame from a stream: what its tensors are, and its header. Raises ProtocolError."""
    size = bytearray(8)
    fill(memoryview(size))
    if (length := int.from_bytes(size, "little")) > MAX_HEAD_BYTES:
        raise ProtocolError(f"Expected the head of a frame to have at most {MAX_HEAD_BYTES} bytes, got {length}.")
    head = bytearray(length)
    fill(memoryview(head))
    return _parse_head(bytes(head))


def _parse_head(data: bytes) -> tuple[list[TensorSpec], dict[str, Any]]:
    try:
        head = parse_json(data)
        specs, header = [TensorSpec.from_json(spec) for spec in head["tensors"]], dict(head["header"])
    except PARSE_ERRORS as error:
        raise ProtocolError(f"Expected a frame of tensors, got {data[:40]!r}…: {error}.") from error
    if len({spec.name for spec in specs}) != len(specs):
        raise ProtocolError("Expected a frame with each name once.")
    return specs, header


def _byte_view(array: np.ndarray) -> memoryview:
    contiguous = np.ascontiguousarray(array)
    if contiguous.dtype.byteorder == ">":
        contiguous = contiguous.astype(contiguous.dtype.newbyteorder("<"))
    return contiguous.reshape(-1).view(np.uint8).data
