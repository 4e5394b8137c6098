"""The lease of a run: its machine, histories of three processes whose clocks differ and that stop and go on, the shell."""

import asyncio
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from shoal.clock import ManualClock
from shoal.errors import LeaseHeld, LeaseLost, StoreUnavailable
from shoal.fleet import lease as m
from shoal.fleet.host import Host
from shoal.fleet.lease_keeper import LeaseKeeper
from shoal.plan.run_plan import begin_run
from shoal.record import LeaseRow, MemoryStore, Store, open_store
from tests.fleet import toy
from tests.record.builders import commit_row, group_row, metric_row, with_initial

ROW = LeaseRow(holder="there process 1 ab", fence=3, expires_s=500.0)
OURS = LeaseRow(holder="here process 1 ab", fence=3, expires_s=500.0)


def taking(**settings: Any) -> m.LeaseMachine:
    machine = m.LeaseMachine("here process 7 cd", life_s=30.0, **settings)
    assert machine.step(m.Begin(), 0.0) == [m.Take()]
    return machine


# The machine.


def test_it_is_renewed_at_a_third_of_its_life__invariant_1() -> None:
    machine = taking()
    assert machine.step(m.Taken(), 0.0) == [m.WakeAt(10.0)]
    assert machine.step(m.Tick(), 9.0) == []
    assert machine.step(m.Tick(), 10.5) == [m.Renew()]
    assert machine.step(m.Tick(), 11.0) == [], "one at a time"
    assert machine.step(m.Renewed(), 12.0) == [m.WakeAt(20.5)], "from when it was asked for: its life counts from there"
    assert machine.step(m.Tick(), 20.5) == [m.Renew()]
    assert machine.step(m.Unavailable(), 25.0) == [m.WakeAt(27.0)]
    assert machine.step(m.Tick(), 400.0) == [m.Renew()], "it was paused: only the record says whether it is lost"
    assert machine.step(m.Lost(), 400.0) == [m.GiveUp()]
    assert machine.step(m.Tick(), 500.0) == machine.step(m.End(), 500.0) == []


def test_its_end_lets_others_have_it_at_once() -> None:
    machine = taking()
    machine.step(m.Taken(), 0.0)
    assert machine.step(m.End(), 1.0) == [m.Release()]
    assert taking().step(m.End(), 1.0) == []


def test_another_lease_is_not_waited_for_unless_asked__invariant_2() -> None:
    assert taking().step(m.Held(ROW, 20.0), 0.0) == [m.GiveUp()]
    assert taking(alone=True).step(m.Held(ROW, 20.0), 0.0) == [m.GiveUp()], "that machine may be alive"
    assert taking().step(m.Held(OURS, 20.0), 0.0) == [m.GiveUp()], "nothing says that it is dead"
    machine = taking(alone=True)
    assert machine.step(m.Held(OURS, 20.0), 0.0) == [m.Take(OURS)], "we have the folder's lock: it is dead"
    assert machine.step(m.Held(OURS, 20.0), 0.0) == [m.GiveUp()], "never twice the same"


def test_one_that_waits_gives_up_when_the_row_has_changed__invariants_2_3() -> None:
    machine = taking(waits=True)
    assert machine.step(m.Held(ROW, 20.0), 0.0) == [m.WakeAt(20.0)]
    assert machine.step(m.Tick(), 20.0) == [m.Take(ROW)]
    assert machine.step(m.Held(ROW, 10.0), 20.0) == [m.GiveUp()]
    machine = taking(waits=True)
    assert machine.step(m.Held(ROW, 9e9), 5.0) == [m.WakeAt(35.0)], "no longer than a life, whatever the clocks say"


def test_a_name_says_which_machine() -> None:
    assert m.holder_name() != m.holder_name()
    assert m.machine_of("node-7.example process 12 ab") == "node-7.example"


# Histories.


class Process:
    """One life after another of a process: a store of its own, a clock of its own, the machine."""

    def __init__(self, name: str, clock_s: float) -> None:
        self.name, self.clock_s, self.lives = name, clock_s, 0
        self.store: Store
        self.machine: m.LeaseMachine
        self.fence: int | None = None
        self.believes = False
        self.queue: list[m.Event] = []


class Histories(RuleBasedStateMachine):
    """Three processes on one record. A rule moves one of them: those that no rule moves are stopped."""

    on_disk = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.first = self.opened() if self.on_disk else MemoryStore()
        with_initial(self.first)
        self.now_s, self.owner, self.highest, self.versions = 0.0, (None, 0), 0, 0  # type: ignore[var-annotated]
        self.processes = [Process(str(i), clock_s) for i, clock_s in enumerate((1000.0, 1015.0, 900.0))]
        for process in self.processes:
            self.born(process)

    def opened(self) -> Store:
        return open_store(Path(self.folder.name)) if self.on_disk else self.first.opened_again()  # type: ignore[attr-defined]

    def born(self, process: Process) -> None:
        process.lives += 1
        process.store, process.fence, process.believes, process.queue = self.opened(), None, False, []
        process.machine = m.LeaseMachine(
            f"m{process.name} process {process.lives} x", alone=process.lives > 1, waits=True
        )

    def teardown(self) -> None:
        for store in (self.first, *(process.store for process in self.processes)):
            store.close()
        self.folder.cleanup()

    which = st.integers(0, 2)

    @rule(seconds=st.sampled_from([0.5, 4.0, 11.0, 40.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(i=which)
    def begin(self, i: int) -> None:
        self.say(self.processes[i], m.Begin())

    @rule(i=which)
    def tick(self, i: int) -> None:
        self.say(self.processes[i], m.Tick())

    @rule(i=which)
    def end(self, i: int) -> None:
        self.say(self.processes[i], m.End())

    @rule(i=which)
    def die(self, i: int) -> None:
        if self.processes[i].machine.phase is not m.Phase.IDLE:
            self.processes[i].store.close()
            self.born(self.processes[i])

    @rule(i=which)
    def take_over(self, i: int) -> None:
        """All others are taken for dead."""
        self.now_s += 150.0
        self.die(i)
        self.say(self.processes[i], m.Begin())

    def say(self, process: Process, event: m.Event) -> None:
        answers = [event]
        while answers:
            for command in process.machine.step(answers.pop(0), self.now_s):
                match command:
                    case m.Take(instead_of):
                        answers.append(self.take(process, instead_of))
                    case m.Renew():
                        answers.append(self.renew(process))
                    case m.Release():
                        process.store.end_lease("run", process.fence or 0)
                        if self.owner == (process.name, process.fence):
                            self.owner, process.fence = (None, 0), None

    def take(self, process: Process, instead_of: LeaseRow | None) -> m.Event:
        wall_s = process.clock_s + self.now_s
        try:
            fence = process.store.take_lease(
                "run", holder=f"m{process.name} process {process.lives} x", now_s=wall_s, life_s=30.0, instead_of=instead_of
            )  # fmt: skip
        except LeaseHeld:
            row = process.store.lease("run")
            assert row is not None and self.owner[0] is not None
            return m.Held(row, row.expires_s - wall_s)
        assert fence > self.highest, "a fence never falls"
        self.highest, process.fence, self.owner = fence, fence, (process.name, fence)
        return m.Taken()

    def renew(self, process: Process) -> m.Event:
        is_owner = self.owner == (process.name, process.fence)
        try:
            process.store.renew_lease("run", process.fence or 0, expires_s=process.clock_s + self.now_s + 30.0)
        except LeaseLost:
            assert not is_owner
            return m.Lost()
        assert is_owner, "a stale one renews nothing"
        return m.Renewed()

    @rule(i=which, what=st.sampled_from(["commit", "group", "log"]))
    def write(self, i: int, what: str) -> None:
        process, store = self.processes[i], self.processes[i].store
        owner, fence = self.owner
        may = (owner, fence) == (process.name, process.fence) or (owner is None and process.fence is None)
        try:
            if what == "commit":
                store.commit("run", commit_row(store, self.versions + 1, round=self.versions + 1), round=None)
            elif what == "group":
                store.add_group("run", group_row(), counted=[])
            else:
                store.log("run", [metric_row()])
        except (LeaseHeld, LeaseLost) as error:
            assert not may
            assert isinstance(error, LeaseLost) == (process.fence is not None)
            return
        assert may, "only the last taker writes"
        self.versions += what == "commit"

    @invariant()
    def versions_have_no_gap(self) -> None:
        assert self.first.last_version("run") == self.versions

    @invariant()
    def a_dead_holder_can_be_followed(self) -> None:
        row = self.first.lease("run")
        if row is not None and row.holder:
            assert row.expires_s <= 1015.0 + self.now_s + 30.0


class HistoriesOnDisk(Histories):
    """The same with three connections to one file."""

    on_disk = True


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestHistoriesOnDisk = HistoriesOnDisk.TestCase
TestHistoriesOnDisk.settings = settings(
    max_examples=4, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


# The shell.


async def settle() -> None:
    """Lets tasks and the threads that they wait for get on."""
    for _ in range(20):
        await asyncio.sleep(0.002)


def record() -> MemoryStore:
    store = MemoryStore()
    with_initial(store)
    return store


@toy.in_loop
async def test_work_of_any_length_keeps_its_lease() -> None:
    store, clock, done = record(), ManualClock(), asyncio.Event()
    keeper = LeaseKeeper(store, "run", clock=clock)
    serving = asyncio.create_task(keeper.serve(done.wait))
    for second in range(10, 130, 10):
        await settle()
        clock.advance(10.0)
        await settle()
        row = store.lease("run")
        assert row is not None and row.expires_s == second + 30.0
    done.set()
    await serving
    row = store.lease("run")
    assert row is not None and row.holder == "" and row.fence == 1


@toy.in_loop
async def test_work_is_cancelled_when_the_lease_is_lost() -> None:
    store, clock = record(), ManualClock()
    serving = asyncio.create_task(LeaseKeeper(store, "run", clock=clock).serve(asyncio.Event().wait))
    await settle()
    store.opened_again().take_lease("run", holder="another", now_s=99.0, life_s=30.0)
    clock.advance(10.0)
    with pytest.raises(LeaseLost, match="another has taken it over"):
        await serving
    assert serving.cancelling() == 0
    row = store.lease("run")
    assert row is not None and row.holder == "another", "its end is not the other's end"


@toy.in_loop
async def test_a_record_that_cannot_be_written_costs_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    store, clock, done = record(), ManualClock(), asyncio.Event()
    serving = asyncio.create_task(LeaseKeeper(store, "run", clock=clock).serve(done.wait))
    await settle()

    def full(*_: Any, **__: Any) -> None:
        raise StoreUnavailable("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "renew_lease", full)
        clock.advance(10.0)
        await settle()
    clock.advance(2.0)
    await settle()
    row = store.lease("run")
    assert row is not None and row.expires_s == 42.0 and not serving.done()
    done.set()
    await serving


@toy.in_loop
async def test_a_host_elsewhere_waits_or_is_told_who_has_the_run() -> None:
    store, clock = record(), ManualClock()
    store.opened_again().take_lease("run", holder="there process 1 x", now_s=0.0, life_s=20.0)
    with pytest.raises(LeaseHeld, match=r"there process 1 x, until 00:00:20 UTC"):
        await LeaseKeeper(store, "run", clock=clock).serve(asyncio.Event().wait)
    with pytest.raises(LeaseHeld):
        LeaseKeeper(store, "run", clock=clock, alone=True).take()
    done = asyncio.Event()
    waiting = asyncio.create_task(LeaseKeeper(store, "run", clock=clock, waits=True).serve(done.wait))
    await settle()
    clock.advance(20.0)
    await settle()
    row = store.lease("run")
    assert row is not None and row.fence == 2
    done.set()
    await waiting


@toy.in_loop
async def test_one_who_is_alone_follows_a_dead_one_of_its_machine_at_once() -> None:
    store, clock = record(), ManualClock()
    LeaseKeeper(store.opened_again(), "run", clock=clock).take()  # and dies
    with pytest.raises(LeaseHeld):
        LeaseKeeper(store, "run", clock=clock).take()
    keeper = LeaseKeeper(store, "run", clock=clock, alone=True)
    keeper.take()
    store.log("run", [metric_row()])
    done = asyncio.Event()
    done.set()
    await keeper.serve(done.wait)
    row = store.lease("run")
    assert row is not None and (row.holder, row.fence) == ("", 2), "taken once"


@toy.in_loop
async def test_two_hosts_of_one_run_make_one_line() -> None:
    """The first is taken for dead within a round and goes on: nothing of it is counted; its devices go to the other."""
    store = MemoryStore()
    plan = toy.plan(toy.exact("a", "b"))
    model = {s.name: toy.np.zeros(s.shape, s.numpy_dtype) for s in plan.manifest.broadcast}
    run_id = begin_run(store, plan, model, kind="host", rounds=3, seed=0)
    first = Host(store.opened_again(), run_id, toy.KEYS, lease_s=0.3)
    serving = asyncio.create_task(first.run())
    link = toy.LocalLink(first.edge)
    one = asyncio.create_task(toy.device("a", link).run())
    await settle()
    taken = store.lease(run_id)
    assert taken is not None
    store.take_lease(run_id, holder="another", now_s=0.0, life_s=9.0, instead_of=taken)
    two = asyncio.create_task(toy.device("b", link).run())  # now the first has a whole round
    with pytest.raises(LeaseLost, match="another has taken it over"):
        await serving
    assert store.last_version(run_id) == 0 and store.run(run_id).status == "running"
    for task in (one, two):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await first.edge.close()
    second = Host(store, run_id, toy.KEYS)
    devices = [asyncio.create_task(toy.device(name, toy.LocalLink(second.edge)).run()) for name in "ab"]
    await second.run()
    await asyncio.gather(*devices)
    await second.edge.close()
    assert [commit.version for commit in store.commits(run_id)] == [0, 1, 2, 3]
    assert [commit.members for commit in store.commits(run_id)] == [0, 2, 2, 2]
