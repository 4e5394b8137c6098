"""The host's part of telemetry: holds shares of a day until its batch is whole, has the helper open their sum, and writes that down.

A share tells nothing without the helper (`privacy/split_sums.py`), has no sender, and is in memory only: a host that falls loses the reports of
the days that are open. What is written is a batch's sum with the helper's noise.

Invariants (tests cite them by number):
    (1) A report is in one batch, of its own day, whenever it came.
    (2) Nothing of a report is on a disk, and nothing of who sent it is kept but how many an address sent today.
    (3) Held at once: `MOST_HELD` a day, of `DAYS_BACK` days and today's; addresses: `MOST_ADDRESSES`.
    (4) A sum that cannot be one of honest reports is dropped whole.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import ceil, floor
from typing import Final, Protocol, runtime_checkable

import numpy as np

from shoal.clock import Clock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.durable import durably
from shoal.fleet.telemetry_helper import MOST_REPORTS
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.split_sums import SEALED_BYTES, joined
from shoal.privacy.telemetry import BOUNDS, DAY_S, SCHEMA, UNITS
from shoal.record.store import Store, TelemetryRow

log = logging.getLogger("shoal.host")

DAYS_BACK: Final = 2
"""A device tells of yesterday, by its own clock; so far may a clock be behind."""
CLOSES_S: Final = 2.0 * 3600.0
"""After the end of the day in which a day is told of: its batch is opened then."""
LOOK_S: Final = 60.0
MOST_HELD: Final = 2 * MOST_REPORTS
"""Reports of a day: while as many as a batch may have are opened, others come."""
OF_ONE_ADDRESS: Final = 1_024
"""Reports that one address may send in a day: as many devices may stand behind it."""
MOST_ADDRESSES: Final = 100_000
MOST_NOISE: Final = 2.0**16
TOO_FAR: Final = 8.0
"""Standard deviations of noise that a sum may be out of its bounds: once in 10^13 batches."""


@dataclass(slots=True)
class _Held:
    shares: list[np.ndarray] = field(default_factory=list)
    sealed: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Closed:
    """A batch that is to be opened."""

    day: int
    shares: Sequence[np.ndarray]
    sealed: Sequence[bytes]

    def request(self) -> pb.Batch:
        return pb.Batch(schema=SCHEMA, day=self.day, sealed=self.sealed)

    def without(self, places: Sequence[int]) -> "Closed":
        """What is left when those are gone."""
        good = [place for place in range(len(self.sealed)) if place not in set(places)]
        return Closed(self.day, [self.shares[place] for place in good], [self.sealed[place] for place in good])

    def sums(self, opened: pb.Opened) -> np.ndarray | None:
        """The sum with noise, (entries,) int64; None: it cannot be one of honest reports (invariant 4).

        Raises:
            ProtocolError: the helper's answer is none.
        """
        if len(opened.masks) != 4 * BOUNDS.size or not 1.0 <= opened.noise <= MOST_NOISE:
            raise ProtocolError(
                f"Expected the helper's sum of {BOUNDS.size} entries with noise, got {len(opened.masks)} bytes."
            )
        shares = np.asarray(np.sum(self.shares, axis=0, dtype=np.uint32))
        sums = joined(shares, np.frombuffer(opened.masks, "<u4"))
        room = TOO_FAR * opened.noise * UNITS
        is_honest = np.all((sums >= -room) & (sums <= len(self.sealed) * BOUNDS + room))
        return sums if is_honest else None


class Collector:
    """Reports of the days that are open. No I/O."""

    def __init__(self) -> None:
        self._days: dict[int, _Held] = {}
        self._today = 0
        self._of: Counter[str] = Counter()

    @property
    def num_held(self) -> int:
        """Reports that wait."""
        return sum(len(held.sealed) for held in self._days.values())

    def add(self, report: pb.Report, *, address: str, wall_s: float) -> None:
        """Takes a report in.

        Raises:
            ProtocolError: it is none, or of a day that is not told of now.
            NetworkError: there are too many.
        """
        today = floor(wall_s / DAY_S)
        if today != self._today:
            self._today = today
            self._of.clear()
        if report.schema != SCHEMA:
            raise ProtocolError(
                f"Expected telemetry of form {SCHEMA.hex()}, got {report.schema.hex()[:32]}. Run the same version of shoal here and there."
            )
        if not today - DAYS_BACK <= report.day <= today:
            raise ProtocolError(
                f"Expected a report of a day from {today - DAYS_BACK} to {today}, got {report.day}: is the clock right?"
            )
        if len(report.share) != 4 * BOUNDS.size or len(report.sealed) != SEALED_BYTES:
            raise ProtocolError(
                f"Expected a share of {4 * BOUNDS.size} bytes and a seal of {SEALED_BYTES}, got {len(report.share)} and {len(report.sealed)}."
            )
        held = self._days.setdefault(report.day, _Held())
        is_new = address not in self._of
        if (
            self._of[address] >= OF_ONE_ADDRESS
            or (is_new and len(self._of) >= MOST_ADDRESSES)
            or len(held.sealed) >= MOST_HELD
        ):
            raise NetworkError("This server has as many reports as it takes of an address, or of a day; leave it out.")
        self._of[address] += 1
        held.shares.append(np.frombuffer(report.share, "<u4"))
        held.sealed.append(report.sealed)

    def closed(self, wall_s: float, *, all: bool = False) -> list[Closed]:
        """Takes out the batches that are whole: of days that nobody tells of any more, or as many as a batch may have.

        `all`: those of open days, too.
        """
        due = [
            day
            for day, held in self._days.items()
            if all or len(held.sealed) >= MOST_REPORTS or wall_s >= (day + 2) * DAY_S + CLOSES_S
        ]
        return [batch for day in due for batch in _batches(day, self._days.pop(day))]

    def put_back(self, batch: Closed) -> None:
        """It could not be opened yet. Where its day has filled up meanwhile, those that came last go."""
        held = self._days.setdefault(batch.day, _Held())
        held.shares = [*batch.shares, *held.shares][:MOST_HELD]
        held.sealed = [*batch.sealed, *held.sealed][:MOST_HELD]

    def forget(self, wall_s: float) -> None:
        """Drops days that the helper opens no more."""
        for day in [day for day in self._days if day < floor(wall_s / DAY_S) - 4]:
            log.warning(
                "%d telemetry reports of day %d were never opened, and are dropped",
                len(self._days.pop(day).sealed),
                day,
            )


def _batches(day: int, held: _Held) -> list[Closed]:
    """As few as may be, and about as large as one another: a small one is not opened."""
    number = ceil(len(held.sealed) / MOST_REPORTS)
    ends = [len(held.sealed) * place // number for place in range(number + 1)] if number else []
    return [Closed(day, held.shares[low:high], held.sealed[low:high]) for low, high in pairwise(ends)]


@runtime_checkable
class HelperLink(Protocol):
    """The way to the helper."""

    async def open(self, batch: pb.Batch) -> pb.Opened:
        """Raises NetworkError (try again) or ProtocolError (do not)."""
        ...


class TelemetryHost:
    """See the module's text."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        helper: HelperLink,
        *,
        clock: Clock,
        on_opened: Callable[[TelemetryRow], None] = lambda row: None,
    ) -> None:
        """
        Args:
            store: the record.
            run_id: the run that sums are written to.
            helper: who opens them.
            clock: time.
            on_opened: told of each sum once it is durable.
        """
        self._store, self._run_id, self._helper, self._clock, self._on_opened = store, run_id, helper, clock, on_opened
        self.collector = Collector()

    def tell(self, report: pb.Report, *, address: str) -> None:
        """One report. Raises as `Collector.add` does."""
        self.collector.add(report, address=address, wall_s=self._clock.wall_s())

    async def run(self) -> None:
        """Opens batches as they are whole, until it is cancelled; then those of open days, too."""
        try:
            while True:
                await self.open_closed()
                await self._clock.sleep_until(self._clock.now_s() + LOOK_S)
        except asyncio.CancelledError:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.open_closed(all=True)
            raise

    async def open_closed(self, *, all: bool = False) -> None:
        """Opens what is whole; what the helper does not answer for waits."""
        wall_s = self._clock.wall_s()
        self.collector.forget(wall_s)
        for batch in self.collector.closed(wall_s, all=all):
            try:
                await self._open(batch)
            except NetworkError as error:
                log.warning("the telemetry helper does not answer, trying again: %s", error)
                self.collector.put_back(batch)
            except ProtocolError as error:
                log.warning("%d telemetry reports of day %d are dropped: %s", len(batch.sealed), batch.day, error)
            except StoreError as error:
                log.error("telemetry of day %d is lost: %s", batch.day, error)

    async def _open(self, batch: Closed) -> None:
        opened = await self._helper.open(batch.request())
        if opened.bad:
            log.warning(
                "%d of %d telemetry reports of day %d open to nothing", len(opened.bad), len(batch.sealed), batch.day
            )
            batch = batch.without(opened.bad)
            opened = await self._helper.open(batch.request())
        sums = batch.sums(opened)
        if sums is None:
            return log.warning(
                "the sum of %d telemetry reports of day %d is absurd, and dropped", len(batch.sealed), batch.day
            )
        row = TelemetryRow(
            day=batch.day, schema=SCHEMA.hex(), reports=len(batch.sealed), noise=opened.noise,
            sums=tuple(int(each) for each in sums), time_s=self._clock.wall_s(),
        )  # fmt: skip
        await durably(self._store, self._clock, lambda: self._store.add_telemetry(self._run_id, row))
        self._on_opened(row)
