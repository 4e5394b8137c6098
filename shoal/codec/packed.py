"""A piece of a tensor in fewer bytes, and back to the bit.

Nothing here rounds: it finds what has been rounded before. In turn, each step where it holds:

    narrow      the low half of every element is zero (a float32 that is a bfloat16): it is left out
    delta       the difference to a base that both sides hold, in steps from one number to the next
    levels      every block of `rounding.BLOCK` float32 is whole multiples, up to 127, of a step: a byte for each
    sparse      else, where most elements are zero, a bit for each says which are not
    planes      and of those the first bytes, then the second ones, …

and what remains by deflate (RFC 1951) where that is shorter.

Format: one byte of flags (`_DELTA`, `_SPARSE`, `_LEVELS`, `_RAW`), one byte for the width that was left of an element, then streams. A stream is
its length (uint32, its highest bit set where it is deflated) and its bytes. All numbers are little-endian. `_RAW`: the bytes as they are.
"""

from typing import Any, Final, Literal

import numpy as np
from isal import isal_zlib
from zlib_ng import zlib_ng

from shoal.codec.rounding import BLOCK, MAX_LEVEL
from shoal.errors import ProtocolError
from shoal.tensors import DTYPES

PACKED: Final = "packed/1"
"""What both sides call this format."""
MAX_PIECE_BYTES: Final = 1 << 20
"""Of one piece, before it is packed."""
_RAW, _DELTA, _SPARSE, _LEVELS = 1, 2, 4, 8
_FLAGS: Final = (0, _DELTA, _SPARSE, _DELTA | _SPARSE, _LEVELS)
"""What goes together, but for `_RAW`, which stands alone."""
_DEFLATED: Final = 1 << 31
_BROKEN: Final[type[Exception]] = zlib_ng.error  # type: ignore[assignment]  # a class, whatever its stub says
_MIN_DEFLATED: Final = 32
_SAMPLE: Final = 1 << 12
_LEVEL: Final[Literal[1]] = 1
"""Of deflate: as small as level 2, and no slower, where no bytes repeat."""
_INFINITE: Final = 0x7F800000
_SAMPLED: Final = 32
"""Elements of a block, of which its step is guessed."""

_Array = np.ndarray[Any, np.dtype[Any]]


def pack(piece: bytes | memoryview, dtype: str, base: bytes | memoryview | None = None) -> bytes:
    """The piece in the fewest bytes that are found, at most two more than it has.

    Args:
        piece: bytes of whole elements, at most `MAX_PIECE_BYTES`.
        dtype: a key of `DTYPES`.
        base: bytes of as many elements, which whoever unpacks has, too.

    Raises:
        ValueError: the piece is too large or breaks an element off, or the base has another length.
    """
    width = DTYPES[dtype].itemsize
    if len(piece) % width or len(piece) > MAX_PIECE_BYTES or (base is not None and len(base) != len(piece)):
        raise ValueError(
            f"Expected whole elements of {dtype} of at most {MAX_PIECE_BYTES} bytes, and a base as long, got {len(piece)} and "
            f"{None if base is None else len(base)}."
        )
    words = np.frombuffer(piece, f"<u{width}")
    made = _packed(words, dtype) if base is None else _packed_delta(words, np.frombuffer(base, f"<u{width}"), dtype)
    return made if len(made) < len(piece) + 2 else bytes((_RAW, width)) + bytes(piece)


def unpack(data: bytes, dtype: str, size: int, base: bytes | memoryview | None = None) -> bytes:
    """The piece that `pack` was given, of `size` bytes; no more than that is made of what comes, whatever it is.

    Raises:
        ProtocolError: what comes is nothing that `pack` wrote for a piece of that size, or needs a base and there is none.
    """
    width = DTYPES[dtype].itemsize
    if size % width or size > MAX_PIECE_BYTES:
        raise ProtocolError(f"Expected a piece of whole elements, of at most {MAX_PIECE_BYTES} bytes, got {size}.")
    if len(data) < 2:
        raise ProtocolError(f"Expected a packed piece, got {len(data)} bytes.")
    flags, left = data[0], data[1]
    if flags == _RAW and left == width:
        if len(data) != size + 2:
            raise ProtocolError(f"Expected {size} bytes, got {len(data) - 2}.")
        return data[2:]
    if flags not in _FLAGS or left not in (1, 2, 4, 8) or left > width:
        raise ProtocolError(f"Expected a packed piece of {dtype}, got flags {flags} and elements of {left} bytes.")
    streams = _Streams(data)
    words = _unpacked(streams, flags, left, size // width, dtype)
    streams.end()
    if flags & _DELTA:
        if base is None or len(base) != size:
            raise ProtocolError(
                "Expected a piece that stands for itself, got a difference to something that is not here."
            )
        words = _from_delta(words, _narrowed(np.frombuffer(base, f"<u{width}"), left), dtype)
    return _widened(words, width).tobytes()


def _packed(words: _Array, dtype: str) -> bytes:
    left = _width_left(words)
    return _body(_narrowed(words, left), dtype, flags=0)


def _packed_delta(words: _Array, base: _Array, dtype: str) -> bytes:
    left = max(_width_left(words), _width_left(base))
    return _body(_to_delta(_narrowed(words, left), _narrowed(base, left), dtype), dtype, flags=_DELTA)


def _body(words: _Array, dtype: str, *, flags: int) -> bytes:
    if dtype == "float32" and words.itemsize == 4 and not flags & _DELTA:
        found = _to_levels(words.view(np.float32))
        if found is not None:
            return bytes((_LEVELS, 4)) + b"".join(map(_stream, found))
    parts: list[bytes] = []
    if 2 * np.count_nonzero(words) < words.size:
        flags |= _SPARSE
        mask = words != 0
        parts.append(_stream(np.packbits(mask)))
        words = words[mask]
    for _ in range(words.itemsize - 1):
        parts.append(_stream(words.astype(np.uint8)))
        words = words >> words.dtype.type(8)
    parts.append(_stream(words.astype(np.uint8)))
    return bytes((flags, words.itemsize)) + b"".join(parts)


def _unpacked(streams: "_Streams", flags: int, left: int, count: int, dtype: str) -> _Array:
    if flags == _LEVELS:
        if dtype != "float32" or left != 4:
            raise ProtocolError(f"Expected levels of float32 alone, got them of {dtype}.")
        steps = streams.take(4 * -(-count // BLOCK)).view("<f4")
        return _from_levels(steps, streams.take(count).view(np.int8)).view("<u4")
    mask = None
    if flags & _SPARSE:
        mask = np.unpackbits(streams.take(-(-count // 8)), count=count).view(bool)
    size = count if mask is None else int(np.count_nonzero(mask))
    words = streams.take(size).astype(f"<u{left}")
    for place in range(1, left):
        words |= streams.take(size).astype(words.dtype) << words.dtype.type(8 * place)
    if mask is None:
        return words
    whole = np.zeros(count, words.dtype)
    whole[mask] = words
    return whole


# Elements of less width.


def _width_left(words: _Array) -> int:
    """Bytes of an element without its low halves, where these are zero in all."""
    used = int(np.bitwise_or.reduce(words, initial=0))
    width = words.itemsize
    while width > 1 and not used & ((1 << 4 * width) - 1):
        used >>= 4 * width
        width //= 2
    return width


def _narrowed(words: _Array, left: int) -> _Array:
    shift = 8 * (words.itemsize - left)
    return (words >> words.dtype.type(shift)).astype(f"<u{left}") if shift else words


def _widened(words: _Array, width: int) -> _Array:
    shift = 8 * (width - words.itemsize)
    made: _Array = words.astype(f"<u{width}", copy=False)
    made = made << made.dtype.type(shift)
    return made


# Differences.


def _to_delta(words: _Array, base: _Array, dtype: str) -> _Array:
    """Steps from the base's number to the other, small ones as small words whichever way they lead."""
    steps: _Array = _ordered(words, dtype) - _ordered(base, dtype)
    made: _Array = (steps << steps.dtype.type(1)) ^ _is_top(steps)
    return made


def _from_delta(words: _Array, base: _Array, dtype: str) -> _Array:
    one = words.dtype.type(1)
    steps: _Array = (words >> one) ^ (np.zeros_like(words) - (words & one))
    ordered: _Array = _ordered(base, dtype) + steps
    if not _follows(dtype):
        ordered ^= _is_top(~ordered) | _top(ordered)
    return ordered


def _ordered(words: _Array, dtype: str) -> _Array:
    """Words that follow one another as the numbers do: those of floats have their sign apart from their magnitude."""
    return words if _follows(dtype) else words ^ (_is_top(words) | _top(words))


def _follows(dtype: str) -> bool:
    return DTYPES[dtype].kind in "iub"


def _top(words: _Array) -> Any:
    return words.dtype.type(1 << (8 * words.itemsize - 1))


def _is_top(words: _Array) -> _Array:
    """All bits set where the highest is, else none."""
    return (words.view(f"<i{words.itemsize}") >> (8 * words.itemsize - 1)).view(words.dtype)


# Levels.


def _to_levels(values: _Array) -> tuple[_Array, _Array] | None:
    """(steps of the blocks, levels int8 of the elements) whose products are the values to the bit; None where there are none."""
    blocks = _blocks(values)
    steps = _guessed_steps(blocks)
    if steps is None:
        return None
    levels = blocks / np.where(steps > 0, steps, np.float32(1))[:, None]  # at most MAX_LEVEL, and a little for rounding
    whole = levels.astype(np.int8).reshape(-1)[: values.size]
    if not np.array_equal(_from_levels(steps, whole).view(np.uint32), values.view(np.uint32)):
        return None
    return steps, whole


def _from_levels(steps: _Array, levels: _Array) -> _Array:
    blocks = _blocks(levels).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        blocks *= steps[:, None]
    return blocks.reshape(-1)[: levels.size]


def _blocks(values: _Array) -> _Array:
    """(blocks, BLOCK), the last one filled up with zeros."""
    rows = -(-values.size // BLOCK)
    if values.size == rows * BLOCK:
        return values.reshape(rows, BLOCK)
    filled = np.zeros(rows * BLOCK, values.dtype)
    filled[: values.size] = values
    return filled.reshape(rows, BLOCK)


def _guessed_steps(blocks: _Array) -> _Array | None:
    """What some elements of each block are whole multiples of; None where it is too fine for the largest."""
    magnitudes = blocks.view(np.uint32) & np.uint32(0x7FFFFFFF)
    largest = np.max(magnitudes, axis=1, initial=0)
    if np.any(largest >= _INFINITE):
        return None
    # The least but for zero, which is the step itself more often than not where most levels are zero.
    least = np.min(magnitudes - np.uint32(1), axis=1, initial=_INFINITE) + np.uint32(1)
    sample = np.column_stack((magnitudes[:, :: BLOCK // _SAMPLED], largest, np.where(least <= _INFINITE, least, 0)))
    bits = sample.astype(np.uint32)
    exponents = (bits >> 23).astype(np.int64)
    mantissas = np.where(exponents > 0, (bits & 0x7FFFFF) | 0x800000, bits & 0x7FFFFF).astype(np.int64)
    exponents = np.maximum(exponents, 1)
    lowest = np.min(np.where(mantissas > 0, exponents, 255), axis=1)
    shifts = exponents - lowest[:, None]
    if np.any(shifts[mantissas > 0] > 32):
        return None
    common = np.gcd.reduce(np.where(mantissas > 0, mantissas << np.maximum(shifts, 0), 0), axis=1)
    with np.errstate(over="ignore"):
        steps = np.ldexp(common.astype(np.float64), lowest - 150).astype(np.float32)
        return steps if np.all(largest.view(np.float32) <= MAX_LEVEL * steps) else None


# Streams.


def _stream(values: _Array) -> bytes:
    data = values.tobytes()
    if len(data) >= _MIN_DEFLATED and _is_worth_deflating(data):
        made: bytes = isal_zlib.compress(data, _LEVEL, wbits=-15)
        if len(made) < len(data):
            return (len(made) | _DEFLATED).to_bytes(4, "little") + made
    return len(data).to_bytes(4, "little") + data


def _is_worth_deflating(data: bytes) -> bool:
    if len(data) <= 4 * _SAMPLE:
        return True
    middle = len(data) // 2
    return len(isal_zlib.compress(data[middle : middle + _SAMPLE], _LEVEL, wbits=-15)) < 0.97 * _SAMPLE


class _Streams:
    """Reads streams, one after the other."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 2

    def take(self, size: int) -> _Array:
        """The next stream, of just that many bytes."""
        head = self._data[self._at : self._at + 4]
        length = int.from_bytes(head, "little")
        start, count = self._at + 4, length & (_DEFLATED - 1)
        body = self._data[start : start + count]
        if len(head) < 4 or len(body) < count:
            raise ProtocolError("Expected a packed piece, got one that ends within a stream.")
        self._at = start + count
        made = _inflated(body, size) if length & _DEFLATED else body
        if len(made) != size:
            raise ProtocolError(f"Expected a stream of {size} bytes, got {len(made)}.")
        return np.frombuffer(made, np.uint8)

    def end(self) -> None:
        """Raises ProtocolError unless all was read."""
        if self._at != len(self._data):
            raise ProtocolError(f"Expected a packed piece of {self._at} bytes, got {len(self._data)}.")


def _inflated(data: memoryview, size: int) -> bytes:
    # What comes is a stranger's: zlib-ng has stood in for zlib in whole operating systems. Deflating our own is faster by isal.
    inflater = zlib_ng.decompressobj(wbits=-15)
    try:
        made = inflater.decompress(data, size + 1)  # one more than is right shows that there is more
    except _BROKEN as error:
        raise ProtocolError(f"Expected a deflated stream: {error}.") from error
    if not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"Expected a deflated stream of {size} bytes, got another one.")
    return made
