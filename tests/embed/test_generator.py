import numpy as np
import pytest

from shoal.embed.generator import TableKind, describe, futures, generate, patterns, tables
from shoal.embed.partition import fanout, partition

KIND = TableKind(name="small", rows=1500, mean_bag=12, compulsory=0.05, cold=0.06, epochs=3, seed=1)


@pytest.fixture(scope="module")
def made():
    return generate(KIND)


def test_the_same_kind_gives_the_same_trace(made):
    again = generate(KIND)
    assert (again.trace.ids == made.trace.ids).all()
    assert (again.trace.indptr == made.trace.indptr).all()


def test_bags_hold_distinct_ids_and_have_the_mean_that_was_asked(made):
    trace = made.trace
    for begin, end in zip(trace.indptr[:200], trace.indptr[1:201], strict=True):
        assert len(set(trace.ids[begin:end].tolist())) == end - begin > 0
    found = describe(trace)
    assert found.mean_bag == pytest.approx(12, rel=0.1)
    assert found.compulsory == pytest.approx(0.05, rel=0.5)
    assert found.top_1_percent > 0.05
    assert sum(share for _, share, _ in found.reuse_histogram) == pytest.approx(1)
    assert sum(share for _, _, share in found.reuse_histogram) == pytest.approx(1)


def test_communities_show_and_ids_tell_something_of_them(made):
    block = np.arange(1500) // 32
    oracle = np.empty(1500, np.int64)
    oracle[made.community_order] = block
    assert sorted(made.community_order.tolist()) == list(range(1500))
    by_community, by_id, by_chance = (
        fanout(trace, blocks) for trace, blocks in ((made.trace, oracle), (made.trace, block), (made.permuted(), block))
    )
    assert by_community < 0.9 * by_id < 0.95 * by_chance


def test_rows_are_born(made):
    first, *_, last = made.trace.split(1, 1, 1)
    new = (last.counts() > 0) & (first.counts() == 0)
    assert new.sum() > 10


def test_the_eight_tables():
    kinds = tables(0.01)
    assert [kind.name for kind in kinds] == [f"table{n}" for n in range(1, 9)]
    assert kinds[7].compulsory == 0.60


def test_patterns():
    made = patterns(200, 50, 6)
    assert set(made) == {"random", "scan", "bag of one", "hot block", "big bag"}
    assert made["scan"].ids[:7].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert made["hot block"].ids.max() < 32
    assert all(trace.num_rows == 200 for trace in made.values())


def test_bad_kinds_are_refused():
    with pytest.raises(ValueError, match="mean_bag"):
        TableKind(name="x", rows=10, mean_bag=0.5, compulsory=0.1, cold=0)
    with pytest.raises(ValueError, match="rows > 0"):
        TableKind(name="x", rows=0, mean_bag=2, compulsory=0.1, cold=0)


def test_futures_share_the_world_but_not_the_draws():
    kind = TableKind(name="t", rows=1500, mean_bag=20, compulsory=0.1, cold=0.05, seed=2)
    true, (one, two) = generate(kind).trace, futures(kind, 3, 2)
    begin = 3 * (kind.num_queries // kind.epochs)
    past, ahead = true.slice(0, begin), true.slice(begin, len(true))
    assert len(one) == len(two) == len(ahead)
    assert not np.array_equal(one.ids, two.ids) and not np.array_equal(one.ids[:100], ahead.ids[:100])
    order = partition(one, 32)
    block_of = np.empty(1500, np.int64)
    block_of[order] = np.arange(1500) // 32
    # What is learnt from one future holds in another better than what is learnt from the past does, as users' histories go on.
    learnt = np.empty(1500, np.int64)
    learnt[partition(past.slice(0, len(past) // 2), 32)] = np.arange(1500) // 32
    assert fanout(two, block_of) < fanout(two, learnt)


def test_futures_start_inside_the_trace():
    kind = TableKind(name="t", rows=200, mean_bag=5, compulsory=0.1, cold=0.05)
    with pytest.raises(ValueError, match="from_epoch"):
        next(futures(kind, 5, 1))
