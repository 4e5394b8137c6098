"""Several runs in one host: devices are dealt out to them, and what happens in one does not touch another."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from shoal.data.store import Examples
from shoal.errors import DataError, PlanError, StoreError
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.floor import Floor
from shoal.fleet.frontdoor import Frontdoor
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.host import Host
from shoal.fleet.link import Link, LocalLink
from shoal.fleet.pace import Pace
from shoal.fleet.several import SeveralHosts
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.policy import Late, Privacy, RoundPolicy, Secure
from shoal.record.memory import MemoryStore
from tests.fleet import toy


class Fleet:
    def __init__(self, store: MemoryStore, several: SeveralHosts) -> None:
        self.store, self.several = store, several
        self.running = asyncio.create_task(several.run())
        self.devices: list[asyncio.Task[None]] = []

    @property
    def link(self) -> LocalLink:
        return LocalLink(self.several.frontdoor)

    def start(self, *devices: Device) -> None:
        self.devices += [asyncio.create_task(device.run()) for device in devices]

    def host(self, task: str) -> Host:
        return next(host for host in self.several.hosts if host.plan.manifest.task == task)

    def version(self, task: str) -> int:
        return self.store.last_version(self.host(task).run_id) or 0

    async def until(self, condition: Any) -> None:
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def fleet(
    plans: Sequence[Plan],
    *,
    rounds: int | Mapping[str, int] = 2,
    weights: Mapping[str, float] | None = None,
    by_order: bool = False,
    populations: Mapping[str, str] | None = None,
) -> AsyncIterator[Fleet]:
    store, hosts = MemoryStore(), []
    for made in plans:
        model = {s.name: np.zeros(s.shape, s.numpy_dtype) for s in made.manifest.broadcast}
        task = made.manifest.task
        run_id = begin_run(
            store, made, model, kind="host", seed=0, rounds=rounds if isinstance(rounds, int) else rounds[task],
            population=(populations or {}).get(task, "default"),
        )  # fmt: skip
        hosts.append(Host(store, run_id, toy.KEYS, rng=np.random.default_rng(0)))
    by_run = {host.run_id: (weights or {}).get(host.plan.manifest.task, 1.0) for host in hosts}
    several = SeveralHosts(hosts, weights=by_run, by_order=by_order, rng=np.random.default_rng(0))
    running = Fleet(store, several)
    try:
        yield running
    finally:
        for each in (running.running, *running.devices):
            each.cancel()
        await asyncio.gather(running.running, *running.devices, return_exceptions=True)
        await several.frontdoor.close()


def policy(goal: int = 3, **changes: Any) -> RoundPolicy:
    return RoundPolicy(
        **{"goal": goal, "minimum_group": 1, "over_selection": 1.0, "selection_window_s": 0.3, **changes}
    )  # fmt: skip


def devices(link: Link, number: int, **changes: Any) -> list[Device]:
    host = toy.device_host()
    return [toy.device(f"d{index}", link, host=host, **changes) for index in range(number)]


def fitted(name: str, link: Link, fits: str, shared: Any = None) -> Device:
    """A device of which only the task `fits` can use the examples."""
    return Device(
        name, lambda: Examples({fits: np.ones(3, np.float32)}), link=link, host=shared or toy.device_host(),
        rng=np.random.default_rng(0),
    )  # fmt: skip


@pytest.mark.parametrize("stays", [True, False])
@toy.in_loop
async def test_the_same_few_devices_serve_two_tasks_to_their_ends(stays: bool) -> None:
    plans = [toy.plan(policy(), task="one"), toy.plan(policy(2), task="two")]
    async with fleet(plans, rounds=4) as running:
        made = devices(running.link, 4, stays=stays)
        for device in made:
            device._host.clock = Quick()  # one that goes away is back at once
        running.start(*made)
        await running.running
        assert running.version("one") == running.version("two") == 4
        assert {running.store.run(host.run_id).status for host in running.several.hosts} == {"finished"}
        for task, goal in (("one", 3), ("two", 2)):
            assert all(c.members == goal for c in running.store.commits(running.host(task).run_id) if c.version)
        await asyncio.gather(*running.devices)


@toy.in_loop
async def test_those_who_are_sent_away_are_told_when_the_next_rounds_are(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []

    class Heard(Pace):
        def opened(self, now_s: float) -> None:
            heard.append(now_s)
            super().opened(now_s)

    monkeypatch.setattr("shoal.fleet.frontdoor.Pace", Heard)
    async with fleet([toy.plan(policy(), task="one"), toy.plan(policy(2), task="two")], rounds=4) as running:
        running.start(*devices(running.link, 4))
        await running.running
    assert 2 <= len(heard) <= 6  # eight versions of two runs that are both at work most of the time


class Quick:
    """A clock whose sleeps are short."""

    def now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def wall_s(self) -> float:
        return 0.0

    async def sleep_until(self, deadline_s: float) -> None:
        await asyncio.sleep(0.001)


@toy.in_loop
async def test_secure_groups_of_two_tasks() -> None:
    privacy = Privacy(delta_bound=8.0, clip_norm=1e4, secure=Secure(members=8, colluders=0.0, dropouts=0.2))
    rules = policy(8, minimum_group=4)
    plans = [
        toy.plan(rules, shapes, task=task, privacy=privacy, max_weight=16)
        for task, shapes in (("one", {"params/w": (1,)}), ("two", {"params/w": (2,)}))
    ]
    async with fleet(plans) as running:
        running.start(*devices(running.link, 10))
        await running.running
        assert running.version("one") == running.version("two") == 2


@toy.in_loop
async def test_a_device_with_a_floor_serves_the_tasks_that_keep_it() -> None:
    privacy = Privacy(delta_bound=8.0, clip_norm=1e4, secure=Secure(members=8, colluders=0.0, dropouts=0.2))
    secure = toy.plan(policy(6, minimum_group=4), {"params/w": (2,)}, task="two", privacy=privacy, max_weight=16)
    async with fleet([toy.plan(policy(2), task="one"), secure]) as running:
        shared = DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, floor=Floor(secure=True))
        careful = [toy.device(f"careful-{i}", running.link, host=shared) for i in range(6)]
        running.start(*careful, *devices(running.link, 2))
        await running.running
        assert running.version("one") == running.version("two") == 2
        assert all("one" in device._unfit for device in careful if device._unfit)


@toy.in_loop
async def test_over_sockets_too() -> None:
    plans = [toy.plan(policy(), {"params/w": (300_000,)}, task="large"), toy.plan(policy(), task="small")]
    async with fleet(plans) as running:
        server = running.several.server(address="127.0.0.1:0")
        await server.start()
        link = GrpcLink(f"127.0.0.1:{server.port}")
        try:
            running.start(*devices(link, 4))
            await running.running
            await asyncio.gather(*running.devices)
        finally:
            await link.close()
            await server.close()
        assert running.version("large") == running.version("small") == 2


@toy.in_loop
async def test_by_order_the_first_task_is_done_before_the_second_begins() -> None:
    plans = [toy.plan(policy(), task="first"), toy.plan(policy(), task="second")]
    async with fleet(plans, rounds=5, by_order=True) as running:
        running.start(*devices(running.link, 3))
        await running.running
        ends = {
            task: [commit.created_s for commit in running.store.commits(running.host(task).run_id)]
            for task in ("first", "second")
        }
        # Taken in turn, they would be level; the second has the devices while the first's last sums are being written.
        assert ends["first"][3] <= ends["second"][2]


@toy.in_loop
async def test_by_weight_one_task_has_three_rounds_for_each_of_the_other() -> None:
    plans = [toy.plan(policy(), task="often"), toy.plan(policy(), task="seldom")]
    async with fleet(plans, rounds=100, weights={"often": 3.0}) as running:
        running.start(*devices(running.link, 3))
        await running.until(lambda: running.version("often") + running.version("seldom") >= 40)
        assert abs(running.version("often") - 3 * running.version("seldom")) <= 6


@toy.in_loop
async def test_a_task_that_lacks_devices_does_not_stop_the_other() -> None:
    plans = [toy.plan(policy(50), task="large"), toy.plan(policy(2), task="small")]
    async with fleet(plans) as running:
        running.start(*devices(running.link, 4))
        await running.until(lambda: running.version("small") == 2)
        assert running.version("large") == 0 and not running.running.done()


@toy.in_loop
async def test_a_run_that_fails_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [toy.plan(policy(), task="bad"), toy.plan(policy(), task="good")]
    async with fleet(plans, rounds=3) as running:
        bad = running.host("bad")

        def broken(*args: Any) -> None:
            raise StoreError("its record is not what it was")

        monkeypatch.setattr(bad.coordinator, "_write_commit", broken)
        running.start(*devices(running.link, 3))
        with pytest.raises(StoreError, match="not what it was"):
            await running.running
        assert running.version("good") == 3 and running.store.run(bad.run_id).status == "failed"
        assert running.store.run(running.host("good").run_id).status == "finished"


@toy.in_loop
async def test_a_bug_in_one_run_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = [toy.plan(policy(), task="bad"), toy.plan(policy(), task="good")]
    async with fleet(plans, rounds=30) as running:

        def broken(*args: Any) -> None:
            raise ValueError("a bug")

        monkeypatch.setattr(running.host("bad").coordinator, "_write_commit", broken)
        running.start(*devices(running.link, 3))
        with pytest.raises(ValueError, match="a bug"):
            await running.running
        assert running.version("good") == 30


@toy.in_loop
async def test_a_commit_that_fails_costs_its_task_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fleet([toy.plan(policy(), task="one"), toy.plan(policy(), task="two")]) as running:
        toy.fail_once(monkeypatch, running.host("one"))
        running.start(*devices(running.link, 3))
        await running.running
        assert running.version("one") == running.version("two") == 2


@toy.in_loop
async def test_a_run_that_has_refused_a_device_is_not_given_it_again_while_there_is_another() -> None:
    async with fleet([toy.plan(policy(1), task="one"), toy.plan(policy(1), task="two")]) as running:
        async with toy.peer(running.link, "d") as peer:
            await peer.check_in(stay=True)
            seen = []
            for _ in range(3):
                kind, assigned = await peer.hear()
                assert kind == "assigned"
                seen.append(assigned.run)
                made = next(host.plan for host in running.several.hosts if host.run_id == assigned.run)
                bad = {name: np.full_like(value, np.nan) for name, value in toy.update(made).items()}
                values = bad if assigned.run == seen[0] else toy.update(made)
                await peer.say(report=toy.report(assigned.token, values))
                kind, _ = await peer.hear()
                assert kind == ("refused" if assigned.run == seen[0] else "counted")
                if kind == "refused":
                    await peer.check_in(stay=True)
        assert seen[1] == seen[2] != seen[0]


@toy.in_loop
async def test_one_who_is_told_to_come_later_waits_nowhere() -> None:
    async with (
        fleet([toy.plan(policy(4), task="one"), toy.plan(policy(4), task="two")]) as running,
        toy.peer(running.link, "d") as peer,
    ):
        door = running.several.frontdoor
        await peer.check_in(stay=True)
        hearing = asyncio.create_task(peer.hear())
        await running.until(lambda: door.snapshot().given)
        door._pace.pool = 0
        await peer.check_in()
        assert (await hearing)[0] == "later"
        await running.until(lambda: not door.snapshot().given)


@toy.in_loop
async def test_devices_serve_the_tasks_of_their_population_only() -> None:
    plans = [toy.plan(policy(), task="phones"), toy.plan(policy(), task="watches")]
    async with fleet(plans, populations={"phones": "phone", "watches": "watch"}) as running:
        host = toy.device_host()
        made = {
            kind: [
                Device(
                    f"{kind}{index}", toy.examples, link=running.link, host=host, rng=np.random.default_rng(0),
                    population=kind,
                )
                for index in range(3)
            ]
            for kind in ("phone", "watch")
        }  # fmt: skip
        running.start(*made["phone"])
        await running.until(lambda: running.version("phones") == 2)
        await asyncio.gather(*running.devices)  # their run is over, the other is not
        assert running.version("watches") == 0
        running.start(*made["watch"])
        await running.running
        assert [device.progress.counted for device in made["phone"]] == [2, 2, 2]
        stranger = Device(
            "x", toy.examples, link=running.link, host=host, rng=np.random.default_rng(0), population="car"
        )  # fmt: skip
        with pytest.raises(PlanError, match=r"population 'phone'.*or a device of population 'watch'"):
            await stranger.run()


@toy.in_loop
async def test_a_device_serves_the_tasks_that_it_names() -> None:
    plans = [toy.plan(policy(1), task="one"), toy.plan(policy(1), task="two")]
    async with fleet(plans, rounds=3) as running:
        choosy = Device(
            "x", toy.examples, link=running.link, host=toy.device_host(), rng=np.random.default_rng(0), tasks=["two"]
        )  # fmt: skip
        running.start(choosy)
        await running.until(lambda: running.version("two") == 3)
        await asyncio.gather(*running.devices)
        assert running.version("one") == 0 and choosy.progress.counted == 3


@toy.in_loop
async def test_a_device_whose_examples_fit_one_task_serves_that_one() -> None:
    two = toy.plan(policy(1), task="two", field="y")
    async with fleet([toy.plan(policy(1), task="one"), two], rounds=2) as running:
        device = fitted("d", running.link, "y")
        running.start(device)
        await running.until(lambda: running.version("two") == 2)
        await asyncio.gather(*running.devices)  # for it all is over
        assert running.version("one") == 0 and device.progress.counted == 2
        with pytest.raises(DataError, match="reads field"):
            await fitted("odd", running.link, "z").run()


@toy.in_loop
async def test_a_broken_stream_goes_on_with_the_run_that_it_worked_for() -> None:
    async with fleet([toy.plan(policy(1), task="one"), toy.plan(policy(1), task="two")], rounds=1) as running:
        async with toy.peer(running.link, "d") as first:
            assigned = await first.assigned()
        made = next(host.plan for host in running.several.hosts if host.run_id == assigned.run)
        link = running.link
        status = await link.status(pb.StatusRequest(token=assigned.token))
        assert status.state == pb.StatusReply.PENDING
        async with toy.peer(running.link, "d") as second:
            await second.say(report=toy.report(assigned.token, toy.update(made)))
            assert (await second.hear())[0] == "counted"
            await second.check_in()
            kind, other = await second.hear()
            assert kind == "assigned" and other.run != assigned.run


@toy.in_loop
async def test_a_lost_assignment_is_given_again() -> None:
    plans = [toy.plan(toy.exact("d"), task="one"), toy.plan(toy.exact("e"), task="two")]
    async with fleet(plans, rounds=1) as running:
        async with toy.peer(running.link, "d") as first:
            assigned = await first.assigned()
        async with toy.peer(running.link, "d") as second:
            again = await second.assigned()
            assert again.token.signed and again.run == assigned.run


@toy.in_loop
async def test_a_stranger_breaks_nothing() -> None:
    async with fleet([toy.plan(policy(1), task="one"), toy.plan(policy(1), task="two")], rounds=1) as running:
        async with toy.peer(running.link, "bad") as peer:
            await peer.say(report=pb.Report(token=pb.Token(signed=b"nonsense")))
            kind, refused = await peer.hear()
            assert kind == "refused" and "no run of this host" in refused.detail
        async with toy.peer(running.link, "worse") as peer:
            assigned = await peer.assigned()
            forged = pb.Token(signed=assigned.token.signed, signature=b"x" * 64)
            await peer.say(report=pb.Report(token=forged))
            kind, refused = await peer.hear()
            assert kind == "refused" and "not one of this Coordinator's" in refused.detail
        async with toy.peer(running.link, "empty") as peer:
            await peer.check_in(device_id="")
            assert (await peer.hear())[0] == "refused"
        running.start(*devices(running.link, 1))
        await running.running


@toy.in_loop
async def test_another_device_of_the_same_name_replaces_the_first() -> None:
    async with (
        fleet([toy.plan(policy(2), task="one"), toy.plan(policy(2), task="two")], rounds=1) as running,
        toy.peer(running.link, "same") as first,
        toy.peer(running.link, "same") as second,
    ):
        await first.check_in()
        hearing = asyncio.create_task(first.hear())
        await asyncio.sleep(0.01)
        await second.check_in()
        heard = asyncio.create_task(second.hear())
        kind, refused = await hearing
        assert kind == "refused" and refused.reason == "replaced"
        running.start(*devices(running.link, 1))
        assert (await heard)[0] == "assigned"


@toy.in_loop
async def test_sessions_are_bounded_over_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.fleet.streams.MAX_SESSIONS", 1)
    async with (
        fleet([toy.plan(policy(2), task="one"), toy.plan(policy(2), task="two")], rounds=1) as running,
        toy.peer(running.link, "a") as first,
        toy.peer(running.link, "b") as second,
    ):
        await first.check_in()
        hearing = asyncio.create_task(first.hear())
        await asyncio.sleep(0.01)
        await second.check_in()
        kind, later = await second.hear()
        assert kind == "later" and "as many sessions as it may" in later.why
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


@toy.in_loop
async def test_those_at_work_for_a_run_that_ends_are_let_go() -> None:
    late = policy(1, over_selection=2.0, late=Late.discount(0.5, max_staleness=1))
    async with (
        fleet([toy.plan(late, task="one"), toy.plan(policy(1), task="two")], rounds=1, by_order=True) as running,
        toy.peer(running.link, "slow") as slow,
        toy.peer(running.link, "fast") as fast,
    ):
        await slow.check_in()
        hearing = asyncio.create_task(slow.hear())
        assigned = await fast.assigned()
        assert (await hearing)[0] == "assigned"
        one = running.host("one")
        assert assigned.run == one.run_id
        await fast.say(report=toy.report(assigned.token, toy.update(one.plan)))
        assert (await fast.hear())[0] == "counted"
        kind, released = await slow.hear()
        assert kind == "released" and "last version" in released.why


def test_a_front_door_says_where_devices_are() -> None:
    from shoal.clock import SystemClock

    async def ask() -> None:
        door = Frontdoor(clock=SystemClock(), rng=np.random.default_rng(0))
        assert door.snapshot().idle == frozenset() and door.snapshot().turn == ""
        await door.close()

    asyncio.run(ask())


@toy.in_loop
async def test_of_a_large_check_in_little_is_kept() -> None:
    async with (
        fleet([toy.plan(policy(4), task="one"), toy.plan(policy(4), task="two")]) as running,
        toy.peer(running.link, "d") as peer,
    ):
        door, words = running.several.frontdoor, [f"{number:0>60}" for number in range(900)]
        await peer.check_in(stay=True, tasks=["one", "two", *words], held=[])
        hearing = asyncio.create_task(peer.hear())
        await running.until(lambda: door.snapshot().given)
        kept = door._visits["d"].check_in
        assert kept is not None and kept.ByteSize() < 200
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)


@pytest.mark.parametrize(
    "runtime",
    [{"kind": "x" * 101}, {"platforms": ["cpu"] * 17}, {"platforms": ["cpu", "x" * 101]}, {"version": [1, 2]}],
    ids=["kind", "platforms", "platform", "version"],
)
@toy.in_loop
async def test_a_runtime_that_is_none_is_refused(runtime: dict[str, Any]) -> None:
    info = {"kind": toy.RUNTIME.kind, "version": toy.RUNTIME.version, "platforms": ["cpu"], **runtime}
    async with (
        fleet([toy.plan(policy(1), task="one"), toy.plan(policy(1), task="two")]) as running,
        toy.peer(running.link, "d") as peer,
    ):
        await peer.check_in(runtime=pb.RuntimeInfo(**info))
        kind, refused = await peer.hear()
        assert (kind, refused.reason) == ("refused", "protocol") and "Expected a runtime" in refused.detail
