"""The groups: their numbered invariants under any order of events, and the cases that a reader should know."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.clip_norm import AdaptiveClip
from shoal.errors import InvalidTransition
from shoal.fleet import group_sums
from shoal.fleet.clear_groups import ClearGroups
from shoal.fleet.group import (
    Add,
    Added,
    Check,
    Checked,
    Close,
    Closed,
    Committed,
    CountMember,
    Failed,
    Gone,
    Joined,
    JoinRound,
    Member,
    Merge,
    Offered,
    Open,
    ReleaseMember,
    Stored,
    Tell,
)
from shoal.plan.manifest import Promises
from shoal.policy import Late, Privacy, RoundPolicy
from tests.fleet import toy

A, B, C = b"a", b"b", b"c"
DISCARD = Late()


def policy(late: Late = DISCARD, *, minimum_group: int = 1, **changes: Any) -> RoundPolicy:
    return RoundPolicy(**{"goal": 2, "minimum_group": minimum_group, "over_selection": 1.0, "late": late, **changes})


def opened(
    late: Late = DISCARD, *, most: int = 3, minimum_group: int = 1, version: int = 0, **changes: Any
) -> ClearGroups:
    groups = ClearGroups(policy(late, minimum_group=minimum_group, **changes), most=most)
    groups.step(Open(version), 0.0)
    return groups


def add(groups: ClearGroups, *nonces: bytes, version: int = 0) -> list[Any]:
    """Members on their way from joining to the sum; returns what is said."""
    said: list[Any] = []
    for nonce in nonces:
        for event in (Joined(nonce, version), Offered(nonce), Checked(nonce), Added(nonce)):
            said += groups.step(event, 0.0)
    return said


def close(groups: ClearGroups, version: int) -> list[Any]:
    """A round's end: closed, committed as `version`, the next one opened."""
    return [c for event in (Close(), Committed(version), Open(version)) for c in groups.step(event, 0.0)]


def test_a_member_goes_from_joined_to_counted() -> None:
    groups = opened()
    assert groups.step(Joined(A, 0), 0.0) == [JoinRound(A, 0)]
    assert groups.step(Offered(A), 0.0) == [Check(A)]
    (adding,) = groups.step(Checked(A), 0.0)
    assert isinstance(adding, Add) and adding.discount == 1.0
    assert groups.step(Added(A), 0.0) == [CountMember(A, 0)]
    assert groups.members(adding.group) == (A,) and groups.base_version(adding.group) == 0
    assert groups.step(Close(), 0.0) == [Closed((adding.group,))]
    assert groups.step(Committed(1), 0.0) == [Tell(A, "counted", version=1)]
    assert groups.state(A) is None


def test_a_bad_update_is_refused_and_its_member_may_join_again() -> None:
    groups = opened()
    groups.step(Joined(A, 0), 0.0)
    groups.step(Offered(A), 0.0)
    told = groups.step(Checked(A, "not finite", "NaN"), 0.0)
    assert told == [Tell(A, "refused", reason="not finite", detail="NaN"), ReleaseMember(A)]
    assert groups.step(Joined(A, 0), 0.0) == [JoinRound(A, 0)]


def test_a_bad_update_may_be_found_before_it_is_whole() -> None:
    groups = opened()
    groups.step(Joined(A, 0), 0.0)
    assert ReleaseMember(A) in groups.step(Checked(A, "wrong slices", "a gap"), 0.0)
    assert groups.step(Offered(A), 0.0) == [Tell(A, "refused", reason="late", detail="The round has closed.")]


def test_additions_are_one_at_a_time() -> None:
    groups = opened()
    for nonce in (A, B):
        groups.step(Joined(nonce, 0), 0.0)
        groups.step(Offered(nonce), 0.0)
    (adding,) = groups.step(Checked(A), 0.0)
    assert groups.step(Checked(B), 0.0) == []
    assert groups.step(Added(A), 0.0) == [CountMember(A, 0), Add(B, adding.group, 1.0)]  # type: ignore[union-attr]


def test_those_who_have_finished_are_used_at_the_close_and_the_others_told() -> None:
    groups = opened()
    for nonce in (A, B, C):
        groups.step(Joined(nonce, 0), 0.0)
    for nonce in (A, B):
        groups.step(Offered(nonce), 0.0)
        groups.step(Checked(nonce), 0.0)
    told = groups.step(Close(), 0.0)
    assert [c for c in told if isinstance(c, Tell)] == [Tell(C, "released", reason="the round has what it needs")]
    added = groups.step(Added(A), 0.0)
    assert [type(c) for c in added] == [CountMember, Add], "B is used"
    assert isinstance(groups.step(Added(B), 0.0)[-1], Closed)


def test_no_more_are_added_than_fit_the_sum() -> None:
    groups = opened(most=1)
    add(groups, A)
    groups.step(Joined(B, 0), 0.0)
    groups.step(Offered(B), 0.0)
    assert groups.step(Checked(B), 0.0) == []
    assert ReleaseMember(B) in groups.step(Close(), 0.0)


def test_a_second_report_of_the_same_update_changes_nothing() -> None:
    groups = opened()
    add(groups, A)
    assert groups.step(Offered(A), 0.0) == groups.step(Joined(A, 0), 0.0) == []


def test_who_comes_after_the_close_is_released() -> None:
    groups = opened()
    groups.step(Close(), 0.0)
    (told,) = groups.step(Joined(A, 0), 0.0)
    assert isinstance(told, Tell) and told.outcome == "released"


def test_discarded_the_late_are_told_so() -> None:
    groups = opened()
    add(groups, A)
    close(groups, 1)
    (told,) = groups.step(Joined(B, 0), 0.0)
    assert isinstance(told, Tell) and told.outcome == "released"


def test_discounted_the_late_go_into_the_present_group() -> None:
    groups = opened(Late.discount(0.5, max_staleness=2))
    groups.step(Joined(B, 0), 0.0)
    add(groups, A)
    assert ReleaseMember(B) not in close(groups, 1), "it is not aborted"
    add(groups, C, version=1)
    groups.step(Offered(B), 0.0)
    (adding,) = groups.step(Checked(B), 0.0)
    assert isinstance(adding, Add) and adding.discount == 0.5 and groups.base_version(adding.group) == 1
    assert groups.step(Added(B), 0.0) == [CountMember(B, 1)]
    assert [c.nonce for c in close(groups, 2) if isinstance(c, Tell)] == [C, B]


def test_patched_the_late_change_their_own_version() -> None:
    groups = opened(Late.patch(max_staleness=2))
    add(groups, A)
    close(groups, 1)
    add(groups, B, version=1)
    (late,) = [c for c in add(groups, C, version=0) if isinstance(c, Add)]
    assert late.discount == 1.0 and groups.base_version(late.group) == 0
    (closed,) = groups.step(Close(), 0.0)
    assert isinstance(closed, Closed) and sorted(map(groups.base_version, closed.groups)) == [0, 1]


def test_who_is_too_late_is_let_go() -> None:
    groups = opened(Late.discount(0.5, max_staleness=1))
    groups.step(Joined(B, 0), 0.0)
    add(groups, A)
    assert ReleaseMember(B) not in close(groups, 1)
    add(groups, C, version=1)
    assert ReleaseMember(B) in close(groups, 2), "invariant (6)"


def test_a_late_group_below_the_minimum_waits_and_is_never_lost() -> None:
    groups = opened(Late.patch(max_staleness=1), minimum_group=2)
    add(groups, A, B)
    close(groups, 1)
    add(groups, C, version=0)
    add(groups, b"e", b"f", version=1)
    said = close(groups, 2)
    (closed,) = [c for c in said if isinstance(c, Closed)]
    assert [groups_version for groups_version in closed.groups] and C not in [
        c.nonce for c in said if isinstance(c, Tell)
    ]
    assert [type(c) for c in said if isinstance(c, Merge)] == [Merge], (
        "too old to be patched in, it joins the present group"
    )
    add(groups, b"g", version=2)
    assert C in [c.nonce for c in close(groups, 3) if isinstance(c, Tell) and c.outcome == "counted"], "invariant (7)"


def test_a_group_is_stored_while_the_round_goes_on() -> None:
    groups = opened(most=9, minimum_group=2, group_size=2, goal=6)
    add(groups, A, B)
    groups.step(Joined(C, 0), 0.0)
    (closed,) = groups.step(Close(final=False), 0.0)
    assert isinstance(closed, Closed) and groups.members(closed.groups[0]) == (A, B)
    assert groups.step(Offered(C), 0.0) == [Check(C)], "the others go on meanwhile"
    assert groups.step(Stored(), 0.0) == [Tell(A, "counted"), Tell(B, "counted")]
    (adding,) = groups.step(Checked(C), 0.0)
    assert isinstance(adding, Add) and adding.group not in closed.groups


def test_who_waits_while_a_group_is_stored_is_added_next() -> None:
    groups = opened(most=9, minimum_group=2, group_size=2, goal=6)
    add(groups, A)
    for nonce in (B, C):
        for event in (Joined(nonce, 0), Offered(nonce), Checked(nonce)):
            groups.step(event, 0.0)
    assert groups.step(Close(final=False), 0.0) == [], "the sum that B is being added to is full"
    _, closed, adding = groups.step(Added(B), 0.0)
    assert isinstance(closed, Closed) and isinstance(adding, Add) and adding.nonce == C, "invariant (8)"
    assert adding.group not in closed.groups


def test_no_group_is_begun_that_could_not_be_one() -> None:
    groups = opened(most=9, minimum_group=2, group_size=2, goal=3)
    add(groups, A, B, C)
    (closed,) = groups.step(Close(final=False), 0.0)
    assert closed == Closed(()), "one would be left over: it stays with the others"
    (closed,) = groups.step(Close(), 0.0)
    assert isinstance(closed, Closed) and groups.members(closed.groups[0]) == (A, B, C)


def test_a_group_that_could_not_be_stored_frees_its_members() -> None:
    groups = opened(most=9, minimum_group=2, group_size=2, goal=6)
    add(groups, A, B)
    groups.step(Close(final=False), 0.0)
    said = groups.step(Failed("no"), 0.0)
    assert [c.outcome for c in said if isinstance(c, Tell)] == ["refused", "refused"]
    assert {c.nonce for c in said if isinstance(c, ReleaseMember)} == {A, B}
    assert CountMember(A, 0) in add(groups, A), "the round goes on, and they may try again"


def test_a_failed_commit_gives_its_room_back() -> None:
    groups = opened(most=2)
    add(groups, A, B)
    groups.step(Close(), 0.0)
    assert [c.outcome for c in groups.step(Failed("no"), 0.0) if isinstance(c, Tell)] == ["refused", "refused"]
    groups.step(Open(0), 0.0)
    assert CountMember(B, 0) in add(groups, A, B)


def test_what_the_record_holds_takes_room() -> None:
    groups = ClearGroups(policy(), most=3)
    groups.step(Open(4, ((4, 2),)), 0.0)
    said = add(groups, A, version=4)
    assert CountMember(A, 0) in said
    groups.step(Joined(B, 4), 0.0)
    groups.step(Offered(B), 0.0)
    assert groups.step(Checked(B), 0.0) == [], "invariant (5)"


def test_an_added_that_nobody_asked_for_is_a_bug_of_ours() -> None:
    with pytest.raises(InvalidTransition, match="not allowed"):
        opened().step(Added(A), 0.0)


NONCES = tuple(bytes([n]) for n in range(8))
nonces = st.sampled_from(NONCES)
LATES = [Late(), Late.discount(0.5, max_staleness=2), Late.patch(max_staleness=2)]


class AnyOrder(RuleBasedStateMachine):
    """Events in any order, duplicates too; the shell answers `Check`, `Add` and `Closed` when it likes."""

    @initialize(late=st.sampled_from(LATES), minimum=st.integers(1, 2), size=st.integers(0, 2), most=st.integers(2, 4))
    def start(self, late: Late, minimum: int, size: int, most: int) -> None:
        size = size and max(size, minimum)
        rules = policy(late, minimum_group=minimum, group_size=size, goal=most)
        self.groups, self.most = ClearGroups(rules, most=most), most
        self.late, self.minimum = late, minimum
        self.version = 0
        self.of: dict[bytes, int] = {}  # nonce -> the version that it trained on
        self.checks: list[bytes] = []
        self.adds: list[bytes] = []
        self.sums: dict[int, list[bytes]] = {}
        self.ends: dict[bytes, str] = {}
        self.closed: tuple[int, ...] | None = None
        self.asked: Close | None = None
        self.durable: set[bytes] = set()
        self.num = 0
        self.do(Open(0))

    def do(self, event: Any) -> None:
        for command in self.groups.step(event, 0.0):
            match command:
                case Check(nonce):
                    self.checks.append(nonce)
                case Add(nonce, group, discount):
                    assert not self.adds, "invariant (2): one at a time"
                    late = self.version - self.of[nonce]
                    assert 0 <= late <= self.late.max_staleness, "invariant (6)"
                    assert discount == (0.5**late if self.late.kind == "discount" else 1.0)
                    assert self.closed is None or not (group in self.closed or self.asked.final), "invariant (3)"  # type: ignore[union-attr]
                    self.adds.append(nonce)
                    self.sums.setdefault(group, []).append(nonce)
                case Merge(source, target):
                    self.sums.setdefault(target, []).extend(self.sums.pop(source))
                case Tell(nonce, outcome):
                    if nonce in self.of:
                        assert nonce not in self.ends, "invariant (1)"
                        assert outcome != "counted" or nonce in self.durable, "invariant (4)"
                        self.ends[nonce] = outcome
                case ReleaseMember(nonce):
                    self.ends.setdefault(nonce, "gone")
                case Closed(groups):
                    assert self.asked is not None
                    self.closed = groups
                    for group in groups:
                        assert tuple(self.sums[group]) == self.groups.members(group)
                        assert self.minimum <= len(self.sums[group]), "invariant (3)"

    @precondition(lambda self: hasattr(self, "groups"))
    @rule(back=st.integers(0, 3))
    def join(self, back: int) -> None:
        if self.version - back >= 0 and self.groups.takes(self.version - back) and self.asked is None:
            nonce = self.num.to_bytes(4, "big")
            self.num += 1
            self.of[nonce] = self.version - back
            self.do(Joined(nonce, self.version - back))

    def inside(self) -> list[bytes]:
        return sorted(nonce for nonce in self.of if nonce not in self.ends)

    @precondition(lambda self: hasattr(self, "groups") and self.inside())
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        self.do(Offered(data.draw(st.sampled_from(self.inside()))))

    @precondition(lambda self: hasattr(self, "groups") and self.inside())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.do(Gone(data.draw(st.sampled_from(self.inside())), "tired"))

    @precondition(lambda self: hasattr(self, "groups") and self.checks)
    @rule(good=st.integers(0, 3))
    def check(self, good: int) -> None:
        self.do(Checked(self.checks.pop(), "" if good else "not finite"))

    @precondition(lambda self: hasattr(self, "groups") and self.adds)
    @rule()
    def added(self) -> None:
        self.do(Added(self.adds.pop()))

    @precondition(lambda self: hasattr(self, "groups") and self.asked is None)
    @rule(final=st.booleans())
    def close(self, final: bool) -> None:
        self.asked = Close(final)
        self.do(self.asked)

    @precondition(lambda self: hasattr(self, "groups") and self.closed is not None)
    @rule(good=st.integers(0, 3))
    def answer(self, good: int) -> None:
        assert self.closed is not None and self.asked is not None
        members = {nonce for group in self.closed for nonce in self.sums.pop(group)}
        final, self.closed, self.asked = self.asked.final, None, None
        if not final:
            self.durable |= members
            return self.do(Stored())
        if good:
            self.durable |= members
            self.version += 1
            self.do(Committed(self.version))
        else:
            self.do(Failed("no"))
        self.do(Open(self.version))

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if hasattr(self, "groups") and self.asked is None and not self.adds:
            assert self.groups._add_next() == [], "invariant (8)"

    @invariant()
    def nobody_is_in_two_sums_and_none_is_too_full(self) -> None:
        if hasattr(self, "groups"):
            held = [nonce for members in self.sums.values() for nonce in members]
            assert len(set(held)) == len(held), "invariant (2)"
            assert all(len(members) <= self.most + 2 * self.minimum for members in self.sums.values()), "invariant (5)"

    def teardown(self) -> None:
        """Whatever came before, everybody hears how it ended."""
        if not hasattr(self, "groups"):
            return
        for _ in range(8):
            while self.checks:
                self.check(1)
            while self.adds:
                self.added()
                while self.checks:
                    self.check(1)
            if self.closed is not None:
                self.answer(1)
            elif self.asked is None:
                for _ in range(self.minimum):
                    self.join(0)
                for nonce in self.inside():
                    self.do(Offered(nonce))
                while self.checks:
                    self.check(1)
                while self.adds:
                    self.added()
                self.close(True)
        waiting = [nonce for nonce in self.inside() if self.groups.state(nonce) is not Member.ADDED]
        assert len(waiting) <= self.most + 2, "invariant (1)"
        assert {n for n, end in self.ends.items() if end == "counted"} == self.durable, "invariant (4)"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_where_noise_counts_on_one_update_a_device_nothing_moves_on_to_the_next_version() -> None:
    groups = ClearGroups(policy(Late(), minimum_group=2), most=4, moves_on=False)
    groups.step(Open(0), 0.0)
    add(groups, b"a")
    assert groups.step(Close(), 0.0)[-1] == Closed(())
    groups.step(Committed(1), 0.0)
    told = groups.step(Open(1), 0.0)
    assert [type(each).__name__ for each in told] == ["Drop", "Tell", "ReleaseMember"]
    assert groups.state(b"a") is None


@pytest.mark.parametrize(
    ("privacy", "moves_on"),
    [
        (Privacy(clip_norm=1.0), True),
        (Privacy(clip_norm=1.0, noise_multiplier=1.0), False),
        (Privacy(clip_norm=AdaptiveClip(initial=1.0)), False),
    ],
    ids=["plain", "noise", "adaptive"],
)
def test_what_is_of_its_version_alone_does_not_move_on(privacy: Privacy, moves_on: bool) -> None:
    manifest = replace(toy.plan(RoundPolicy(goal=8)).manifest, promises=Promises.of(privacy, minimum_group=8))
    groups = group_sums._machine(manifest)
    groups.step(Open(0), 0.0)
    add(groups, b"a")  # type: ignore[arg-type]
    for event in (Close(), Committed(1)):
        groups.step(event, 0.0)
    told = groups.step(Open(1), 0.0)
    assert any(isinstance(each, Merge) for each in told) is moves_on
