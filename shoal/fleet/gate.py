"""Lets the devices of a process work while their machine may: asks probe and meter every few seconds, and says so.

probe ── Eligibility ──┐
                       ├── Gate ── open | closed, and why
meter ── Impact ───────┘       └── device file: what each day has cost
"""

import asyncio
import datetime
import logging
from collections.abc import Callable
from typing import Final, final

from shoal.clock import Clock
from shoal.errors import DataError, StoreError
from shoal.fleet.conditions import Conditions, Eligibility, Probe
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.impact import Impact, ImpactBudget, Sample

log = logging.getLogger("shoal.device")

POLL_S: Final = 5.0
WRITE_S: Final = 60.0
"""What a crash may forget of what a day has cost."""


@final
class Gate:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self,
        eligibility: Eligibility,
        probe: Probe,
        budget: ImpactBudget,
        meter: Callable[[], Sample],
        *,
        file: DeviceFile,
        clock: Clock,
        poll_s: float = POLL_S,
        on_change: Callable[[str], None] = lambda why: None,
    ) -> None:
        """
        Args:
            eligibility, probe: what the machine's conditions must be, and are.
            budget, meter: what working may cost, and has cost.
            file: where that is kept by day.
            clock: time; days are local days of its wall time.
            poll_s: between two looks.
            on_change: told why the gate has closed; "" when it has opened.
        """
        self._eligibility, self._probe, self._meter = eligibility, probe, meter
        self._file, self._clock, self._poll_s, self._on_change = file, clock, poll_s, on_change
        self._impact = Impact(budget, meter())
        self._is_open, self._is_closed = asyncio.Event(), asyncio.Event()
        self._is_closed.set()
        self._day = self._today()
        self._spent = file.day(self._day)
        self._written_s = clock.now_s()
        self.why = "its conditions are not known yet"
        """Why it is closed; empty while it is open."""

    async def until_open(self) -> None:
        """Returns when the devices may work."""
        await self._is_open.wait()

    async def until_closed(self) -> None:
        """Returns when they may no longer."""
        await self._is_closed.wait()

    async def run(self) -> None:
        """Looks until it is cancelled; what the day has cost is then in the file."""
        try:
            while True:
                await self._look()
                await self._clock.sleep_until(self._clock.now_s() + self._poll_s)
        finally:
            self._write()

    async def _look(self) -> None:
        conditions, unread = Conditions(), ""
        if self._eligibility.wanted:
            try:
                conditions = await asyncio.to_thread(self._probe.read)
            except DataError as error:
                unread = str(error)
        why = self._eligibility.step(conditions, now_s=self._clock.now_s())
        self._turn(self._cost() or unread or why)

    def _cost(self) -> str:
        if (today := self._today()) != self._day:
            self._write()
            self._day, self._spent = today, self._file.day(today)
        why = self._impact.step(self._meter(), self._spent, works=self._is_open.is_set())
        self._spent = self._impact.today
        if self._clock.now_s() - self._written_s >= WRITE_S:
            self._write()
        return why

    def _turn(self, why: str) -> None:
        if why == self.why:
            return
        self.why = why
        if why:
            self._is_open.clear()
            self._is_closed.set()
        else:
            self._is_closed.clear()
            self._is_open.set()
        self._on_change(why)

    def _today(self) -> int:
        return datetime.datetime.fromtimestamp(self._clock.wall_s()).toordinal()

    def _write(self) -> None:
        self._written_s = self._clock.now_s()
        try:
            self._file.keep_day(self._day, self._spent)
        except StoreError as error:
            log.warning("what the day has cost is not written down: %s", error)
