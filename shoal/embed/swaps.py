"""Swaps of vectors between the two sides of a split: where partitions get better.

The hyperedges are those of `hypergraph.py`; what a swap is worth is in `partition.py`, with the references.
"""

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed._sorted import order_of


@compiled
def bisect(
    indptr: np.ndarray,
    pins: np.ndarray,
    weights: np.ndarray,
    side: np.ndarray,
    powers: np.ndarray,
    iterations: int,
    skip: float,
    stop: float,
    rng: np.random.Generator,
) -> None:
    """Improves `side` (n,) in place by rounds of swaps."""
    gain = np.empty(len(side), np.float32)
    for _ in range(iterations):
        _gains(indptr, pins, weights, side, powers, gain)
        if _swap(side, gain, skip, rng) <= stop * len(side):
            return


@compiled
def _gains(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray, powers: np.ndarray, gain: np.ndarray
) -> None:
    """What the final p-fanout loses, over p, when a vector goes to the other side."""
    gain[:] = 0
    for query in range(len(indptr) - 1):
        begin, end = indptr[query], indptr[query + 1]
        right = 0
        for at in range(begin, end):
            right += side[pins[at]]
        left = end - begin - right
        from_left = weights[query] * (powers[0, max(0, left - 1)] - powers[1, right])
        from_right = weights[query] * (powers[1, max(0, right - 1)] - powers[0, left])
        for at in range(begin, end):
            vector = pins[at]
            gain[vector] += from_right if side[vector] else from_left


@compiled
def _swap(side: np.ndarray, gain: np.ndarray, skip: float, rng: np.random.Generator) -> int:
    """Swaps the best of one side with the best of the other while a pair gains; returns the vectors moved."""
    best = np.full(2, -np.inf)
    for vector in range(len(side)):
        best[side[vector]] = max(best[side[vector]], gain[vector])
    left = _candidates(side, gain, 0, -best[1])
    right = _candidates(side, gain, 1, -best[0])
    moved = 0
    for i in range(min(len(left), len(right))):
        if gain[left[i]] + gain[right[i]] <= 1e-7:
            break
        if rng.random() >= skip:
            side[left[i]] = 1
            side[right[i]] = 0
            moved += 2
    return moved


@compiled
def _candidates(side: np.ndarray, gain: np.ndarray, of: int, above: float) -> np.ndarray:
    """The vectors of a side that gain more than `above`, best first."""
    number = 0
    for vector in range(len(side)):
        number += side[vector] == of and gain[vector] > above
    found = np.empty(number, np.int64)
    number = 0
    for vector in range(len(side)):
        if side[vector] == of and gain[vector] > above:
            found[number] = vector
            number += 1
    best: np.ndarray = found[order_of(-gain[found])]
    return best
