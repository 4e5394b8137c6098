"""One of the demo's device processes: what `shoal device` does for 25 users, told to the demo as news.

`python -m shoal.cli.demo_device`, started by `demo_fleet.py`. Its devices share one connection, one runner in a child
process (one thread) and one compiled plan. It reads its own devices' files and no others.
"""

import asyncio
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from shoal.cli.demo_child import Parent
from shoal.cli.device_process import Settings, choose, make_host, play
from shoal.data.disk import open_population
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.plan.manifest import Runtime

TELL_S: Final = 0.2


async def serve(parent: Parent, order: Mapping[str, Any]) -> None:
    """Plays its devices until the run is over."""
    population = open_population(Path(order["data"]))
    users = choose(population, first=order["first"], count=order["count"])
    settings = Settings(server=order["server"], users=users, trusted_key=bytes.fromhex(order["public_key"]), threads=1)
    host = make_host(settings, Runtime.from_json(order["runtime"]))
    try:
        devices = await play(settings, population, host, watch=lambda devices: _report(parent, devices, host))
        parent.tell(kind="devices", **_progress(devices, host))
    finally:
        host.close()


async def _report(parent: Parent, devices: Sequence[Device], host: DeviceHost) -> None:
    """What the devices are at, a few times a second, when it has changed."""
    told: dict[str, Any] = {}
    while True:
        now = _progress(devices, host)
        if now != told:
            parent.tell(kind="devices", **now)
            told = now
        await asyncio.sleep(TELL_S)


def _progress(devices: Sequence[Device], host: DeviceHost) -> dict[str, Any]:
    progress = [device.progress for device in devices]
    return {
        "stages": dict(Counter(one.stage for one in progress)),
        "failures": sum(one.failures for one in progress),
        "last_error": next((one.last_error[:200] for one in reversed(progress) if one.last_error), ""),
        "up_bytes": sum(one.up_bytes for one in progress),
        "down_bytes": host.fetching.down_bytes,
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
