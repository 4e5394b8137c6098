"""Work in hand outlives an interruption and a restart: it is gone on with where it stood, if it is useful then."""

import asyncio
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from shoal.errors import StoreUnavailable
from shoal.fleet.device import Device
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.device_host import RUNNERS_HELD, DeviceHost
from shoal.fleet.floor import Floor
from shoal.fleet.link import Link, LocalLink
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.policy import RoundPolicy
from shoal.tensors import Tensors
from tests.fleet import toy

NUM = 3 * toy.BATCH
"""Examples for three blocks."""


class Halting(toy.ToyRunner):
    """Waits in its second block until the test lets it go on; counts blocks."""

    in_second, go_on, blocks = threading.Event(), threading.Event(), 0

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        super().block(batches, mask, key)
        Halting.blocks += 1
        if self.steps == 2:
            self.in_second.set()
            assert self.go_on.wait(timeout=20)


@pytest.fixture(autouse=True)
def _halts() -> None:
    Halting.in_second.clear()
    Halting.go_on.clear()
    Halting.blocks = 0


def device(link: Link, folder: Path | None, name: str = "a", *, place: str = "", **terms: Any) -> Device:
    """`terms`: of its host."""
    host = DeviceHost(make_runner=Halting, runtime=toy.RUNTIME, state_folder=folder, **terms)
    return Device(
        name, lambda: toy.examples(1.5, NUM), link=link, host=host, rng=np.random.default_rng(0), place=place
    )  # fmt: skip


async def interrupt(running: Device) -> None:
    """Interrupts it in its second block, and waits until it has left."""
    task = asyncio.create_task(running.run())
    await asyncio.to_thread(Halting.in_second.wait, 20)
    assert running.interrupt()
    Halting.go_on.set()
    await asyncio.wait_for(task, timeout=15)


POLICY = RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)


@pytest.mark.parametrize("restarts", [False, True])
@toy.in_loop
async def test_a_training_goes_on_where_it_stood(tmp_path: Path, restarts: bool) -> None:
    async with toy.fleet(toy.plan(POLICY)) as fleet:
        first = device(fleet.link, tmp_path if restarts else None)
        await interrupt(first)
        assert Halting.blocks == 2 and fleet.members == [0] and first.progress.stage == "interrupted"
        again = device(fleet.link, tmp_path) if restarts else first
        await asyncio.wait_for(again.run(), timeout=15)
        assert Halting.blocks == 3, "what was done is not done again"
        assert again.progress.counted == 1
        np.testing.assert_array_equal(fleet.model["params/w"], [1.5])


@toy.in_loop
async def test_one_that_nobody_needs_any_more_is_dropped(tmp_path: Path) -> None:
    async with toy.fleet(toy.plan(POLICY), rounds=2) as fleet:
        await interrupt(device(fleet.link, tmp_path))
        other = toy.device("b", fleet.link, value=4.0)
        while len(fleet.members) < 2:  # the first version is made without it
            fleet.start(other) if other.progress.stage == "connecting" else None
            await asyncio.sleep(0.01)
        await asyncio.wait_for(asyncio.gather(fleet.tasks[0]), timeout=15)
        late = device(fleet.link, tmp_path)
        await asyncio.wait_for(late.run(), timeout=15)
        assert Halting.blocks == 2 and late.progress.counted == 0
        assert DeviceFile(tmp_path).work(" default", "a", wall_s=0.0) is None


class Cut(LocalLink):
    """While it is cut nothing can be sent over it after a training."""

    is_cut = True

    async def push(self, slices: Any) -> pb.PushReply:
        if self.is_cut:
            await asyncio.Event().wait()
        return await super().push(slices)


@toy.in_loop
async def test_an_update_that_was_not_sent_outlives_the_process(tmp_path: Path) -> None:
    Halting.go_on.set()
    async with toy.fleet(toy.plan(POLICY, {"params/w": (20_000,)})) as fleet:
        task = asyncio.create_task(device(Cut(fleet.host.edge), tmp_path).run())
        while DeviceFile(tmp_path, read_only=True).work(" default", "a", wall_s=0.0) is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        again = device(fleet.link, tmp_path)
        await asyncio.wait_for(again.run(), timeout=15)
        assert Halting.blocks == 3 and again.progress.counted == 1
        np.testing.assert_array_equal(fleet.model["params/w"], np.full(20_000, 1.5, np.float32))
        assert DeviceFile(tmp_path).work(" default", "a", wall_s=0.0) is None


@toy.in_loop
async def test_what_is_in_hand_for_one_host_is_offered_to_no_other(tmp_path: Path) -> None:
    async with toy.fleet(toy.plan(POLICY)) as fleet, toy.fleet(toy.plan(POLICY)) as other:
        await interrupt(device(fleet.link, tmp_path, place="one:1"))
        asked: list[pb.StatusRequest] = []

        class Watched(LocalLink):
            async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
                asked.append(request)
                return await super().status(request)

        elsewhere = device(Watched(other.host.edge), tmp_path, place="two:1")
        await asyncio.wait_for(elsewhere.run(), timeout=15)
        assert elsewhere.progress.counted == 1 and not asked, "it has trained anew, for this one"
        back = device(fleet.link, tmp_path, place="one:1")
        Halting.blocks = 0
        await asyncio.wait_for(back.run(), timeout=15)
        assert back.progress.counted == 1 and Halting.blocks == 1


class Heard(LocalLink):
    """Counts what was offered or asked by token."""

    tokens = 0

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        self.tokens += 1
        return await super().status(request)


@pytest.mark.parametrize(
    "terms", [{}, {"trusted_key": bytes(32)}, {"floor": Floor(secure=True)}], ids=["same", "other key", "other floor"]
)
@toy.in_loop
async def test_an_update_for_another_host_or_on_other_terms_is_not_offered(
    tmp_path: Path, terms: dict[str, Any]
) -> None:
    Halting.go_on.set()
    async with toy.fleet(toy.plan(POLICY, {"params/w": (20_000,)})) as fleet:
        task = asyncio.create_task(device(Cut(fleet.host.edge), tmp_path).run())
        while DeviceFile(tmp_path, read_only=True).work(" default", "a", wall_s=0.0) is None:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        heard = Heard(fleet.host.edge)
        again = device(heard, tmp_path, **terms)
        task = asyncio.create_task(again.run())
        while not task.done() and again.progress.stage not in ("waiting", "reporting"):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert bool(heard.tokens) != bool(terms)


@toy.in_loop
async def test_an_update_that_was_interrupted_while_it_was_sent_is_sent_by_the_next_run() -> None:
    Halting.go_on.set()
    async with toy.fleet(toy.plan(POLICY, {"params/w": (20_000,)})) as fleet:
        cut = Cut(fleet.host.edge)
        running = device(cut, None)
        task = asyncio.create_task(running.run())
        while running.progress.stage != "reporting":
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        cut.is_cut = False
        await asyncio.wait_for(running.run(), timeout=15)
        assert Halting.blocks == 3 and (running.progress.counted, running.progress.failures) == (1, 0)
        np.testing.assert_array_equal(fleet.model["params/w"], np.full(20_000, 1.5, np.float32))


@toy.in_loop
async def test_a_full_disk_costs_the_restart_and_not_the_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*given: Any, **named: Any) -> None:
        raise StoreUnavailable("the disk is full")

    for write in ("keep_work", "counted", "drop_work"):
        monkeypatch.setattr(DeviceFile, write, full)
    Halting.go_on.set()
    async with toy.fleet(toy.plan(POLICY)) as fleet:
        running = device(fleet.link, tmp_path)
        await asyncio.wait_for(running.run(), timeout=15)
        assert running.progress.counted == 1
    assert "will not outlive this process: the disk is full" in caplog.text


class Closing(toy.ToyRunner):
    """Says which are open."""

    open: ClassVar[list[str]] = []

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.open.append(plan.hash)

    def close(self) -> None:
        self.open.remove(self.manifest.hash)


@toy.in_loop
async def test_of_the_plans_that_came_by_a_few_runners_are_kept() -> None:
    Closing.open.clear()
    host = DeviceHost(make_runner=Closing, runtime=toy.RUNTIME)
    for number in range(RUNNERS_HELD + 3):
        async with toy.fleet(toy.plan(POLICY, task=f"task-{number}")) as fleet:
            fleet.start(toy.device("a", fleet.link, host=host))
            await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=15)
    assert len(Closing.open) == len(set(Closing.open)) == RUNNERS_HELD
    with host.using(first := Closing.open[0]):
        for number in range(100, 103 + RUNNERS_HELD):
            async with toy.fleet(toy.plan(POLICY, task=f"task-{number}")) as fleet:
                fleet.start(toy.device("a", fleet.link, host=host))
                await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=15)
        assert first in Closing.open, "somebody works with it"
    host.close()
    assert not Closing.open


@toy.in_loop
async def test_a_device_of_two_populations_works_for_one_at_a_time() -> None:
    at_once, most = [0], [0]

    class Counting(toy.ToyRunner):
        def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
            time.sleep(0.01)
            super().block(batches, mask, key)
            at_once[0] -= 1

    host = DeviceHost(make_runner=Counting, runtime=toy.RUNTIME)
    made = [toy.plan(POLICY, task=name) for name in ("one", "two")]
    async with toy.fleet(made[0], rounds=3) as one, toy.fleet(made[1], rounds=3, population="other") as two:
        devices = [
            Device(
                "a", lambda: toy.examples(num=NUM), link=link, host=host, rng=np.random.default_rng(0), population=name
            )
            for link, name in ((one.link, "default"), (two.link, "other"))
        ]
        one.start(*devices)
        await asyncio.wait_for(asyncio.gather(*one.tasks, *two.tasks), timeout=20)
    assert [device.progress.counted for device in devices] == [3, 3] and most == [1]


class OnlyNow:
    """A clock that a test sets; sleeping sets it."""

    def __init__(self) -> None:
        self.wall, self.slept = 1e9, 0.0

    def now_s(self) -> float:
        return self.slept

    def wall_s(self) -> float:
        return self.wall

    async def sleep_until(self, deadline_s: float) -> None:
        waits = max(0.0, deadline_s - self.slept)
        self.slept += waits
        self.wall += waits
        await asyncio.sleep(0)


@pytest.mark.parametrize(("set_by", "rests_s"), [(0.0, 36e3), (-1e6, 36e3), (18e3, 18e3), (1e6, 0.0)])
@toy.in_loop
async def test_a_device_rests_between_two_updates(tmp_path: Path, set_by: float, rests_s: float) -> None:
    Halting.go_on.set()
    clock = OnlyNow()
    async with toy.fleet(toy.plan(POLICY), rounds=2) as fleet:
        for number in range(2):
            host = DeviceHost(make_runner=Halting, runtime=toy.RUNTIME, state_folder=tmp_path, clock=clock)
            resting = Device(
                "a", lambda: toy.examples(1.5, NUM), link=fleet.link, host=host, rng=np.random.default_rng(0), rest_s=36e3
            )  # fmt: skip
            task = asyncio.create_task(resting.run())
            while not resting.progress.counted:
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if not number:
                assert clock.slept < 2e3
                before = clock.slept
                clock.wall += set_by
        assert rests_s - 2e3 <= clock.slept - before < rests_s + 2e3, "but for what the host asks for"
