"""Swaps between blocks by simulated annealing: what no sequence of swaps that each gain can reach.

Not in the paper. A vector, a vector that a random query of it names too, and a random vector of that one's block: the first and the last
trade places if that lowers the fanout, and with probability exp(-loss / temperature) if not (Kirkpatrick, Gelatt and Vecchi 1983,
"Optimization by simulated annealing"), while the temperature falls from `HOTTEST` to `COLDEST` queries. Each query has a list of its blocks and
how many of its vectors are in each, so a proposal costs the fanout of the queries of two vectors.
"""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled

HOTTEST: Final = 1.0
COLDEST: Final = 0.1
"""Temperatures, in queries of mean weight that need one block more."""
SAME: Final = 1 << 12
"""Proposals at one temperature."""


@compiled
def anneal(
    indptr: np.ndarray,
    pins: np.ndarray,
    weights: np.ndarray,
    starts: np.ndarray,
    queries: np.ndarray,
    order: np.ndarray,
    slot_of: np.ndarray,
    per_block: int,
    first: int,
    last: int,
    proposals: int,
    hottest: float,
    coldest: float,
    rng: np.random.Generator,
) -> None:
    """Improves `order` (n,), slot -> vector, and `slot_of` (n,) in place.

    Args:
        indptr, pins, weights: the queries, as in `hypergraph.py`.
        starts, queries: by vector, the queries that name it.
        per_block: slots of a block; the last may have fewer.
        first, last: the proposals of this call, from 1; `first` is 1 more than a multiple of `SAME`.
        proposals: of all calls: how fast the temperature falls.
        hottest, coldest: temperatures, in units of the weights.
        rng: what is drawn.
    """
    size = len(order)
    blocks, counts = np.zeros(len(pins), np.int32), np.zeros(len(pins), np.int32)
    distinct, seen = np.zeros(len(indptr) - 1, np.int32), np.zeros(len(indptr) - 1, np.int64)
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            _add(blocks, counts, distinct, indptr[query], query, slot_of[pins[at]] // per_block)
    temperature = hottest
    for number in range(first, last + 1):
        if number % SAME == 1:
            temperature = hottest * (coldest / hottest) ** (number / proposals)
        vector = int(rng.random() * size)
        named = starts[vector + 1] - starts[vector]
        if named == 0:
            continue
        query = queries[starts[vector] + int(rng.random() * named)]
        beside = pins[indptr[query] + int(rng.random() * (indptr[query + 1] - indptr[query]))]
        here, there = slot_of[vector] // per_block, slot_of[beside] // per_block
        if here == there:
            continue
        first = there * per_block
        other_slot = first + int(rng.random() * min(per_block, size - first))
        other = order[other_slot]
        for at in range(starts[other], starts[other + 1]):
            seen[queries[at]] = number
        loss = 0.0
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            if seen[query] == number:
                seen[query] = -number  # it names both: nothing changes for it
            else:
                loss += weights[query] * _loss(blocks, counts, distinct[query], indptr[query], here, there)
        for at in range(starts[other], starts[other + 1]):
            query = queries[at]
            if seen[query] != -number:
                loss += weights[query] * _loss(blocks, counts, distinct[query], indptr[query], there, here)
        if loss > 0 and rng.random() >= np.exp(-loss / temperature):
            continue
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            if seen[query] != -number:
                _remove(blocks, counts, distinct, indptr[query], query, here)
                _add(blocks, counts, distinct, indptr[query], query, there)
        for at in range(starts[other], starts[other + 1]):
            query = queries[at]
            if seen[query] != -number:
                _remove(blocks, counts, distinct, indptr[query], query, there)
                _add(blocks, counts, distinct, indptr[query], query, here)
        slot = slot_of[vector]
        order[slot], order[other_slot] = other, vector
        slot_of[vector], slot_of[other] = other_slot, slot


@compiled
def _loss(blocks: np.ndarray, counts: np.ndarray, num: int, begin: int, here: int, there: int) -> int:
    """Blocks that a query needs more when one of its vectors goes from here to there."""
    made = 1
    for at in range(begin, begin + num):
        if blocks[at] == there or (blocks[at] == here and counts[at] == 1):
            made -= 1
    return made


@compiled
def _add(blocks: np.ndarray, counts: np.ndarray, distinct: np.ndarray, begin: int, query: int, block: int) -> None:
    end = begin + distinct[query]
    for at in range(begin, end):
        if blocks[at] == block:
            counts[at] += 1
            return
    blocks[end], counts[end] = block, 1
    distinct[query] += 1


@compiled
def _remove(blocks: np.ndarray, counts: np.ndarray, distinct: np.ndarray, begin: int, query: int, block: int) -> None:
    last = begin + distinct[query] - 1
    for at in range(begin, last + 1):
        if blocks[at] == block:
            counts[at] -= 1
            if counts[at] == 0:
                blocks[at], counts[at] = blocks[last], counts[last]
                distinct[query] -= 1
            return
