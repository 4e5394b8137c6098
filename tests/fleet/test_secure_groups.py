"""The machine of secure groups: its invariants under any order of events, and the cases that a reader should know.

Numbers in brackets are invariants of `group.py` (to 8) and `secure_groups.py` (from 9).
"""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.errors import InvalidTransition
from shoal.fleet import group as g
from shoal.fleet.group import Broke, Form, Formed, Member
from shoal.fleet.secure_groups import SecureGroups
from shoal.policy import Late, RoundPolicy

A, B, C, D, E = b"a", b"b", b"c", b"d", b"e"
LATE = Late(kind="discount", factor=0.5, max_staleness=1)
LEAST = 3


def policy(late: Late, **changes: Any) -> RoundPolicy:
    return RoundPolicy(**{"goal": 4, "minimum_group": LEAST, "over_selection": 1.0, "late": late, **changes})


def opened(late: Late | None = None, *, most: int = 8, size: int = 4, version: int = 0) -> SecureGroups:
    groups = SecureGroups(policy(late or Late()), most=most, size=size, fits=lambda count: count >= LEAST)
    groups.step(g.Open(version), 0.0)
    return groups


def offer(groups: SecureGroups, *nonces: bytes, version: int = 0) -> list[Any]:
    """Members that join and wait; returns what is said after they have joined, but for who counts."""
    said: list[Any] = []
    for nonce in nonces:
        groups.step(g.Joined(nonce, version), 0.0)
        said += [told for told in groups.step(g.Offered(nonce), 0.0) if not isinstance(told, g.CountMember)]
    return said


def test_a_group_forms_of_those_that_wait_and_counts_its_survivors() -> None:
    groups = opened()
    (form,) = offer(groups, A, B, C, D)
    assert form == Form(1, (A, B, C, D), 1.0)
    told = groups.step(Formed(1, (A, B, C)), 0.0)
    assert told == [g.Tell(D, "moved", reason="it was lost in its secure group"), g.ReleaseMember(D)], (
        "and the round no longer counts on D"
    )
    assert groups.step(g.Close(), 0.0) == [g.Closed((1,))]
    assert groups.members(1) == (A, B, C)
    assert groups.step(g.Committed(1), 0.0) == [g.Tell(nonce, "counted", version=1) for nonce in (A, B, C)]


def test_who_waits_counts_so_that_the_round_closes_when_enough_do() -> None:
    groups = opened()
    groups.step(g.Joined(A, 0), 0.0)
    assert groups.step(g.Offered(A), 0.0) == [g.CountMember(A, 0)]
    assert groups.step(g.Gone(A, "left"), 0.0) == [g.ReleaseMember(A)]


def test_of_late_members_only_so_many_count_as_can_be_a_group() -> None:
    groups = opened(LATE, version=1)
    for nonce in (A, B, C):
        groups.step(g.Joined(nonce, 0), 0.0)
    assert groups.step(g.Offered(A), 0.0) == groups.step(g.Offered(B), 0.0) == []
    assert groups.step(g.Offered(C), 0.0) == [g.CountMember(nonce, 1) for nonce in (A, B, C)]


def test_at_a_round_s_end_groups_are_about_as_large() -> None:
    groups = opened(most=20, size=6)
    offer(groups, *(bytes([i]) for i in range(5)))
    assert [len(form.nonces) for form in groups.step(g.Close(), 0.0)] == [5]
    many = SecureGroups(policy(Late()), most=20, size=100, fits=lambda count: count >= LEAST)
    many.step(g.Open(0), 0.0)
    offer(many, *(bytes([i]) for i in range(8)))
    many._size = 6
    assert [len(form.nonces) for form in many.step(g.Close(), 0.0)] == [4, 4], "not 6, and 2 that are no group"


def test_members_that_wait_count_again_in_a_round_that_begins_anew() -> None:
    groups = opened(LATE)
    offer(groups, A, B)
    assert groups.step(g.Close(), 0.0) == [g.Closed(())]
    groups.step(g.Failed("disk"), 0.0)
    assert groups.step(g.Open(0), 0.0) == [g.CountMember(A, 0), g.CountMember(B, 0)]


def test_fewer_than_a_group_wait_until_the_round_ends() -> None:
    groups = opened()
    assert offer(groups, A, B, C) == []
    (form,) = groups.step(g.Close(), 0.0)
    assert form == Form(1, (A, B, C), 1.0), "three can be a group, and the close waits for it"
    assert groups.step(Formed(1, (A, B, C)), 0.0)[-1] == g.Closed((1,))


def test_too_few_are_released_when_the_round_ends() -> None:
    groups = opened()
    offer(groups, A, B)
    told = groups.step(g.Close(), 0.0)
    assert [command.nonce for command in told if isinstance(command, g.Tell)] == [A, B]
    assert told[-1] == g.Closed(())


def test_of_a_broken_group_the_spent_are_refused_and_the_others_may_offer_again() -> None:
    groups = opened()
    offer(groups, A, B, C, D)
    told = groups.step(Broke(1, (A, B), "too few shares"), 0.0)
    outcomes = {command.nonce: command.outcome for command in told if isinstance(command, g.Tell)}
    assert outcomes == {A: "refused", B: "refused", C: "moved", D: "moved"}
    assert offer(groups, C, D) == [] and groups.state(C) is Member.OFFERED


def test_late_members_are_a_group_of_their_own_with_their_discount() -> None:
    groups = opened(LATE, version=1)
    offer(groups, A, B, version=0)
    assert offer(groups, C, version=1) == []
    told = groups.step(g.Close(), 0.0)
    assert told == [g.Closed(())], (
        "two of version 0 and one of version 1 make no group, and may wait for the next round"
    )
    groups.step(g.Committed(2), 0.0)
    told = groups.step(g.Open(2), 0.0)
    assert {command.nonce for command in told if isinstance(command, g.Tell)} == {A, B}, "two versions late is too late"
    assert offer(groups, D, E, version=1) == []
    (form,) = offer(groups, b"f", version=1)
    assert form == Form(1, (C, D, E, b"f"), 0.5)


def test_what_is_stored_while_the_round_goes_on_leaves_out_what_is_forming() -> None:
    groups = opened()
    offer(groups, A, B, C, D)
    groups.step(Formed(1, (A, B, C, D)), 0.0)
    offer(groups, E, b"f", b"g", b"h")
    assert groups.step(g.Close(final=False), 0.0) == [g.Closed((1,))]
    assert [type(command) for command in groups.step(g.Stored(), 0.0)] == [g.Tell] * 4
    assert groups.state(E) is Member.ADDING


def test_no_more_are_taken_than_fit_the_sum_of_a_version() -> None:
    groups = opened(most=5)
    offer(groups, A, B, C, D)
    assert offer(groups, E, b"f", b"g", b"h") == [], "there is room for one more, which is no group"


def test_what_is_not_awaited_is_an_error() -> None:
    with pytest.raises(InvalidTransition):
        opened().step(Formed(1, ()), 0.0)


class AnyOrder(RuleBasedStateMachine):
    """Members, groups and rounds in any order."""

    @initialize(
        late=st.sampled_from([Late(), LATE, Late(kind="patch", max_staleness=2)]),
        most=st.integers(4, 9),
        size=st.integers(3, 5),
    )
    def begin(self, late: Late, most: int, size: int) -> None:
        self.policy, self.most = policy(late), most
        self.groups = SecureGroups(self.policy, most=most, size=min(size, most), fits=lambda count: count >= LEAST)
        self.version, self.closing = 0, False
        self.closed: tuple[int, ...] | None = None
        self.ended: dict[bytes, list[str]] = {}
        self.counted: set[bytes] = set()
        self.spent: set[bytes] = set()
        self.forming: dict[int, tuple[bytes, ...]] = {}
        self.number = 0
        self.in_sum: dict[int, int] = {}
        self.do(g.Open(0))

    def do(self, event: Any) -> None:
        for command in self.groups.step(event, 0.0):
            match command:
                case Form(group, nonces):
                    assert len(nonces) >= LEAST and len(set(nonces)) == len(nonces)  # (9)
                    assert not set(nonces) & {n for members in self.forming.values() for n in members}  # (9)
                    assert not set(nonces) & self.spent  # (10)
                    self.forming[group] = nonces
                case g.Tell(nonce, outcome):
                    self.ended.setdefault(nonce, []).append(outcome)
                    if outcome == "counted":
                        assert nonce in self.counted  # (4)
                case g.CountMember(nonce, staleness):
                    assert 0 <= staleness <= self.policy.max_staleness  # (6)
                    self.counted.add(nonce)
                case g.Closed(groups):
                    for number in groups:
                        assert number not in self.forming and self.groups.members(number)  # (3) (11)
                    self.closed = groups

    @property
    def is_idle(self) -> bool:
        return not self.closing and self.closed is None

    @rule(back=st.integers(0, 2))
    @precondition(lambda self: self.closed is None)
    def join(self, back: int) -> None:
        self.number += 1
        self.do(g.Joined(self.number.to_bytes(4, "big"), max(0, self.version - back)))

    @rule(count=st.integers(1, 6))
    @precondition(lambda self: self.closed is None)
    def offer(self, count: int) -> None:
        joined = [nonce for nonce, state in self.groups._states.items() if state is Member.JOINED]
        for nonce in joined[:count]:
            if self.groups.state(nonce) is Member.JOINED:
                self.do(g.Offered(nonce))

    @rule(data=st.data())
    @precondition(lambda self: self.forming)
    def group_ends(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.forming)))
        members = self.forming.pop(number)
        some = tuple(nonce for nonce in members if data.draw(st.booleans()))
        if len(some) >= self.policy.minimum_group and data.draw(st.booleans()):
            self.do(Formed(number, some))
        else:
            self.spent |= set(some)
            self.do(Broke(number, some, "why"))

    @rule(data=st.data())
    def gone(self, data: st.DataObject) -> None:
        if self.groups._states and self.closed is None:
            self.do(g.Gone(data.draw(st.sampled_from(sorted(self.groups._states))), "left"))

    @rule(final=st.booleans())
    @precondition(lambda self: self.is_idle)
    def close(self, final: bool) -> None:
        self.closing, self.final = True, final
        self.do(g.Close(final))

    @rule(works=st.booleans())
    @precondition(lambda self: self.closed is not None)
    def settle(self, works: bool) -> None:
        self.closed, self.closing = None, False
        if not works:
            self.do(g.Failed("disk"))
            if self.final:
                self.do(g.Open(self.version))
        elif self.final:
            self.version += 1
            self.do(g.Committed(self.version))
            self.do(g.Open(self.version))
        else:
            self.do(g.Stored())

    @rule()
    @precondition(lambda self: self.is_idle)
    def dissolve(self) -> None:
        self.do(g.Dissolve())

    @invariant()
    def each_ends_once_but_for_who_may_offer_again(self) -> None:
        for nonce, outcomes in self.ended.items():
            assert outcomes.count("counted") + outcomes.count("refused") + outcomes.count("released") <= 1, (
                nonce,
                outcomes,
            )  # (1)

    @invariant()
    def a_sum_has_room_for_its_members(self) -> None:
        if hasattr(self, "groups"):
            by_version: dict[int, int] = {}
            for group in self.groups._groups.values():
                by_version[group.version] = by_version.get(group.version, 0) + len(group.members)
            assert all(count <= self.most for count in by_version.values())  # (5)


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase
