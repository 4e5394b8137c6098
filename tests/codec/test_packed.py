"""Pieces come back to the bit, take no more than two bytes too many, and nothing that a stranger sends takes more than it should."""

import tracemalloc
import zlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.codec.packed import MAX_PIECE_BYTES, pack, unpack
from shoal.codec.rounding import BLOCK, Rounding, rounded
from shoal.errors import ProtocolError
from shoal.tensors import DTYPES

FLOATS = ("float16", "bfloat16", "float32", "float64")


def normal(size: int, *, seed: int = 0, scale: float = 0.01) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, scale, size).astype(np.float32)


def round_trip(values: np.ndarray, dtype: str, base: np.ndarray | None = None) -> bytes:
    data, held = values.tobytes(), None if base is None else base.tobytes()
    packed = pack(data, dtype, held)
    assert len(packed) <= len(data) + 2
    assert unpack(packed, dtype, len(data), held) == data
    return packed


@given(st.sampled_from(sorted(DTYPES)), st.binary(max_size=400), st.randoms(use_true_random=False), st.integers(0, 3))
def test_any_bytes_come_back(dtype: str, data: bytes, random: object, repeats: int) -> None:
    """Whatever they are: also numbers that are none, and halves, zeros and differences by chance."""
    width = DTYPES[dtype].itemsize
    data = (data * (1 + repeats))[: len(data) * (1 + repeats) // width * width]
    held = bytes(byte ^ (random.random() < 0.1) for byte in data)  # type: ignore[attr-defined]
    for base in (None, held):
        packed = pack(data, dtype, base)
        assert len(packed) <= len(data) + 2 and unpack(packed, dtype, len(data), base) == data


SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 2.0**-126, 1.5, 127.0]


@given(st.lists(st.sampled_from(SPECIAL), max_size=60), st.lists(st.sampled_from(SPECIAL), min_size=60, max_size=60))
def test_numbers_at_the_edges_come_back(values: list[float], base: list[float]) -> None:
    for dtype in FLOATS:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            made, held = np.array(values).astype(DTYPES[dtype]), np.array(base[: len(values)]).astype(DTYPES[dtype])
        round_trip(made, dtype)
        round_trip(made, dtype, held)


@given(
    st.integers(0, 3 * BLOCK + 5), st.sampled_from([1e-42, 1e-30, 1.0, 1e30]), st.integers(0, 5), st.sampled_from(["bfloat16", "int8"])
)  # fmt: skip
def test_what_was_rounded_comes_back(size: int, scale: float, seed: int, rounding: Rounding) -> None:
    values = rounded(normal(size, seed=seed, scale=scale), rounding)
    round_trip(values, "float32")
    round_trip(values, "float32", rounded(values + normal(size, seed=seed + 9, scale=scale / 100), rounding))


SIZE = 1 << 16


@pytest.mark.parametrize(
    ("values", "base", "most"),
    [
        (lambda: normal(SIZE), None, 0.93),
        (lambda: rounded(normal(SIZE), "bfloat16"), None, 0.40),
        (lambda: rounded(normal(SIZE), "int8"), None, 0.24),
        (lambda: np.where(np.random.default_rng(1).random(SIZE) < 0.01, normal(SIZE), np.float32(0)), None, 0.016),
        (lambda: np.zeros(SIZE, np.float32), None, 0.001),
        (lambda: rounded(normal(SIZE) + normal(SIZE, seed=2, scale=4e-4), "bfloat16"), lambda: rounded(normal(SIZE), "bfloat16"), 0.24),
        (lambda: normal(SIZE) + normal(SIZE, seed=2, scale=4e-4), lambda: normal(SIZE), 0.76),
        (lambda: normal(SIZE), lambda: normal(SIZE), 0.001),
    ],
    ids=["float32", "bfloat16", "int8", "one in a hundred", "zeros", "bfloat16 after a round", "float32 after a round", "the same"],
)  # fmt: skip
def test_what_takes_few_bytes_is_found(
    values: Callable[[], np.ndarray], base: Callable[[], np.ndarray] | None, most: float
) -> None:
    given = values()
    packed = round_trip(given, "float32", None if base is None else base())
    assert len(packed) <= most * given.nbytes, len(packed) / given.nbytes


def test_levels_survive_a_factor_of_few_bits() -> None:
    """What is scaled to a clip norm by 8 significant bits is on a grid as before."""
    factor = np.float32(ml_dtypes.bfloat16(0.7317))
    packed = round_trip(rounded(normal(SIZE), "int8") * factor, "float32")
    assert len(packed) < 0.24 * 4 * SIZE


def test_other_bytes_than_were_packed_are_refused() -> None:
    values = rounded(normal(3000), "int8")
    packed, size = pack(values.tobytes(), "float32"), values.nbytes
    for data, dtype, wanted in (
        (packed, "float32", size - 4), (packed, "float32", size + 4), (packed, "int32", size), (packed, "float16", size),
        (packed[:-1], "float32", size), (packed + b"\0", "float32", size), (b"", "float32", size), (b"\x01\x04", "float32", size),
        (packed, "float32", size - 1), (packed, "float32", MAX_PIECE_BYTES + 4),
    ):  # fmt: skip
        with pytest.raises(ProtocolError):
            unpack(data, dtype, wanted)
    delta = pack(values.tobytes(), "float32", values.tobytes())
    for base in (None, b"", values.tobytes()[4:]):
        with pytest.raises(ProtocolError, match="stands for itself"):
            unpack(delta, "float32", size, base)
    with pytest.raises(ValueError, match="Expected whole elements of float32"):
        pack(b"abc", "float32")


@given(st.data())
def test_broken_pieces_are_refused_or_make_what_was_asked_for(data: st.DataObject) -> None:
    values = rounded(normal(2000), data.draw(st.sampled_from(["float32", "bfloat16", "int8"])))
    packed = bytearray(pack(values.tobytes(), "float32", data.draw(st.sampled_from([None, values.tobytes()]))))
    for _ in range(data.draw(st.integers(1, 6))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert len(unpack(bytes(packed), "float32", values.nbytes, values.tobytes())) == values.nbytes
    except ProtocolError:
        pass


@given(st.binary(max_size=200), st.sampled_from(sorted(DTYPES)), st.integers(0, 100))
def test_random_bytes_are_refused_or_make_what_was_asked_for(data: bytes, dtype: str, size: int) -> None:
    try:
        assert len(unpack(data, dtype, size)) == size
    except ProtocolError:
        pass


def test_a_bomb_makes_no_more_than_it_should() -> None:
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    bomb = deflater.compress(bytes(200 << 20)) + deflater.flush()
    stream = (len(bomb) | 1 << 31).to_bytes(4, "little") + bomb
    tracemalloc.start()
    for flags, width in ((0, 4), (0, 1), (4, 4), (8, 4)):
        with pytest.raises(ProtocolError):
            unpack(bytes((flags, width)) + stream, "float32", 1 << 16)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
