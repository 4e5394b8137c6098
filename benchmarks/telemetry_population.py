"""Devices with a routine, and what a server gets to see of them through shoal's own telemetry."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.clock import ManualClock
from shoal.fleet.telemetry_device import report_of
from shoal.fleet.telemetry_diary import Diary
from shoal.fleet.telemetry_helper import Helper, OpenedSeeds
from shoal.fleet.telemetry_host import CLOSES_S, TelemetryHost
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.masks import public_key
from shoal.privacy.noise import seeded
from shoal.privacy.telemetry import BOUNDS, DAY_S, ENTRIES, HOURS, slot_s
from shoal.record.memory import MemoryStore
from shoal.record.store import RunRow

FIRST_DAY: Final = 20_000
OFF: Final = 0.03
"""Chance that a device is off at any hour, whatever its owner does."""
COUNTED: Final = ("sessions", "trained", "interrupted")


@dataclass(frozen=True)
class Lives:
    """What happens. Legend: D devices, T days, H hours."""

    works_at_night: np.ndarray
    """(D,) bool: what the attacker is after."""
    there: np.ndarray
    """(D, T, H) bool: the raw log."""
    asleep: np.ndarray
    """(D, T, H) bool."""
    amounts: np.ndarray
    """(D, T, COUNTED) int."""


@dataclass(frozen=True)
class Seen:
    """What the server gets. NaN where a device told nothing."""

    hour: np.ndarray
    """(D, T) of arrival, hours of the day."""
    share: np.ndarray
    """(D, T, entries) of the report, as parts of 2^32."""
    sums: np.ndarray
    """(T, entries) that it stores."""
    noise: float
    reports: int


def live(devices: int, days: int, rng: np.random.Generator) -> Lives:
    """Half of the devices charge at night and half by day, each with habits of its own."""
    at_night = rng.permutation(devices) % 2 == 0
    middle = np.where(at_night, 13.0, 2.0) + rng.normal(0, 2.0, devices)
    width = rng.uniform(3.5, 6.0, devices)
    usual, other = rng.uniform(0.55, 0.85, devices), rng.uniform(0.15, 0.35, devices)
    hours = np.arange(HOURS)
    far = np.abs((hours[None] - middle[:, None] + 12.0) % HOURS - 12.0)
    chance = np.where(far <= width[:, None], usual[:, None], other[:, None])
    there = rng.random((devices, days, HOURS)) < chance[:, None]
    asleep = np.broadcast_to((far <= 3.5)[:, None], there.shape)
    sessions = rng.binomial(there.sum(-1), 0.4)
    trained = rng.binomial(sessions, 0.75)
    return Lives(at_night, there, asleep, np.stack([sessions, trained, rng.binomial(sessions - trained, 0.7)], -1))


def tell(lives: Lives, *, off: np.ndarray, seed: int) -> Seen:
    """Lets every device keep its diary and tell at its slots, and the host have its sums opened.

    Args:
        lives: what happens.
        off: (D, T, H) bool: where a device is off at its slot it tells nothing.
        seed: of secrets and noise.
    """
    devices, days, _ = lives.there.shape
    random = seeded(seed.to_bytes(32, "little"), b"benchmark")
    private = random(32)
    link = _Link(Helper(private, OpenedSeeds(None), random=random))
    store, clock = MemoryStore(), ManualClock(FIRST_DAY * DAY_S)
    store.create_run(_run())
    host = TelemetryHost(store, "run", link, clock=clock)
    link.clock = clock
    secrets = [random(32) for _ in range(devices)]
    diaries = [Diary(secret) for secret in secrets]
    hour, share = np.full((devices, days), np.nan), np.full((devices, days, BOUNDS.size), np.nan)
    for number in range(days):
        day = FIRST_DAY + number
        for device, diary in enumerate(diaries):
            _note(diary, lives, device, number)
        slots = [slot_s(secret, day + 1) for secret in secrets]
        for device in np.argsort(slots):
            if off[device, number, int(slots[device] // 3600)]:
                continue
            wall_s = (day + 1) * DAY_S + slots[device]
            told = diaries[device].due(wall_s + 1e-3)
            assert told is not None and told.day == day
            report = report_of(told, public_key(private), random)
            host.collector.add(report, address=f"10.{device}", wall_s=wall_s)
            hour[device, number] = slots[device] / 3600.0
            share[device, number] = np.frombuffer(report.share, "<u4") / 2.0**32
        clock.advance((day + 2) * DAY_S - clock.now_s())
        asyncio.run(host.open_closed())  # the batch of the day before this one
    clock.advance(CLOSES_S)
    asyncio.run(host.open_closed())
    rows = store.telemetry("run")
    assert len(rows) == days
    return Seen(hour, share, np.array([row.sums for row in rows]), rows[0].noise, sum(row.reports for row in rows))


def truth(lives: Lives) -> dict[str, int]:
    """The totals that are judged, by entry."""
    hours = {f"hour/{hour:02}": int(lives.there[:, :, hour].sum()) for hour in range(HOURS)}
    return hours | {name: int(lives.amounts[:, :, at].sum()) for at, name in enumerate(COUNTED)}


def places(names: Sequence[str]) -> list[int]:
    """Where entries stand in a vector."""
    order = {entry.name: at for at, entry in enumerate(ENTRIES)}
    return [order[name] for name in names]


class _Link:
    """The helper in this process."""

    def __init__(self, helper: Helper) -> None:
        self._helper = helper
        self.clock = ManualClock()

    async def open(self, batch: pb.Batch) -> pb.Opened:
        return self._helper.open(batch, wall_s=self.clock.wall_s())


def _note(diary: Diary, lives: Lives, device: int, number: int) -> None:
    at_s = (FIRST_DAY + number) * DAY_S
    for hour in np.flatnonzero(lives.there[device, number]):
        diary.was_there(at_s + 3600.0 * float(hour))
    for name, amount in zip(COUNTED, lives.amounts[device, number], strict=True):
        diary.add(name, float(amount), at_s)


def _run() -> RunRow:
    return RunRow(
        id="run", name="telemetry", kind="host", plan_hash="", config={}, provenance={}, status="running",
        created_s=0.0,
    )  # fmt: skip
