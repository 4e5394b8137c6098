"""Numbers that look drawn by chance, from words: cheap, the same in JAX and NumPy. For rounding and choosing, never for secrets or noise."""

from typing import Any

Array = Any


def mixed(words: Array, seed: Array, xp: Any) -> Array:
    """Each word, uint32, as one that looks drawn by chance (the finalizer of MurmurHash3, twice)."""
    made = words ^ seed
    for _ in range(2):
        made = (made ^ (made >> xp.uint32(16))) * xp.uint32(0x85EBCA6B)
        made = (made ^ (made >> xp.uint32(13))) * xp.uint32(0xC2B2AE35)
        made = made ^ (made >> xp.uint32(16)) ^ seed
    return made


def uniform(size: int, key: Array, xp: Any) -> Array:
    """(size,) float32 from [0, 1), in steps of 2^-16. `key`: (2,) uint32."""
    words = mixed(xp.arange(size, dtype=xp.uint32) ^ key[0], key[1], xp)
    return (words >> xp.uint32(16)).astype(xp.float32) * xp.float32(2.0**-16)
