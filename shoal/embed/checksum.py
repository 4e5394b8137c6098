"""XXH64 over whole words: the checksum of blocks and journal records, about a microsecond for 4 KiB.

It finds what disks and memory do by accident, not what an attacker does on purpose. A block's number is the seed, so a
block that lies in another's place is found too.

References: Y. Collet, xxHash fast digest algorithm, version 0.1.1, github.com/Cyan4973/xxHash (XXH64).
"""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled

_P1: Final = np.uint64(0x9E3779B185EBCA87)
_P2: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_P3: Final = np.uint64(0x165667B19E3779F9)
_P4: Final = np.uint64(0x85EBCA77C2B2AE63)
_P5: Final = np.uint64(0x27D4EB2F165667C5)
_P12: Final = np.uint64((0x9E3779B185EBCA87 + 0xC2B2AE3D27D4EB4F) % 2**64)
_64: Final = np.uint64(64)


@compiled
def _rotate(x: np.uint64, by: np.uint64) -> np.uint64:
    return (x << by) | (x >> (_64 - by))


@compiled
def _round(lane: np.uint64, word: np.uint64) -> np.uint64:
    return _rotate(lane + word * _P2, np.uint64(31)) * _P1


@compiled
def _merge(total: np.uint64, lane: np.uint64) -> np.uint64:
    return (total ^ _round(np.uint64(0), lane)) * _P1 + _P4


@compiled
def of_words(words: np.ndarray, seed: np.uint64) -> np.uint64:
    """XXH64 of `words`, (n,) uint64 in little-endian order, with a seed."""
    size = len(words)
    stripes = size // 4 * 4
    if stripes:
        a, b, c, d = seed + _P12, seed + _P2, seed, seed - _P1
        for i in range(0, stripes, 4):
            a, b = _round(a, words[i]), _round(b, words[i + 1])
            c, d = _round(c, words[i + 2]), _round(d, words[i + 3])
        total = _rotate(a, np.uint64(1)) + _rotate(b, np.uint64(7))
        total += _rotate(c, np.uint64(12)) + _rotate(d, np.uint64(18))
        total = _merge(_merge(_merge(_merge(total, a), b), c), d)
    else:
        total = seed + _P5
    total += np.uint64(8 * size)
    for i in range(stripes, size):
        total = _rotate(total ^ _round(np.uint64(0), words[i]), np.uint64(27)) * _P1 + _P4
    total = (total ^ (total >> np.uint64(33))) * _P2
    total = (total ^ (total >> np.uint64(29))) * _P3
    return total ^ (total >> np.uint64(32))


@compiled
def of_blocks(blocks: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The checksum of each block: `blocks` (n, words a block) uint64, `numbers` (n,) int64 -> (n,) uint64."""
    made = np.empty(len(blocks), np.uint64)
    for i in range(len(blocks)):
        made[i] = of_words(blocks[i], np.uint64(numbers[i]))
    return made


def of_bytes(data: bytes | bytearray | memoryview) -> int:
    """The checksum of bytes, padded with zeros to whole words; the length is the seed."""
    padded = np.zeros(-(-len(data) // 8), np.uint64)
    padded.view(np.uint8)[: len(data)] = np.frombuffer(data, np.uint8)
    return int(of_words(padded, np.uint64(len(data))))
