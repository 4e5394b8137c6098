"""Pace steering: large populations are spread, small ones drawn together, the daily swing is followed."""

import math

import numpy as np
import pytest

from shoal.fleet import pace as p
from shoal.fleet.pace import Pace
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import RoundPolicy
from tests.fleet import toy

PERIOD_S = 60.0


def live(devices: int, *, hours: float, wanted: int = 100, swing: float = 0.0) -> tuple[Pace, list[int]]:
    """Devices that come when they are told to; returns the pace and the check-ins of every minute."""
    rng, made, now_s = np.random.default_rng(0), Pace(devices_a_round=wanted, now_s=0.0), 0.0
    due = rng.uniform(0.0, PERIOD_S, devices)
    minutes = []
    for minute in range(int(60 * hours)):
        made.opened(now_s)
        came = 0
        for second in range(60):
            now_s = 60.0 * minute + second
            here = np.flatnonzero(due <= now_s)
            present = 1.0 - swing * (0.5 + 0.5 * math.cos(2 * math.pi * now_s / 86_400.0))
            here = here[here < present * devices]
            came += len(here)
            if len(here):
                made.arrived(len(here), now_s)
                low, high = made.window(now_s)
                due[here] = now_s + rng.uniform(low, high, len(here))
        minutes.append(came)
    return made, minutes


def test_a_large_population_is_spread() -> None:
    made, minutes = live(10_000, hours=4)
    assert made.population == pytest.approx(10_000, rel=0.3)
    last = minutes[-60:]
    assert np.mean(last) == pytest.approx(p.MARGIN * 100, rel=0.4), "about twice what a round of a minute takes"
    assert max(last) < 2 * np.mean(last), "and no herd"


def test_a_small_population_is_drawn_together() -> None:
    made, minutes = live(150, hours=1)
    low, high = made.window(3600.0)
    assert high - low <= p.LEAST_S + p.TOGETHER * PERIOD_S + 1.0, "they come within a tenth of a round"
    assert np.mean(minutes[-20:]) >= 100, "and nearly all of them, in nearly every round"


@pytest.mark.slow
def test_the_daily_swing_is_followed() -> None:
    _, minutes = live(5_000, hours=24, swing=0.75)
    by_hour = np.reshape(minutes, (24, 60)).sum(axis=1)[4:]
    assert by_hour.max() < 2 * by_hour.min(), "four times the devices, but not four times the check-ins"


def test_windows_are_within_bounds_whatever_comes() -> None:
    made = Pace(devices_a_round=10, now_s=0.0)
    for now_s, number in [(0.0, 1), (0.0, 10**6), (1e-6, 0), (1e6, 1), (1e6 + 1, 10**7), (1e6 + 1, 0)]:
        made.arrived(number, now_s)
        low, high = made.window(now_s)
        assert 0.0 < low <= high <= 1.5 * p.MOST_S + p.MOST_S * p.TOGETHER


@pytest.mark.parametrize("silent_s", range(219_000, 225_000, 100))
def test_after_days_without_a_device_one_may_come(silent_s: int) -> None:
    pace = Pace(devices_a_round=1000, now_s=0.0)
    pace.arrived(1, 0.0)
    low, high = pace.window(float(silent_s))
    assert 0.0 < low < high


@toy.in_loop
async def test_an_answer_says_when_to_come_again() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        token = (await peer.assigned()).token
        await peer.say(report=toy.report(token, toy.update(made)))
        kind, told = await peer.hear()
        assert kind == "counted" and 0.0 < told.delay_min_s <= told.delay_max_s


@toy.in_loop
async def test_one_who_comes_and_goes_is_told_later_when_enough_wait() -> None:
    made = toy.plan(RoundPolicy(goal=8, over_selection=1.0, selection_window_s=60.0))
    async with toy.fleet(made) as fleet:
        fleet.host.edge._pace.pool = 0  # as many wait as may
        async with toy.peer(fleet.link) as peer:
            await peer.check_in()
            kind, told = await peer.hear()
            assert kind == "later" and 0.0 < told.delay_min_s <= told.delay_max_s
            await peer.say(ping=pb.Ping())
        async with toy.peer(fleet.link, "silo") as silo:
            await silo.check_in(stay=True)
            await silo.say(ping=pb.Ping())
            assert (await silo.hear())[0] == "ping", "one that stays is let in"


@toy.in_loop
async def test_a_device_that_comes_and_goes_takes_part_in_round_after_round() -> None:
    made = toy.plan(toy.exact("visitor"))
    async with toy.fleet(made, rounds=3) as fleet:
        device = toy.device("visitor", fleet.link, stays=False)
        device._drawn = lambda answer: 0.01  # type: ignore[method-assign,assignment]
        fleet.start(device)
        await fleet.tasks[0]
    assert fleet.members == [0, 1, 1, 1]


@toy.in_loop
async def test_one_device_that_checks_in_again_and_again_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    monkeypatch.setattr(Pace, "arrived", lambda self, count, now_s: came.append(count))
    async with toy.fleet(toy.plan(RoundPolicy(goal=10, minimum_group=1))) as fleet, toy.peer(fleet.link) as peer:
        for _ in range(50):
            await peer.check_in(stay=True)
        await peer.say(ping=pb.Ping())
        assert (await peer.hear())[0] == "ping" and came == [1]
