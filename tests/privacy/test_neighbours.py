"""Degree and threshold keep what they promise: against drawn groups, and against sums of the tails done otherwise."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.privacy.neighbours import MAX_MEMBERS, Assumptions, _chance, find, neighbours

ROSTER = bytes(range(32))


@settings(max_examples=40, deadline=None)
@given(members=st.integers(12, 400), minimum=st.integers(1, 8))
def test_neighbours_are_mutual_as_many_as_the_degree_and_the_same_for_all(members: int, minimum: int) -> None:
    graph = find(members, Assumptions(colluders=0.05, dropouts=0.1), minimum)
    found = neighbours(graph, ROSTER)
    assert set(found) == set(range(1, members + 1))
    for number, others in found.items():
        assert len(set(others)) == len(others) == graph.degree
        assert number not in others
        assert all(number in found[other] for other in others)


def test_another_roster_is_another_circle() -> None:
    graph = find(300, Assumptions(), 8)
    assert not graph.is_complete
    assert neighbours(graph, ROSTER) != neighbours(graph, ROSTER[::-1])


@pytest.mark.parametrize("members", [40, 200, 500])
@pytest.mark.parametrize(("colluders", "dropouts"), [(0.1, 0.3), (0.05, 0.1), (0.2, 0.2)])
def test_in_drawn_groups_nobody_is_exposed_or_lost(members: int, colluders: float, dropouts: float) -> None:
    graph = find(members, Assumptions(colluders=colluders, dropouts=dropouts), 8)
    rng = np.random.default_rng(members)
    found = {number: np.array(others) for number, others in neighbours(graph, ROSTER).items()}
    for _ in range(30):
        bad = rng.permutation(members) + 1
        spies, gone = set(bad[: graph.colluders].tolist()), set(bad[graph.colluders :][: graph.dropouts].tolist())
        for others in found.values():
            near = set(others.tolist())
            assert len(near & spies) <= graph.threshold - graph.minimum
            assert len(near - gone) >= graph.threshold
        honest = set(found) - spies - gone
        seen, open_ = set(), [next(iter(honest))]
        while open_:
            at = open_.pop()
            if at not in seen:
                seen.add(at)
                open_ += [int(other) for other in found[at] if other in honest]
        assert seen == honest, "the honest members that survive are one piece"


@given(population=st.integers(1, 40), data=st.data())
def test_tails_are_those_of_the_hypergeometric_distribution(population: int, data: st.DataObject) -> None:
    marked, drawn = (data.draw(st.integers(0, population)) for _ in range(2))
    masses = [comb(marked, x) * comb(population - marked, drawn - x) for x in range(drawn + 1)]
    for at_least in range(drawn + 2):
        assert _chance(population, marked, drawn, at_least) == Fraction(sum(masses[at_least:]), comb(population, drawn))


def test_the_chances_of_the_graph_that_is_found_are_below_the_promised_and_of_a_smaller_not() -> None:
    graph = find(500, Assumptions(colluders=0.1, dropouts=0.1), 8)
    exposed = 500 * _chance(499, graph.colluders, graph.degree, graph.threshold - graph.minimum + 1)
    lost = 500 * _chance(499, graph.dropouts, graph.degree, graph.degree - graph.threshold + 1)
    assert exposed < 2**-40
    assert lost < 2**-20
    assert 500 * _chance(499, graph.colluders, graph.degree, graph.threshold - graph.minimum) >= 2**-40, (
        "no lower threshold would do"
    )


@pytest.mark.parametrize(
    ("members", "assumptions", "why"),
    [
        (9, Assumptions(), "members would do"),
        (MAX_MEMBERS + 1, Assumptions(), "several groups"),
        (100, Assumptions(colluders=0.5, dropouts=0.499), "no number of members would do"),
        (500, Assumptions(colluders=0.33, dropouts=0.33), "more than a message holds"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(members: int, assumptions: Assumptions, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        find(members, assumptions, 8)


@pytest.mark.parametrize("shares", [{"colluders": 1.0}, {"dropouts": -0.1}, {"colluders": 0.5, "dropouts": 0.5}])
def test_wrong_shares_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"Expected"):
        Assumptions(**shares)
