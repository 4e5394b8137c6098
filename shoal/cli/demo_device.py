"""One of the demo's device processes: 25 devices that hold their pictures and train when they are asked to.

`python -m shoal.cli.demo_device`, started by `demo_fleet.py`. Its devices share one connection, one runner in a child
process (one thread) and one compiled plan. It reads its own devices' files and no others.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from shoal.cli.demo_child import Parent
from shoal.data.disk import open_population
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.grpc_link import GrpcLink
from shoal.plan.child import ChildRunner
from shoal.plan.manifest import Runtime

TELL_S: Final = 0.2


async def serve(parent: Parent, order: Mapping[str, Any]) -> None:
    """Plays its devices until the run is over."""
    population = open_population(Path(order["data"]))
    mine = population.ids[order["first"] : order["first"] + order["count"]]
    host = DeviceHost(
        make_runner=lambda plan: ChildRunner(plan, threads=1),
        runtime=Runtime.from_json(order["runtime"]),
        trusted_key=bytes.fromhex(order["public_key"]),
    )
    link = GrpcLink(order["server"])
    devices = [
        Device(
            name,
            partial(population.__getitem__, name),
            link=link,
            host=host,
            rng=np.random.default_rng([order["seed"], order["first"] + number]),
        )
        for number, name in enumerate(mine)
    ]
    reporting = asyncio.create_task(_report(parent, devices, host))
    try:
        async with asyncio.TaskGroup() as group:
            for device in devices:
                group.create_task(device.run())
        parent.tell(kind="devices", **_progress(devices, host))
    finally:
        reporting.cancel()
        host.close()
        await link.close()


async def _report(parent: Parent, devices: list[Device], host: DeviceHost) -> None:
    """What the devices are at, a few times a second, when it has changed."""
    told: dict[str, Any] = {}
    while True:
        now = _progress(devices, host)
        if now != told:
            parent.tell(kind="devices", **now)
            told = now
        await asyncio.sleep(TELL_S)


def _progress(devices: list[Device], host: DeviceHost) -> dict[str, Any]:
    progress = [device.progress for device in devices]
    errors = [one.last_error for one in progress if one.last_error]
    return {
        "stages": dict(Counter(one.stage for one in progress)),
        "counted": sum(one.counted for one in progress),
        "failures": sum(one.failures for one in progress),
        "last_error": errors[-1][:200] if errors else "",
        "up_bytes": sum(one.up_bytes for one in progress),
        "down_bytes": host.down_bytes,
    }


def main() -> None:
    """Plays the devices that the first order names."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s")
    parent = Parent()
    order = parent.order()
    parent.on_end(lambda: os._exit(0))
    asyncio.run(serve(parent, order))


if __name__ == "__main__":
    main()
