"""The membership machine: what follows from what, and any history of hosts that come, go, fail and hang."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidTransition
from shoal.pod import membership_events as e
from shoal.pod.membership import MembershipMachine, PodPolicy

HOSTS = ("a", "b", "c")


def joined(host: str) -> e.Joined:
    return e.Joined(host, f"{host}.here", 1, (7001, 7002))


def mark(
    step: int, *, begun: int | None = None, doing: e.Doing = "training", step_s: float = 1.0, saved: int = -1
) -> e.Mark:
    return e.Mark(doing, step, step + 1 if begun is None else begun, saved, step_s)


def running(number: int = 2, **policy: Any) -> MembershipMachine:
    """A machine whose life 1 runs at time 0."""
    machine = MembershipMachine(PodPolicy(**{"hosts": number, "floor_s": 5.0, **policy}))
    for host in HOSTS[:number]:
        commands = machine.step(joined(host), 0.0)
    assert [c.life for c in commands if isinstance(c, e.StartWorker)] == [1] * number
    return machine


def starts(commands: Sequence[e.Command]) -> list[tuple[str, int, int, int]]:
    return [(c.host, c.life, c.process_id, c.num_processes) for c in commands if isinstance(c, e.StartWorker)]


def run_on(machine: MembershipMachine, from_s: float, to_s: float, *speaking: tuple[str, e.Mark]) -> list[e.Command]:
    """Ticks, and marks of those that speak, twice a second."""
    made: list[e.Command] = []
    now_s = from_s
    while now_s < to_s and not made:
        now_s += 0.5
        for host, said in speaking:
            made += machine.step(e.Marked(host, machine.snapshot().life, said), now_s)
        made += machine.step(e.Tick(), now_s)
    return made


# One thing after the other.


def test_the_first_life_waits_for_all_and_has_them_in_the_order_in_which_they_came() -> None:
    machine = MembershipMachine(PodPolicy(hosts=2))
    assert machine.step(joined("b"), 0.0) == []
    commands = machine.step(joined("a"), 1.0)
    assert commands == [e.StartWorker("b", 1, 0, 2, "b.here:7001"), e.StartWorker("a", 1, 1, 2, "b.here:7001")]


def test_it_starts_with_fewer_once_it_has_waited_long_enough_and_gives_up_with_too_few() -> None:
    machine = MembershipMachine(PodPolicy(hosts=3, least=2, gather_s=10.0))
    machine.step(joined("a"), 0.0)
    assert machine.step(joined("b"), 1.0) == machine.step(e.Tick(), 9.0) == []
    assert starts(machine.step(e.Tick(), 10.0)) == [("a", 1, 0, 2), ("b", 1, 1, 2)]
    alone = MembershipMachine(PodPolicy(hosts=3, least=2, gather_s=10.0))
    alone.step(joined("a"), 0.0)
    assert alone.step(e.Tick(), 10.0) == [e.GiveUp("There are too few hosts: 1 (a) after 10 s, and a life needs 2.")]


def test_a_dead_worker_ends_the_life_and_the_next_starts_when_all_are_gone__invariant_1() -> None:
    machine = running()
    machine.step(e.Marked("a", 1, mark(3)), 1.0)
    machine.step(e.Marked("b", 1, mark(3)), 1.0)
    why = "b's worker was killed (SIGKILL), by somebody or by the system for want of memory"
    assert machine.step(e.Exited("b", 1, -9), 2.0) == [e.LifeEnded(1, ("b",), why, 3), e.StopWorkers(1)]
    assert machine.step(e.Tick(), 3.0) == machine.step(e.Exited("a", 0, -15), 3.0) == []
    assert starts(machine.step(e.Exited("a", 1, -15), 3.5)) == [("a", 2, 0, 2), ("b", 2, 1, 2)]
    assert machine.snapshot().lives_without_progress == 0


def test_each_life_has_another_coordinator() -> None:
    machine = running(1, backoff_s=0.0)
    commands = machine.step(e.Exited("a", 1, 1), 1.0)
    assert [c.coordinator for c in commands if isinstance(c, e.StartWorker)] == ["a.here:7002"]
    six = MembershipMachine(PodPolicy())
    assert six.step(e.Joined("a", "::1", 1, (9,)), 0.0) == [e.StartWorker("a", 1, 0, 1, "[::1]:9")]


def test_after_the_loss_of_a_host_those_left_go_on__invariant_2() -> None:
    machine = running(lost_s=8.0, backoff_s=0.0)
    assert machine.step(e.Lost("b"), 1.0) == [e.LifeEnded(1, ("b",), "b is gone", -1), e.StopWorkers(1)]
    assert machine.step(e.Exited("a", 1, -15), 2.0) == [], "b's worker may still live"
    assert machine.step(e.Tick(), 8.9) == []
    assert starts(machine.step(e.Tick(), 9.0)) == [("a", 2, 0, 1)]


def test_a_host_that_says_that_it_leaves_is_waited_for_no_longer_than_its_worker() -> None:
    machine = running(lost_s=100.0, backoff_s=0.0)
    assert machine.step(e.Leaves("b"), 1.0) == [e.LifeEnded(1, ("b",), "b leaves", -1), e.StopWorkers(1)]
    machine.step(e.Exited("a", 1, -15), 2.0)
    assert starts(machine.step(e.Exited("b", 1, -15), 3.0)) == [("a", 2, 0, 1)]
    assert machine.step(e.Lost("b"), 3.1) == []


def test_a_lost_host_that_comes_back_has_no_worker__invariant_1() -> None:
    machine = running(lost_s=100.0, backoff_s=0.0)
    machine.step(e.Lost("b"), 1.0)
    machine.step(e.Exited("a", 1, -15), 2.0)
    assert starts(machine.step(joined("b"), 3.0)) == [("a", 2, 0, 2), ("b", 2, 1, 2)]
    with pytest.raises(InvalidTransition, match="'b' has joined already"):
        machine.step(joined("b"), 4.0)


def test_a_stuck_member_is_named_by_its_silence__invariant_3() -> None:
    machine = running()
    machine.step(e.Marked("a", 1, mark(7)), 1.0)
    machine.step(e.Marked("b", 1, mark(7)), 1.0)
    ended, stop = run_on(machine, 1.0, 30.0, ("b", mark(7)))
    assert isinstance(ended, e.LifeEnded) and ended.hosts == ("a",)
    assert ended.why == "a came no further than step 7 (training) for 10 s (limit 10 s)"
    assert stop == e.StopWorkers(1, stuck=("a",)), "it would not listen"


def test_a_stuck_member_that_runs_is_the_one_behind_the_others__invariant_3() -> None:
    machine = running(3)
    said = ("a", mark(7, begun=8)), ("b", mark(7, begun=7)), ("c", mark(7, begun=8))
    ended, _ = run_on(machine, 0.0, 30.0, *said)
    assert isinstance(ended, e.LifeEnded) and ended.hosts == ("b",)
    ended, _ = run_on(running(), 0.0, 30.0, ("a", mark(7)), ("b", mark(7)))
    assert isinstance(ended, e.LifeEnded) and ended.hosts == () and "none is behind" in ended.why


def test_limits_go_by_what_a_worker_does() -> None:
    assert run_on(running(), 0.0, 60.0, *((h, mark(-1, doing="compiling", step_s=0.0)) for h in "ab")) == []
    saving = ("a", mark(5, doing="saving")), ("b", mark(5))
    assert run_on(running(pause_s=40.0), 0.0, 39.5, *saving) == [], "who saves keeps the others waiting"
    assert run_on(running(pause_s=40.0), 0.0, 45.0, *saving) != []
    first = ("a", mark(-1, step_s=0.0)), ("b", mark(-1, step_s=0.0))
    assert run_on(running(begin_s=40.0), 0.0, 39.5, *first) == [], "the first step has no median to be held to"
    slow = ("a", mark(5, step_s=3.0)), ("b", mark(5, step_s=3.0))
    assert run_on(running(), 0.0, 29.0, *slow) == [], "ten times the median"
    assert run_on(running(), 0.0, 32.0, *slow) != []


def test_one_that_freezes_while_it_compiles_is_found_by_its_silence() -> None:
    machine = running(silent_s=20.0)
    machine.step(e.Marked("a", 1, mark(-1, doing="compiling")), 0.0)
    ended, _ = run_on(machine, 0.0, 30.0, ("b", mark(-1, doing="compiling")))
    assert ended == e.LifeEnded(1, ("a",), "a said nothing for 20 s", -1)


def test_who_had_stopped_running_is_named_though_another_dies_of_it_first() -> None:
    machine = running(floor_s=60.0)
    machine.step(e.Marked("a", 1, mark(7)), 0.0)
    assert run_on(machine, 0.0, 5.0, ("b", mark(7))) == []
    ended, _ = machine.step(e.Exited("b", 1, -6, "heartbeat timeout"), 5.0)
    why = "a had stopped running; then b's worker was ended by signal 6: heartbeat timeout"
    assert ended == e.LifeEnded(1, ("a",), why, 7)


def test_time_in_which_the_machine_did_not_run_counts_for_nobody__invariant_6() -> None:
    machine = running()
    for host in "ab":
        machine.step(e.Marked(host, 1, mark(7)), 0.0)
    assert machine.step(e.Tick(), 1000.0) == []
    assert run_on(machine, 1000.0, 1020.0, ("a", mark(7)), ("b", mark(7))) != []


def test_it_is_over_when_all_are_at_their_end__invariant_5() -> None:
    machine = running()
    assert machine.step(e.Exited("a", 1, 0), 1.0) == []
    assert machine.step(e.Exited("b", 1, 0), 2.0) == [e.Done(finished=True)]
    assert machine.step(e.Tick(), 3.0) == machine.step(joined("c"), 3.0) == []
    assert machine.snapshot().phase is e.Phase.OVER


def test_one_that_does_not_end_when_another_has_is_stuck() -> None:
    machine = running(end_s=5.0)
    machine.step(e.Exited("a", 1, 0), 0.0)
    ended, stop = run_on(machine, 0.0, 10.0, ("b", mark(9)))
    assert ended == e.LifeEnded(1, ("b",), "b had not ended 5 s after another had", 9) and stop == e.StopWorkers(
        1, ("b",)
    )


def test_lives_without_progress_come_slower_and_slower_and_then_no_more__invariant_4() -> None:
    machine = running(1, backoff_s=2.0, lives_without_progress=3)
    ended, stop = machine.step(e.Exited("a", 1, 1, "no such file"), 10.0)
    assert isinstance(ended, e.LifeEnded) and stop == e.StopWorkers(1)
    assert machine.step(e.Tick(), 11.0) == []
    assert starts(machine.step(e.Tick(), 12.0)) == [("a", 2, 0, 1)]
    machine.step(e.Exited("a", 2, 1, "no such file"), 20.0)
    assert machine.step(e.Tick(), 23.9) == []
    assert starts(machine.step(e.Tick(), 24.0)) == [("a", 3, 0, 1)]
    *_, last = machine.step(e.Exited("a", 3, 1, "no such file"), 30.0)
    why = "the last ended because a's worker ended with code 1: no such file"
    assert last == e.GiveUp(f"3 lives one after the other came no further than its start; {why}")


def test_a_step_or_a_checkpoint_beyond_all_before_is_progress__invariant_4() -> None:
    machine = running(1, backoff_s=0.0, lives_without_progress=2)
    for life, said in enumerate((mark(5), mark(5), mark(4, saved=3), mark(4, saved=3), mark(6)), 1):
        machine.step(e.Marked("a", life, said), 1.0)
        machine.step(e.Exited("a", life, 1), 1.0)
        assert machine.snapshot().lives_without_progress == {2: 1, 4: 1}.get(life, 0)
    assert machine.snapshot().step == 6


def test_a_host_that_comes_late_makes_the_others_pause_once_they_have_come_further() -> None:
    machine = running()
    assert machine.step(joined("c"), 1.0) == []
    machine.step(e.Marked("a", 1, mark(-1)), 2.0)
    assert machine.step(e.Marked("a", 1, mark(0)), 3.0) == [e.AskToStop(1)]
    assert machine.step(e.Tick(), 3.5) == []
    machine.step(e.Exited("a", 1, e.PAUSED), 4.0)
    ended, *begun = machine.step(e.Exited("b", 1, e.PAUSED), 4.0)
    assert ended == e.LifeEnded(1, (), "it paused for others to join", 0)
    assert starts(begun) == [("a", 2, 0, 3), ("b", 2, 1, 3), ("c", 2, 2, 3)]


def test_a_host_that_comes_late_may_be_left_to_wait_or_to_its_own_where_numbers_do_not_fit() -> None:
    for policy in ({"late": "wait"}, {"multiple": 2}):
        machine = running(**policy)
        machine.step(joined("c"), 1.0)
        assert machine.step(e.Marked("a", 1, mark(3)), 3.0) == []
    machine.step(e.Exited("a", 1, 1), 4.0)
    assert starts(machine.step(e.Exited("b", 1, 1), 4.0)) == [("a", 2, 0, 2), ("b", 2, 1, 2)], "a multiple of two"


def test_one_that_pauses_again_and_again_unasked_is_given_up() -> None:
    machine = running(1, backoff_s=0.0, lives_without_progress=2)
    machine.step(e.Exited("a", 1, e.PAUSED), 1.0)
    *_, last = machine.step(e.Exited("a", 2, e.PAUSED), 1.0)
    assert isinstance(last, e.GiveUp) and "it paused, though nobody asked" in last.why


def test_stop_ends_the_workers_first__invariant_5() -> None:
    machine = running()
    assert machine.step(e.Stop(), 1.0) == [e.LifeEnded(1, (), "it was stopped", -1), e.StopWorkers(1)]
    assert machine.step(e.Exited("a", 1, -15), 2.0) == []
    assert machine.step(e.Exited("b", 1, -15), 2.0) == [e.Done(finished=False)]
    assert MembershipMachine(PodPolicy()).step(e.Stop(), 0.0) == [e.Done(finished=False)]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"hosts": 0}, "hosts to be a whole number of at least 1, got hosts=0"),
        ({"hosts": 1, "least": 2}, "hosts >= least and >= multiple, got hosts=1, least=2"),
        ({"factor": 0.5}, "factor >= 1, got factor=0.5"),
        ({"floor_s": 0.0}, "floor_s > 0"),
    ],
)
def test_a_wrong_policy_is_refused(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as raised:
        PodPolicy(**wrong)
    assert text in str(raised.value)


# Any history.


class World:
    """Hosts with workers that keep the machine's contract; every command is held to the invariants."""

    def __init__(self, policy: PodPolicy) -> None:
        self.machine, self.policy, self.now_s = MembershipMachine(policy), policy, 0.0
        self.hosts: set[str] = set()
        self.workers: dict[str, int] = {}  # host -> life
        self.dying: set[str] = set()
        self.orphans: dict[str, float] = {}  # host that is lost -> when its worker is gone at the latest
        self.steps: dict[str, int] = {}
        self.life = self.num_last = 0

    def step(self, event: e.Event) -> None:
        commands = self.machine.step(event, self.now_s)
        assert not (commands and self.num_last), "invariant (5): nothing comes after the last"
        started = [c for c in commands if isinstance(c, e.StartWorker)]
        if started:
            self.start(started)
        for command in commands:
            if isinstance(command, e.StopWorkers):
                assert command.life == self.life
                self.dying |= set(self.workers)
            elif isinstance(command, e.Done | e.GiveUp):
                assert not self.workers and not self.alive_orphans(), "invariant (5)"
                self.num_last += 1

    def start(self, started: list[e.StartWorker]) -> None:
        assert not self.workers and not self.alive_orphans(), "invariant (1)"
        names = [c.host for c in started]
        assert set(names) <= self.hosts and len(set(names)) == len(names), "invariant (2)"
        assert len(names) >= self.policy.least and len(names) % self.policy.multiple == 0
        assert [c.process_id for c in started] == list(range(len(names)))
        assert {(c.life, c.num_processes, c.coordinator) for c in started} == {
            (self.life + 1, len(names), started[0].coordinator)
        }
        self.life += 1
        self.workers, self.dying = dict.fromkeys(names, self.life), set()
        self.steps = dict.fromkeys(names, -1)

    def alive_orphans(self) -> bool:
        return any(self.now_s < until_s for until_s in self.orphans.values())

    def act(self, kind: str, host: str) -> None:
        """One thing that may happen now; what cannot does not."""
        if kind == "join" and host not in self.hosts:
            self.hosts.add(host)
            self.orphans.pop(host, None)
            self.step(joined(host))
        elif kind == "lose" and host in self.hosts:
            self.hosts.discard(host)
            if self.workers.pop(host, None) is not None:
                self.orphans[host] = self.now_s + self.policy.lost_s
            self.step(e.Lost(host))
        elif kind == "leave" and host in self.hosts:
            self.hosts.discard(host)
            self.step(e.Leaves(host))
        elif kind in ("fail", "end", "pause") and host in self.workers:
            life = self.workers.pop(host)
            self.step(e.Exited(host, life, {"fail": 1, "end": 0, "pause": e.PAUSED}[kind]))
        elif kind == "mark" and host in self.workers:
            self.steps[host] += 1
            self.step(e.Marked(host, self.workers[host], mark(self.steps[host])))
        elif kind == "old mark":
            self.step(e.Marked(host, self.life - 1, mark(99)))
        elif kind == "old exit":
            self.step(e.Exited(host, self.life - 1, 1))
        elif kind == "stop":
            self.step(e.Stop())
        else:
            self.now_s += 0.7
            self.step(e.Tick())


KINDS = (
    "join",
    "join",
    "mark",
    "mark",
    "mark",
    "lose",
    "fail",
    "end",
    "pause",
    "old mark",
    "old exit",
    "time",
    "time",
    "time",
)


@settings(max_examples=50)
@given(
    history=st.lists(st.tuples(st.sampled_from((*KINDS, "stop")), st.sampled_from(HOSTS)), max_size=120),
    least=st.integers(1, 2),
    late=st.sampled_from(("ask", "wait")),
)
def test_any_history_keeps_the_invariants_and_comes_to_an_end(
    history: list[tuple[str, str]], least: int, late: Any
) -> None:
    policy = PodPolicy(
        hosts=2, least=least, late=late, gather_s=20.0, floor_s=2.0, begin_s=10.0, pause_s=10.0, lost_s=3.0
    )
    world = World(policy)
    for kind, host in history:
        world.act(kind, host)
        if world.dying:
            world.act("fail", min(world.dying))
            world.dying -= {min(world.dying)}
    for _ in range(400):  # nobody does anything any more: every life is ended, and at last there is none again
        world.act("time", "")
        for host in sorted(world.dying & world.workers.keys()):
            world.act("fail", host)
    assert world.num_last == 1 and world.machine.snapshot().phase is e.Phase.OVER


@settings(max_examples=25)
@given(
    number=st.integers(2, 3),
    steps=st.integers(1, 10),
    step_s=st.sampled_from((0.5, 1.0, 2.0)),
    frozen=st.integers(0, 1),
    is_silent=st.booleans(),
)
def test_whoever_is_stuck_is_named_in_time__invariant_3(
    number: int, steps: int, step_s: float, frozen: int, is_silent: bool
) -> None:
    machine, now_s = running(number), 0.0
    for step in range(steps):
        now_s += step_s
        for host in HOSTS[:number]:
            assert machine.step(e.Marked(host, 1, mark(step, step_s=step_s)), now_s) == []
    behind = mark(steps - 1, begun=steps - 1, step_s=step_s)
    said = [(host, mark(steps - 1, step_s=step_s)) for host in HOSTS[:number] if host != HOSTS[frozen]]
    limit_s = max(5.0, 10.0 * step_s)
    ended, stop = run_on(
        machine, now_s, now_s + limit_s + 1.0, *said, *([] if is_silent else [(HOSTS[frozen], behind)])
    )
    assert isinstance(ended, e.LifeEnded) and ended.hosts == (HOSTS[frozen],)
    assert stop == e.StopWorkers(1, (HOSTS[frozen],))
