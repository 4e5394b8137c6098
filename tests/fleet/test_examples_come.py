"""Devices whose examples come and go: with too few they wait for more, rather than end; the store is read anew for each round."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shoal.cli.device_process import _sources
from shoal.data import ExampleStore
from shoal.errors import DeviceError, StoreUnavailable
from shoal.fleet import device as device_module
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.link import Link
from shoal.plan.plan import Plan
from shoal.policy import RoundPolicy
from tests.fleet import toy

POLICY = RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "EXAMPLES_LOOK_S", 0.01)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def device(link: Link, store: ExampleStore) -> Device:
    read, count = _sources(store, ("a",))
    host = DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME)
    return Device("a", lambda: read("a"), link=link, host=host, rng=np.random.default_rng(0), num_examples=count)


def ones(count: int) -> dict[str, np.ndarray]:
    return {"x": np.ones(count, np.float32)}


def whole_batches(plan: Plan) -> Plan:
    manifest = replace(plan.manifest, training=replace(plan.manifest.training, drop_remainder=True))
    return Plan(manifest, plan.programs).sign(toy.KEYS.signing)


@toy.in_loop
async def test_a_device_without_examples_waits_and_says_so(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "a.examples") as store:
        async with toy.fleet(toy.plan(POLICY)) as fleet:
            waiting = device(fleet.link, store)
            fleet.start(waiting)
            await until(lambda: waiting.progress.stage == "waiting for examples")
            await asyncio.sleep(0.05)
            assert fleet.members == [0]
            store.add(ones(3))
            await asyncio.wait_for(fleet.tasks[0], timeout=15)
            assert fleet.members == [0, 1] and waiting.progress.counted == 1


@toy.in_loop
async def test_too_few_for_the_task_are_not_offered_again_before_there_are_more(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "a.examples") as store:
        store.add(ones(toy.BATCH - 1))
        async with toy.fleet(whole_batches(toy.plan(POLICY))) as fleet:
            waiting = device(fleet.link, store)
            fleet.start(waiting)
            await until(lambda: waiting.progress.stage == "waiting for examples")
            assert waiting.progress.failures == 1 and "fewer examples than a batch" in waiting.progress.last_error
            await asyncio.sleep(0.1)
            assert waiting.progress.failures == 1
            store.add(ones(1))
            await asyncio.wait_for(fleet.tasks[0], timeout=15)
            assert fleet.members == [0, 1]


@toy.in_loop
async def test_each_round_sees_what_has_come_and_a_store_that_empties_is_waited_for(tmp_path: Path) -> None:
    now_s = [0.0]
    with ExampleStore(tmp_path / "a.examples", max_age_s=10.0, wall_s=lambda: now_s[0]) as store:
        store.add(ones(1))
        async with toy.fleet(toy.plan(POLICY), rounds=2000) as fleet:
            working = device(fleet.link, store)
            fleet.tasks.append(asyncio.create_task(working.run()))
            await until(lambda: working.progress.counted >= 1)
            now_s[0] = 11.0
            await until(lambda: working.progress.stage == "waiting for examples")
            done = working.progress.counted
            store.add(ones(2))
            await until(lambda: working.progress.counted > done)


def test_a_full_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> object:
        raise StoreUnavailable("No space left.")

    with ExampleStore(tmp_path / "a.examples") as store:
        monkeypatch.setattr(ExampleStore, "_tidy", full)
        read, count = _sources(store, ("a",))
        with pytest.raises(DeviceError, match="No space left"):
            read("a")
        assert count is not None and count() == 0
