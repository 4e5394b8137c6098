"""Replays against plain Python, and the choice of blocks where there are copies."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import Layout, Trace
from shoal.embed.cache import POLICIES, Cache
from shoal.embed.choose import choose_blocks, copies_of, is_read
from shoal.embed.simulate import misses, replay

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


def lru_reads(queries, layout, capacity, depth):
    """The paper's cache in plain Python: reads of each query."""
    held, reads, ids_of = OrderedDict(), [], layout.ids_of()

    def admit(id):
        if len(held) == capacity:
            held.popitem(last=False)
        held[id] = None

    for query in queries:
        query = list(dict.fromkeys(query))
        missing = [id for id in query if id not in held]
        for id in query:
            if id in held:
                held.move_to_end(id)
        blocks = list(dict.fromkeys(int(layout.block_of[id]) for id in missing))
        reads.append(len(blocks))
        for block in blocks:
            for id in ids_of[block][: depth[block]].tolist():
                if id >= 0 and id not in query and id not in held:
                    admit(id)
        for id in missing:
            admit(id)
    return reads


queries_of = st.lists(st.lists(st.integers(0, 29), max_size=6), max_size=40)


@given(queries_of, st.integers(8, 20), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_reads_are_those_of_the_plain_cache(queries, capacity, deep):
    layout = Layout.at_random(30, 4, seed=0)
    depth = np.full(layout.num_blocks, deep)
    made = replay(Trace.of(queries, 30), layout, Cache("lru", capacity, 30), depth)
    assert made.reads.tolist() == lru_reads(queries, layout, capacity, depth)
    assert made.block_reads == made.reads.sum()
    assert made.lookups - made.hits == made.is_miss.sum()


@given(queries_of, st.sampled_from(sorted(POLICIES)), st.booleans(), st.booleans(), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_no_query_reads_more_blocks_than_it_has_ids(queries, policy, duel, read_aware, capacity):
    trace = Trace.of(queries, 30)
    cache = Cache(policy, capacity, 30, duel=duel, read_aware=read_aware)
    layout = Layout(np.arange(30), 4, np.arange(5), np.arange(40, 45))
    made = replay(trace, layout, cache, np.full(layout.num_blocks, 2))
    sizes = np.array([len(set(query)) for query in queries], np.int64)
    assert (made.reads <= sizes).all()
    assert len(cache) <= capacity
    missed = misses(trace, made)
    assert len(missed) == len(trace) and missed.num_lookups == made.is_miss.sum()


def test_the_head_warms_and_is_not_counted():
    trace = Trace.of([[0], [0], [1]], 4)
    made = replay(trace, Layout.in_id_order(4, 2), Cache("lru", 2, 4), skip=1)
    assert (made.num_queries, made.lookups, made.hits, made.block_reads) == (2, 2, 1, 1)
    assert made.reads_per_query == 0.5 and made.miss_ratio == 0.5


def test_prefetch_is_counted_and_used():
    trace = Trace.of([[0], [1], [1]], 4)
    made = replay(trace, Layout.in_id_order(4, 2), Cache("lru", 4, 4), np.array([2, 0]))
    assert (made.prefetched, made.prefetch_hits, made.block_reads) == (1, 1, 1)


def test_a_copy_beside_its_company_is_chosen():
    layout = Layout(np.arange(6), 2, np.array([0]), np.array([5 + 1]))  # 0 also lies in block 3
    layout = Layout.from_blocks(np.array([[0, 1], [2, 3], [4, 5], [0, 4]]), 6, homes=layout.block_of)
    chosen = np.empty(3, np.int64)
    assert choose_blocks(copies_of(layout), np.array([0, 4]), 2, chosen) == 1
    assert chosen[:2].tolist() == [3, 3]
    assert is_read(copies_of(layout), 4, chosen, 2) and not is_read(copies_of(layout), 2, chosen, 2)
    assert choose_blocks(copies_of(layout), np.array([0, 2, 3]), 3, chosen) == 2


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_every_missing_vector_is_in_its_chosen_block(missing, seed):
    rng = np.random.default_rng(seed)
    blocks = np.concatenate([np.arange(10).reshape(5, 2), rng.permutation(10)[:8].reshape(4, 2)])
    layout = Layout.from_blocks(blocks, 10, homes=np.arange(10) // 2)
    chosen = np.empty(len(missing), np.int64)
    number = choose_blocks(copies_of(layout), np.array(missing), len(missing), chosen)
    assert number == len(set(chosen.tolist())) <= len({id // 2 for id in missing}) + 1
    for id, block in zip(missing, chosen, strict=True):
        assert id in blocks[block]


def test_repeats_in_a_query_count_once():
    made = replay(Trace.of([[3, 3, 3]], 4), Layout.in_id_order(4, 2), Cache("lru", 2, 4))
    assert (made.lookups, made.block_reads, made.is_miss.tolist()) == (1, 1, [True, False, False])
    assert made.miss_ratio == pytest.approx(1.0)
