"""Telemetry end to end in one process: devices, host and helper, under one clock. Invariants by number as in `telemetry_host.py`."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.message import DecodeError

from shoal.clock import ManualClock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet import telemetry_helper, telemetry_host
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.progress import Progress
from shoal.fleet.telemetry_device import Kept, KeptFact, TelemetryDevice, report_of
from shoal.fleet.telemetry_diary import Tell
from shoal.fleet.telemetry_helper import Helper, OpenedSeeds, Terms
from shoal.fleet.telemetry_host import CLOSES_S, OF_ONE_ADDRESS, Collector, TelemetryHost
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.masks import public_key
from shoal.privacy.telemetry import BOUNDS, DAY_S, ENTRIES, SCHEMA, UNITS, Day, slot_s
from shoal.record.memory import MemoryStore
from shoal.record.store import TelemetryRow
from tests.fleet import toy
from tests.record.builders import run_row

PRIVATE = bytes(range(32))
KEY = public_key(PRIVATE)
DAY = 20_000
NOON_S = (DAY + 1) * DAY_S + DAY_S / 2
"""On the day on which `DAY` is told of."""
CLOSED_S = (DAY + 2) * DAY_S + CLOSES_S
QUIET = Terms(minimum=3, noise=1.0)


def report(day: int = DAY, told: Day | None = None, key: bytes = KEY) -> pb.Report:
    return report_of(Tell(day, told or Day(hours=frozenset({7}), amounts={"trained": 2})), key, os.urandom)


class Local:
    """The helper in this process; `breaks` is asked before each call, `loses` after it."""

    def __init__(self, helper: Helper, clock: ManualClock) -> None:
        self.helper, self.clock = helper, clock
        self.asked: list[pb.Batch] = []
        self.breaks: Callable[[], bool] = lambda: False
        self.loses: Callable[[], bool] = lambda: False

    async def open(self, batch: pb.Batch) -> pb.Opened:
        self.asked.append(batch)
        if self.breaks():
            raise NetworkError("the helper is away")
        opened = self.helper.open(batch, wall_s=self.clock.wall_s())
        if self.loses():
            raise NetworkError("its answer was lost")
        return opened


class World:
    """A host with a helper."""

    def __init__(self, terms: Terms = QUIET) -> None:
        self.clock, self.store = ManualClock(NOON_S), MemoryStore()
        self.store.create_run(run_row())
        self.link = Local(Helper(PRIVATE, OpenedSeeds(None), terms=terms), self.clock)
        self.host = TelemetryHost(self.store, "run", self.link, clock=self.clock)

    def add(self, *reports: pb.Report) -> None:
        for number, each in enumerate(reports):
            self.host.tell(each, address=f"ipv4:10.0.0.{number}")

    def opened(self, *, after_s: float = CLOSED_S - NOON_S) -> Sequence[TelemetryRow]:
        self.clock.advance(after_s)
        asyncio.run(self.host.open_closed())
        return self.store.telemetry("run")


def values(row: TelemetryRow) -> dict[str, int]:
    return {entry.name: value for entry, value in zip(ENTRIES, row.sums, strict=True)}


# Sums.


def test_a_days_sum_is_opened_once_the_day_is_over_and_not_before() -> None:
    world = World()
    world.add(*(report() for _ in range(200)))
    assert world.opened(after_s=0) == [] and world.host.num_held == 200
    (row,) = world.opened()
    assert (row.day, row.reports, row.noise, row.schema) == (DAY, 200, 1.0, SCHEMA.hex())
    assert (
        abs(values(row)["hour/07"] - 200) < 8
        and abs(values(row)["trained"] - 400) < 64
        and abs(values(row)["hour/08"]) < 8
    )
    assert world.host.num_held == 0


def test_guarantee_sums_are_unbiased_with_noise_of_the_stated_size() -> None:
    errors = []
    helper = Helper(PRIVATE, OpenedSeeds(None), terms=Terms(minimum=1, noise=5.0))
    for _ in range(100):
        made = [report(told=Day(hours=frozenset({number}))) for number in range(4)]
        batch = telemetry_host.Closed(
            DAY, [np.frombuffer(each.share, "<u4") for each in made], [each.sealed for each in made]
        )
        sums = batch.sums(helper.open(batch.request(), wall_s=NOON_S))
        errors.append((sums - [1, 1, 1, 1, *[0] * (BOUNDS.size - 4)]) / UNITS)
    assert abs(np.mean(errors)) < 5 * 5.0 / np.size(errors) ** 0.5
    assert np.std(errors) == pytest.approx(5.0, rel=0.06)


def test_a_report_counts_for_its_own_day_whenever_it_comes__invariant_1() -> None:
    world = World()
    world.add(*(report(DAY) for _ in range(5)), *(report(DAY - 1) for _ in range(4)))
    assert [(row.day, row.reports) for row in world.opened()] == [(DAY - 1, 4), (DAY, 5)]


def test_too_few_are_not_opened() -> None:
    world = World()
    world.add(report(), report())
    assert world.opened() == [] and world.host.num_held == 0


def test_nothing_of_a_report_is_kept__invariant_2() -> None:
    world = World()
    reports = [report() for _ in range(3)]
    world.add(*reports)
    (row,) = world.opened()
    told = repr(row).encode() + repr(world.store.events("run")).encode() + repr(vars(world.host.collector)).encode()
    assert all(repr(part)[2:12].encode() not in told for each in reports for part in (each.share, each.sealed))


# What is not to be relied on.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schema": b"otherone"}, "form"),
        ({"schema": b""}, "form"),
        ({"day": DAY - 3}, "day from"),
        ({"day": DAY + 2}, "day from"),
        ({"share": b""}, "share of"),
        ({"share": bytes(4 * BOUNDS.size + 4)}, "share of"),
        ({"sealed": bytes(79)}, "seal of"),
    ],
)
def test_a_report_that_is_none_is_refused_in_words(changes: dict[str, object], words: str) -> None:
    made = report()
    for name, value in changes.items():
        setattr(made, name, value)
    with pytest.raises(ProtocolError, match=words):
        Collector().add(made, address="a", wall_s=NOON_S)


def test_broken_reports_are_refused_or_found_to_open_to_nothing() -> None:
    """Bits turned over, bytes cut off and put in. (A share cannot be checked alone: those are left whole.)"""
    world, rng = World(), np.random.default_rng(0)
    world.add(*(report() for _ in range(20)))
    for number in range(300):
        good = report()
        data = bytearray(good.SerializeToString())
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(2))] = rng.bytes(int(rng.integers(3)))
        try:
            made = pb.Report.FromString(bytes(data))
            made.share = good.share
            world.host.tell(made, address=f"ipv4:10.1.0.{number}")
        except (DecodeError, ProtocolError):
            continue
    assert world.host.num_held > 20
    rows = world.opened()
    assert rows and all(abs(values(row)["hour/07"] - row.reports) < 8 for row in rows)


def test_what_is_held_is_bounded__invariant_3(monkeypatch: pytest.MonkeyPatch) -> None:
    collector, made = Collector(), report()
    for _ in range(OF_ONE_ADDRESS):
        collector.add(made, address="a", wall_s=NOON_S)
    with pytest.raises(NetworkError, match="as many reports"):
        collector.add(made, address="a", wall_s=NOON_S)
    collector.add(report(DAY + 1), address="a", wall_s=NOON_S + DAY_S)  # another day
    monkeypatch.setattr(telemetry_host, "MOST_ADDRESSES", 2)
    collector.add(made, address="b", wall_s=NOON_S + DAY_S)
    with pytest.raises(NetworkError, match="as many reports"):
        collector.add(made, address="c", wall_s=NOON_S + DAY_S)
    monkeypatch.setattr(telemetry_host, "MOST_REPORTS", OF_ONE_ADDRESS + 1)
    monkeypatch.setattr(telemetry_host, "MOST_HELD", OF_ONE_ADDRESS + 1)
    with pytest.raises(NetworkError, match="as many reports"):
        collector.add(made, address="b", wall_s=NOON_S + DAY_S)
    (full,) = collector.closed(NOON_S + DAY_S)  # is opened at once, and there is room again
    assert full.day == DAY and len(full.sealed) == OF_ONE_ADDRESS + 1
    collector.add(made, address="b", wall_s=NOON_S + DAY_S)


def test_batches_that_wait_for_a_helper_for_long_are_dropped__invariant_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_host, "MOST_DUE", 2)
    world = World()
    world.link.breaks = lambda: True
    for day in range(4):
        world.add(*(report(DAY + day) for _ in range(5)))
        assert world.opened(after_s=DAY_S) == []
    assert world.host.num_held == 10
    world.link.breaks = lambda: False
    assert [row.day for row in world.opened(after_s=0)] == [DAY + 2, DAY + 3]


def test_more_than_a_batch_may_have_are_opened_in_batches_of_like_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_host, "MOST_REPORTS", 8)
    world = World()
    world.add(*(report() for _ in range(9)))
    assert sorted(row.reports for row in world.opened(after_s=0)) == [4, 5]
    assert world.host.num_held == 0


def test_seals_that_open_to_nothing_spoil_nothing() -> None:
    world = World()
    good = [report() for _ in range(20)]
    stranger = report(key=public_key(bytes(31) + b"\7"))
    broken = report()
    broken.sealed = bytes(80)
    world.add(*good[:10], stranger, good[0], broken, *good[10:])
    (row,) = world.opened()
    assert row.reports == 20 and abs(values(row)["hour/07"] - 20) < 8


def test_an_absurd_sum_is_dropped_whole__invariant_4() -> None:
    world = World()
    hostile = report()
    hostile.share = np.full(BOUNDS.size, 10**6, "<u4").tobytes()
    world.add(*(report() for _ in range(20)), hostile)
    assert world.opened() == []


def test_a_helper_that_is_away_is_asked_again_and_one_whose_answer_was_lost_gives_it_again() -> None:
    world = World()
    world.add(*(report() for _ in range(5)))
    world.link.breaks = lambda: len(world.link.asked) == 1
    assert world.opened() == [] and world.host.num_held == 5
    world.link.loses = lambda: len(world.link.asked) == 2
    assert world.opened(after_s=60) == []
    (row,) = world.opened(after_s=60)
    assert row.reports == 5 and len(world.link.asked) == 3


def test_an_answer_that_is_none_is_not_written() -> None:
    world = World()
    for opened in (
        pb.Opened(),
        pb.Opened(masks=bytes(8), noise=1.0),
        pb.Opened(masks=bytes(4 * BOUNDS.size), noise=float("nan")),
    ):
        batch = telemetry_host.Closed(DAY, [np.zeros(BOUNDS.size, np.uint32)], [b""])
        with pytest.raises(ProtocolError, match="helper"):
            batch.sums(opened)
    assert world.store.telemetry("run") == []


@toy.in_loop
async def test_a_host_that_ends_while_the_helper_works_asks_again_and_writes_once() -> None:
    world = World()
    world.add(*(report() for _ in range(5)))
    opens, entered = world.link.open, asyncio.Event()

    async def slow(batch: pb.Batch) -> pb.Opened:
        answer = await opens(batch)
        if not entered.is_set():
            entered.set()
            await asyncio.Event().wait()
        return answer

    world.link.open = slow  # type: ignore[method-assign]
    world.clock.advance(CLOSED_S - NOON_S)
    running = asyncio.create_task(world.host.run())
    await entered.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [row.reports for row in world.store.telemetry("run")] == [5] and len(world.link.asked) == 2


@toy.in_loop
async def test_a_host_that_ends_has_what_it_holds_opened() -> None:
    world = World()
    world.add(*(report() for _ in range(5)))
    running = asyncio.create_task(world.host.run())
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert [row.reports for row in world.store.telemetry("run")] == [5]


# The helper.


def batch_of(number: int = 3, day: int = DAY) -> pb.Batch:
    return pb.Batch(schema=SCHEMA, day=day, sealed=[report(day).sealed for _ in range(number)])


def test_guarantee_a_seed_is_opened_once_over_restarts(tmp_path: Path) -> None:
    batch = batch_of()
    helper = Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET)
    first = helper.open(batch, wall_s=NOON_S)
    assert first.masks and helper.open(batch, wall_s=NOON_S) == first  # the same question: the same noise
    with_one_more = pb.Batch(schema=SCHEMA, day=DAY, sealed=[*batch.sealed, report().sealed])
    for again in (helper, Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET)):
        assert again.open(with_one_more, wall_s=NOON_S) == pb.Opened(bad=[0, 1, 2])
    with (tmp_path / f"{DAY}.opened").open("ab") as file:
        file.write(b"torn")
    assert Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET).open(batch, wall_s=NOON_S).bad == [0, 1, 2]


def test_a_clock_that_was_ahead_for_a_while_brings_nothing_back_over_a_restart(tmp_path: Path) -> None:
    batch = batch_of()
    assert Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET).open(batch, wall_s=NOON_S).masks
    ahead = Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET)
    assert ahead.open(batch_of(day=DAY + 3), wall_s=NOON_S + 6 * DAY_S).masks
    with pytest.raises(ProtocolError, match="a day from"):
        Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET).open(batch, wall_s=NOON_S)


def test_the_attack_that_works_without_this__subtracting_two_sums(tmp_path: Path) -> None:
    """A host that has a day opened with and without one device would know its day; noise aside, as here."""
    vector = Day(hours=frozenset({3})).vector()
    others, one = [report() for _ in range(5)], report(told=Day(hours=frozenset({3})))

    def sums(helper: Helper, of: list[pb.Report]) -> np.ndarray:
        closed = telemetry_host.Closed(
            DAY, [np.frombuffer(each.share, "<u4") for each in of], [each.sealed for each in of]
        )
        return closed.sums(helper.open(closed.request(), wall_s=NOON_S))

    forgetful = [Helper(PRIVATE, OpenedSeeds(None), terms=QUIET) for _ in range(2)]
    with_it, without = sums(forgetful[0], [*others, one]), sums(forgetful[1], others)
    assert np.abs((with_it - without - vector) / UNITS).max() < 8  # it is what one device told, and noise
    helper = Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET)
    sums(helper, [*others, one])
    with pytest.raises(ProtocolError, match="sum of"):
        sums(helper, others)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (lambda: batch_of(2), "3 to"),
        (lambda: batch_of(day=DAY - 5), "a day from"),
        (lambda: batch_of(day=DAY + 2), "a day from"),
        (lambda: pb.Batch(schema=b"otherone", day=DAY, sealed=[bytes(80)] * 3), "form"),
        (lambda: pb.Batch(schema=SCHEMA, day=DAY, sealed=[b""] * 20_000), "reports in a sum"),
    ],
)
def test_a_batch_that_breaks_the_terms_is_refused_in_words(batch: Callable[[], pb.Batch], words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        Helper(PRIVATE, OpenedSeeds(None), terms=QUIET).open(batch(), wall_s=NOON_S)


def test_nobody_talks_a_helper_out_of_its_noise() -> None:
    with pytest.raises(ValueError, match="noise"):
        Terms(noise=0.5)
    with pytest.raises(ValueError, match="minimum"):
        Terms(minimum=0)


def test_where_it_cannot_write_down_what_it_opens_it_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "opened").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="opened"):
        Helper(PRIVATE, OpenedSeeds(tmp_path / "opened"), terms=QUIET).open(batch_of(), wall_s=NOON_S)


def test_what_a_helper_keeps_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET)
    monkeypatch.setattr(telemetry_helper, "MOST_A_DAY", 7)
    helper.open(batch_of(3), wall_s=NOON_S)
    helper.open(batch_of(4), wall_s=NOON_S)
    with pytest.raises(ProtocolError, match="in all"):
        helper.open(batch_of(3), wall_s=NOON_S)
    helper.open(batch_of(3, DAY + 9), wall_s=NOON_S + 9 * DAY_S)
    assert sorted(path.stem for path in tmp_path.glob("*.opened")) == [str(DAY + 9), str(DAY + 10)], "that day, today"
    with pytest.raises(ProtocolError, match="a day from"):  # a clock that is set back does not open what was forgotten
        helper.open(batch_of(3), wall_s=NOON_S)
    with pytest.raises(ProtocolError, match="a day from"):  # nor does a restart
        Helper(PRIVATE, OpenedSeeds(tmp_path), terms=QUIET).open(batch_of(3), wall_s=NOON_S)


# The device.


class Wire:
    """Keeps what a device sends."""

    def __init__(self, error: Exception | None = None) -> None:
        self.sent: list[pb.Report] = []
        self.error = error

    async def tell(self, report: pb.Report) -> None:
        self.sent.append(report)
        if self.error is not None:
            raise self.error


class Memory:
    """What outlives a process, without a disk; `is_full` where it takes no more."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.is_full = False

    def read(self) -> bytes | None:
        return self.data

    def write(self, data: bytes) -> None:
        if self.is_full:
            raise StoreError("the disk is full")
        self.data = data


def device(kept: Kept, wire: Wire, clock: ManualClock) -> TelemetryDevice:
    return TelemetryDevice(helper=KEY, kept=kept, link=wire, clock=clock, random=os.urandom)


async def days(
    made: TelemetryDevice, clock: ManualClock, progress: Progress, number: int, *, step_s: float = 50.0
) -> None:
    """So many days go by."""
    running = asyncio.create_task(made.run(progress))
    for _ in range(int(number * DAY_S / step_s)):
        await asyncio.sleep(0)
        clock.advance(step_s)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@toy.in_loop
async def test_a_report_of_one_size_leaves_every_day_whatever_happens() -> None:
    sizes, hours = set[int](), list[int]()
    for progress in (Progress(stage="reconnecting"), Progress(stage="training")):
        wire, clock = Wire(), ManualClock(DAY * DAY_S)
        made = device(Memory(), wire, clock)
        progress.counted = 3
        made.heard(progress)
        await days(made, clock, progress, 2)
        assert [each.day for each in wire.sent] == [DAY - 1, DAY]
        sizes |= {each.ByteSize() for each in wire.sent}
        hours.append(len(made.diary._notes(clock.wall_s() - 1).hours))
    assert len(sizes) == 1 and hours == [0, 24]


@toy.in_loop
async def test_what_is_lost_on_its_way_is_not_sent_again() -> None:
    for error in (NetworkError("gone"), ProtocolError("this host takes no telemetry")):
        wire, clock = Wire(error), ManualClock(DAY * DAY_S)
        await days(device(Memory(), wire, clock), clock, Progress(), 2)
        assert [each.day for each in wire.sent] == [DAY - 1, DAY]


@toy.in_loop
async def test_a_device_that_falls_between_noting_and_sending_does_not_send_twice(tmp_path: Path) -> None:
    class Cut(Wire):
        async def tell(self, report: pb.Report) -> None:
            await super().tell(report)
            raise asyncio.CancelledError

    kept, clock, wire = KeptFact(DeviceFile(tmp_path), "a"), ManualClock(DAY * DAY_S), Cut()
    first = device(kept, wire, clock)
    clock.advance(first.diary.next_s(clock.wall_s()) - clock.wall_s() + 1.0)
    with pytest.raises(asyncio.CancelledError):
        await first.run(Progress())
    assert len(wire.sent) == 1
    again = device(kept, wire, clock)
    running = asyncio.create_task(again.run(Progress()))
    await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert len(wire.sent) == 1


@toy.in_loop
async def test_where_the_day_cannot_be_written_down_nothing_is_sent() -> None:
    kept, clock, wire = Memory(), ManualClock(DAY * DAY_S), Wire()
    made = device(kept, wire, clock)
    kept.is_full = True
    await days(made, clock, Progress(), 2)
    assert wire.sent == []


def test_a_secret_is_drawn_once_and_a_broken_diary_is_not_replaced(tmp_path: Path) -> None:
    kept, clock = KeptFact(DeviceFile(tmp_path), "a"), ManualClock(DAY * DAY_S)
    one, two = (device(KeptFact(DeviceFile(tmp_path), "a"), Wire(), clock) for _ in range(2))
    assert one.diary.next_s(DAY * DAY_S) == two.diary.next_s(DAY * DAY_S)
    kept.write(b"{")
    with pytest.raises(StoreError, match="telemetry"):
        device(kept, Wire(), clock)


def test_what_a_device_goes_through_is_noted(tmp_path: Path) -> None:
    clock, progress = ManualClock(DAY * DAY_S), Progress()
    made = device(KeptFact(DeviceFile(tmp_path), "a"), Wire(), clock)
    for stage, counted in (("waiting", 0), ("training", 0), ("reporting", 0), ("waiting", 1), ("reconnecting", 1)):
        progress.stage, progress.counted, progress.up_bytes = stage, counted, 1000 * counted
        made.heard(progress)
        clock.advance(1800.0)
        made.heard(progress)
    secret = made.diary._secret
    clock.advance((DAY + 1) * DAY_S + slot_s(secret, DAY + 1) - clock.now_s())
    told = made.diary.due(clock.wall_s())
    assert told is not None and told.told.hours == {0, 1, 2} and told.told.amounts is not None
    assert told.told.amounts == {"sessions": 2, "trained": 1, "train_s": 1800.0, "up_bytes": 1000.0}
