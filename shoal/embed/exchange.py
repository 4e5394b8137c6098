"""Swaps between any two blocks, as long as they lower the plain fanout: what splits leave over. Not in the paper.

A vector that leaves a block saves a read for each query in which it was *alone* there, and costs one for each query that does not
read the block it comes to. So what a swap gains follows from three sums: over a vector's queries in which it is
alone, over those that read the other's block, and over the queries that name both, for which nothing changes. The sums are kept for
all vectors, or (`near`) for those that share a query with the block that is looked at. So a visit costs the pins
of the vector's own queries, however often the vectors beside it are asked for.

The hyperedges (`edges`) are those of `hypergraph.py`; `named` are the same by vector, `by_vector`'s starts and queries.
"""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed.hypergraph import Edges, Named

_LEAST: Final = 1e-4
"""Swaps that gain less are not made, against rounding."""

_Sums = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""By vector: `block_of`, and the weights of its queries: the `whole`; where it is `alone` in its block; that are `near`, naming a
vector of the block that is looked at. By query: how many it names `here`, in that block."""


@compiled
def exchange(
    edges: Edges, named: Named, order: np.ndarray, slot_of: np.ndarray, size: int, visits: np.ndarray, work: int
) -> tuple[int, int]:
    """One pass: each vector goes to the block that gains most, for the vector there with which the swap gains most.

    Args:
        order, slot_of: (n,) slot -> vector and back, changed in place.
        size: slots of a block; the last block may have fewer, and is left alone.
        visits: the full blocks in the order in which they are looked at.
        work: pins to look at, at most.

    Returns:
        The swaps made, and the work that is left.
    """
    sums = sums_of(edges, slot_of, size)
    _, whole, alone, near, _ = sums
    present, is_read = np.zeros(len(order) // size + 1), np.full(len(order) // size + 1, -1, np.int64)
    touched, both = np.empty(len(present), np.int64), np.zeros(size)
    swaps = 0
    for block in visits:
        if work <= 0:
            break
        work -= _look_at(edges, named, order[block * size : block * size + size], sums)
        for slot in range(block * size, block * size + size):
            if work <= 0:
                break
            vector = order[slot]
            best, most, pins = _best_block(edges, named, vector, sums, len(order) // size, present, is_read, touched)
            work -= pins
            gain = most + alone[vector] - whole[vector]
            if gain <= 0:
                continue
            _count_both(edges, named, vector, best, sums, slot_of, both)
            partner, partner_gain = -1, _LEAST
            for i in range(size):
                other = order[best * size + i]
                total = gain + near[other] + alone[other] - whole[other] - both[i]
                both[i] = 0
                if total > partner_gain:
                    partner, partner_gain = other, total
            if partner >= 0:
                _move(edges, named, vector, best, block, sums)
                _move(edges, named, partner, block, block, sums)
                slot_of[vector], slot_of[partner] = slot_of[partner], slot_of[vector]
                order[slot_of[vector]], order[slot_of[partner]] = vector, partner
                swaps += 1
        _look_away(edges, named, order[block * size : block * size + size], sums)
    return swaps, work


@compiled
def sums_of(edges: Edges, slot_of: np.ndarray, size: int) -> _Sums:
    """The sums while no block is looked at."""
    indptr, pins, weights = edges
    block_of = (slot_of // size).astype(np.int32)
    whole, alone, near = np.zeros(len(slot_of)), np.zeros(len(slot_of)), np.zeros(len(slot_of))
    number = np.zeros(len(slot_of) // size + 1, np.int32)
    for query in range(len(indptr) - 1):
        members = pins[indptr[query] : indptr[query + 1]]
        for vector in members:
            number[block_of[vector]] += 1
        for vector in members:
            whole[vector] += weights[query]
            if number[block_of[vector]] == 1:
                alone[vector] += weights[query]
        for vector in members:
            number[block_of[vector]] = 0
    return block_of, whole, alone, near, np.zeros(len(indptr) - 1, np.int32)


@compiled
def _look_at(edges: Edges, named: Named, members: np.ndarray, sums: _Sums) -> int:
    """Fills `near` and `here` for the block with these members; returns the pins looked at."""
    indptr, pins, weights = edges
    starts, queries = named
    _, _, _, near, here = sums
    work = 0
    for vector in members:
        for query in queries[starts[vector] : starts[vector + 1]]:
            if here[query] == 0:
                work += indptr[query + 1] - indptr[query]
                for other in pins[indptr[query] : indptr[query + 1]]:
                    near[other] += weights[query]
            here[query] += 1
    return work


@compiled
def _look_away(edges: Edges, named: Named, members: np.ndarray, sums: _Sums) -> None:
    """Empties `near` and `here` again."""
    indptr, pins, _ = edges
    starts, queries = named
    _, _, _, near, here = sums
    for vector in members:
        for query in queries[starts[vector] : starts[vector + 1]]:
            if here[query] > 0:
                here[query] = 0
                for other in pins[indptr[query] : indptr[query + 1]]:
                    near[other] = 0


@compiled
def _best_block(
    edges: Edges, named: Named, vector: int, sums: _Sums, full: int,
    present: np.ndarray, is_read: np.ndarray, touched: np.ndarray,
) -> tuple[int, float, int]:  # fmt: skip
    """The other full block that most of the vector's queries read, their weight, and the pins looked at.

    `present`, `is_read` (all 0, all -1) and `touched` are room to work in, (blocks,).
    """
    indptr, pins, weights = edges
    starts, queries = named
    block_of = sums[0]
    home, num_touched, work = block_of[vector], 0, 0
    for query in queries[starts[vector] : starts[vector + 1]]:
        work += indptr[query + 1] - indptr[query]
        for other in pins[indptr[query] : indptr[query + 1]]:
            block = block_of[other]
            if block != home and is_read[block] != query:
                is_read[block] = query
                if present[block] == 0:
                    touched[num_touched] = block
                    num_touched += 1
                present[block] += weights[query]
    best, most = -1, 0.0
    for block in touched[:num_touched]:
        if present[block] > most and block < full:
            best, most = block, present[block]
        present[block], is_read[block] = 0, -1
    return best, most, work


@compiled
def _count_both(
    edges: Edges, named: Named, vector: int, block: int, sums: _Sums, slot_of: np.ndarray, both: np.ndarray
) -> None:
    """Adds to `both` (size,), by slot, what the sums gain by the queries that name the vector and one of the block."""
    indptr, pins, weights = edges
    starts, queries = named
    block_of, _, _, _, here = sums
    for query in queries[starts[vector] : starts[vector + 1]]:
        there = 0
        for other in pins[indptr[query] : indptr[query + 1]]:
            there += block_of[other] == block
        if there == 0:
            continue
        gain = weights[query] * ((here[query] == 1) + (there == 1))
        for other in pins[indptr[query] : indptr[query + 1]]:
            if block_of[other] == block:
                both[slot_of[other] - block * len(both)] += gain


@compiled
def _move(edges: Edges, named: Named, vector: int, to: int, looked_at: int, sums: _Sums) -> None:
    """Takes a vector to another block, and the sums with it."""
    indptr, pins, weights = edges
    starts, queries = named
    block_of, _, alone, near, here = sums
    home = block_of[vector]
    change = 1 if to == looked_at else -1
    for query in queries[starts[vector] : starts[vector + 1]]:
        weight, left, met, mate, host = weights[query], 0, 0, vector, vector
        for other in pins[indptr[query] : indptr[query + 1]]:
            if block_of[other] == to:
                met += 1
                host = other
            elif block_of[other] == home and other != vector:
                left += 1
                mate = other
        if left == 0:
            alone[vector] -= weight
        elif left == 1:
            alone[mate] += weight
        if met == 0:
            alone[vector] += weight
        elif met == 1:
            alone[host] -= weight
        here[query] += change
        if here[query] == (1 if change > 0 else 0):  # it has begun, or ceased, to read the block that is looked at
            for other in pins[indptr[query] : indptr[query + 1]]:
                near[other] += change * weight
    block_of[vector] = to
