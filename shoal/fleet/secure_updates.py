"""Updates of which an Edge sees sums only: their members say that they are ready, and are taken through a secure group."""

import asyncio
from functools import cached_property

from shoal.fixed import FixedPoint
from shoal.fleet import group as g
from shoal.fleet.configuration import Configuration
from shoal.fleet.forming import FormingGroups, SecureSum
from shoal.fleet.group import Broke, Form, Formed
from shoal.fleet.secure_phases import MASKED
from shoal.fleet.session import Session
from shoal.fleet.updates import Held, Updates
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.plan.secure import terms
from shoal.tensors import TensorSpec


class SecureUpdates(Updates):
    """See the module's text. What differs from `Updates` is what devices send, and that nothing of it is looked at."""

    @cached_property
    def _forming(self) -> FormingGroups:
        return FormingGroups(self._manifest, self, self._clock, population=self._population)

    @cached_property
    def _vectors(self) -> asyncio.Semaphore:
        """Whole vectors in memory at once."""
        return asyncio.Semaphore(2)

    @staticmethod
    def _sent(manifest: Manifest) -> tuple[TensorSpec, ...]:
        return (TensorSpec(name=MASKED, shape=(terms(manifest, model="").packed_bytes,), dtype="uint8"),)

    def _awaits(self, nonce: bytes) -> bool:
        return self._forming.takes_vector(nonce)

    def _looked_at(self, configuration: Configuration) -> dict[str, FixedPoint]:
        return {}  # a masked value may be any

    async def drop(self) -> None:
        await self._forming.drop()
        await super().drop()

    def gave_up(self, nonce: bytes, why: str) -> None:
        self._forming.gone(nonce)
        super().gave_up(nonce, why)

    # What devices say.

    async def report(self, session: Session, report: pb.Report) -> None:
        """The device is ready, or is on another stream. Raises as `Updates.report`."""
        held, nonce = await self._admit(session, report.token)
        if held is None:
            return
        if self.state(nonce) is not g.Member.JOINED:
            return self._forming.remind(nonce)
        held.costs = report.costs
        self.sums.analytics.sending(nonce, self._clock.now_s())
        self.sums.step(g.Offered(nonce))

    async def hear(self, session: Session, message: pb.GroupMessage) -> None:
        """What a member says in its group. Raises ProtocolError: it is none of a group's messages."""
        held, nonce = await self._admit(session, message.token)
        if held is None:
            return
        if message.phase != MASKED:
            return self._forming.hear(nonce, message.phase, message.data)
        async with held.lock:
            if not self._awaits(nonce):
                return
            async with self._vectors:
                data = message.data or await asyncio.to_thread(self._pushed, held)
                await self._forming.add(nonce, data) if data else None
            if not data:
                return session.send(pb.FromEdge(incomplete=pb.Incomplete(token=message.token, missing=[MASKED])))
            self.up_bytes += len(message.data)
        self._forget(held)

    def _pushed(self, held: Held) -> bytes:
        """The vector that was pushed; empty where it is not whole."""
        if held.update is None or held.update.missing:
            return b""
        return b"".join(values.tobytes() for _, _, values in held.update.pieces())

    # What the groups want.

    def form(self, form: Form) -> None:
        """Begins a group."""
        assignment = pb.Assignment.FromString(self._held[form.nonces[0]].token.signed)
        self._forming.form(form, assignment.model)

    def send(self, nonce: bytes, phase: str, data: bytes) -> None:
        """Sends a member a message of its group, if its stream is there."""
        held = self._held[nonce]
        if held.session is not None:
            held.session.send(pb.FromEdge(group=pb.GroupMessage(token=held.token, phase=phase, data=data)))

    def ended(self, outcome: Formed | Broke, sums: SecureSum | None) -> None:
        """A group has a sum, or none."""
        if isinstance(outcome, Formed):
            assert sums is not None
            for nonce in outcome.survivors:
                self.sums.begin_adding(outcome.group, self._held[nonce].costs)
            self.sums.merge(
                outcome.group, sums.pieces, weight=sums.weight, members=len(outcome.survivors), discount=sums.discount
            )
        self.sums.step(outcome)
