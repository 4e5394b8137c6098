"""Real hosts and devices in one process: what goes right, and what bad peers can do."""

import asyncio

import numpy as np

from tests.fleet import toy


@toy.in_loop
async def test_devices_train_a_model() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b")), rounds=3) as fleet:
        fleet.start(toy.device("a", fleet.link, value=1.0), toy.device("b", fleet.link, value=3.0))
        await asyncio.gather(*fleet.tasks)
        np.testing.assert_array_equal(fleet.model["params/w"], [6.0])
        assert fleet.members == [0, 2, 2, 2]
