"""Swaps between blocks: each lowers the fanout by what the sums say, and none that does is passed over."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import Trace
from shoal.embed.exchange import exchange
from shoal.embed.hypergraph import by_vector
from shoal.embed.partition import Settings, partition

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


def edges_of(bags):
    """Edges of different weights."""
    indptr = np.cumsum([0, *map(len, bags)]).astype(np.int64)
    pins = np.array([vector for bag in bags for vector in bag], np.int32)
    return indptr, pins, np.linspace(0.5, 2, len(bags)).astype(np.float32)


def reads(bags, weights, block_of):
    """Blocks that the queries read, by weight."""
    return sum(w * len({int(block_of[v]) for v in bag}) for w, bag in zip(weights, bags, strict=True))


def gains_left(bags, weights, block_of, full):
    """What swaps of a vector gain, counted anew, with each vector of the block that it would gain most to go to."""
    now = reads(bags, weights, block_of)
    for vector in np.flatnonzero(block_of < full):
        gains = np.array([now - reads(bags, weights, moved(block_of, vector, there)) for there in range(full)])
        gains[block_of[vector]] = 0
        best = int(np.argmax(gains))
        if gains[best] > 1e-3 and np.sum(gains > gains[best] - 1e-3) == 1:  # of several that are as good, one is tried
            for partner in np.flatnonzero(block_of == best):
                yield now - reads(bags, weights, moved(moved(block_of, vector, best), partner, block_of[vector]))


def moved(block_of, vector, to):
    """The blocks with a vector in another one."""
    return np.where(np.arange(len(block_of)) == vector, to, block_of)


bags_of = st.lists(st.lists(st.integers(0, 16), min_size=2, max_size=6, unique=True), min_size=2, max_size=20)


@settings(max_examples=60, deadline=None)
@given(bags=bags_of, size=st.integers(1, 6), seed=st.integers(0, 99))
def test_swaps_gain_until_none_is_left(bags, size, seed):
    edges, rng = edges_of(bags), np.random.default_rng(seed)
    named, order = by_vector(edges[0], edges[1], 17), rng.permutation(17)
    slot_of, full = np.argsort(order), 17 // size
    before, swaps = reads(bags, edges[2], slot_of // size), -1
    while swaps:
        swaps, _ = exchange(edges, named, order, slot_of, size, rng.permutation(full), 10**9)
        after = reads(bags, edges[2], slot_of // size)
        assert after <= before - 5e-5 * swaps
        before = after
    assert sorted(order) == list(range(17)) and (order[slot_of] == np.arange(17)).all()
    assert all(gain < 1e-3 for gain in gains_left(bags, edges[2], slot_of // size, full))


def test_the_last_block_stays_where_it_is_not_full():
    edges = edges_of([[0, 4], [1, 4], [2, 4], [3, 4]])
    order, slot_of = np.arange(5), np.arange(5)
    swaps, _ = exchange(edges, by_vector(edges[0], edges[1], 5), order, slot_of, 2, np.arange(2), 10**9)
    assert swaps == 0 and order.tolist() == [0, 1, 2, 3, 4]


def test_work_is_bounded():
    rng = np.random.default_rng(0)
    bags = [rng.choice(64, 8, replace=False).tolist() for _ in range(200)]
    edges, order, slot_of = edges_of(bags), np.arange(64), np.arange(64)
    named = by_vector(edges[0], edges[1], 64)
    swaps, left = exchange(edges, named, order.copy(), slot_of.copy(), 8, np.arange(8), 10**6)
    assert swaps > 0 and left > 0
    stopped, left = exchange(edges, named, order, slot_of, 8, np.arange(8), 2000)
    assert stopped < swaps and -4000 < left <= 0  # a block's vectors' pins above it, at most


def test_a_vector_named_twice_counts_once():
    rng = np.random.default_rng(0)
    bags = [rng.choice(64, 6, replace=False).tolist() for _ in range(200)]
    twice = [bag + bag[: k % 4] for k, bag in enumerate(bags)]
    chosen = Settings(multilevel=True, passes=2)
    assert (partition(Trace.of(twice, 64), 8, chosen) == partition(Trace.of(bags, 64), 8, chosen)).all()
