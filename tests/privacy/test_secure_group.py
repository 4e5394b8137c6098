"""A secure group's sum is that of its survivors, whoever is lost wherever; what the threshold does not allow is refused."""

import random as stdlib_random
from collections.abc import Callable, Iterable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RoundError
from shoal.privacy.identity import Authority, Identity, Trusted
from shoal.privacy.neighbours import Assumptions
from shoal.privacy.played import PHASES, play
from shoal.privacy.secure_terms import Segment, Terms

SEGMENTS = (Segment(size=5, bits=7), Segment(size=0, bits=9), Segment(size=11, bits=25), Segment(size=3, bits=32))


def terms(*, certified: bool = False, minimum: int = 3, dropouts: float = 0.3, colluders: float = 0.1) -> Terms:
    return Terms(
        purpose=bytes(32), segments=SEGMENTS, minimum=minimum, certified=certified,
        assumptions=Assumptions(colluders=colluders, dropouts=dropouts),
    )  # fmt: skip


def seeded(seed: int) -> Callable[[int], bytes]:
    return stdlib_random.Random(seed).randbytes


def vector(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.integers(0, 1 << each.bits, each.size, np.uint64) for each in SEGMENTS]).astype(
        np.uint32
    )


def total_of(places: Iterable[int]) -> np.ndarray:
    total = np.zeros(sum(each.size for each in SEGMENTS), np.uint32)
    for place in places:
        total += vector(place)
    return total


def certified(members: int) -> tuple[list[Identity], Trusted]:
    authority = Authority(Ed25519PrivateKey.from_private_bytes(bytes(31) + b"\1"), "fleet")
    made = []
    for number in range(members):
        plain = Identity.of_seed(number.to_bytes(32, "big"))
        made.append(Identity(key=plain.key, certificate=authority.certify(plain.public, 1e9)))
    return made, Trusted(authority.key.public_key(), "fleet")


@settings(max_examples=15, deadline=None)
@given(data=st.data(), members=st.integers(8, 24), is_certified=st.booleans())
def test_the_sum_is_that_of_the_survivors_whoever_is_lost_wherever(
    data: st.DataObject, members: int, is_certified: bool
) -> None:
    given_terms = terms(certified=is_certified)
    graph = given_terms.graph(members)
    gone = data.draw(st.lists(st.integers(0, members - 1), unique=True, max_size=graph.dropouts))
    phases = [phase for phase in PHASES if is_certified or phase != "signed"]
    lost = {place: data.draw(st.sampled_from(phases)) for place in gone}
    who, trusted = certified(members) if is_certified else (None, None)
    played = play(given_terms, vector, members, random=seeded(members), lost=lost, identities=who, trusted=trusted)
    alive = [place for place in range(members) if lost.get(place) not in ("shares", "masked")]
    assert list(played.survivors) == alive
    expected = total_of(alive)
    np.testing.assert_array_equal(played.total, given_terms.reduced(expected))
    assert played.spent == set(range(members)) - set(lost), "who reveals shares is spent, and nobody else"


@pytest.mark.parametrize("phase", ["shares", "masked", "signed", "unmask"])
def test_beyond_what_is_assumed_the_group_fails_with_its_reason(phase: str) -> None:
    given_terms = terms(certified=True)
    graph = given_terms.graph(12)
    who, trusted = certified(12)
    lost = dict.fromkeys(range(12 - graph.threshold + 1), phase)
    with pytest.raises(RoundError, match=r"are needed|fewer than"):
        play(given_terms, vector, 12, random=seeded(1), lost=lost, identities=who, trusted=trusted)


@pytest.mark.slow
def test_a_group_of_many_has_few_neighbours_each() -> None:
    given_terms = terms(minimum=8, dropouts=0.1, colluders=0.05)
    graph = given_terms.graph(150)
    assert graph.degree < 60
    lost = {place: PHASES[1 if place % 2 else 3] for place in range(0, 150, 11)}
    played = play(given_terms, vector, 150, random=seeded(2), lost=lost)
    expected = total_of(played.survivors)
    np.testing.assert_array_equal(played.total, given_terms.reduced(expected))


@pytest.mark.parametrize("members", [3, 9])
def test_too_few_members_are_refused_with_how_many_would_do(members: int) -> None:
    with pytest.raises(RoundError, match=r"\d+ members would do"):
        play(terms(minimum=8), vector, members, random=seeded(3))
