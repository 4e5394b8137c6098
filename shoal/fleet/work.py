"""Work in hand: an assignment, and its update once there is one. It outlives the process in the device's file."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from google.protobuf.message import DecodeError

from shoal.errors import StoreError
from shoal.fleet.device_host import DeviceHost, name_of_run
from shoal.fleet.floor import Floor
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.runner import Update
from shoal.plan.train import Paused
from shoal.tensors import Tensors, sha256

if TYPE_CHECKING:
    from shoal.fleet.secure_offer import SecureOffer

log = logging.getLogger("shoal.device")


@dataclass
class Work:
    """An assignment, and its update once there is one."""

    assigned: pb.Assigned
    name: str
    """Under which the device has checked in for it."""
    key: bytes
    """That signed its plan: as the host says, and once the plan is here, as was verified."""
    task: str = ""
    """Its name, once the plan is here."""
    stopped: bool = False
    training: bool = False
    """A thread is at it, which stops between two blocks and cannot be cancelled."""
    update: Update | None = None
    report: pb.Report | None = None
    sends: Tensors = field(default_factory=dict)
    """What is pushed: the update's sums, or in a secure group what they look like under their masks."""
    secure: "SecureOffer | None" = None
    """The update's way through secure groups, where the task has them."""
    paused: Paused | None = None
    """Where its training was interrupted."""
    repeats: int = 0
    """How often the Edge has asked for what it had been sent."""
    is_kept: bool = False
    """It is in the device's file."""

    @property
    def run(self) -> str:
        """What the device keeps its state of the run under."""
        return name_of_run(self.assigned.run, self.key)

    @property
    def has_revealed(self) -> bool:
        """Its update was revealed in a sum: it is offered no more, whatever is said of it."""
        return self.secure is not None and self.secure.has_revealed


class WorkInFile:
    """The work in hand of one device, in its file. Without a folder nothing of it outlives the process."""

    def __init__(self, host: DeviceHost, place: str, device: str) -> None:
        """
        Args:
            place: whose work: what is in hand for one is offered to no other.
        """
        self._host, self._entry, self._device = host, (place, device), device
        self._warned: set[str] = set()
        """What has been warned of since the last write."""

    async def keep(self, work: Work) -> None:
        """Writes it, as it is; work in secure groups does not outlive its process."""
        if not self._host.file.is_durable or work.secure is not None:
            return
        content = {**_content(work), "floor": _as_array(_digest(self._host.floor))}
        expires_s = work.assigned.expires_s
        work.is_kept = await self._try_to_write(
            "what it has in hand will not outlive this process",
            lambda: self._host.file.keep_work(*self._entry, content, expires_s=expires_s),
        )

    def read(self) -> Work | None:
        """What was in hand when the process before ended."""
        file = self._host.file
        content = file.work(*self._entry, wall_s=self._host.clock.wall_s()) if file.is_durable else None
        if content is None:
            return None
        try:
            work = _of_content(content)
            is_ours = content["floor"].tobytes() == _digest(self._host.floor)
        except (KeyError, ValueError, DecodeError) as error:
            log.warning("%s: what it had in hand cannot be read: %r", self._device, error)
            return None
        trusted = self._host.trusted_key
        if not is_ours or (trusted is not None and trusted != work.key):
            log.warning(
                "%s: what it had in hand is for another host, or was made on other terms: it is not offered",
                self._device,
            )
            return None
        return work

    async def drop(self, work: Work) -> None:
        """Forgets it."""
        if work.is_kept:
            await self._try_to_write(
                "what it had in hand is not forgotten", lambda: self._host.file.drop_work(*self._entry)
            )

    async def counted(self, work: Work, update: Update) -> bool:
        """The update was counted: in one step it is in hand no more, and what it leaves on the device is kept. Whether that could be written."""
        file, wall_s = self._host.file, self._host.clock.wall_s()
        return await self._try_to_write(
            "what a counted update leaves is not kept",
            lambda: file.counted(*self._entry, run=work.run, state=update.device_state, wall_s=wall_s),
        )

    async def _try_to_write(self, otherwise: str, write: Callable[[], None]) -> bool:
        """Whether it could be; else a warning says what that means, once for each reason."""
        try:
            if self._host.file.is_durable:
                await asyncio.to_thread(write)
            else:
                write()
        except StoreError as error:
            if otherwise not in self._warned:
                log.warning("%s: %s: %s", self._device, otherwise, error)
                self._warned.add(otherwise)
            return False
        self._warned.clear()
        return True


def _content(work: Work) -> Tensors:
    """Work in hand as one set of tensors."""
    told = {"assigned": work.assigned.SerializeToString(), "name": work.name.encode(), "key": work.key}
    content = {name: _as_array(data) for name, data in told.items()}
    if work.paused is not None:
        content["blocks"] = np.array(work.paused.blocks)
        content |= {f"carry {name}": value for name, value in work.paused.carry.items()}
    if work.report is not None and work.update is not None:
        report = pb.Report()
        report.CopyFrom(work.report)
        del report.slices[:]  # the update has them
        content["report"] = _as_array(report.SerializeToString())
        content |= {f"sum {name}": value for name, value in work.update.sums.items()}
        content |= {f"state {name}": value for name, value in work.update.device_state.items()}
    return content


def _of_content(content: Tensors) -> Work:
    """What `_content` made."""

    def named(kind: str) -> Tensors:
        return {name.removeprefix(kind): value for name, value in content.items() if name.startswith(kind)}

    assigned = pb.Assigned.FromString(content["assigned"].tobytes())
    work = Work(assigned, content["name"].tobytes().decode(), content["key"].tobytes(), is_kept=True)
    if "blocks" in content:
        work.paused = Paused(int(content["blocks"]), named("carry "))
    if "report" in content:
        work.report = pb.Report.FromString(content["report"].tobytes())
        work.update = Update(named("sum "), work.report.weight, named("state "))
        work.sends = work.update.sums
    return work


def _digest(floor: Floor) -> bytes:
    """Of what a device asks of plans: what it made when it asked for less it does not offer when it asks for more."""
    return bytes.fromhex(sha256(repr(floor).encode()))


def _as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)
