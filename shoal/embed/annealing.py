"""Swaps between blocks by simulated annealing: what no sequence of swaps that each gain can reach.

Not in the paper. A vector, a vector that a random query of it names too, and a random vector of that one's block: the first and the last
trade places if that lowers the fanout, and with probability exp(-loss / temperature) if not (Kirkpatrick, Gelatt and Vecchi 1983,
"Optimization by simulated annealing"), while the temperature falls from `HOTTEST` to `COLDEST` queries. Each query has a list of its blocks and
how many of its vectors are in each, so a proposal costs at most the fanout of the queries of two vectors. Most cost nothing: what a vector
loses by leaving is kept as a sum, and what it gains elsewhere is bounded by what is asked for there, so vectors that are
asked for often, which would have to stay among the like, are seldom looked at.
"""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled
from shoal.embed.exchange import sums_of
from shoal.embed.hypergraph import Edges, Named

HOTTEST: Final = 1.0
COLDEST: Final = 0.1
"""Temperatures, in queries of mean weight that need one block more."""
SAME: Final = 1 << 12
"""Proposals at one temperature."""


_Reads = tuple[np.ndarray, np.ndarray, np.ndarray]
"""The blocks that each query reads, as long as its pins, and how many of its vectors are in each; how many blocks it reads."""


@compiled
def anneal(
    edges: Edges, named: Named, order: np.ndarray, slot_of: np.ndarray, per_block: int,
    first: int, last: int, proposals: int, hottest: float, coldest: float, rng: np.random.Generator,
) -> None:  # fmt: skip
    """Improves `order` (n,), slot -> vector, and `slot_of` (n,) in place.

    Args:
        edges: the queries, as in `hypergraph.py`.
        named: starts and queries: by vector, the queries that name it.
        per_block: slots of a block; the last may have fewer.
        first, last: the proposals of this call, from 1; `first` is 1 more than a multiple of `SAME`.
        proposals: of all calls: how fast the temperature falls.
        hottest, coldest: temperatures, in units of the weights.
        rng: what is drawn.
    """
    size = len(order)
    block_of, whole, alone, _, _ = sums_of(edges, slot_of, per_block)
    reads = _reads(edges, block_of)
    asked = np.zeros(size // per_block + 1)  # the queries of each block's vectors, by weight
    for vector in range(size):
        asked[block_of[vector]] += whole[vector]
    seen, temperature = np.zeros(len(edges[0]) - 1, np.int64), hottest
    for number in range(first, last + 1):
        if number % SAME == 1:
            temperature = hottest * (coldest / hottest) ** (number / proposals)
        vector = int(rng.random() * size)
        beside = _beside(edges, named, vector, rng)
        here, there = block_of[vector], block_of[beside]
        if here == there:
            continue
        other = order[there * per_block + int(rng.random() * min(per_block, size - there * per_block))]
        most = -temperature * np.log(1 - rng.random())  # it may lose so much
        few, many = vector, other
        if whole[vector] > whole[other]:
            few, many = other, vector
        loss = whole[few] - alone[few] - min(whole[few], asked[block_of[many]])
        least = whole[many] - alone[many] - min(whole[many], asked[block_of[few]])
        if loss + least > most:
            continue
        loss = _loss_of(edges, named, reads, few, block_of[few], block_of[many], seen, number)
        if loss + least > most:
            continue
        loss += _loss_beside(edges, named, reads, many, block_of[many], block_of[few], seen, number)
        if loss > most:
            continue
        _move(edges, named, reads, vector, block_of, there, alone)
        _move(edges, named, reads, other, block_of, here, alone)
        asked[here] += whole[other] - whole[vector]
        asked[there] += whole[vector] - whole[other]
        slot_of[vector], slot_of[other] = slot_of[other], slot_of[vector]
        order[slot_of[vector]], order[slot_of[other]] = vector, other


@compiled
def _reads(edges: Edges, block_of: np.ndarray) -> _Reads:
    indptr, pins, _ = edges
    reads = np.zeros(len(pins), np.int32), np.zeros(len(pins), np.int32), np.zeros(len(indptr) - 1, np.int32)
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            _add(reads, indptr[query], query, block_of[pins[at]])
    return reads


@compiled
def _beside(edges: Edges, named: Named, vector: int, rng: np.random.Generator) -> int:
    """A random vector of a random query of the vector; itself if no query names it."""
    indptr, pins, _ = edges
    starts, queries = named
    number = starts[vector + 1] - starts[vector]
    if number == 0:
        return vector
    query = queries[starts[vector] + int(rng.random() * number)]
    found: int = pins[indptr[query] + int(rng.random() * (indptr[query + 1] - indptr[query]))]
    return found


@compiled
def _loss_of(
    edges: Edges, named: Named, reads: _Reads, vector: int, here: int, there: int, seen: np.ndarray, number: int
) -> float:
    """Blocks that are read more, by weight, when the vector goes from here to there; its queries are marked as seen."""
    indptr, _, weights = edges
    starts, queries = named
    loss = 0.0
    for at in range(starts[vector], starts[vector + 1]):
        query = queries[at]
        seen[query] = number
        loss += weights[query] * _loss(reads, indptr[query], query, here, there)
    return loss


@compiled
def _loss_beside(
    edges: Edges, named: Named, reads: _Reads, vector: int, here: int, there: int, seen: np.ndarray, number: int
) -> float:
    """The same for the vector that comes in return. For queries seen nothing changes: they name both, and what they lost is taken back."""
    indptr, _, weights = edges
    starts, queries = named
    loss = 0.0
    for at in range(starts[vector], starts[vector + 1]):
        query = queries[at]
        if seen[query] == number:
            loss -= weights[query] * _loss(reads, indptr[query], query, there, here)
        else:
            loss += weights[query] * _loss(reads, indptr[query], query, here, there)
    return loss


@compiled
def _loss(reads: _Reads, begin: int, query: int, here: int, there: int) -> int:
    """Blocks that a query needs more when one of its vectors goes from here to there."""
    blocks, counts, distinct = reads
    made = 1
    for at in range(begin, begin + distinct[query]):
        if blocks[at] == there or (blocks[at] == here and counts[at] == 1):
            made -= 1
    return made


@compiled
def _move(
    edges: Edges, named: Named, reads: _Reads, vector: int, block_of: np.ndarray, to: int, alone: np.ndarray
) -> None:
    """Takes a vector to another block."""
    indptr, pins, weights = edges
    starts, queries = named
    home = block_of[vector]
    block_of[vector] = -1
    for at in range(starts[vector], starts[vector + 1]):
        query = queries[at]
        left = _remove(reads, indptr[query], query, home)
        met = _add(reads, indptr[query], query, to)
        alone[vector] += weights[query] * ((met == 0) - 1.0 * (left == 0))
        if left == 1 or met == 1:
            for other in pins[indptr[query] : indptr[query + 1]]:
                if left == 1 and block_of[other] == home:
                    alone[other] += weights[query]
                elif met == 1 and block_of[other] == to:
                    alone[other] -= weights[query]
    block_of[vector] = to


@compiled
def _add(reads: _Reads, begin: int, query: int, block: int) -> int:
    """Counts one more of a query's vectors in the block; returns how many there were."""
    blocks, counts, distinct = reads
    end = begin + distinct[query]
    for at in range(begin, end):
        if blocks[at] == block:
            counts[at] += 1
            before: int = counts[at] - 1
            return before
    blocks[end], counts[end] = block, 1
    distinct[query] += 1
    return 0


@compiled
def _remove(reads: _Reads, begin: int, query: int, block: int) -> int:
    """Counts one less of a query's vectors in the block; returns how many are left."""
    blocks, counts, distinct = reads
    at, last = begin, begin + distinct[query] - 1
    while blocks[at] != block:
        at += 1
    counts[at] -= 1
    left: int = counts[at]
    if left == 0:
        blocks[at], counts[at] = blocks[last], counts[last]
        distinct[query] -= 1
    return left
