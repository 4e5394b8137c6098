import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import Layout, Trace
from shoal.embed.bounds import belady, ideal_reads, reads_behind
from shoal.embed.cache import POLICIES, Cache
from shoal.embed.simulate import replay

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


def plain_belady(ids, capacity):
    held, missed = set(), []
    for at, id in enumerate(ids):
        missed.append(id not in held)
        held.add(id)
        upcoming = {
            held_id: (ids[at + 1 :].index(held_id) if held_id in ids[at + 1 :] else 1 << 30) for held_id in held
        }
        if len(held) > capacity:
            held.remove(max(held, key=lambda i: upcoming[i]))
    return missed


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_it_misses_as_often_as_the_plain_one_and_no_policy_less(ids, capacity):
    trace = Trace.of([[id] for id in ids], 10)
    missed = belady(trace, capacity)
    assert missed.sum() == sum(plain_belady(ids, capacity))
    for policy in POLICIES:
        assert replay(trace, Layout.in_id_order(10, 1), Cache(policy, capacity, 10)).block_reads >= missed.sum()


def test_misses_are_packed():
    trace = Trace.of([[0, 1, 2], [0], [3, 4, 5, 6, 7]], 8)
    assert ideal_reads(trace, np.array([1, 1, 1, 0, 1, 1, 1, 1, 1], bool), 4).tolist() == [1, 0, 2]


def test_reads_of_what_a_cache_leaves():
    trace = Trace.of([[0, 1, 2], [0], [], [3, 4, 5, 6, 7]], 8)
    layout = Layout.in_id_order(8, 4)
    assert reads_behind(trace, np.ones(9, bool), layout).tolist() == [1, 1, 0, 2]
    assert reads_behind(trace, np.array([1, 1, 1, 0, 0, 1, 1, 1, 1], bool), layout).tolist() == [1, 0, 0, 1]
