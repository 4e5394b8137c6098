"""The group: its numbered invariants under any order of events, and the cases that a reader should know."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shoal.errors import InvalidTransition
from shoal.fleet.group import (
    Add,
    Added,
    Check,
    Checked,
    ClearGroup,
    Close,
    Closed,
    Committed,
    CountMember,
    Gone,
    Joined,
    JoinRound,
    Member,
    Offered,
    ReleaseMember,
    Tell,
)

A, B, C = b"a", b"b", b"c"


def added(group: ClearGroup, *nonces: bytes) -> None:
    for nonce in nonces:
        for event in (Joined(nonce), Offered(nonce), Checked(nonce), Added(nonce)):
            group.step(event, 0.0)


def test_a_member_goes_from_joined_to_counted() -> None:
    group = ClearGroup(most=2)
    assert group.step(Joined(A), 0.0) == [JoinRound(A)]
    assert group.step(Offered(A), 0.0) == [Check(A)]
    assert group.step(Checked(A), 0.0) == [Add(A)]
    assert group.step(Added(A), 0.0) == [CountMember(A)]
    assert group.step(Close(), 0.0) == [Closed()]
    assert group.step(Committed(7), 0.0) == [Tell(A, "counted", version=7)]


def test_a_bad_update_is_refused_and_its_member_may_join_again() -> None:
    group = ClearGroup(most=2)
    group.step(Joined(A), 0.0)
    group.step(Offered(A), 0.0)
    told = group.step(Checked(A, "not finite", "NaN"), 0.0)
    assert told == [Tell(A, "refused", reason="not finite", detail="NaN"), ReleaseMember(A)]
    assert group.step(Joined(A), 0.0) == [JoinRound(A)]


def test_a_bad_update_may_be_found_before_it_is_whole() -> None:
    group = ClearGroup(most=2)
    group.step(Joined(A), 0.0)
    assert ReleaseMember(A) in group.step(Checked(A, "wrong slices", "a gap"), 0.0)
    assert group.step(Offered(A), 0.0) == [Tell(A, "refused", reason="late", detail="The round has closed.")]


def test_additions_are_one_at_a_time() -> None:
    group = ClearGroup(most=3)
    for nonce in (A, B):
        group.step(Joined(nonce), 0.0)
        group.step(Offered(nonce), 0.0)
    assert group.step(Checked(A), 0.0) == [Add(A)]
    assert group.step(Checked(B), 0.0) == []
    assert group.step(Added(A), 0.0) == [CountMember(A), Add(B)]


def test_an_addition_under_way_is_waited_for_at_the_close() -> None:
    group = ClearGroup(most=3)
    for nonce in (A, B):
        group.step(Joined(nonce), 0.0)
        group.step(Offered(nonce), 0.0)
        group.step(Checked(nonce), 0.0)
    told = group.step(Close(), 0.0)
    assert Closed() not in told and ReleaseMember(B) in told
    assert group.step(Added(A), 0.0) == [CountMember(A), Closed()]


def test_no_more_are_added_than_fit_the_sum() -> None:
    group = ClearGroup(most=1)
    added(group, A)
    group.step(Joined(B), 0.0)
    group.step(Offered(B), 0.0)
    assert group.step(Checked(B), 0.0) == []
    assert ReleaseMember(B) in group.step(Close(), 0.0)


def test_a_second_report_of_the_same_update_changes_nothing() -> None:
    group = ClearGroup(most=2)
    added(group, A)
    assert group.step(Offered(A), 0.0) == group.step(Joined(A), 0.0) == []
    assert group.added == (A,)


def test_who_comes_after_the_close_is_released() -> None:
    group = ClearGroup(most=2)
    group.step(Close(), 0.0)
    (told,) = group.step(Joined(A), 0.0)
    assert isinstance(told, Tell) and told.outcome == "released"


def test_an_added_that_nobody_asked_for_is_a_bug_of_ours() -> None:
    with pytest.raises(InvalidTransition, match="not allowed"):
        ClearGroup(most=2).step(Added(A), 0.0)


NONCES = (b"a", b"b", b"c", b"d", b"e")
nonces = st.sampled_from(NONCES)


class AnyOrder(RuleBasedStateMachine):
    """Events in any order, duplicates too; the shell answers `Check` and `Add` when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.group = ClearGroup(most=3)
        self.checks: list[bytes] = []
        self.adds: list[bytes] = []
        self.ever_added: list[bytes] = []
        self.ends: dict[bytes, list[str]] = {}
        self.joined = self.ended = 0
        self.closed = self.committed = False
        self.good: set[bytes] = set()

    def do(self, event: Any) -> None:
        for command in self.group.step(event, 0.0):
            match command:
                case Check(nonce):
                    self.checks.append(nonce)
                case Add(nonce):
                    assert not self.adds, "invariant (2): one at a time"
                    assert nonce in self.good, "invariant (2): only after Checked(ok)"
                    assert not self.closed, "invariant (3)"
                    self.adds.append(nonce)
                    self.ever_added.append(nonce)
                case Tell(nonce, outcome):
                    self.ends.setdefault(nonce, []).append(outcome)
                case JoinRound(_):
                    self.joined += 1
                case CountMember(_) | ReleaseMember(_):
                    self.ended += 1
                case Closed():
                    assert not self.adds, "invariant (3)"
                    self.closed = True

    @rule(nonce=nonces)
    def join(self, nonce: bytes) -> None:
        self.do(Joined(nonce))

    @rule(nonce=nonces)
    def offer(self, nonce: bytes) -> None:
        self.do(Offered(nonce))

    @rule(nonce=nonces)
    def leave(self, nonce: bytes) -> None:
        self.do(Gone(nonce, "tired"))

    @precondition(lambda self: self.checks)
    @rule(good=st.booleans())
    def check(self, good: bool) -> None:
        nonce = self.checks.pop()
        if good:
            self.good.add(nonce)
        self.do(Checked(nonce, "" if good else "not finite"))

    @precondition(lambda self: self.adds)
    @rule()
    def add(self) -> None:
        self.do(Added(self.adds.pop()))

    @rule()
    def close(self) -> None:
        self.do(Close())

    @precondition(lambda self: self.closed and not self.committed)
    @rule()
    def commit(self) -> None:
        before = set(self.group.added)
        self.do(Committed(1))
        self.committed = True
        assert {n for n, outcomes in self.ends.items() if "counted" in outcomes} == before, "invariant (4)"

    @invariant()
    def added_once_and_no_more_than_fit(self) -> None:
        assert len(set(self.ever_added)) == len(self.ever_added) <= 3, "invariants (2) and (5)"

    @invariant()
    def counted_only_once_and_by_commit(self) -> None:
        counted = [n for n, outcomes in self.ends.items() if "counted" in outcomes]
        assert not counted or self.committed, "invariant (4)"
        assert all(self.ends[n].count("counted") == 1 for n in counted), "invariant (1)"

    @invariant()
    def whoever_joined_ends_once(self) -> None:
        inside = [n for n in NONCES if self.group.state(n) not in (None, Member.ADDED)]
        if not self.committed:
            assert self.joined == self.ended + len(inside), "invariant (1)"

    def teardown(self) -> None:
        self.do(Close())
        while self.adds:
            self.add()
        assert self.closed, "a close always ends"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
