"""Names that change with time, and a device that comes under them."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.clock import SystemClock
from shoal.errors import TaskRefused
from shoal.fleet.device import Device
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.device_secret import DeviceSecret, Pseudonyms
from shoal.fleet.floor import Floor
from shoal.fleet.link import LocalLink
from shoal.policy import Privacy, RoundPolicy
from tests.fleet import toy
from tests.fleet.test_fleet import until

SECRET = DeviceSecret(bytes(range(32)))
DAY_S = 86_400.0


def names(**changes: Any) -> Pseudonyms:
    return Pseudonyms(
        **{"secret": SECRET, "host": "train.example.org:443", "population": "default", "device": "anna", "window_s": DAY_S, **changes}
    )  # fmt: skip


@given(st.floats(0.0, 4e9), st.floats(60.0, 1e7))
def test_a_name_lasts_its_window_and_no_longer(wall_s: float, window_s: float) -> None:
    made = names(window_s=window_s)
    left_s = made.left_s(wall_s)
    assert 0.0 < left_s <= window_s
    assert made.name(wall_s) == made.name(wall_s + left_s * 0.99 - 1e-6 * window_s) or left_s < 1e-3 * window_s
    assert made.name(wall_s) != made.name(wall_s + left_s + 1e-3 * window_s)


def test_names_differ_by_window_device_host_population_and_secret() -> None:
    days = [names().name(day * DAY_S) for day in range(100)]
    others = [
        names(device="bert"),
        names(host="other.example.org:443"),
        names(population="x"),
        names(secret=DeviceSecret(bytes(32))),
    ]
    assert len({*days, *(each.name(0.0) for each in others)}) == 104
    assert all(len(name) == 32 for name in days)


def test_windows_of_many_devices_do_not_begin_together() -> None:
    begins = np.array([names(device=f"device {i}").left_s(0.0) for i in range(400)]) / DAY_S
    assert np.all(np.histogram(begins, 4, (0.0, 1.0))[0] > 60)


def test_the_secret_is_kept_and_shown_to_nobody(tmp_path: Path) -> None:
    made = DeviceSecret.of(DeviceFile(tmp_path))
    assert DeviceSecret.of(DeviceFile(tmp_path)) == made != DeviceSecret.of(DeviceFile(None))
    assert len(made.data) == 32 and made.data.hex() not in repr(made)


def test_what_a_member_shows_to_one_host_is_good_for_no_other() -> None:
    made = DeviceSecret(bytes(range(32)))
    whose = [
        (b"h" * 32, "default", "a"),
        (b"g" * 32, "default", "a"),
        (b"h" * 32, "x", "a"),
        (b"h" * 32, "default", "b"),
    ]
    assert len({made.data, *(made.of_member(*each) for each in whose)}) == 5
    assert made.of_member(*whose[0]) == made.of_member(*whose[0])


def test_a_window_is_not_too_short() -> None:
    with pytest.raises(ValueError, match="window_s"):
        names(window_s=1.0)


class TurnedClock(SystemClock):
    """Goes a thousand times as fast as the machine's wall clock."""

    def wall_s(self) -> float:
        return 1e9 + 1000.0 * self.now_s()


def turned(fleet: toy.Fleet, **changes: Any) -> tuple[Device, DeviceHost]:
    host = DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, **changes)
    device = Device(
        "anna", toy.examples, link=LocalLink(fleet.host.edge), host=host, rng=np.random.default_rng(0),
        pseudonyms=names(window_s=60.0),
    )  # fmt: skip
    return device, host


@toy.in_loop
async def test_a_device_comes_anew_under_its_next_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.fleet.device.RENAMED_S", 0.01)
    policy = RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    async with toy.fleet(toy.plan(policy), rounds=2) as fleet:
        heard: list[tuple[object, str]] = []
        check_in = fleet.host.edge._check_in

        async def listening(session: Any, message: Any) -> None:
            heard.append((session, message.device_id))
            await check_in(session, message)

        monkeypatch.setattr(fleet.host.edge, "_check_in", listening)
        clock = TurnedClock()
        device, host = turned(fleet, clock=clock)
        monkeypatch.setattr(
            clock, "sleep_until", lambda deadline_s: asyncio.sleep(min(0.06, deadline_s - clock.now_s()))
        )
        fleet.start(device)
        await until(lambda: len({name for _, name in heard}) >= 3)
        assert "anna" not in {name for _, name in heard}
        assert len({id(session) for session, _ in heard}) >= len({name for _, name in heard}), (
            "no stream hears two names"
        )
        by_session: dict[int, set[str]] = {}
        for session, name in heard:
            by_session.setdefault(id(session), set()).add(name)
        assert all(len(called) == 1 for called in by_session.values())
        fleet.start(toy.device("bert", fleet.link))
        await asyncio.wait_for(fleet.tasks[0], timeout=10)
        assert fleet.members == [0, 2, 2]
        assert host.spent("anna") is not None


@toy.in_loop
async def test_a_device_with_pseudonyms_keeps_its_state_under_its_own_name() -> None:
    async with toy.fleet(toy.plan(RoundPolicy(goal=1, minimum_group=1, over_selection=1.0))) as fleet:
        device, host = turned(fleet)
        fleet.start(device)
        await asyncio.gather(*fleet.tasks)
        assert host.file.contributed_s("anna") is not None


@toy.in_loop
async def test_tasks_whose_noise_is_for_a_known_device_are_refused_by_one_that_is_not() -> None:
    noisy = toy.plan(
        RoundPolicy(goal=1, minimum_group=1, over_selection=1.0), privacy=Privacy(clip_norm=1.0, noise_multiplier=1.0, delta_bound=1.0)
    )  # fmt: skip
    async with toy.fleet(noisy) as fleet:
        device, _ = turned(fleet, floor=Floor(pseudonymous=True))
        with pytest.raises(TaskRefused, match="start it without --pseudonyms"):
            await device.run()
