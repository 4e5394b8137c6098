import numpy as np
import pytest

from shoal.embed.generator import TableKind, describe, generate, patterns, tables
from shoal.embed.partition import fanout

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
