"""How a device keeps to what its machine's owner allows: when it may work, what that may cost, and what it does meanwhile."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from shoal.clock import Clock
from shoal.errors import DataError
from shoal.fleet.conditions import SETTLE_S, Eligibility, Probe, untold
from shoal.fleet.device import Device
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.gate import Gate
from shoal.fleet.impact import ImpactBudget

log = logging.getLogger("shoal.device")

LEAVE_S: Final = 5.0
"""For devices that are told to stop to report or put aside what they did."""


@dataclass(frozen=True, kw_only=True)
class Politeness:
    """What the owner asks for."""

    when: tuple[str, ...] = ()
    """Conditions under which devices work."""
    probe: str = ""
    """Command or file that says what they are; else the system is asked."""
    settle_s: float = SETTLE_S
    """How long they hold before work begins."""
    budget: ImpactBudget = field(default_factory=ImpactBudget)
    """What a day may cost."""

    def gate(
        self, processes: Callable[[], list[int]], moved_bytes: Callable[[], int], *, file: DeviceFile, clock: Clock
    ) -> Gate | None:
        """What lets devices work while the machine may; None: they always may.

        Args:
            processes: ids of those that run programs now.
            moved_bytes: down and up, since the process began.
            file: where each day's costs are kept.
            clock: time.

        Raises:
            ValueError: what is asked for cannot be told here, or what says so is given and nothing asked for.
        """
        if self.probe and not self.when:
            raise ValueError(
                "Expected --when charging, idle or unmetered with --probe, which only says whether they hold."
            )
        if not self.when and not self.budget.given():
            return None
        from shoal.fleet.meter import Meter  # with these comes psutil, which has 4 MB
        from shoal.fleet.probe import OwnersProbe, SystemProbe

        meter = Meter(processes, moved_bytes)
        system = SystemProbe(meter.cpu_s)
        probe = OwnersProbe(self.probe, system) if self.probe else system
        if self.when and (unknown := _untold(probe, self.when)):
            raise ValueError(
                f"Expected --probe COMMAND or file:PATH with --when: this system does not say whether it is {unknown}."
            )
        if self.budget.celsius is not None and meter().celsius is None:
            log.warning("no temperature can be read here: --max-temperature does nothing")
        eligibility = Eligibility(self.when, settle_s=self.settle_s)
        return Gate(eligibility, probe, self.budget, meter, file=file, clock=clock, on_change=_say)


def _untold(probe: Probe, wanted: tuple[str, ...]) -> str:
    try:
        return untold(probe, wanted)
    except DataError:  # an app that has not said anything yet: it rests, and says why
        return ""


def _say(why: str) -> None:
    log.warning("%s", f"rests: {why}" if why else "works: conditions hold")


async def while_open(device: Device, gate: Gate | None) -> None:
    """Runs a device until the run is over; while its machine may not work, what it has in hand is put aside."""
    while gate is not None:
        device.rest()
        await gate.until_open()
        running, closing = asyncio.ensure_future(device.run()), asyncio.ensure_future(gate.until_closed())
        has_closed = False
        try:
            await asyncio.wait({running, closing}, return_when=asyncio.FIRST_COMPLETED)
            has_closed = closing.done()  # it may be open again by the time that the device has left
            if not running.done() and device.interrupt():
                await asyncio.wait({running}, timeout=LEAVE_S)
        finally:
            closing.cancel()
            running.cancel()
            await asyncio.gather(running, closing, return_exceptions=True)
        if not running.cancelled() and (error := running.exception()) is not None:
            raise error
        if device.is_over or not has_closed:  # or it was interrupted for good
            return
    await device.run()
