"""Caches: against plain Python, and what must hold of each policy."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import cache
from shoal.embed.cache import Cache, admit, drop, prefetch_pays, probe, touch, was_prefetched

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles


def check(held: Cache) -> None:
    """The invariants of the module."""
    state, capacity = held.state, held.capacity
    head = state.head
    lengths = head[cache.LISTS + 2 :: 3]
    assert lengths.sum() == capacity and (lengths >= 0).all()  # invariant (2)
    for entry in range(len(state.id_of)):
        id = int(state.id_of[entry])
        if id >= 0:  # invariants (1) and (3)
            assert probe(state, id) == (entry if entry < capacity else -1)
    assert (state.buckets >= 0).sum() == (state.id_of >= 0).sum()
    assert len(set(held.ids.tolist())) == len(held.ids) == len(held)


@pytest.mark.parametrize("policy", cache.POLICIES)
@pytest.mark.parametrize("duel", [False, True])
@given(
    capacity=st.integers(1, 12),
    events=st.lists(st.tuples(st.integers(0, 25), st.sampled_from("aaapd")), max_size=120),
)
@settings(max_examples=40, deadline=None)
def test_invariants_hold_whatever_happens(policy, duel, capacity, events):
    held = Cache(policy, capacity, 26, duel=duel)
    for id, event in events:
        entry = probe(held.state, id)
        if event == "d":
            assert drop(held.state, id) == entry
            assert probe(held.state, id) == -1
        elif entry >= 0 and event == "a":
            touch(held.state, entry)
            assert not was_prefetched(held.state, entry)
        elif entry < 0:
            got = admit(held.state, id, event == "p")
            assert got == probe(held.state, id)
            assert got < capacity
            assert got >= 0 or (duel and event == "p")
            assert got < 0 or was_prefetched(held.state, got) == (event == "p")
        check(held)


def lru_hits(ids, capacity):
    held, hits = OrderedDict(), []
    for id in ids:
        hits.append(id in held)
        held[id] = None
        held.move_to_end(id)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


def s3_fifo_hits(ids, capacity):
    """S3-FIFO with plain lists: the oldest comes first."""
    small, main, ghost, uses = [], [], [], {}
    small_room = max(1, int(0.1 * capacity))
    hits, has_evicted = [], False

    def evict():
        while True:
            if len(main) > capacity - small_room or not small:
                id = main.pop(0)
                if uses[id] == 0:
                    return
                uses[id] = min(uses[id], 3) - 1
                main.append(id)
            else:
                while small:
                    id = small.pop(0)
                    if uses[id] < 2:
                        ghost.append(id)
                        return
                    uses[id] = 0
                    main.append(id)

    for id in ids:
        hits.append(id in small or id in main)
        if hits[-1]:
            uses[id] += 1
            continue
        was_ghost = id in ghost
        if was_ghost:
            ghost.remove(id)
        if len(small) + len(main) == capacity:
            evict()
            has_evicted = True
            del ghost[: max(0, len(ghost) - int(0.9 * capacity))]
        uses[id] = 0
        to_main = was_ghost or (not has_evicted and len(small) >= small_room)
        (main if to_main else small).append(id)
    return hits


@pytest.mark.parametrize(("policy", "oracle"), [("lru", lru_hits), ("s3-fifo", s3_fifo_hits)])
@pytest.mark.parametrize("capacity", [10, 37])
def test_hits_are_those_of_the_plain_policy(policy, oracle, capacity):
    ids = np.random.default_rng(0).zipf(1.2, 4000) % 150
    held = Cache(policy, capacity, 150)
    hits = []
    for id in ids.tolist():
        entry = probe(held.state, id)
        hits.append(entry >= 0)
        if entry >= 0:
            touch(held.state, entry)
        else:
            admit(held.state, id, False)
    assert hits == oracle(ids.tolist(), capacity)


def test_the_sketch_keeps_the_frequent_against_a_scan():
    held = Cache("w-tinylfu", 100, 10_000)
    for id in [*(list(range(50)) * 20), *range(1000, 1400)]:
        entry = probe(held.state, id)
        if entry >= 0:
            touch(held.state, entry)
        else:
            admit(held.state, id, False)
    assert sum(probe(held.state, id) >= 0 for id in range(50)) >= 45


def test_a_prefetched_vector_must_beat_its_victim():
    held = Cache("lru", 2, 10, duel=True)
    for id in (0, 1):
        admit(held.state, id, False)
        touch(held.state, probe(held.state, id))
    assert admit(held.state, 2, True) == -1
    assert admit(held.state, 2, False) >= 0


@pytest.mark.parametrize("policy", cache.POLICIES)
def test_bytes_are_counted(policy):
    held = Cache(policy, 5000, 100_000, duel=True)
    assert held.size_bytes / 5000 == pytest.approx(Cache.bytes_per_entry(policy, duel=True), rel=0.02)
    assert Cache.capacity_of(1e6, 128, policy) * (128 + Cache.bytes_per_entry(policy)) <= 1e6


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="policy to be one of"):
        Cache("fifo", 1, 1)
    with pytest.raises(ValueError, match="capacity"):
        Cache("lru", 0, 1)


def test_a_read_aware_cache_counts_what_a_miss_costs():
    held = Cache("s3-fifo", 10, 100, read_aware=True)
    assert cache.is_worth(held.state, 5)  # there is room
    for id in range(10):
        admit(held.state, id, False)
    assert cache.is_worth(held.state, 1)
    assert sum(cache.is_worth(held.state, 4) for _ in range(4000)) == pytest.approx(1000, rel=0.15)
    entry = probe(held.state, 3)
    before = int(held.state.mark[entry])
    cache.spare(held.state, entry)
    assert int(held.state.mark[entry]) == before
    for _ in range(100):
        touch(held.state, entry)
    assert int(held.state.mark[entry]) >> 3 == 31
    plain = Cache("s3-fifo", 1, 100)
    admit(plain.state, 0, False)
    assert cache.is_worth(plain.state, 9)


def test_prefetch_breaks_even():
    assert prefetch_pays(0, 0) and prefetch_pays(999, 0)
    assert prefetch_pays(1000, 50) and not prefetch_pays(1000, 49)
