"""When a machine may work, what it may cost, and that devices keep to it."""

import asyncio
import datetime
import sys
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from shoal.clock import ManualClock
from shoal.errors import DataError, NetworkError
from shoal.fleet import probe
from shoal.fleet.conditions import CONDITIONS, Conditions, Eligibility, untold
from shoal.fleet.device import Device
from shoal.fleet.device_file import Day, DeviceFile
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.gate import WRITE_S, Gate
from shoal.fleet.impact import COOLER_BY, Impact, ImpactBudget, Sample
from shoal.fleet.link import LocalLink, Stream
from shoal.fleet.meter import Meter
from shoal.fleet.politeness import Politeness, while_open
from shoal.fleet.probe import OwnersProbe, SystemProbe
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import RoundPolicy
from shoal.tensors import Tensors
from tests.fleet import toy

GOOD = Conditions(charging=True, idle=True, unmetered=True)
NOTHING = Sample(cpu_s=0.0, moved_bytes=0, memory_bytes=0)
DAY_S = 86_400.0


# Conditions.


def test_work_begins_once_all_has_held_and_ends_at_once() -> None:
    machine = Eligibility(CONDITIONS, settle_s=30.0)
    said = [machine.step(GOOD, now_s=at) for at in (0.0, 29.9, 30.0)]
    assert said == ["its conditions have held for less than 30 s"] * 2 + [""]
    assert machine.step(replace(GOOD, idle=False), now_s=31.0) == "others use this machine"
    assert machine.step(GOOD, now_s=32.0) and not machine.step(GOOD, now_s=62.0), "it settles anew"


@pytest.mark.parametrize("name", CONDITIONS)
def test_what_is_not_wanted_does_not_matter_and_what_is_not_known_does_not_hold(name: str) -> None:
    machine = Eligibility([name], settle_s=0.0)
    assert not machine.step(Conditions(**{name: True}), now_s=0.0)
    unknown, wrong = machine.step(Conditions(), now_s=1.0), machine.step(Conditions(**{name: False}), now_s=2.0)
    assert "not known" in unknown and wrong and wrong != unknown
    assert not Eligibility([]).step(Conditions(), now_s=0.0)


def test_a_condition_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected condition to be one of"):
        Eligibility(["sunny"])


# Probes.


class Said:
    """A probe that says what it is told to."""

    def __init__(self, conditions: Conditions = GOOD) -> None:
        self.conditions: Conditions | None = conditions

    def read(self) -> Conditions:
        if self.conditions is None:
            raise DataError("the hook is gone")
        return self.conditions


def test_the_owner_s_word_goes_before_the_system_s(tmp_path: Path) -> None:
    path = tmp_path / "conditions.json"
    path.write_text('{"idle": false}')
    assert OwnersProbe(f"file:{path}", Said()).read() == replace(GOOD, idle=False)
    script = tmp_path / "probe.py"
    script.write_text("print('{\"charging\": false}')")
    command = f"{sys.executable} {script}"
    assert OwnersProbe(command, Said()).read() == replace(GOOD, charging=False)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"charging": 1}', '{"sunny": true}', '"' + "x" * 10_000 + '"'])
def test_nonsense_is_said_to_be(tmp_path: Path, text: str) -> None:
    path = tmp_path / "conditions.json"
    path.write_text(text)
    with pytest.raises(DataError, match="to give JSON of charging, idle, unmetered, each true or false, got"):
        OwnersProbe(f"file:{path}", Said()).read()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("file:/nowhere", "cannot be read: No such file"),
        ("/nowhere/probe", "failed"),
        (f"{sys.executable} -c 'import sys; sys.exit(\"no battery\")'", "ended with code 1; it said: no battery"),
    ],
)
def test_a_probe_that_fails_is_said(source: str, text: str) -> None:
    with pytest.raises(DataError, match=text):
        OwnersProbe(source, Said()).read()


class _Times:
    def __init__(self, user: float, idle: float) -> None:
        self.user, self.idle, self.system = user, idle, 0.0


@pytest.mark.parametrize(("others", "own", "idle"), [(1.0, 0.0, True), (1.0, 8.0, True), (2.0, 0.0, False)])
def test_own_work_leaves_a_machine_idle(monkeypatch: pytest.MonkeyPatch, others: float, own: float, idle: bool) -> None:
    now, own_s = _Times(5.0, 100.0), [3.0]
    monkeypatch.setattr(psutil, "cpu_times", lambda: now)
    system = SystemProbe(lambda: own_s[0])
    assert system.read().idle is None, "too short a look"
    now.user, now.idle, own_s[0] = 5.0 + others + own, 110.0 - others - own, 3.0 + own
    assert system.read().idle is idle
    assert system.read().idle is idle, "as it was, until there is a longer look"


@pytest.mark.parametrize(("plugged", "charging"), [(True, True), (False, False), (None, None)])
def test_a_battery_is_asked_whether_it_charges(
    monkeypatch: pytest.MonkeyPatch, plugged: bool | None, charging: bool | None
) -> None:
    class Battery:
        power_plugged, percent = plugged, 50.0

    monkeypatch.setattr(psutil, "sensors_battery", lambda: Battery, raising=False)
    assert SystemProbe(lambda: 0.0).read().charging is charging
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert SystemProbe(lambda: 0.0).read().charging is True, "a machine without one"


def test_interfaces_of_mobile_networks_are_metered(tmp_path: Path) -> None:
    table = tmp_path / "route"
    head = "Iface Destination Gateway Flags RefCnt Use Metric Mask\n"
    table.write_text(head + "wwan0 00000000 0102A8C0 0003 0 0 600 00000000\neth0 0002A8C0 0 1 0 0 0 00FFFFFF\n")
    assert probe._default_interfaces(tmp_path) == ["wwan0"]
    assert probe._default_interfaces(tmp_path / "none") == []


def test_so_are_those_of_mobile_networks_that_have_ipv6_alone(tmp_path: Path) -> None:
    none, where = "0" * 32, "fe80" + "0" * 27 + "1"
    (tmp_path / "ipv6_route").write_text(
        f"fe80{'0' * 28} 40 {none} 00 {none} 00000100 00000001 00000000 00000001     eth0\n"
        f"{none} 00 {none} 00 {where} 00000400 00000001 00000000 00450003    rmnet_data0\n"
        f"{none} 00 {none} 00 {none} ffffffff 00000001 00000000 00200200       lo\n"
    )
    assert probe._default_interfaces(tmp_path) == ["rmnet_data0"]


def test_what_cannot_be_told_here_is_said() -> None:
    assert untold(Said(Conditions(charging=None, idle=None, unmetered=None)), CONDITIONS) == "charging or unmetered"
    assert untold(Said(), CONDITIONS) == ""


# Impact.


def spent(budget: ImpactBudget, *samples: Sample, works: bool = True) -> tuple[str, Day]:
    machine, day, why = Impact(budget, NOTHING), Day(), ""
    for sample in samples:
        why = machine.step(sample, day, works=works)
        day = machine.today
    return why, day


@pytest.mark.parametrize(
    ("budget", "last", "text"),
    [
        (ImpactBudget(cpu_s=10.0), Sample(cpu_s=10.0, moved_bytes=0, memory_bytes=0), "processor time is used up"),
        (ImpactBudget(moved_bytes=100), Sample(cpu_s=0.0, moved_bytes=100, memory_bytes=0), "traffic is used up"),
        (ImpactBudget(memory_bytes=100), Sample(cpu_s=0.0, moved_bytes=0, memory_bytes=100), "memory is used up"),
        (ImpactBudget(celsius=50.0), replace(NOTHING, celsius=50.0), "too hot"),
    ],
)
def test_a_budget_ends_where_it_says(budget: ImpactBudget, last: Sample, text: str) -> None:
    under = {name: value * 0.99 if isinstance(value, float) else value - 1
             for name, value in ((n, getattr(last, n)) for n in last.__dataclass_fields__) if value}  # fmt: skip
    assert spent(budget, replace(last, **under))[0] == ""
    assert text in spent(budget, last)[0]
    assert spent(ImpactBudget(), last)[0] == ""


def test_only_work_answers_for_the_battery() -> None:
    charges = [replace(NOTHING, battery_percent=percent) for percent in (80.0, 78.0, 79.0, 77.5)]
    why, day = spent(ImpactBudget(battery_percent=3.5), *charges)
    assert day.battery_percent == 3.5 and "battery is used up" in why
    assert spent(ImpactBudget(battery_percent=3.5), *charges, works=False)[1].battery_percent == 0.0
    plugged = [charges[0], replace(NOTHING, battery_percent=None), charges[1]]
    assert spent(ImpactBudget(), *plugged)[1].battery_percent == 0.0


def test_a_hot_machine_cools_before_it_goes_on() -> None:
    machine = Impact(ImpactBudget(celsius=50.0), NOTHING)
    read = [
        bool(machine.step(replace(NOTHING, celsius=c), Day(), works=True)) for c in (49, 50, 48, 50 - COOLER_BY, 46, 49)
    ]
    assert read == [False, True, True, True, False, False]


def test_times_of_a_child_that_ended_are_counted_once() -> None:
    cpu = [Sample(cpu_s=cpu_s, moved_bytes=0, memory_bytes=0) for cpu_s in (5.0, 2.0, 6.0)]
    assert spent(ImpactBudget(), *cpu)[1].cpu_s == 6.0


@pytest.mark.parametrize("wrong", [{"cpu_s": 0.0}, {"moved_bytes": -1}, {"celsius": float("nan")}])
def test_a_budget_of_nothing_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        ImpactBudget(**wrong)  # type: ignore[arg-type]


def test_a_meter_sees_itself() -> None:
    meter = Meter(list, lambda: 7)
    before = meter()
    sum(range(3_000_000))
    after = meter()
    assert after.cpu_s > before.cpu_s and after.moved_bytes == 7 and after.memory_bytes > 1 << 20
    assert Meter(lambda: [2**22 + 1], lambda: 0)().cpu_s > 0.0, "a child that has ended meanwhile"


# The gate.


class Machine:
    """What a gate looks at, in a test's hands."""

    def __init__(
        self, tmp_path: Path, budget: ImpactBudget | None = None, *, wanted: tuple[str, ...] = CONDITIONS
    ) -> None:
        self.probe, self.sample, self.clock = Said(), NOTHING, ManualClock(DAY_S * 100.5)
        self.file, self.told = DeviceFile(tmp_path), list[str]()
        self.gate = Gate(
            Eligibility(wanted, settle_s=0.0), self.probe, budget or ImpactBudget(), lambda: self.sample,
            file=self.file, clock=self.clock, poll_s=5.0, on_change=self.told.append,
        )  # fmt: skip

    async def look(self, seconds: float = 5.0) -> str:
        """What the gate says some time later."""
        self.clock.advance(seconds)
        await self.gate._look()
        return self.gate.why

    @property
    def today(self) -> int:
        return datetime.datetime.fromtimestamp(self.clock.wall_s()).toordinal()


@toy.in_loop
async def test_a_gate_is_closed_until_it_knows_and_tells_each_change_once(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.gate.why == "its conditions are not known yet"
    assert await machine.look() == "" == await machine.look()
    machine.probe.conditions = replace(GOOD, charging=False)
    assert await machine.look() == "it is not charging"
    await asyncio.wait_for(machine.gate.until_closed(), timeout=1)
    machine.probe.conditions = None
    assert await machine.look() == "the hook is gone"
    machine.probe.conditions = GOOD
    assert await machine.look() == ""
    await asyncio.wait_for(machine.gate.until_open(), timeout=1)
    assert machine.told == ["", "it is not charging", "the hook is gone", ""]


@toy.in_loop
async def test_a_probe_that_fails_when_a_device_starts_means_rest(tmp_path: Path) -> None:
    machine, said = Machine(tmp_path), tmp_path / "app.json"
    polite = Politeness(when=("charging",), probe=f"file:{said}", settle_s=0.0)
    gate = polite.gate(list, lambda: 0, file=machine.file, clock=machine.clock)
    assert gate is not None
    await gate._look()
    assert "app.json cannot be read" in gate.why
    said.write_text('{"charging": true}')
    await gate._look()
    assert gate.why == ""


def test_a_probe_of_nothing_that_is_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected --when charging, idle or unmetered with --probe"):
        Politeness(probe="file:app.json").gate(list, lambda: 0, file=DeviceFile(tmp_path), clock=ManualClock(0.0))


@toy.in_loop
async def test_without_conditions_no_probe_is_asked(tmp_path: Path) -> None:
    machine = Machine(tmp_path, wanted=())
    machine.probe.conditions = None
    assert await machine.look() == ""


@toy.in_loop
async def test_a_day_s_budget_outlives_a_restart_and_ends_with_the_day(tmp_path: Path) -> None:
    machine = Machine(tmp_path, ImpactBudget(cpu_s=10.0))
    machine.sample = replace(NOTHING, cpu_s=9.0)
    assert await machine.look(WRITE_S) == ""
    machine.sample = replace(NOTHING, cpu_s=9.5)  # not written yet
    machine.file.close()
    again = Machine(tmp_path, ImpactBudget(cpu_s=10.0))
    again.clock.advance(WRITE_S)
    assert again.file.day(again.today).cpu_s == 9.0
    again.sample = replace(NOTHING, cpu_s=2.0)
    assert "used up" in await again.look()
    assert await again.look(DAY_S) == "", "another day"
    assert again.file.day(again.today - 1).cpu_s == 11.0


@toy.in_loop
async def test_a_clock_that_is_set_back_finds_what_that_day_had_cost(tmp_path: Path) -> None:
    machine = Machine(tmp_path, ImpactBudget(cpu_s=10.0))
    machine.sample = replace(NOTHING, cpu_s=11.0)
    assert await machine.look()
    assert await machine.look(DAY_S) == ""
    assert "used up" in await machine.look(-DAY_S)


@toy.in_loop
async def test_what_a_day_has_cost_is_written_when_the_gate_is_left(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    looking = asyncio.create_task(machine.gate.run())
    await asyncio.wait_for(machine.gate.until_open(), timeout=5)
    machine.sample = replace(NOTHING, cpu_s=3.0)
    machine.clock.advance(5.0)
    while machine.gate._spent.cpu_s == 0.0:
        await asyncio.sleep(0.001)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)
    assert machine.file.day(machine.today).cpu_s == 3.0


# Devices behind a gate.


class Door(Machine):
    """A machine whose gate a test opens and shuts."""

    async def turn(self, conditions: Conditions) -> None:
        self.probe.conditions = conditions
        await self.look()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


@toy.in_loop
async def test_a_device_rests_while_its_machine_may_not_work(tmp_path: Path) -> None:
    door = Door(tmp_path)
    async with toy.fleet(toy.plan(RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)), rounds=2000) as fleet:
        device = toy.device("a", fleet.link)
        fleet.tasks.append(asyncio.create_task(while_open(device, door.gate)))
        await until(lambda: device.progress.stage == "resting")
        await door.turn(GOOD)
        await until(lambda: device.progress.counted >= 1)
        await door.turn(replace(GOOD, idle=False))
        await until(lambda: device.progress.stage == "resting")
        done = device.progress.counted
        await asyncio.sleep(0.1)
        assert device.progress.counted == done
        await door.turn(GOOD)
        await until(lambda: device.progress.counted > done)


class Lingering(toy.ToyRunner):
    """Its blocks take as long as the test likes."""

    at_work, go_on = threading.Event(), threading.Event()

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        super().block(batches, mask, key)
        self.at_work.set()
        assert self.go_on.wait(timeout=20)


@toy.in_loop
async def test_a_gate_that_opens_before_a_device_has_left_lets_it_in_again(tmp_path: Path) -> None:
    door = Door(tmp_path)
    Lingering.at_work.clear()
    Lingering.go_on.clear()
    async with toy.fleet(toy.plan(RoundPolicy(goal=1, minimum_group=1, over_selection=1.0))) as fleet:
        host = DeviceHost(make_runner=Lingering, runtime=toy.RUNTIME)
        device = Device(
            "a", lambda: toy.examples(1.5, 8), link=fleet.link, host=host, rng=np.random.default_rng(0)
        )  # fmt: skip
        playing = asyncio.create_task(while_open(device, door.gate))
        await door.turn(GOOD)
        await asyncio.to_thread(Lingering.at_work.wait, 20)
        await door.turn(replace(GOOD, idle=False))
        await door.turn(GOOD)  # within the block
        Lingering.go_on.set()
        await asyncio.wait_for(playing, timeout=15)
        assert device.is_over and device.progress.counted == 1


@toy.in_loop
async def test_a_device_that_is_told_to_end_does_not_begin_again(tmp_path: Path) -> None:
    door = Door(tmp_path)
    made = toy.plan(toy.exact("a", "b"))
    async with toy.fleet(made, rounds=2) as fleet, toy.peer(fleet.link, "b") as peer:
        device = toy.device("a", fleet.link)
        playing = asyncio.create_task(while_open(device, door.gate))
        await door.turn(GOOD)
        assigned = await peer.assigned()
        await until(lambda: device.progress.stage == "reported")
        device.interrupt()
        await peer.say(report=toy.report(assigned.token, toy.update(made)))
        await asyncio.wait_for(playing, timeout=15)
        assert device.progress.counted == 1


@toy.in_loop
async def test_a_device_s_error_passes_the_gate(tmp_path: Path) -> None:
    door = Door(tmp_path)
    async with toy.fleet(toy.plan(toy.exact("a"), field="y")) as fleet:
        playing = asyncio.create_task(while_open(toy.device("a", fleet.link), door.gate))
        await door.turn(GOOD)
        with pytest.raises(DataError, match="reads field 'y'"):
            await asyncio.wait_for(playing, timeout=15)


class Breaking(LocalLink):
    """Its first stream breaks once the training has begun."""

    sessions = 0

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Stream, None]:
        self.sessions += 1
        async with super().session() as stream:
            if self.sessions == 1:
                yield BrokenStream(stream)
            else:
                yield stream


class BrokenStream:
    def __init__(self, stream: Stream) -> None:
        self._stream, self.send = stream, stream.send

    async def receive(self) -> pb.FromEdge:
        heard = asyncio.ensure_future(self._stream.receive())
        began = asyncio.ensure_future(asyncio.to_thread(Lingering.at_work.wait, 20))
        await asyncio.wait({heard, began}, return_when=asyncio.FIRST_COMPLETED)
        if heard.done():
            return heard.result()
        heard.cancel()
        raise NetworkError("cut")


@toy.in_loop
async def test_whose_stream_breaks_while_it_trains_comes_back_when_it_has_something_to_say() -> None:
    Lingering.at_work.clear()
    Lingering.go_on.clear()
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        host, link = DeviceHost(make_runner=Lingering, runtime=toy.RUNTIME), Breaking(fleet.host.edge)
        device = Device("a", lambda: toy.examples(1.5, 8), link=link, host=host, rng=np.random.default_rng(0))
        fleet.start(device)
        await until(lambda: device.progress.failures == 1)
        await asyncio.sleep(0.5)  # longer than it waits before it connects again
        assert link.sessions == 1, "a stream on which nobody says who he is is one of a stranger"
        Lingering.go_on.set()
        await asyncio.gather(*fleet.tasks)
        assert device.progress.counted == 1 and link.sessions == 2
