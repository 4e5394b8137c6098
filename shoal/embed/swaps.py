"""Swaps of vectors between two sides of a split, and between any two blocks: where partitions get better.

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


@compiled
def swap_anywhere(
    indptr: np.ndarray,
    pins: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    queries: np.ndarray,
    order: np.ndarray,
    slot_of: np.ndarray,
    size: int,
    visits: np.ndarray,
    work: int,
) -> tuple[int, int]:
    """One pass: each vector goes to the block that gains most, if one of its vectors can come back and both gain.

    Returns:
        The swaps made, and the work (pins looked at) that is left.
    """
    full = len(order) // size
    present, last = np.zeros(full + 1, np.float32), np.full(full + 1, -1, np.int64)
    touched, is_mine = np.empty(full + 1, np.int64), np.full(len(indptr), -1, np.int64)
    swaps, stamp = 0, 0
    for visit in range(len(visits)):
        if work <= 0:
            break
        vector = visits[visit]
        home = slot_of[vector] // size
        if home == full:
            continue
        stays, num_touched = np.float32(0), 0
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            is_mine[query] = vector
            alone = True
            stamp += 1
            work -= indptr[query + 1] - indptr[query]
            for other in pins[indptr[query] : indptr[query + 1]]:
                block = slot_of[other] // size
                if block == home:
                    alone = alone and other == vector
                elif last[block] != stamp:
                    last[block] = stamp
                    if present[block] == 0:
                        touched[num_touched] = block
                        num_touched += 1
                    present[block] += weights[query]
            if not alone:
                stays += weights[query]
        best, best_gain = -1, np.float32(0)
        for i in range(num_touched):
            gain = (
                present[touched[i]] - stays
            )  # of the queries, those that already read there, less those that stay here
            if gain > best_gain and touched[i] < full:
                best, best_gain = touched[i], gain
            present[touched[i]] = 0
        if best < 0:
            continue
        partner, partner_gain = -1, np.float32(1e-4)
        for slot in range(best * size, best * size + size):
            gain = best_gain
            for at in range(starts[order[slot]], starts[order[slot] + 1]):
                query = queries[at]
                here, there = 0, 0
                work -= indptr[query + 1] - indptr[query]
                for other in pins[indptr[query] : indptr[query + 1]]:
                    block = slot_of[other] // size
                    here += block == home
                    there += block == best
                if is_mine[query] == vector:  # both are in it: a swap changes nothing
                    gain -= weights[query] * ((here == 1) + 0)
                else:
                    gain += weights[query] * ((there == 1) - (here == 0) * 1)
            if gain > partner_gain:
                partner, partner_gain = order[slot], gain
        if partner >= 0:
            slot_of[vector], slot_of[partner] = slot_of[partner], slot_of[vector]
            order[slot_of[vector]], order[slot_of[partner]] = vector, partner
            swaps += 1
    return swaps, work
