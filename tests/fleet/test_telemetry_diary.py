"""When a device tells, and of what. Invariants by number as in `telemetry_diary.py`."""

import numpy as np
import pytest

from shoal.errors import StoreError
from shoal.fleet.telemetry_diary import GRACE_S, NOTED, REMEMBERED, Diary, Tell
from shoal.privacy.telemetry import DAY_S, slot_s

SECRET = bytes(range(32))
DAY = 20_000


def slot(day: int, secret: bytes = SECRET) -> float:
    return day * DAY_S + slot_s(secret, day)


def told_in(diary: Diary, wall_s: float) -> Tell:
    told = diary.due(wall_s)
    assert told is not None
    return told


def test_it_tells_of_yesterday_at_its_slot__invariant_2() -> None:
    diary = Diary(SECRET)
    diary.was_there(DAY * DAY_S + 5 * 3600.0 + 1)
    diary.add("trained", 2, DAY * DAY_S + 100)
    diary.was_there(slot(DAY + 1) - 1)
    assert diary.due(slot(DAY + 1) - 0.001) is None
    told = told_in(diary, slot(DAY + 1))
    assert told.day == DAY and told.told.hours == {5} and told.told.amounts == {"trained": 2.0}


def test_where_nothing_happened_it_tells_that__invariant_2() -> None:
    told = told_in(Diary(SECRET), slot(DAY))
    assert told.day == DAY - 1 and not told.told.vector().any()


def test_a_device_that_sleeps_over_its_slot_skips_the_day__invariant_3() -> None:
    diary = Diary(SECRET)
    diary.was_there(DAY * DAY_S)
    assert diary.due(slot(DAY + 1) + GRACE_S + 0.001) is None
    later = told_in(diary, slot(DAY + 2))
    assert later.day == DAY + 1 and not later.told.hours


def test_slots_do_not_depend_on_what_happens__invariant_4() -> None:
    idle, busy = Diary(SECRET), Diary(SECRET)
    now_s = DAY * DAY_S
    for _ in range(50):
        busy.was_there(now_s)
        busy.add("sessions", 1, now_s)
        assert idle.next_s(now_s) == busy.next_s(now_s) > now_s
        now_s += 7001.0


def test_once_a_day_over_restarts_and_whatever_the_clock_does__invariant_1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        diary, told, now_s = Diary(SECRET), list[int](), DAY * DAY_S
        for _ in range(300):
            jump = rng.random()
            if jump < 0.5:
                now_s = diary.next_s(now_s) + float(rng.uniform(0, 2 * GRACE_S))
            elif jump < 0.8:
                now_s += float(rng.uniform(-3, 3)) * DAY_S
            else:
                now_s = slot(int(rng.integers(DAY - 10, DAY + 10))) + 1.0
            now_s = min(max(now_s, (DAY - 20) * DAY_S), (DAY + 20) * DAY_S)
            if (found := diary.due(now_s)) is not None:
                told.append(found.day)
                assert diary.due(now_s) is None
            if rng.random() < 0.3:
                diary = Diary.of_bytes(diary.to_bytes())
        assert told and len(told) == len(set(told))


def test_what_it_keeps_is_small_whatever_the_clock_does() -> None:
    rng, diary = np.random.default_rng(1), Diary(SECRET)
    for _ in range(1000):
        day = int(rng.integers(0, 100_000))
        diary.was_there(day * DAY_S + float(rng.uniform(0, DAY_S)))
        diary.add("up_bytes", 1e300, day * DAY_S)
        diary.due(slot(day))
    kept = Diary.of_bytes(diary.to_bytes())
    assert kept.to_bytes() == diary.to_bytes() and len(diary.to_bytes()) < 4096
    assert len(kept._settled) == REMEMBERED and len(kept._days) <= NOTED


def test_a_clock_that_was_far_ahead_stops_nothing() -> None:
    diary = Diary(SECRET)
    told_in(diary, slot(DAY + 5000))
    assert told_in(diary, slot(DAY)).day == DAY - 1


def test_names_that_are_not_told_of_are_an_error() -> None:
    with pytest.raises(KeyError):
        Diary(SECRET).add("mood", 1, 0.0)


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b'{"secret": "00", "settled": [], "days": {}}', b'{"secret": "zz", "settled": [], "days": {}}'],
)
def test_what_is_no_diary_is_refused(data: bytes) -> None:
    with pytest.raises(StoreError, match="telemetry"):
        Diary.of_bytes(data)
