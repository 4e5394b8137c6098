"""What a device does while its model arrives."""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import NetworkError, ProgramError
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.policy import RoundPolicy
from shoal.tensors import Tensors
from tests.fleet import toy

POLICY = RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)


@toy.in_loop
async def test_its_runner_starts_and_compiles_before_the_model_is_there() -> None:
    has_started = threading.Event()

    class Starting(toy.ToyRunner):
        def compile(self) -> float:
            has_started.set()
            return super().compile()

    @dataclass
    class Waiting(DeviceHost):
        async def _model(self, *given: Any) -> Tensors:
            assert await asyncio.to_thread(has_started.wait, 10.0), "it waits for the model"
            return await super()._model(*given)

    host = Waiting(make_runner=Starting, runtime=toy.RUNTIME)
    async with toy.fleet(toy.plan(POLICY)) as fleet:
        fleet.start(Device("a", lambda: toy.examples(num=8), link=fleet.link, host=host, rng=np.random.default_rng(0)))
        await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=20)
        assert fleet.members == [0, 1]


@toy.in_loop
async def test_what_fails_meanwhile_is_tried_again() -> None:
    failing = ["the program", "the line"]

    class Failing(toy.ToyRunner):
        def compile(self) -> float:
            if "the program" in failing:
                failing.remove("the program")
                raise ProgramError("It was killed.", program="begin")
            return super().compile()

    @dataclass
    class Breaking(DeviceHost):
        async def _model(self, *given: Any) -> Tensors:
            if "the program" not in failing and "the line" in failing:
                failing.remove("the line")
                raise NetworkError("cut")
            return await super()._model(*given)

    host = Breaking(make_runner=Failing, runtime=toy.RUNTIME)
    async with toy.fleet(toy.plan(POLICY)) as fleet:
        fleet.start(Device("a", lambda: toy.examples(num=8), link=fleet.link, host=host, rng=np.random.default_rng(0)))
        await asyncio.wait_for(asyncio.gather(*fleet.tasks), timeout=30)
        assert fleet.members == [0, 1] and not failing
