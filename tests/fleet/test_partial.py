"""A device that is interrupted for good reports the steps it did, where the plan takes them, and leaves."""

import asyncio
import threading
from collections.abc import Mapping

import numpy as np
import pytest

from shoal.policy import RoundPolicy
from shoal.tensors import Tensors
from tests.fleet import toy

NUM = 3 * toy.BATCH
"""Examples for three blocks."""


class Halting(toy.ToyRunner):
    """Waits in its second block until the test lets it go on."""

    in_second, go_on = threading.Event(), threading.Event()

    def block(self, batches: Tensors, mask: np.ndarray, key: np.ndarray) -> None:
        super().block(batches, mask, key)
        if self.steps == 2:
            self.in_second.set()
            assert self.go_on.wait(timeout=20)


async def interrupted(fleet: toy.Fleet, runner: type[toy.ToyRunner] = Halting) -> bool:
    """Interrupts a device in its second block; returns whether it has something to report."""
    Halting.in_second.clear()
    Halting.go_on.clear()
    device = toy.device("a", fleet.link, value=1.5, num=NUM, runner=runner)
    fleet.start(device)
    await asyncio.to_thread(Halting.in_second.wait, 20)
    has_something = device.interrupt()
    Halting.go_on.set()
    return has_something


SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "inside its report": {"params/w": (1,)},
    "pushed before it": {"params/w": (20_000,)},
}


@pytest.mark.parametrize("how", SHAPES)
@toy.in_loop
async def test_the_steps_that_were_done_count_at_the_weight_of_the_data(how: str) -> None:
    async with toy.fleet(toy.plan(toy.exact("a"), SHAPES[how], partial=True)) as fleet:
        assert await interrupted(fleet)
        await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=15)
        commit = fleet.store.last_commit(fleet.host.run_id)
        assert commit is not None
        assert (commit.members, commit.weight) == (1, NUM)
        np.testing.assert_array_equal(fleet.model["params/w"], np.full(SHAPES[how]["params/w"], 2 * 1.5))


@toy.in_loop
async def test_it_leaves_once_the_edge_has_its_report_and_is_counted_without_it() -> None:
    made = toy.plan(toy.exact("a", "b"), partial=True)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link, "b") as peer:
        assigning = asyncio.create_task(peer.assigned())
        assert await interrupted(fleet)
        await asyncio.wait_for(fleet.tasks[1], timeout=15)  # it does not wait for the round's end
        await peer.say(report=toy.report((await assigning).token, toy.update(made)))
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        assert fleet.members == [0, 2]


@toy.in_loop
async def test_without_partial_work_an_interrupted_device_gives_up_and_is_replaced() -> None:
    made = toy.plan(RoundPolicy(goal=1, minimum_group=1, over_selection=1.0))
    async with toy.fleet(made) as fleet:
        assert await interrupted(fleet)
        await asyncio.wait_for(fleet.tasks[1], timeout=15)
        assert fleet.members == [0]
        fleet.start(toy.device("b", fleet.link, value=4.0))
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        assert fleet.members == [0, 1]
        np.testing.assert_array_equal(fleet.model["params/w"], [4.0])


@toy.in_loop
async def test_one_that_waits_has_nothing_to_report() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b"), partial=True)) as fleet:
        device = toy.device("c", fleet.link)
        fleet.start(device)
        await asyncio.sleep(0)
        assert not device.interrupt()
