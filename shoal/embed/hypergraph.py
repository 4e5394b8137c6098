"""Hyperedges over numbered vectors, as flat arrays: turned round, thinned out, contracted to pairs, divided in two.

A set of hyperedges is `indptr` (edges + 1,) int64, `pins` int32 and `weights` (edges,) float32: edge q joins the vectors
`pins[indptr[q]:indptr[q + 1]]`. All passes are linear in the pins, but for `pairs_of`.
"""

from typing import Final

import numpy as np

from shoal.embed._compiled import compiled

MOST_LOOKED_AT: Final = 4096
"""Pins that are looked at to find a vector's mate."""

Edges = tuple[np.ndarray, np.ndarray, np.ndarray]
"""indptr, pins, weights."""
Named = tuple[np.ndarray, np.ndarray]
"""starts, queries: the same by vector, as `by_vector` gives them."""


@compiled
def by_vector(indptr: np.ndarray, pins: np.ndarray, size: int) -> Named:
    """By vector instead of by query: `queries[starts[v]:starts[v + 1]]` name vector v."""
    starts = np.zeros(size + 1, np.int64)
    for at in range(len(pins)):
        starts[pins[at] + 1] += 1
    for vector in range(size):
        starts[vector + 1] += starts[vector]
    queries, filled = np.empty(len(pins), np.int32), starts[:-1].copy()
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            queries[filled[pins[at]]] = query
            filled[pins[at]] += 1
    return starts, queries


@compiled
def pairs_of(indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, size: int, order: np.ndarray) -> np.ndarray:
    """Pairs up vectors that share queries, heaviest first by a greedy pass in `order`; who is left over, by chance.

    Returns:
        (size,) int64: the number of each vector's pair, 0 to size / 2 - 1.
    """
    starts, queries = by_vector(indptr, pins, size)
    pair_of, number = np.full(size, -1, np.int64), 0
    score, touched = np.zeros(size, np.float32), np.empty(size, np.int64)
    for vector in order:
        if pair_of[vector] >= 0:
            continue
        num_touched, looked_at = 0, 0
        for at in range(starts[vector], starts[vector + 1]):
            query = queries[at]
            begin, end = indptr[query], indptr[query + 1]
            for other in pins[begin:end]:
                if other != vector and pair_of[other] < 0:
                    if score[other] == 0:
                        touched[num_touched] = other
                        num_touched += 1
                    score[other] += weights[query] / (end - begin - 1)
            looked_at += end - begin
            if looked_at > MOST_LOOKED_AT:
                break
        best = -1
        for i in range(num_touched):
            if best < 0 or score[touched[i]] > score[best]:
                best = touched[i]
        for i in range(num_touched):
            score[touched[i]] = 0
        if best >= 0:
            pair_of[vector] = pair_of[best] = number
            number += 1
    waiting = -1
    for vector in order:
        if pair_of[vector] < 0:
            if waiting < 0:
                waiting = vector
            else:
                pair_of[vector] = pair_of[waiting] = number
                number += 1
                waiting = -1
    return pair_of


@compiled
def without_repeats(indptr: np.ndarray, pins: np.ndarray, size: int) -> np.ndarray:
    """The pins; a vector's second one in a query becomes -1."""
    last, made = np.full(size, -1, np.int64), np.empty(len(pins), np.int32)
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            vector = pins[at]
            made[at] = vector if last[vector] != query else -1
            last[vector] = query
    return made


@compiled
def contracted(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, pair_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The pins as pairs; a second pin of a pair in one query becomes -1."""
    last, made = np.full(len(pair_of) // 2 + 1, -1, np.int64), np.empty(len(pins), np.int32)
    for query in range(len(indptr) - 1):
        for at in range(indptr[query], indptr[query + 1]):
            pair = pair_of[pins[at]]
            made[at] = pair if last[pair] != query else -1
            last[pair] = query
    return made, weights


@compiled
def without_small(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The hyperedges with two or more pins that count; pins below 0 do not."""
    kept_ptr, kept = np.empty(len(indptr), np.int64), np.empty(len(pins), np.int32)
    kept_weights = np.empty(len(weights), np.float32)
    number, end = 0, 0
    kept_ptr[0] = 0
    for query in range(len(indptr) - 1):
        begin = end
        for at in range(indptr[query], indptr[query + 1]):
            if pins[at] >= 0:
                kept[end] = pins[at]
                end += 1
        if end - begin < 2 or weights[query] <= 0:
            end = begin
            continue
        kept_weights[number] = weights[query]
        number += 1
        kept_ptr[number] = end
    return kept_ptr[: number + 1].copy(), kept[:end].copy(), kept_weights[:number].copy()


@compiled
def halves(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The hyperedges within each side, vectors numbered anew in their order."""
    number = np.zeros(2, np.int32)
    name = np.empty(len(side), np.int32)
    for vector in range(len(side)):
        name[vector] = number[side[vector]]
        number[side[vector]] += 1
    return _half(indptr, pins, weights, side, name, 0), _half(indptr, pins, weights, side, name, 1)


@compiled
def _half(
    indptr: np.ndarray, pins: np.ndarray, weights: np.ndarray, side: np.ndarray, name: np.ndarray, of: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    num_edges, num_pins = 0, 0
    for query in range(len(indptr) - 1):
        here = 0
        for at in range(indptr[query], indptr[query + 1]):
            here += side[pins[at]] == of
        if here > 1:
            num_edges += 1
            num_pins += here
    kept_ptr, kept, kept_weights = (
        np.empty(num_edges + 1, np.int64),
        np.empty(num_pins, np.int32),
        np.empty(num_edges, np.float32),
    )
    kept_ptr[0] = 0
    number, end = 0, 0
    for query in range(len(indptr) - 1):
        begin = end
        for at in range(indptr[query], indptr[query + 1]):
            if side[pins[at]] == of and end < num_pins:
                kept[end] = name[pins[at]]
                end += 1
        if end - begin < 2:
            end = begin
            continue
        kept_weights[number] = weights[query]
        number += 1
        kept_ptr[number] = end
    return kept_ptr, kept, kept_weights
