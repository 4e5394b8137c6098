"""Partitioning and placing: against the formulas in plain Python, and what must hold of every order."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.embed import Layout, Trace, swaps
from shoal.embed.cache import Cache
from shoal.embed.generator import TableKind, generate, patterns
from shoal.embed.partition import Settings, fanout, partition
from shoal.embed.placement import Plan, by_values, depth_above, is_patternless, place
from shoal.embed.replicate import lonely, replicate_residual, replicate_seeds, with_copies
from shoal.embed.simulate import misses, replay

pytestmark = pytest.mark.timeout(240)  # the first test of a fresh checkout compiles

OURS = Settings(multilevel=True, passes=2)


@pytest.fixture(scope="module")
def made():
    return generate(TableKind(name="small", rows=1000, mean_bag=12, compulsory=0.04, cold=0.02, epochs=2, seed=2)).trace


def blocks_of(order, size):
    block_of = np.empty(len(order), np.int64)
    block_of[order] = np.arange(len(order)) // size
    return block_of


def final_p_fanout(queries, side, p, splits):
    """Kabiljo et al.: a query costs s (1 - (1 - p/s)^n) on a side that is to be split into s."""
    total = 0.0
    for query in queries:
        for of, s in enumerate(splits):
            n = sum(side[v] == of for v in query)
            total += s * (1 - (1 - p / s) ** n)
    return total


def test_gains_are_what_the_final_p_fanout_loses():
    rng = np.random.default_rng(0)
    queries = [rng.choice(12, rng.integers(2, 6), replace=False).tolist() for _ in range(20)]
    trace, side, p, splits = Trace.of(queries, 12), (np.arange(12) % 2).astype(np.int8), 0.5, (4, 3)
    powers = np.array([(1 - p / s) ** np.arange(13.0) for s in splits], np.float32)
    gain = np.empty(12, np.float32)
    swaps._gains(trace.indptr, trace.ids.astype(np.int32), np.ones(20, np.float32), side, powers, gain)
    before = final_p_fanout(queries, side, p, splits)
    for vector in range(12):
        moved = side.copy()
        moved[vector] = 1 - moved[vector]
        assert p * gain[vector] == pytest.approx(before - final_p_fanout(queries, moved, p, splits), abs=1e-5)


@pytest.mark.slow
@given(
    queries=st.lists(st.lists(st.integers(0, 40), max_size=7, unique=True), max_size=30),
    size=st.sampled_from([1, 3, 4, 8]),
    multilevel=st.booleans(),
    seed=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_every_order_is_a_permutation_and_is_the_same_again(queries, size, multilevel, seed):
    trace = Trace.of(queries, 41)
    chosen = Settings(multilevel=multilevel, passes=2 * multilevel, seed=seed, iterations=5)
    order = partition(trace, size, chosen)
    assert sorted(order.tolist()) == list(range(41))
    assert (partition(trace, size, chosen, threads=2) == order).all()
    unseen = np.flatnonzero(trace.counts() == 0)
    assert (order[len(order) - len(unseen) :] == unseen).all()  # never seen: last, in order of id


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [Settings(), OURS])
def test_hidden_groups_are_found(chosen):
    rng = np.random.default_rng(1)
    name = rng.permutation(256)
    queries = [name[8 * group + rng.permutation(8)[:4]].tolist() for group in rng.integers(0, 32, 1500)]
    trace = Trace.of(queries, 256)
    assert fanout(trace, blocks_of(partition(trace, 8, chosen), 8)) < 1.3
    assert fanout(trace, np.arange(256) // 8) > 3


@pytest.mark.slow
def test_more_levels_and_passes_lower_fanout(made):
    plain, levels, refined = (
        fanout(made, blocks_of(partition(made, 32, chosen), 32))
        for chosen in (Settings(), Settings(multilevel=True), OURS)
    )
    assert refined <= levels < 1.02 * plain


@pytest.mark.slow
def test_it_goes_on_from_a_first_order(made):
    good = partition(made, 32, OURS)
    again = partition(made, 32, Settings(iterations=2), start=good)
    assert fanout(made, blocks_of(again, 32)) <= 1.02 * fanout(made, blocks_of(good, 32))


def test_heavy_queries_win():
    light, heavy = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    trace = Trace.of([*light, *heavy], 4)
    block = blocks_of(partition(trace, 2, Settings(skip=0.0), weights=np.array([1.0, 1.0, 5.0, 5.0])), 2)
    assert block[0] == block[2] != block[1] == block[3]


def lru(rows):
    return lambda: Cache("s3-fifo", rows // 20, rows, read_aware=True)


def test_placing_for_the_cache_reads_less(made):
    learnt, test = made.split(2, 1)
    blind = place(learnt, 32, lru(1000), Plan(rounds=0))
    aware = place(learnt, 32, lru(1000), Plan(rounds=1))
    copied = place(learnt, 32, lru(1000), Plan(rounds=1, space=0.3))
    reads = [replay(test, layout, lru(1000)()).block_reads for layout in (blind, aware, copied)]
    in_order = replay(test, Layout.in_id_order(1000, 32), lru(1000)()).block_reads
    assert reads[0] < 0.8 * in_order
    assert reads[1] < 1.02 * reads[0]
    assert reads[2] < reads[1]
    assert copied.space <= 1.31 * (32 * 32 / 1000)
    assert (copied.block_of == aware.block_of).all()


def test_without_a_pattern_nothing_moves():
    trace = patterns(600, 600, 8)["random"]
    assert is_patternless(trace, 32, OURS)
    layout = place(trace, 32, lru(600))
    assert (layout.block_of == np.arange(600) // 32).all()


def test_seeds_bring_what_came_with_them():
    trace = Trace.of([[0, 4], [0, 4], [0, 5], [1, 2]], 6)
    layout = replicate_seeds(Layout.in_id_order(6, 2), trace, 0.4)
    assert layout.ids_of()[3].tolist() == [0, 4]
    assert layout.replica_ids.tolist() == [0, 4]


def test_the_lonely_are_those_who_share_no_block():
    trace = Trace.of([[0, 1, 4], [2], [2, 3]], 6)
    alone = lonely(Layout.in_id_order(6, 2), trace)
    assert alone.ids.tolist() == [4, 2]
    assert alone.indptr.tolist() == [0, 1, 2, 2]


def test_residual_copies_cut_reads(made):
    layout = Layout.from_order(partition(made, 32, OURS), 32)
    missed = misses(made, replay(made, layout, Cache("lru", 50, 1000)))
    copied = replicate_residual(layout, missed, 0.2, OURS)
    assert 0 < len(copied.replica_ids) <= 0.2 * 1000
    before, after = (replay(made, x, Cache("lru", 50, 1000)).block_reads for x in (layout, copied))
    assert after < before


@pytest.mark.parametrize("space", [0.0, 0.05, 0.2, 1.0])
def test_copies_fill_the_space_and_those_that_save_reads_come_first(made, space):
    layout = Layout.from_order(partition(made, 32, OURS), 32)
    copied = with_copies(layout, made, made.counts(), space, OURS)
    np.testing.assert_array_equal(copied.slot_of, layout.slot_of)
    assert (
        len(copied.replica_ids) == len(np.unique(copied.replica_ids)) == {0.0: 0, 0.05: 32, 0.2: 192, 1.0: 1000}[space]
    )
    assert set(replicate_residual(layout, made, space, OURS).replica_ids) <= set(copied.replica_ids)
    assert np.all(copied.replica_slots // 32 >= layout.num_blocks)  # never beside the row itself
    if space == 0.2:
        assert (
            made.counts()[copied.replica_ids].sum() > 2 * space * made.num_lookups
        )  # of those that are asked for most


def test_copies_of_neighbours_are_neighbours():
    layout = Layout.from_order(np.random.default_rng(0).permutation(320), 32)
    nothing = Trace.of([[0], [1]], 320)
    copied = with_copies(layout, nothing, np.zeros(320, int), 1.0, OURS)
    homes = layout.block_of[copied.replica_ids]
    for block in range(10):
        assert len(np.unique(copied.replica_slots[homes == block] // 32)) == 1


def test_rows_that_stay_in_id_order_get_their_copies():
    trace = patterns(600, 500, 10)["random"]
    assert len(place(trace, 32, lru(30), Plan(space=0.5)).replica_ids) == 9 * 32


def test_depths_follow_the_threshold():
    counts = np.array([5, 1, 9, 0])
    layout = Layout.in_id_order(4, 2).hot_first(counts)
    assert depth_above(layout, counts, 0).tolist() == [2, 1]
    assert depth_above(layout, counts, 4).tolist() == [1, 1]
    assert depth_above(layout, counts, np.inf).tolist() == [0, 0]


@pytest.mark.parametrize("clusters", [4, 10_000])
def test_near_values_lie_together(clusters):
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat(np.arange(8), 16))
    values = 100 * rng.normal(size=(8, 4))[group] + rng.normal(size=(128, 4))
    order = by_values(values, 16, seed=0, clusters=clusters)
    assert sorted(order.tolist()) == list(range(128))
    runs = np.sum(np.diff(group[order]) != 0) + 1
    assert runs <= 24  # by chance some 112


def test_bad_settings_are_refused(made):
    with pytest.raises(ValueError, match="p > 0"):
        Settings(p=0)
    with pytest.raises(ValueError, match="vectors_per_block > 0"):
        partition(made, 0)
    with pytest.raises(ValueError, match="space"):
        Plan(space=-1)
    assert inspect.getdoc(partition)
