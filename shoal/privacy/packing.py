"""Integers of b bits on the wire: b / 8 bytes each, whatever b is.

The low bytes of all integers, then their next bytes, and so on; the bits that are left over follow, one plane of all integers after
the other. So packing and unpacking are a few passes of NumPy over planes.
"""

import numpy as np

MAX_BITS = 32


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` integers."""
    whole, rest = divmod(bits, 8)
    return count * whole + rest * (-(-count // 8))


def pack(values: np.ndarray, bits: int) -> bytes:
    """Packs integers (n,) uint32 below 2^bits, 1 to 32."""
    if values.dtype != np.uint32 or not 1 <= bits <= MAX_BITS:
        raise ValueError(f"Expected uint32 and 1 <= bits <= {MAX_BITS}, got {values.dtype} and {bits}.")
    whole, rest = divmod(bits, 8)
    octets = np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, 4)
    planes = [octets[:, plane] for plane in range(whole)]
    planes += [np.packbits(octets[:, whole] >> bit & 1, bitorder="little") for bit in range(rest)]
    return b"".join(plane.tobytes() for plane in planes)


def unpack(data: bytes, count: int, bits: int) -> np.ndarray:
    """The integers again, (count,) uint32. Raises ValueError for another length."""
    if len(data) != packed_bytes(count, bits):
        raise ValueError(
            f"Expected {packed_bytes(count, bits)} bytes for {count} integers of {bits} bits, got {len(data)}."
        )
    whole, rest = divmod(bits, 8)
    made = np.zeros((count, 4), np.uint8)
    planes = np.frombuffer(data, np.uint8)
    for plane in range(whole):
        made[:, plane] = planes[plane * count : (plane + 1) * count]
    if rest:
        flags = np.unpackbits(planes[whole * count :].reshape(rest, -1), axis=1, count=count, bitorder="little")
        for bit in range(rest):
            made[:, whole] |= flags[bit] << np.uint8(bit)
    return made.view("<u4").reshape(-1)
