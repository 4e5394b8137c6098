"""The round machine: its numbered invariants under any order of events, and the cases that a reader should know."""

from dataclasses import replace
from math import ceil

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shoal.errors import InvalidTransition
from shoal.fleet import round_events as r
from shoal.fleet.round import RoundMachine
from shoal.policy import Late, RoundPolicy, Selection

POLICY = RoundPolicy(
    goal=3, minimum_group=2, minimum_fraction=0.5, over_selection=1.3, selection_window_s=10.0, reporting_window_s=60.0
)
"""Rounds of 3 of 4 selected, that commit with 2."""


def nonce(version: int, device: str) -> bytes:
    return f"{version}/{device}".encode()


def machine(policy: RoundPolicy = POLICY, *, last_version: int = 2, seed: int = 0) -> RoundMachine:
    return RoundMachine(policy, last_version=last_version, nonce_of=nonce, rng=np.random.default_rng(seed))


def selecting(policy: RoundPolicy = POLICY, *, last_version: int = 2) -> RoundMachine:
    """A machine that waits for devices at time 0."""
    made = machine(policy, last_version=last_version)
    made.step(r.Started(0, 0), 0.0)
    return made


def assigned(commands: list[r.Command]) -> list[str]:
    return [device for command in commands if isinstance(command, r.Assign) for device in command.devices]


def arrive(made: RoundMachine, devices: str, now_s: float = 0.0) -> list[str]:
    return [d for device in devices for d in assigned(made.step(r.Arrived((device,)), now_s))]


def count(made: RoundMachine, devices: str, now_s: float = 1.0) -> list[r.Command]:
    version = made.snapshot().version
    return [c for device in devices for c in made.step(r.Counted(nonce(version, device), version), now_s)]


def test_a_round_from_opening_to_commit() -> None:
    made = machine()
    assert made.step(r.Started(0, 7), 0.0) == [r.OpenRound(8, 0), r.WakeAt(10.0)]
    assert arrive(made, "abcd") == ["a", "b", "c", "d"], "over-selection: 4 for a goal of 3"
    assert count(made, "abc") == [r.CommitRound(8, "goal")]
    assert made.step(r.Committed(1), 2.0) == [r.OpenRound(9, 1), r.WakeAt(12.0)]


def test_the_run_is_over_after_its_last_version() -> None:
    made = selecting(last_version=1)
    arrive(made, "abcd")
    count(made, "abc")
    assert made.step(r.Committed(1), 2.0) == [r.Finish()]
    assert made.step(r.Arrived(("e",)), 3.0) == [r.Finish()], "invariant (6): told that it is over"


def test_a_late_round_closes_with_what_it_has() -> None:
    made = selecting()
    arrive(made, "abcd")
    count(made, "ab")
    assert made.step(r.Tick(), 59.0) == []
    assert made.step(r.Tick(), 60.0) == [r.CommitRound(1, "window")]


def test_a_round_below_the_minimum_is_abandoned_and_goes_on_with_its_group() -> None:
    made = selecting()
    arrive(made, "abcd")
    count(made, "a")
    (abandoned,) = made.step(r.Tick(), 60.0)
    assert isinstance(abandoned, r.AbandonRound)
    assert made.step(r.Abandoned(), 60.0)[0] == r.OpenRound(2, 0)
    assert made.snapshot().counted == 1, "invariant (5)"
    assert arrive(made, "efg", 61.0) == ["e", "f", "g"], "one is counted already: 3 more make a selection of 4"
    assert count(made, "ef", 62.0) == [r.CommitRound(2, "goal")]


def test_devices_that_vanished_do_not_stand_in_the_way_of_those_that_wait() -> None:
    made = selecting()
    arrive(made, "abcd")  # and are never heard of again
    made.step(r.Tick(), 60.0)
    made.step(r.Abandoned(), 60.0)
    assert arrive(made, "efgh", 61.0) == ["e", "f", "g", "h"], "invariant (6)"


def test_late_reports_of_an_abandoned_round_can_meet_the_goal_alone() -> None:
    made = selecting()
    arrive(made, "abcd")
    made.step(r.Tick(), 60.0)
    count(made, "ab", 60.1)  # while the round's end is written
    made.step(r.Abandoned(), 60.2)
    assert count(made, "c", 60.3)[-1] == r.CommitRound(2, "goal")


def test_the_selection_window_starts_a_round_with_fewer_if_they_can_reach_the_minimum() -> None:
    made = selecting()
    assert arrive(made, "a", 1.0) == []
    assert made.step(r.Tick(), 10.0) == [], "one cannot reach the minimum: it waits on"
    assert arrive(made, "b", 11.0) == ["a", "b"]


def test_drop_outs_are_replaced_by_those_that_wait() -> None:
    made = selecting(replace(POLICY, over_selection=1.0))
    assert arrive(made, "abcd") == ["a", "b", "c"]
    assert assigned(made.step(r.Released(nonce(0, "a")), 1.0)) == ["d"]


def test_one_that_was_refused_is_taken_again_only_after_all_others() -> None:
    made = selecting(replace(POLICY, over_selection=1.0))
    made.step(r.Released(nonce(0, "a")), 0.0)
    assert arrive(made, "a") == []
    assert assigned(made.step(r.Arrived(("b", "c", "d")), 1.0)) == ["b", "c", "d"]
    made.step(r.Released(nonce(0, "b")), 2.0)
    assert made.snapshot().outstanding == 3 and made.snapshot().waiting == 0, "nobody else waits: now it is taken"


def test_a_returning_device_gets_the_same_assignment() -> None:
    made = selecting()
    arrive(made, "abcd")
    assert made.step(r.Arrived(("b",)), 5.0) == [r.Assign(("b",))]
    assert made.snapshot().outstanding == 4


def test_one_that_was_counted_waits_for_the_next_version() -> None:
    made = selecting(last_version=3)
    arrive(made, "abcd")
    count(made, "abc")
    made.step(r.Arrived(("a",)), 2.0)
    made.step(r.Committed(1), 2.0)
    assert arrive(made, "bcd", 3.0) == ["a", "b", "c", "d"]


def test_tokens_from_before_a_crash_join_the_first_round() -> None:
    made = selecting()
    for device in "abcd":
        made.step(r.Joined(nonce(0, device), 0), 0.1)
    assert made.snapshot().phase is r.Phase.REPORTING
    assert count(made, "abc") == [r.CommitRound(1, "goal")]


EXACT = RoundPolicy(goal=3, minimum_group=3, selection=Selection.exact(("a", "b", "c")), reporting_window_s=60.0)


def test_exact_selection_takes_the_named_and_nobody_else() -> None:
    made = selecting(EXACT)
    assert arrive(made, "xaybz") == []
    assert arrive(made, "c") == ["a", "b", "c"]
    assert count(made, "ab") == []
    assert made.step(r.Tick(), 1e4) == [r.AbandonRound(1, "2 of at least 3 reported in the window")]
    made.step(r.Abandoned(), 1e4)
    assert arrive(made, "c", 1e4) == ["c"], "it comes again and is given its work back"
    assert count(made, "c", 1e4) == [r.CommitRound(2, "goal")]


def test_a_commit_that_failed_takes_its_group_along() -> None:
    made = selecting()
    arrive(made, "abcd")
    count(made, "abc")
    assert made.step(r.Failed("no"), 2.0) == [r.AbandonRound(1, "commit failed: no")]
    made.step(r.Abandoned(), 2.0)
    assert made.snapshot().counted == 0
    assert arrive(made, "abcd", 3.0) == ["a", "b", "c", "d"], "invariant (5): they may report again"


@pytest.mark.parametrize("phase", ["idle", "selecting", "reporting", "committing", "abandoning"])
def test_stop_ends_the_run_from_every_phase(phase: str) -> None:
    """Invariant (7)."""
    made, ended, now_s = machine(), False, 0.0
    waiting: list[r.Command] = []

    def step(event: r.Event) -> None:
        nonlocal ended
        for command in made.step(event, now_s):
            assert not (made.snapshot().round > 1 and isinstance(command, r.OpenRound)), "no round after this one"
            ended |= isinstance(command, r.Finish)
            waiting.append(command)

    all_here = [r.Started(0, 0), r.Arrived(tuple("abcd"))]
    to_there: dict[str, list[r.Event]] = {
        "idle": [],
        "selecting": [r.Started(0, 0)],
        "reporting": all_here,
        "committing": [*all_here, *(r.Counted(nonce(0, d), 0) for d in "abc")],
        "abandoning": [*all_here, r.Tick()],
    }
    for event in to_there[phase]:
        now_s = 70.0 if isinstance(event, r.Tick) else now_s
        step(event)
    assert made.snapshot().phase.value == phase
    step(r.Stop())
    answers: dict[r.Phase, r.Event] = {
        r.Phase.IDLE: r.Started(0, 0), r.Phase.COMMITTING: r.Committed(1),
        r.Phase.ABANDONING: r.Abandoned(),
    }  # fmt: skip
    for _ in range(10):
        if not ended:
            now_s += 100.0
            step(answers.get(made.snapshot().phase, r.Tick()))
    assert ended


def test_an_event_that_the_state_does_not_allow_tells_the_story() -> None:
    with pytest.raises(InvalidTransition, match=r"Abandoned.*not allowed in reporting(.|\n)*reporting: Abandoned"):
        made = selecting()
        arrive(made, "abcd")
        made.step(r.Abandoned(), 1.0)


def test_groups_that_wait_in_the_record_count_for_the_next_commit() -> None:
    made = machine()
    made.step(r.Started(0, 1, frozenset({nonce(0, "a"), nonce(0, "b")})), 0.0)
    assert arrive(made, "acd") == ["c", "d"], (
        "two are counted: two more make a selection of 4, and a is not taken again"
    )
    assert count(made, "c") == [], "c alone would not be a group"
    assert count(made, "d") == [r.CommitRound(2, "goal")]


STORING = replace(POLICY, goal=6, over_selection=1.0, minimum_group=2, group_size=2)


def test_a_group_is_stored_while_the_round_goes_on() -> None:
    made = selecting(STORING)
    arrive(made, "abcdef")
    assert count(made, "ab") == [r.StoreGroup()]
    made.step(r.Stored(frozenset({nonce(0, "a"), nonce(0, "b")})), 1.0)
    assert count(made, "cd") == [r.StoreGroup()]
    assert count(made, "e") == [], "what is left to the goal could not be a group of its own"
    assert count(made, "f") == [r.CommitRound(1, "goal")]


def test_what_was_stored_outlives_a_commit_that_failed() -> None:
    made = selecting(STORING)
    arrive(made, "abcdef")
    count(made, "ab")
    made.step(r.Stored(frozenset({nonce(0, "a"), nonce(0, "b")})), 1.0)
    count(made, "cdef")
    made.step(r.Failed("no"), 2.0)
    assert made.snapshot().counted == 2, "invariant (5)"


LATE = replace(POLICY, late=Late.discount(0.5, max_staleness=2))


def test_late_updates_count_beside_the_goal() -> None:
    made = selecting(LATE, last_version=5)
    arrive(made, "abcd")
    count(made, "abc")
    made.step(r.Committed(1), 2.0)
    assert made.snapshot().outstanding == 1, "d is on its way"
    assert arrive(made, "abce", 3.0) == ["a", "b", "c", "e"]
    assert made.step(r.Counted(nonce(0, "d"), 1, 1), 4.0) == []
    assert (made.snapshot().counted, made.snapshot().late, made.snapshot().outstanding) == (0, 1, 4)


def test_one_that_is_too_late_is_not_waited_for() -> None:
    made = selecting(LATE, last_version=9)
    arrive(made, "abcd")
    count(made, "abc")
    for version in (1, 2, 3):
        made.step(r.Committed(version), 2.0)
        assert made.snapshot().outstanding == (1 if version <= 2 else 0)
        arrive(made, "abc", 3.0)
        made.step(r.Tick(), 13.0)
        count(made, "abc", 14.0)


def test_an_addition_that_is_heard_of_after_its_commit_does_not_count_twice() -> None:
    made = selecting(LATE)
    arrive(made, "abcd")
    count(made, "abc")
    made.step(r.Counted(nonce(0, "d"), 0), 1.5)  # it was added while the group closed
    made.step(r.Committed(1), 2.0)
    assert made.snapshot().counted == 0 and made.snapshot().outstanding == 0


def test_late_ones_in_a_stored_group_do_not_stand_for_others() -> None:
    policy = replace(STORING, late=Late.discount(0.5, max_staleness=2), minimum_fraction=0.5)
    made = selecting(policy, last_version=9)
    arrive(made, "abcdef")
    count(made, "abcdef")
    made.step(r.Committed(1), 2.0)
    arrive(made, "ghijkl", 3.0)
    for device in "ab":
        made.step(r.Counted(nonce(0, device + "x"), 1, 1), 4.0)
    made.step(r.Stored(frozenset({nonce(0, "ax"), nonce(0, "bx")})), 4.0)
    assert made._committable == 0
    assert made.step(r.Tick(), 1e4)[-1] == r.AbandonRound(2, "0 of at least 3 reported in the window")


def test_silent_devices_of_an_asynchronous_round_give_up_their_place() -> None:
    made = machine(ASYNCHRONOUS, last_version=9)
    made.step(r.Started(0, 0), 0.0)
    assert len(arrive(made, "abcdef")) == 3
    made.step(r.Tick(), 300.0)
    assert len(assigned(made.step(r.Abandoned(), 300.0))) == 3, "invariant (6)"


ASYNCHRONOUS = RoundPolicy(
    goal=2, minimum_group=2, minimum_fraction=1.0, buffer=2, concurrency=3, late=Late.discount(1.0, max_staleness=5)
)


def test_asynchronous_rounds_keep_a_number_of_devices_busy_and_count_every_update() -> None:
    made = machine(ASYNCHRONOUS, last_version=9)
    made.step(r.Started(0, 0), 0.0)
    assert arrive(made, "abcde") == ["a", "b", "c"], "invariant (8)"
    (fourth,) = assigned(count(made, "a"))
    assert count(made, "b")[-1] == r.CommitRound(1, "goal")
    assert {fourth, *assigned(made.step(r.Committed(1), 2.0))} == {"d", "e"}
    made.step(r.Counted(nonce(0, "c"), 1, 1), 3.0)
    assert made.snapshot().counted == 1, "late is as good as in time"


def test_a_round_closes_when_waiting_does_not_pay() -> None:
    policy = RoundPolicy(
        goal=20, minimum_group=8, minimum_fraction=0.5, over_selection=1.0, reporting_window_s=1000.0,
        late=Late.patch(max_staleness=1),
    )  # fmt: skip
    names = [f"d{i}" for i in range(20)]
    made, closed = machine(policy, last_version=9), []
    made.step(r.Started(0, 0), 0.0)
    for round in range(3):
        begun_s = round * 2000.0
        made.step(r.Arrived(tuple(names)), begun_s)
        commands: list[r.Command] = []
        for i, name in enumerate(names[:18]):  # the last two are never heard of
            commands += made.step(r.Counted(nonce(round, name), round), begun_s + 10.0 + i)
        times = [c.time_s for c in commands if isinstance(c, r.WakeAt)]
        if not any(isinstance(c, r.CommitRound) for c in commands):
            for time_s in [*times, begun_s + 1000.0]:
                commands += made.step(r.Tick(), time_s) if made.snapshot().phase is r.Phase.REPORTING else []
        closed += [c.reason for c in commands if isinstance(c, r.CommitRound)]
        made.step(r.Committed(round + 1), begun_s + 1500.0)
    assert (closed[0], closed[-1]) == ("window", "waiting did not pay"), "it is learned from what was seen"


DEVICES = tuple("abcdefgh")


class AnyOrder(RuleBasedStateMachine):
    """A shell that answers when it likes, devices that do what they like."""

    @initialize(
        goal=st.integers(1, 4), over=st.sampled_from([1.0, 1.5]), fraction=st.sampled_from([0.5, 1.0]),
        exact=st.booleans(), seed=st.integers(0, 9), separation=st.sampled_from([1, 2, 3]),
    )  # fmt: skip
    def start(self, goal: int, over: float, fraction: float, exact: bool, seed: int, separation: int) -> None:
        selection = Selection.exact(DEVICES[:goal]) if exact else Selection()
        separation = 1 if exact else min(separation, len(DEVICES) // ceil(goal * over))
        self.policy = RoundPolicy(
            goal=goal, minimum_group=1, over_selection=over, minimum_fraction=fraction, selection=selection,
            selection_window_s=10.0, reporting_window_s=50.0, min_separation=separation,
        )  # fmt: skip
        self.made = machine(self.policy, last_version=3, seed=seed)
        self.recent: dict[int, set[str]] = {}  # who is in a version, by the one that they trained from
        self.now_s, self.version = 0.0, 0
        self.ask: r.Command | None = None  # what the shell has not answered yet
        self.taken: set[str] = set()  # in this version
        self.counted: set[str] = set()
        self.waiting: set[str] = set()
        self.stopped = self.finished = False
        self.rounds = 0
        self.do(r.Started(0, 0))

    def do(self, event: r.Event) -> None:
        for command in self.made.step(event, self.now_s):
            match command:
                case r.OpenRound(round, base):
                    assert not self.stopped, "invariant (7)"
                    assert base == self.version and round == self.rounds + 1, "invariant (1)"
                    self.rounds = round
                case r.Assign(devices):
                    assert not set(devices) & self.counted, "invariant (2)"
                    assert len(set(devices)) == len(devices)
                    if self.policy.selection.ids:
                        assert set(devices) <= set(self.policy.selection.ids), "invariant (4)"
                    for version, members in self.recent.items():
                        if version + self.policy.min_separation > self.version:
                            assert not set(devices) & members, "invariant (9)"
                    self.taken |= set(devices)
                    self.waiting -= set(devices)
                case r.CommitRound():
                    assert len(self.counted) >= self.policy.minimum, "invariant (3)"
                    if self.policy.selection.ids:
                        assert self.counted == set(self.policy.selection.ids), "invariant (4)"
                    self.ask = command
                case r.AbandonRound():
                    self.ask = command
                case r.Finish():
                    self.finished = True
                    self.waiting.clear()

    @property
    def group_is_open(self) -> bool:
        return not self.finished and not isinstance(self.ask, r.CommitRound) and self.rounds > 0

    @rule(device=st.sampled_from(DEVICES))
    def arrive(self, device: str) -> None:
        self.waiting.add(device)
        self.do(r.Arrived((device,)))

    @rule(device=st.sampled_from(DEVICES))
    def leave(self, device: str) -> None:
        self.waiting.discard(device)
        self.do(r.Left(device))

    @precondition(lambda self: self.group_is_open and self.taken - self.counted)
    @rule(data=st.data())
    def count(self, data: st.DataObject) -> None:
        device = data.draw(st.sampled_from(sorted(self.taken - self.counted)))
        self.counted.add(device)
        self.do(r.Counted(nonce(self.version, device), self.version))

    @precondition(lambda self: self.group_is_open and self.taken - self.counted)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.do(r.Released(nonce(self.version, data.draw(st.sampled_from(sorted(self.taken - self.counted))))))

    @precondition(lambda self: self.group_is_open)
    @rule(device=st.sampled_from(DEVICES[:4]))
    def join_with_an_old_token(self, device: str) -> None:
        exact = self.policy.selection.ids
        separation = self.policy.min_separation
        resting = any(device in self.recent.get(of, ()) for of in range(self.version - separation + 1, self.version))
        if (not exact or device in exact) and not resting:
            self.taken.add(device)
            self.do(r.Joined(nonce(self.version, device), self.version))

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0, 60.0]))
    def tick(self, seconds: float) -> None:
        self.now_s += seconds
        self.do(r.Tick())

    @precondition(lambda self: self.ask is None and not self.finished)
    @rule()
    def crash(self) -> None:
        """The record knows who is in versions; those who trained come back with their tokens."""
        recent = {of: frozenset(nonce(of, device) for device in members) for of, members in self.recent.items()}
        self.made = machine(self.policy, last_version=3, seed=0)
        self.counted, self.waiting, self.stopped = set(), set(), False
        self.do(r.Started(self.version, self.rounds, frozenset(), recent))

    @precondition(lambda self: self.ask is not None)
    @rule(good=st.booleans())
    def answer(self, good: bool) -> None:
        asked, self.ask = self.ask, None
        match asked:
            case r.AbandonRound():
                self.do(r.Abandoned())
            case r.CommitRound():
                if good:
                    self.recent[self.version] = self.counted
                self.taken, self.counted = set(), set()
                self.version += good
                self.do(r.Committed(self.version) if good else r.Failed("no"))

    @precondition(lambda self: self.rounds > 3)
    @rule()
    def stop(self) -> None:
        self.stopped = True
        self.do(r.Stop())

    @invariant()
    def the_snapshot_agrees(self) -> None:
        if hasattr(self, "made"):
            seen = self.made.snapshot()
            assert seen.version == self.version and seen.counted == len(self.counted), "invariants (1), (2), (5)"
            assert seen.waiting == len(self.waiting)

    def teardown(self) -> None:
        """Invariant (6): whatever came before, devices that do their work bring the run to its end."""
        if not hasattr(self, "made"):
            return
        for _ in range(60):
            if self.ask is not None:
                self.answer(True)
            for device in DEVICES:
                if self.group_is_open and self.ask is None and device in self.taken - self.counted:
                    self.counted.add(device)
                    self.do(r.Counted(nonce(self.version, device), self.version))
                if not self.finished and device not in self.waiting and device not in self.taken:
                    self.arrive(device)
            self.tick(20.0)
        assert self.finished


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
