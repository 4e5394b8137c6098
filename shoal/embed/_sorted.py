"""Sorting inside compiled code: NumPy's own sorts take Numba seconds to compile, these a fraction of one."""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled

RUN: Final = 12
"""So many are sorted by insertion."""


@compiled
def order_of(keys: np.ndarray) -> np.ndarray:
    """(n,) int64: the places of `keys` (n,), least first; equal ones in their order. Merge sort."""
    size = len(keys)
    order, other = np.empty(size, np.int64), np.empty(size, np.int64)
    for begin in range(0, size, RUN):
        for at in range(begin, min(begin + RUN, size)):
            hole = at
            while hole > begin and keys[order[hole - 1]] > keys[at]:
                order[hole] = order[hole - 1]
                hole -= 1
            order[hole] = at
    width = RUN
    while width < size:
        for begin in range(0, size, 2 * width):
            left, middle = begin, min(begin + width, size)
            right, end = middle, min(begin + 2 * width, size)
            for to in range(begin, end):
                if right == end or (left < middle and keys[order[left]] <= keys[order[right]]):
                    other[to] = order[left]
                    left += 1
                else:
                    other[to] = order[right]
                    right += 1
        order, other = other, order
        width *= 2
    return order


@compiled
def distinct(keys: np.ndarray) -> np.ndarray:
    """The different ones of `keys` (n,) int64, rising."""
    found: np.ndarray = keys[order_of(keys)]
    number = 0
    for key in found:
        if number == 0 or found[number - 1] != key:
            found[number] = key
            number += 1
    return found[:number]


@compiled
def first_at(rising: np.ndarray, key: int) -> int:
    """The first place of `rising` that is not below the key; its length if all are."""
    low, high = 0, len(rising)
    while low < high:
        middle = (low + high) // 2
        if rising[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low
