"""A device's telemetry: notes what its `Device` goes through, and tells of each day at its slot. An actor around `telemetry_diary.py`.

What leaves is a report of one size, split for a helper whose key the device was given by its owner, on a connection of its own. The host cannot
ask for anything: neither for another form, another helper, nor another time.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from shoal.clock import Clock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.progress import Progress
from shoal.fleet.telemetry_diary import Diary, Tell
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.split_sums import context, split
from shoal.privacy.telemetry import SCHEMA

log = logging.getLogger("shoal.device")

LOOK_S: Final = 300.0
"""Between two looks at the clock, which may have been set, and at whether the device is there. One that falls loses the notes of so long."""
AWAY: Final = ("connecting", "reconnecting", "away", "finished")
"""Stages of a device that is not there for work."""


@runtime_checkable
class Kept(Protocol):
    """A few bytes that outlive the process."""

    def read(self) -> bytes | None:
        """What was written last; None: nothing was. Raises StoreError."""
        ...

    def write(self, data: bytes) -> None:
        """On the disk, whole, when it returns; what was there before stays where it raises StoreError."""
        ...


@dataclass(frozen=True)
class KeptFact:
    """In the device's file."""

    file: DeviceFile
    name: str

    def read(self) -> bytes | None:
        return self.file.fact(self.name)

    def write(self, data: bytes) -> None:
        self.file.keep_fact(self.name, data)


@runtime_checkable
class TelemetryLink(Protocol):
    """The way of reports: nothing in one call says that it is of whom another was of."""

    async def tell(self, report: pb.Report) -> None:
        """Raises NetworkError or ProtocolError: it was not taken."""
        ...


class TelemetryDevice:
    """See the module's text."""

    def __init__(
        self,
        *,
        helper: bytes,
        kept: Kept,
        link: TelemetryLink,
        clock: Clock,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """
        Args:
            helper: X25519 public key of the helper that the device's owner trusts not to join the host.
            kept: what outlives the process.
            link: to the host.
            clock: time.
            random: the system's random bytes.

        Raises:
            StoreError: what was kept cannot be read, or nothing can be kept.
        """
        self._helper, self._kept, self._link, self._clock, self._random = helper, kept, link, clock, random
        data = kept.read()
        self.diary = Diary(random(32)) if data is None else Diary.of_bytes(data)
        self._written = self.diary.to_bytes()
        kept.write(self._written)  # a secret that is not kept would be drawn again, and slots with it, until one suits
        self._stage, self._stage_s = "connecting", clock.now_s()
        self._counts = {"trained": 0, "refused": 0, "interrupted": 0, "broken": 0, "up_bytes": 0}

    def heard(self, progress: Progress) -> None:
        """The device is at another stage, or still at the same."""
        now_s, wall_s = self._clock.now_s(), self._clock.wall_s()
        if self._stage not in AWAY:
            self.diary.was_there(wall_s)
        if self._stage == "training":
            self.diary.add("train_s", now_s - self._stage_s, wall_s)
        if progress.stage == "waiting" and self._stage != "waiting":
            self.diary.add("sessions", 1, wall_s)
        counts = {
            "trained": progress.counted, "refused": progress.refused, "interrupted": progress.released,
            "broken": progress.failures, "up_bytes": progress.up_bytes,
        }  # fmt: skip
        for name, count in counts.items():
            if count > self._counts[name]:
                self.diary.add(name, count - self._counts[name], wall_s)
        self._stage, self._stage_s, self._counts = progress.stage, now_s, counts

    async def run(self, progress: Progress) -> None:
        """Tells at each slot, until it is cancelled; then the notes are written down. What cannot be sent is not sent later."""
        try:
            while True:
                wall_s = self._clock.wall_s()
                if (told := self.diary.due(wall_s)) is not None:
                    await self._tell(told)
                left_s = self.diary.next_s(wall_s) - wall_s
                await self._clock.sleep_until(self._clock.now_s() + min(left_s, LOOK_S))
                self.heard(progress)
                self._save()
        except asyncio.CancelledError:
            self._save()
            raise

    async def _tell(self, told: Tell) -> None:
        if not self._save():
            return
        try:
            await self._link.tell(report_of(told, self._helper, self._random))
        except (NetworkError, ProtocolError) as error:
            log.info("a day's telemetry was not taken, and is not sent again: %s", error)

    def _save(self) -> bool:
        """Whether the diary as it is now is on the disk."""
        data = self.diary.to_bytes()
        if data != self._written:
            try:
                self._kept.write(data)
            except StoreError as error:
                log.warning("%s", error)
                return False
            self._written = data
        return True


def report_of(told: Tell, helper: bytes, random: Callable[[int], bytes]) -> pb.Report:
    """What leaves the device."""
    share, sealed = split(told.told.vector(), helper, context=context(SCHEMA, told.day), random=random)
    return pb.Report(schema=SCHEMA, day=told.day, share=share.astype("<u4").tobytes(), sealed=sealed)
