"""Linear maps of updates, the same for all members: the sum of what they make is what they make of the sum.

So a sum can be undone where single updates are never seen, in secure groups. Of the two, both are public:

    rotated  blocks of 2^n elements have their signs changed by chance and are multiplied by a Hadamard matrix (Suresh et al. 2017, "Distributed
             mean estimation with limited communication", section 3): no element is much larger than the others then, and the same bits hold
             finer numbers.
    one_of   of every m elements one, drawn anew for each version by its number, which is broadcast with it (`VERSION`) (Konečný et al. 2016, "Federated learning: strategies for improving
             communication efficiency", random masks; one of each m instead of 1 in m of all), times m: right in the mean.

Functions take the array module: members compute in JAX, the server in NumPy. A rotation back of float64 is by additions and subtractions alone, the
same on every machine.
"""

import hashlib
from typing import Any, Final

import numpy as np

from shoal.codec.chance import mixed

VERSION: Final = "drawn/version"
"""Tensor of a line beside its model, (1,) uint32: the number of versions committed before, where there are elements to be drawn."""
MAX_BLOCK: Final = 1 << 18
"""Elements that are rotated together, at most."""
SPREAD: Final = 6.0
"""How many standard deviations a rotated element is held to; for a block of any numbers the chance of one beyond it is about 2e-9."""
_FACTOR: Final = 16

Array = Any


def block_length(size: int) -> int:
    """Of a tensor's rotation: a power of two that leaves at most an eighth of the tensor to be filled up."""
    return min(MAX_BLOCK, 1 << max(0, (size // 8).bit_length() - 1))


def rotated_size(size: int, block: int) -> int:
    """Elements of a tensor that is rotated in such blocks."""
    return -(-size // block) * block


def rotate(values: Array, block: int, *, seed: int, xp: Any) -> Array:
    """(n,) float32 -> (rotated_size,), of the same norm."""
    filled = xp.pad(values, (0, rotated_size(values.size, block) - values.size))
    turned = (filled * _signs(filled.size, seed, xp)).reshape(-1, block)
    made = turned
    for length in _factors(block):
        matrix = xp.asarray(_hadamard(length), dtype=values.dtype)
        made = xp.swapaxes(made.reshape(made.shape[0], length, -1), 1, 2) @ matrix
        made = made.reshape(turned.shape)
    return (made * xp.asarray(block**-0.5, dtype=values.dtype)).reshape(-1)


def rotate_back(values: np.ndarray, block: int, *, seed: int, start: int = 0) -> np.ndarray:
    """(n,) float64 of whole blocks, the first of which begins at element `start` of the rotated tensor."""
    made = values.reshape(-1, block)
    for length in _factors(block):
        rows = made.reshape(len(made), length, -1)
        turned = np.ascontiguousarray(np.swapaxes(rows, 0, 1))  # (length, blocks, rest)
        _butterflies(turned.reshape(length, -1))
        made = np.ascontiguousarray(np.moveaxis(turned, 0, 2)).reshape(-1, block)
    signed: np.ndarray = (made * block**-0.5).reshape(-1) * _signs(values.size, seed, np, start=start)
    return signed


def _butterflies(values: np.ndarray) -> None:
    """The Hadamard matrix (Sylvester's) times the (length, n) values, in place: the same bits on every machine, as no product of matrices is."""
    half = 1
    while half < len(values):
        pairs = values.reshape(len(values) // (2 * half), 2, -1)
        total = pairs[:, 0] + pairs[:, 1]
        np.subtract(pairs[:, 0], pairs[:, 1], out=pairs[:, 1])
        pairs[:, 0] = total
        half *= 2


def _factors(block: int) -> list[int]:
    """A power of two as a product of matrices' lengths, few enough that their products are fast."""
    made = []
    while block > 1:
        made.append(min(block, _FACTOR))
        block //= made[-1]
    return made


def _hadamard(length: int) -> np.ndarray:
    made = np.ones((1, 1), np.float32)
    while len(made) < length:
        made = np.block([[made, made], [made, -made]])
    return made


def chosen(size: int, one_of: int, *, seed: Array, xp: Any, start: int = 0) -> Array:
    """(ceil(size / one_of),) uint32: which element of each `one_of` is sent, the first group being number `start`."""
    groups = xp.arange(start, start + -(-size // one_of), dtype=xp.uint32)
    return groups * xp.uint32(one_of) + mixed(groups, seed, xp) % xp.uint32(one_of)


def seed_of(name: str) -> int:
    """32 bits of a tensor's name."""
    return int.from_bytes(hashlib.sha256(b"shoal linear\0" + name.encode()).digest()[:4], "little")


def seed_of_version(version: Array, name: str, xp: Any) -> Array:
    """(1,) uint32: what a tensor's elements are drawn by for members that start from a version, (1,) uint32."""
    return mixed(version, xp.uint32(seed_of(name)), xp)


def _signs(size: int, seed: int, xp: Any, *, start: int = 0) -> Array:
    bits = mixed(xp.arange(start, start + size, dtype=xp.uint32), xp.uint32(seed), xp) & xp.uint32(1)
    return xp.float32(1) - xp.float32(2) * bits.astype(xp.float32)
