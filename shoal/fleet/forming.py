"""Secure groups that an Edge is forming: each a `SecureServer`, what its members say, and the sum that they add to.

    form ─> begin to each ─> advert, roster, shares … ─> masked: a vector, added at once ─> … ─> Open: masks off, in a thread ─> ended

A member's stream may break at any time: what it was told last is told again when it reports again (`remind`), and what it has answered
before is answered again by it. Who does not answer in time is lost (`SecureServer`).
"""

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError, Message

from shoal.clock import Clock
from shoal.errors import ProtocolError
from shoal.fleet.group import Broke, Form, Formed
from shoal.plan.manifest import Manifest
from shoal.plan.secure import layout, members_noise, terms
from shoal.privacy import masks
from shoal.privacy import secure_server as server
from shoal.privacy.identity import Trusted
from shoal.privacy.secure_terms import GROUP_BYTES, Terms
from shoal.privacy.vectors import VectorLayout
from shoal.privacy.wire import secure_pb2 as pb

log = logging.getLogger("shoal.edge")

LONGEST_PHASE_S: Final = 60.0
SHORTEST_PHASE_S: Final = 2.0
MEMORY_BYTES: Final = 1 << 20
"""Work on vectors that are larger than that is done in a thread."""

_PHASES: Final[Mapping[type[Message], str]] = {
    pb.Roster: "roster",
    pb.Shares: "shares",
    pb.Survivors: "survivors",
    pb.Agreement: "agreement",
}


@dataclass(frozen=True)
class SecureSum:
    """What an opened group summed up to."""

    pieces: tuple[tuple[str, int, np.ndarray], ...]
    """(tensor, first element, totals (n,) int64), as `Accumulator.merge` takes them."""
    weight: int
    discount: float
    """What the members' updates count for their age."""


@runtime_checkable
class Members(Protocol):
    """Who speaks with the members, and is told what came of a group."""

    def send(self, nonce: bytes, phase: str, data: bytes) -> None:
        """Sends a member a message, if its stream is there."""
        ...

    def ended(self, outcome: Formed | Broke, sums: SecureSum | None) -> None:
        """A group has ended; there are sums where it was formed."""
        ...


@dataclass
class _Forming:
    """One group."""

    form: Form
    machine: server.SecureServer
    total: np.ndarray
    """Of masked vectors."""
    said: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)
    """Member -> what it was told last."""
    asked: set[bytes] = field(default_factory=set)
    """Members whose keys are awaited."""
    watch: "asyncio.Task[None] | None" = None


class FormingGroups:
    """See the module's text. All methods belong to one event loop."""

    def __init__(self, manifest: Manifest, members: Members, clock: Clock, *, population: str) -> None:
        """
        Args:
            manifest: of the plan.
            members: who speaks with them.
            clock: time.
            population: that members are certified for.
        """
        self._manifest, self._members, self._clock = manifest, members, clock
        self._layout: VectorLayout = layout(manifest)
        self._noise = members_noise(manifest)
        secure = manifest.promises.privacy.secure
        assert secure is not None
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(secure.authority)) if secure.authority else None
        self._trusted = Trusted(key, population) if key is not None else None
        window_s = manifest.server.rounds.reporting_window_s
        self._phase_s = min(LONGEST_PHASE_S, max(SHORTEST_PHASE_S, window_s / 5))
        self._groups: dict[int, _Forming] = {}
        self._of: dict[bytes, _Forming] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def form(self, form: Form, model: str) -> None:
        """Begins a group of members that trained from the tensors with that root."""
        made: Terms = terms(self._manifest, model=model)
        number = os.urandom(GROUP_BYTES)
        machine = server.SecureServer(
            made, number, trusted=self._trusted, phase_s=self._phase_s, wall_s=self._clock.wall_s()
        )
        group = _Forming(form, machine, np.zeros(made.size, np.uint32), asked=set(form.nonces))
        self._groups[form.group] = group
        for nonce in form.nonces:
            self._of[nonce] = group
            self._say(group, nonce, "begin", number)
        group.watch = self._spawn(self._keep_time(group))

    def remind(self, nonce: bytes) -> None:
        """Tells a member again what it was told last: it is on another stream."""
        group = self._of.get(nonce)
        if group is not None and nonce in group.said:
            self._members.send(nonce, *group.said[nonce])

    def takes_vector(self, nonce: bytes) -> bool:
        """Whether the member's masked vector is to come now."""
        return (group := self._of.get(nonce)) is not None and group.machine.takes_vector(nonce)

    def hear(self, nonce: bytes, phase: str, data: bytes) -> None:
        """What a member says, but for its vector. Raises ProtocolError: it is none of a group's messages; the member is lost."""
        group = self._of.get(nonce)
        if group is None:
            return  # the group has ended, and its member was told
        try:
            event = _event(nonce, phase, data)
        except ProtocolError:
            self.gone(nonce)
            raise
        self._step(group, event)
        if isinstance(event, server.Advertised):
            self._advertised(group, nonce)

    async def add(self, nonce: bytes, data: bytes) -> None:
        """Adds a member's masked vector, if it is awaited. Raises ProtocolError: it has another length; the member is lost."""
        group = self._of.get(nonce)
        if group is None or not group.machine.takes_vector(nonce):
            return
        unpack = group.machine.terms.unpack
        try:
            vector = await asyncio.to_thread(unpack, data) if len(data) > MEMORY_BYTES else unpack(data)
        except ValueError as error:
            self.gone(nonce)
            raise ProtocolError(str(error)) from error
        # In one turn: who is in the sum, and who is a survivor, must not differ.
        if group.machine.takes_vector(nonce):
            np.add(group.total, vector, out=group.total)
            self._step(group, server.Added(nonce))

    def gone(self, nonce: bytes) -> None:
        """The member will not go on."""
        group = self._of.get(nonce)
        if group is not None:
            self._step(group, server.Gone(nonce))
            self._advertised(group, nonce)

    async def drop(self) -> None:
        """Forgets all groups, without a word."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._groups.clear()
        self._of.clear()

    # What the machine wants.

    def _advertised(self, group: _Forming, nonce: bytes) -> None:
        group.asked.discard(nonce)
        if not group.asked and group.machine.phase == "adverts":
            self._step(group, server.Full())

    def _step(self, group: _Forming, event: server.Event) -> None:
        for command in group.machine.step(event, self._clock.now_s()):
            match command:
                case server.Send(nonce, message):
                    self._say(group, nonce, _PHASES[type(message)], message.SerializeToString())
                case server.Lost(nonce, why):
                    log.info("a member of a secure group is lost: %s", why)
                case server.Open(survivors, opening):
                    self._spawn(self._open(group, survivors, opening))
                case server.Failed(why, spent):
                    self._end(group, Broke(group.form.group, spent, why), None)

    def _say(self, group: _Forming, nonce: bytes, phase: str, data: bytes) -> None:
        group.said[nonce] = phase, data
        self._members.send(nonce, phase, data)

    async def _keep_time(self, group: _Forming) -> None:
        await self._clock.sleep_until(self._clock.now_s() + self._phase_s)
        if group.machine.phase == "adverts":
            self._step(group, server.Full())
        while group.machine.deadline_s < float("inf"):
            await self._clock.sleep_until(group.machine.deadline_s)
            self._step(group, server.Tick())

    async def _open(self, group: _Forming, survivors: tuple[bytes, ...], opening: server.Opening) -> None:
        number = group.form.group
        try:
            if group.total.nbytes > MEMORY_BYTES:
                sums = await asyncio.to_thread(self._opened, group, len(survivors), opening)
            else:
                sums = self._opened(group, len(survivors), opening)
        except Exception as error:  # of ours, too: a close waits for the group
            log.warning("a secure group cannot be used: %s", error, exc_info=not isinstance(error, ProtocolError))
            return self._end(group, Broke(number, survivors, str(error)), None)
        self._end(group, Formed(number, survivors), sums)

    def _opened(self, group: _Forming, survivors: int, opening: server.Opening) -> SecureSum:
        """The sum without its masks. Raises ProtocolError: shares do not fit, or no honest members have such a sum."""
        masks.add_masks(group.total, opening.masks())
        pieces, weight = self._layout.totals(group.machine.terms.reduced(group.total))
        sums = SecureSum(tuple(pieces), weight, group.form.discount)
        graph, stddev = group.machine.graph, 0.0
        if self._noise is not None and graph is not None:
            stddev = self._noise.stddev(graph, survivors)
        self._layout.refuse_absurd(
            sums.pieces, weight=weight, members=survivors, norm_bound=self._manifest.promises.privacy.norm_bound, noise_stddev=stddev,
        )  # fmt: skip
        return sums

    def _end(self, group: _Forming, outcome: Formed | Broke, sums: SecureSum | None) -> None:
        if self._groups.pop(group.form.group, None) is None:
            return
        for nonce in group.form.nonces:
            self._of.pop(nonce, None)
        if group.watch is not None and group.watch is not asyncio.current_task():
            group.watch.cancel()
        self._members.ended(outcome, sums)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _event(nonce: bytes, phase: str, data: bytes) -> server.Event:
    try:
        match phase:
            case "advert":
                return server.Advertised(nonce, pb.Advert.FromString(data))
            case "shares":
                return server.Shared(nonce, pb.Shares.FromString(data))
            case "signed":
                return server.Signed(nonce, pb.Signed.FromString(data))
            case "unmask":
                return server.Unmasked(nonce, pb.Unmask.FromString(data))
            case "complaint":
                log.info("a member leaves its secure group: %r", data[:200])
                return server.Gone(nonce)
    except DecodeError as error:
        raise ProtocolError(f"Expected {phase!r} of a secure group, got {len(data)} bytes that are none.") from error
    raise ProtocolError(f"Expected advert, shares, masked, signed, unmask or complaint, got {phase[:40]!r}.")
