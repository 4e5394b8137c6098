"""Orders: as published, found fast, and what they gain."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.schedule import fast_tac as fast_module
from shoal.schedule.fast_tac import fast_tac
from shoal.schedule.graph import Graph, Stage, Times, Transfer
from shoal.schedule.makespan import UP, How, bounds, finished, makespan_s, step_jobs
from shoal.schedule.orders import Properties, is_before, layer, properties, random, tac, tic, tree


def graph(needs: list[tuple[int, ...]], after: list[tuple[int, ...]], num: int) -> Graph:
    transfers = tuple(Transfer(name=f"t{number:03d}", size_bytes=1 << 20) for number in range(num))
    stages = (Stage(name=f"s{n}", after=a, needs=d) for n, (a, d) in enumerate(zip(after, needs, strict=True)))
    return Graph(transfers=transfers, stages=tuple(stages))


def chain(num: int) -> Graph:
    return graph([(n,) for n in range(num)], [(n - 1,) if n else () for n in range(num)], num)


fast_tac(
    chain(2), Times(np.ones(2, np.int64), np.ones(2, np.int64))
)  # compiled before Hypothesis counts what is random


@st.composite
def drawn(draw: Any) -> Any:
    """What `built` makes a graph and its times of: not here, where run-time type checks would use up Hypothesis' randomness."""
    num, stages = draw(st.integers(1, 7)), draw(st.integers(1, 9))
    needs = [tuple(sorted(draw(st.sets(st.integers(0, num - 1), max_size=2)))) for _ in range(stages)]
    after = [tuple(sorted(draw(st.sets(st.integers(0, n - 1), max_size=2)))) if n else () for n in range(stages)]
    sending = draw(st.lists(st.integers(1, 6), min_size=num, max_size=num))
    computing = draw(st.lists(st.integers(0, 6), min_size=stages, max_size=stages))
    return needs, after, sending, computing


def built(made: Any) -> tuple[Graph, Times]:
    needs, after, sending, computing = made
    return graph(needs, after, len(sending)), Times(np.array(sending, np.int64), np.array(computing, np.int64))


@given(drawn())
@settings(max_examples=300, deadline=None)
def test_the_fast_order_is_the_published_one(made: Any) -> None:
    found, times = built(made)
    assert fast_tac(found, times).tolist() == tac(found, times).tolist()


@given(drawn())
@settings(max_examples=50, deadline=None)
def test_without_numba_it_is_the_same(made: Any) -> None:
    found, times = built(made)
    plain = {name: getattr(fast_module, name) for name in ("_order", "_impending", "_least")}
    try:
        for name, compiled in plain.items():
            setattr(fast_module, name, getattr(compiled, "py_func", compiled))
        assert fast_tac(found, times).tolist() == tac(found, times).tolist()
    finally:
        for name, compiled in plain.items():
            setattr(fast_module, name, compiled)


def test_properties_are_those_of_the_paper() -> None:
    """Its example (figure 3): op1 needs recv1; op2 needs op1 and recv2; op3 needs recv2 alone with recv3."""
    found = graph([(0,), (1,), (1, 2)], [(), (0,), ()], 3)
    times = Times(np.array([2, 3, 5]), np.array([7, 11, 13]))
    seen = properties(found, times, {0, 1, 2})
    assert seen[0] == Properties(2, 7, 5)  # unlocks op1; together with recv2 op2
    assert seen[1] == Properties(3, 0, 5)
    assert seen[2] == Properties(5, 0, 8)
    seen = properties(found, times, {1, 2})
    assert seen[1] == Properties(3, 11, 8)


def test_the_comparator_is_johnsons_rule() -> None:
    """Of two transfers that each unlock a computation, the order that ends first."""
    rng, num_decided = np.random.default_rng(0), 0

    def ends(first: Properties, then: Properties) -> int:
        """When both are computed, on one link and one processor."""
        down = first.communication + then.communication
        return max(first.communication + first.unlocked, down) + then.unlocked

    for _ in range(2000):
        a, b = (Properties(int(m), int(p)) for m, p in rng.integers(1, 50, (2, 2)))
        if is_before(a, b):
            num_decided += 1
            assert ends(a, b) <= ends(b, a)
    assert num_decided > 500


def test_the_comparator_goes_round() -> None:
    """So an order must not depend on how it is sorted."""
    one, two, three = (Properties(m, p, impending) for p, m, impending in [(1, 1, 5), (5, 4, 8), (2, 3, 3)])
    forth = [is_before(one, two), is_before(two, three), is_before(three, one)]
    back = [is_before(two, one), is_before(three, two), is_before(one, three)]
    assert (all(forth), any(back)) == (True, False) or (all(back), any(forth)) == (True, False)


def test_on_a_chain_all_are_the_order_of_layers() -> None:
    found = chain(12)
    times = Times(np.full(12, 5, np.int64), np.full(12, 5, np.int64))
    assert tic(found).tolist() == [0, 0, *range(1, 11)]  # the first two share a rank: M+ of both is 2
    assert tac(found, times).tolist() == layer(found).tolist() == list(range(12))


def test_tac_takes_the_branch_that_pays() -> None:
    """Two branches: one is a long transfer for little work, the other a short one for much."""
    found = graph([(0,), (1,), ()], [(), (), (0, 1)], 2)
    times = Times(np.array([10, 2]), np.array([1, 20, 1]))
    assert tac(found, times).tolist() == [1, 0]
    how = How(slice_bytes=None)
    assert makespan_s(found, times, tac(found, times), how) < makespan_s(found, times, layer(found), how)


def test_layer_and_tree_and_random() -> None:
    found = graph([(2,), (0,), (1,)], [(), (0,), (1,)], 3)
    assert layer(found).tolist() == [1, 2, 0]
    assert tree(found).tolist() == [0, 1, 2]
    assert sorted(random(found, np.random.default_rng(0)).tolist()) == [0, 1, 2]


@given(drawn(), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_no_order_leaves_the_bounds(made: Any, seed: int) -> None:
    found, times = built(made)
    ranks = random(found, np.random.default_rng(seed))
    how = How(slice_bytes=1 << 18)
    seen = bounds(found, times, how)
    took = makespan_s(found, times, ranks, how)
    assert seen.lower_s - 1e-12 <= took <= seen.upper_s + 1e-12
    assert took <= seen.lower_s * (1 + seen.gain) + 1e-12


@pytest.mark.parametrize("num", [2, 3, 20])
def test_a_chain_in_order_reaches_its_bound(num: int) -> None:
    rng = np.random.default_rng(num)
    found = chain(num)
    times = Times(rng.integers(1, 90, num), rng.integers(1, 90, num))
    how = How(slice_bytes=None)
    seen = bounds(found, times, how)
    took = makespan_s(found, times, layer(found), how)
    assert took == pytest.approx(seen.chain_s)
    assert seen.efficiency(took, chain=True) == pytest.approx(1.0)
    assert seen.efficiency(seen.upper_s) == pytest.approx(0.0)


def test_credit_lets_what_was_handed_over_go_first() -> None:
    """An urgent transfer that becomes ready waits for what the link has been handed: one slice, or four."""
    found = Graph(
        transfers=(Transfer(name="big", size_bytes=8 << 20), Transfer(name="urgent", size_bytes=1 << 20)),
        stages=(
            Stage(name="a", makes=(0,)),
            Stage(name="b", after=(0,), makes=(1,)),
        ),
    )
    times = Times(np.array([800, 100]), np.array([0, 150]))
    ranks = np.array([1, 0])
    jobs, _ = step_jobs(found, times, ranks, How(is_training=True, slice_bytes=1 << 20))
    urgent = next(number for number, job in enumerate(jobs) if job.resource == UP and job.rank[1] == 0)
    took = [finished(jobs, {UP: credit})[urgent] for credit in (1, 4)]
    assert took == [200 + 100, 500 + 100]


def test_ahead_two_steps_are_on_their_way_at_a_time() -> None:
    """One transfer down, forward and back, one up: one step after the other, or each begun when the one before the last is over."""
    found = graph([(0,), ()], [(), (0,)], 1)
    made = Graph(transfers=found.transfers, stages=(found.stages[0], Stage(name="back", after=(0,), makes=(0,))))
    for down, forward, back, up in ((10, 5, 10, 10), (40, 5, 10, 40), (4, 50, 100, 4)):
        times = Times(np.array([down]), np.array([forward, back]))
        took = [
            1e9 * makespan_s(made, times, np.zeros(1, np.int64), How(slice_bytes=None, is_training=True, ahead=ahead, num_steps=21))
            for ahead in (False, True)
        ]  # fmt: skip
        assert took[0] == pytest.approx(down + forward + back + up)
        assert took[1] == pytest.approx(max((down + forward + back + up) / 2, down, up, forward + back), rel=0.1)


def test_a_thousand_transfers_are_ordered() -> None:
    found = chain(1000)
    rng = np.random.default_rng(0)
    times = Times(rng.integers(1, 1000, 1000), rng.integers(1, 1000, 1000))
    assert fast_tac(found, times).tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"after": (1,)}, "wait for stages before it"), ({"needs": (7,)}, "numbers of 1 transfers")],
)
def test_a_graph_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Graph(transfers=(Transfer(name="t", size_bytes=1),), stages=(Stage(name="s", **change),))


def test_times_of_another_graph_are_refused() -> None:
    with pytest.raises(ValueError, match="times of 2 transfers"):
        fast_tac(chain(2), Times(np.ones(1, np.int64), np.ones(2, np.int64)))
    with pytest.raises(ValueError, match="at least 1 ns"):
        fast_tac(chain(1), Times(np.zeros(1, np.int64), np.ones(1, np.int64)))
