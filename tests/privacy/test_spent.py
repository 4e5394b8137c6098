"""An update that has been opened is spent: no sums of any groups are taken apart by subtracting one from another.

The server says of every group that it failed, and keeps its sum. The proof is in `docs/trust.md`; each of its conditions has a test
here or in `test_hostile_server.py` that shows what happens without it.
"""

import itertools
import random as stdlib_random
from collections.abc import Sequence

import numpy as np
import pytest

from shoal.privacy.neighbours import Assumptions
from shoal.privacy.played import PHASES, Played, play
from shoal.privacy.secure_terms import Segment, Terms

MEMBERS, MINIMUM = 10, 3


def terms(dropouts: float) -> Terms:
    assumed = Assumptions(colluders=0.1, dropouts=dropouts)
    return Terms(purpose=bytes(32), segments=(Segment(size=3, bits=32),), minimum=MINIMUM, assumptions=assumed)


def vector(update: int) -> np.ndarray:
    return np.random.default_rng(update).integers(0, 1 << 32, 3, np.uint64).astype(np.uint32)


def group(updates: Sequence[int], lost: dict[int, str], *, seed: int, dropouts: float = 0.3) -> Played:
    """The group of these updates; `lost` by update."""
    return play(
        terms(dropouts), lambda place: vector(updates[place]), len(updates), random=stdlib_random.Random(seed).randbytes,
        lost={at: lost[update] for at, update in enumerate(updates) if update in lost},
    )  # fmt: skip


def exposed(sums: Sequence[set[int]]) -> list[tuple[int, ...]]:
    """Fewer than the minimum of updates that some combination of the sums is over."""
    names = sorted(set().union(*sums))
    matrix = np.array([[name in each for name in names] for each in sums], np.int64)
    whole = np.linalg.matrix_rank(matrix)
    few = itertools.combinations(range(len(names)), MINIMUM - 1)  # fewer are among these
    return [
        tuple(names[at] for at in some)
        for some in few
        if np.linalg.matrix_rank(np.delete(matrix, some, axis=1)) < whole
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("believes_the_server", [False, True])
def test_a_server_that_lies_about_failure_learns_no_combination_of_fewer_than_the_minimum(
    seed: int, believes_the_server: bool
) -> None:
    """Groups one after another, of updates that are offered again unless they are spent; members lost at random. With members that offer
    again whatever they are told has failed the attack succeeds."""
    chance, fresh = stdlib_random.Random(seed), itertools.count()
    offered, sums = [next(fresh) for _ in range(MEMBERS)], list[set[int]]()
    for number in range(7):
        some = chance.sample(offered, MEMBERS)
        lost = {
            update: chance.choice([phase for phase in PHASES if phase != "signed"]) for update in chance.sample(some, 3)
        }
        played = group(some, lost, seed=number)
        sums.append({some[place] for place in played.survivors})
        if not believes_the_server:
            offered = [each for each in offered if each not in {some[place] for place in played.spent}]
            offered += [next(fresh) for _ in range(MEMBERS - len(offered))]
    assert len({frozenset(each) for each in sums}) > 1
    assert bool(exposed(sums)) == believes_the_server


def test_what_was_believed_to_have_failed_is_bare_in_the_difference() -> None:
    """The attack of the test above, down to the numbers."""
    everybody = list(range(MEMBERS))
    first, second = group(everybody, {}, seed=1), group(everybody, {4: "masked"}, seed=2)
    np.testing.assert_array_equal(first.total - second.total, vector(4))
    assert 4 in first.spent, "a member that keeps to the rule is not in the second"


def test_an_update_in_two_groups_at_once_is_bare_too_though_each_member_reveals_shares_once() -> None:
    """Condition: one group at a time. Half of the members mask in both groups and reveal shares in the first, half in the second."""
    one, other, victim = list(range(5)), list(range(5, 10)), 10
    first = group([*one, *other, victim], dict.fromkeys(one, "added"), seed=1, dropouts=0.5)
    second = group([*one, *other], dict.fromkeys(other, "added"), seed=2, dropouts=0.5)
    assert not {[*one, *other, victim][at] for at in first.spent} & {[*one, *other][at] for at in second.spent}
    np.testing.assert_array_equal(first.total - second.total, vector(victim))
