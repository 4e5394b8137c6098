"""The host's part of telemetry: holds shares of a day until its batch is whole, has the helper open their sum, and writes that down.

A share tells nothing without the helper (`privacy/split_sums.py`), has no sender, and is in memory only: a host that falls loses the reports of
the days that are open. What is written is a batch's sum with the helper's noise.

Invariants (tests cite them by number):
    (1) A report is in one batch, of its own day, whenever it came.
    (2) Nothing of a report is on a disk, and nothing of who sent it is kept but how many an address sent today.
    (3) Held at once: `MOST_HELD` a day, of `DAYS_BACK` days and today's; addresses: `MOST_ADDRESSES`;
        batches that wait for the helper: `MOST_DUE`.
    (4) A sum that cannot be one of honest reports is dropped whole.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Sequence
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
MOST_DUE: Final = 8
"""Batches that wait for the helper."""
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

    def sums(self, opened: pb.Opened) -> np.ndarray:
        """The sum with noise, (entries,) int64.

        Raises:
            ProtocolError: the helper's answer is none, or the sum cannot be one of honest reports (invariant 4).
        """
        if len(opened.masks) != 4 * BOUNDS.size or not 1.0 <= opened.noise <= MOST_NOISE:
            raise ProtocolError(
                f"Expected the helper's sum of {BOUNDS.size} entries with noise, got {len(opened.masks)} bytes."
            )
        shares = np.asarray(np.sum(self.shares, axis=0, dtype=np.uint32))
        sums = joined(shares, np.frombuffer(opened.masks, "<u4"))
        room = TOO_FAR * opened.noise * UNITS
        if not np.all((sums >= -room) & (sums <= len(self.sealed) * BOUNDS + room)):
            raise ProtocolError("Their sum is absurd: one of them at least is not an honest device's.")
        return sums


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

    def __init__(self, store: Store, run_id: str, helper: HelperLink, *, clock: Clock) -> None:
        """
        Args:
            store: the record.
            run_id: the run that sums are written to.
            helper: who opens them.
            clock: time.
        """
        self._store, self._run_id, self._helper, self._clock = store, run_id, helper, clock
        self.collector = Collector()
        self._due: deque[Closed] = deque()
        """Batches that wait for the helper. Each is asked for again just as it was: the helper may have opened it, and its answer been lost."""

    @property
    def num_held(self) -> int:
        """Reports that wait."""
        return self.collector.num_held + sum(len(batch.sealed) for batch in self._due)

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
            if self.num_held:
                log.warning("%d telemetry reports are lost: the helper did not answer", self.num_held)
            raise

    async def open_closed(self, *, all: bool = False) -> None:
        """Opens what is whole; what the helper does not answer for waits."""
        self._due += self.collector.closed(self._clock.wall_s(), all=all)
        while len(self._due) > MOST_DUE:
            self._lose(self._due.popleft(), "the helper has not answered for long")
        while self._due:
            batch = self._due[0]
            try:
                row = await self._opened(batch)
            except NetworkError as error:
                return log.warning("the telemetry helper does not answer: %s", error)
            except ProtocolError as error:
                self._lose(self._due.popleft(), str(error))
                continue
            self._due.popleft()  # before it is written: whoever ends this while it is must not have it written twice
            await self._write(row)

    async def _opened(self, batch: Closed) -> TelemetryRow:
        """Raises ProtocolError where it cannot be opened, NetworkError where it cannot now."""
        opened = await self._helper.open(batch.request())
        if opened.bad:
            log.warning("%d of %d telemetry reports open to nothing", len(opened.bad), len(batch.sealed))
            batch = batch.without(opened.bad)
            opened = await self._helper.open(batch.request())
        sums = batch.sums(opened)
        return TelemetryRow(
            day=batch.day, schema=SCHEMA.hex(), reports=len(batch.sealed), noise=opened.noise,
            sums=tuple(int(each) for each in sums), time_s=self._clock.wall_s(),
        )  # fmt: skip

    async def _write(self, row: TelemetryRow) -> None:
        try:
            await durably(self._store, self._clock, lambda: self._store.add_telemetry(self._run_id, row))
        except StoreError as error:
            log.error("telemetry of day %d is lost: %s", row.day, error)
        else:
            log.info("telemetry of day %d: a sum over %d devices", row.day, row.reports)

    def _lose(self, batch: Closed, why: str) -> None:
        log.warning("%d telemetry reports of day %d are dropped: %s", len(batch.sealed), batch.day, why)
