"""The Edge: holds device sessions, sends plans and models, takes updates in, closes groups. No JAX here.

One asyncio actor. Everything that decides is a machine (`group.py`, and the Coordinator's `round.py`); this file moves
bytes and messages between them and the devices. It trusts no device: every message is bounded, every token verified,
every hash recomputed, and whatever a device sends ends in an answer to that device, never in the fall of the Edge.

    CheckIn ─> Coordinator.arrived … assign ─> Assigned ─> Pull* ─> Push* + Report ─> group: check, add ─> Counted
"""

import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol, runtime_checkable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shoal.clock import Clock
from shoal.errors import ProtocolError
from shoal.fleet import group as g
from shoal.fleet.analytics import Seen
from shoal.fleet.check_in import check_device_id, needs, shown
from shoal.fleet.configuration import Configuration
from shoal.fleet.entrance import Entrance
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.offer import Offer
from shoal.fleet.pace import Pace
from shoal.fleet.packed_slices import PackedSlices, Readable
from shoal.fleet.secure_updates import SecureUpdates
from shoal.fleet.session import Session, Stream, piped
from shoal.fleet.staging import Limits
from shoal.fleet.streams import Streams, busy
from shoal.fleet.updates import Held, Updates
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.record.store import TokenRow
from shoal.tensors import Index

log = logging.getLogger("shoal.edge")

BASES: Final = 8
"""Versions that a device may hold, to be sent the difference alone."""
MOVING_S: Final = 1.0


@runtime_checkable
class Coordinator(Protocol):
    """What an Edge says to the Coordinator."""

    def arrived(self, *devices: str) -> None: ...
    def left(self, device: str) -> None: ...
    def joined(self, nonce: bytes, version: int) -> None: ...
    def counted(self, nonce: bytes, version: int, staleness: int) -> None: ...
    def released(self, nonce: bytes) -> None: ...
    def away(self, nonce: bytes) -> None: ...
    async def token_row(self, nonce: bytes) -> TokenRow | None: ...


@dataclass(frozen=True)
class Statistics:
    """Counters since the Edge started; they only rise, but for the two that say `now`."""

    sessions_now: int
    staged_now: int
    check_ins: int
    counted: int
    refused: int
    released: int
    down_bytes: int
    up_bytes: int


class Edge:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        token_key: Ed25519PublicKey,
        blobs: Readable,
        clock: Clock,
        limits: Limits | None = None,
        population: str = "default",
        entrance: Entrance | None = None,
    ) -> None:
        self._entrance = entrance or Entrance()
        self._plan, self._manifest, self._run, self._population = plan, plan.manifest, run, population
        self._blobs, self._clock = blobs, clock
        self._coordinator: Coordinator | None = None
        kind = Updates if plan.manifest.promises.privacy.secure is None else SecureUpdates
        self._updates = kind(
            plan.manifest, run=run, population=population, token_key=token_key, clock=clock, limits=limits or Limits(),
            token_row=self._token_row, tell=self._tell, again=self._again,
        )  # fmt: skip
        self._seen = self._updates.sums.analytics
        self._sessions: dict[str, Session] = {}
        self._streams = Streams(clock, lambda kind: self._seen.error(kind, clock.now_s()), entrance=self._entrance)
        self._nonces: dict[str, bytes] = {}  # device -> what it was assigned last
        policy = self._manifest.server.rounds
        self._pace = Pace(devices_a_round=policy.most_at_once, resting=policy.most_resting, now_s=clock.now_s())
        self._num_waiting = 0
        self._packed = PackedSlices(blobs)
        self._bases: OrderedDict[str, Mapping[str, str]] = OrderedDict()
        """Root -> hash -> name of its tensors, of the latest versions."""
        self._offer = self._offering(Index(()))
        self._offers: dict[int, Offer] = {}
        """Of the versions that something may still be late for: who is late fetches the model, too."""
        self._assigned = pb.Assigned()
        self._finished = self._other_edge = ""
        self._check_ins = self._refused = self._released = 0
        self._down_bytes = 0
        self._bytes_before = (0, 0)

    def connect(self, coordinator: Coordinator) -> None:
        """Whom to tell of arrivals and members. Called once, before the first session."""
        self._coordinator = coordinator
        self._updates.sums.connect(coordinator)

    def take_analytics(self) -> Seen:
        """What was seen of devices since this was asked last."""
        return self._seen.take()

    def statistics(self) -> Statistics:
        return Statistics(
            sessions_now=self._streams.num,
            staged_now=self._updates.num_staged,
            check_ins=self._check_ins,
            counted=self._updates.sums.num_counted,
            refused=self._refused,
            released=self._released,
            down_bytes=self._down_bytes,
            up_bytes=self._updates.up_bytes,
        )

    # What the Coordinator says.

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        """A round begins. The groups of a round that was abandoned go on.

        Args:
            configuration: the round's.
            model: what its devices start from.
            taken: version -> members that sums of the record hold already.
        """
        present = self._updates.configuration
        if present is None or present.base_version != configuration.base_version:
            self._pace.opened(self._clock.now_s())
            self._offer = self._offering(model)
            oldest = configuration.base_version - self._manifest.server.rounds.max_staleness
            self._offers = {version: offer for version, offer in self._offers.items() if version >= oldest}
            self._offers[configuration.base_version] = self._offer
        self._assigned = self._offer.assigned(configuration, run=self._run)
        self._updates.open(configuration, taken=taken)
        self._nonces = {device: nonce for device, nonce in self._nonces.items() if self._updates.held(nonce)}

    def _offering(self, model: Index) -> Offer:
        bases = {hash: name for version in self._bases.values() for hash, name in version.items()}
        self._bases[model.root] = {entry.hash: entry.spec.name for entry in model}
        while len(self._bases) > BASES:
            self._bases.popitem(last=False)
        return Offer(self._plan, model, self._blobs, self._packed, bases=bases)

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        """Sends a device its assignment; False where it has gone, and nothing of it is here."""
        session = self._sessions.get(device)
        if session is None and self._updates.state(assignment.nonce) is not None:
            self._told().away(assignment.nonce)  # it was given the same before, and may come back with it
            return True
        if session is None or self._updates.configuration is None:
            return False
        self._updates.assigned(token, assignment, session)
        now_s = self._clock.now_s()
        self._seen.assigned(assignment.nonce, now_s, waited_s=now_s - session.waiting_since_s)
        self._nonces[device] = assignment.nonce
        self._stop_waiting(session)
        session.has_arrived = False
        message = pb.FromEdge(assigned=self._assigned)
        message.assigned.token.CopyFrom(token)
        message.assigned.expires_s = assignment.expires_s
        message.assigned.server_time_s = self._clock.wall_s()
        self._down_bytes += self._offer.inline_bytes
        session.send(message)
        return True

    async def close_groups(self, *, final: bool = True) -> list[GroupResult]:
        """The sums that are to be seen, once an addition under way is done: all at a round's end, else the present one.

        Raises:
            StoreError: an addition broke off; the sums are of no use.
        """
        groups = await self._updates.close(final=final)
        if groups:
            (down, up), now = self._bytes_before, (self._down_bytes, self._updates.up_bytes)
            groups[0].costs.down_bytes, groups[0].costs.up_bytes = now[0] - down, now[1] - up
            self._bytes_before = now
        return groups

    # As one of several Edges.

    def gather(self) -> None:
        """Nothing to do: one Edge alone has all there is."""

    def neighbours(self, addresses: Sequence[str]) -> None:
        """Where devices find the other Edges: those that there is no room for here are sent there."""
        self._streams.neighbours(addresses)

    def lose(self, why: str) -> None:
        """Nothing to do: an Edge in the Coordinator's process ends with it."""

    def withdraw(self, nonce: bytes, answer: Callable[[bool], None]) -> None:
        """Lets go of an update, unless it is in a sum; says whether it is not here (any more)."""
        self._seen.moved(nonce)
        self._updates.gave_up(nonce, "its device is at another Edge")
        answer(self._updates.state(nonce) is None)

    def dissolve(self, address: str) -> None:
        """Gives up a group that is below the minimum; its devices are told to offer their updates at that address."""
        self._other_edge = address
        self._updates.sums.step(g.Dissolve())

    def send_away(self, device: str) -> None:
        """Tells a device that was taken from those that wait to come later."""
        session = self._sessions.get(device)
        if session is not None:
            self._stop_waiting(session)
            session.send(pb.FromEdge(later=busy("its update is at another Edge")))
            session.end()

    # What the Coordinator says of the sums that were closed.

    def stored(self) -> None:
        """The sums that were closed are durable, and wait for a commit: their members are told."""
        self._updates.sums.step(g.Stored())

    def committed(self, version: int) -> None:
        """The sums that were closed are durable, in this version: their members are told."""
        self._updates.sums.step(g.Committed(version))

    def failed(self, why: str) -> None:
        """The sums that were closed could not be used; their members are told, and train anew."""
        self._updates.sums.step(g.Failed(why))

    def finish(self, why: str) -> None:
        """The run is over: every device is told."""
        self._finished = why
        self._updates.finish()
        for session in list(self._sessions.values()):
            session.send(pb.FromEdge(finished=pb.Finished(why=why)))

    async def close(self) -> None:
        """Ends every session and forgets what is staged."""
        for session in list(self._sessions.values()):
            session.end()
        await self._updates.drop()

    # What devices say.

    def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncGenerator[pb.FromEdge, None]:
        """One control stream within the process: yields what the device is to be told until either side ends it."""
        return piped(self.hold, messages)

    async def hold(self, stream: Stream) -> None:
        """One control stream, until either side ends it."""
        session = Session(stream)
        try:
            await self._streams.hold(session, stream, partial(self._handle, session))
        finally:
            self._stop_waiting(session)
            if session.device and self._sessions.get(session.device) is session:
                del self._sessions[session.device]
                self._left(session.device)

    async def _handle(self, session: Session, message: pb.FromDevice) -> None:
        match message.WhichOneof("kind"):
            case "check_in":
                await self._check_in(session, message.check_in)
            case "report":
                await self._updates.report(session, message.report)
            case "group":
                await self._updates.hear(session, message.group)
            case "gave_up":
                self._gave_up(message.gave_up)
            case "ping":
                session.send(pb.FromEdge(ping=pb.Ping()))
            case _:
                raise ProtocolError("Expected check_in, report, group, gave_up or ping.")

    async def _check_in(self, session: Session, check_in: pb.CheckIn) -> None:
        self._check_ins += 1
        device = check_in.device_id
        check_device_id(device)
        why = needs(check_in, self._manifest, population=self._population)
        if not why and self._entrance.admit is not None:
            why = await self._entrance.admit(check_in)
        if why:
            self._seen.error("incompatible", self._clock.now_s())
            return session.send(pb.FromEdge(incompatible=pb.Incompatible(needs=why)))
        if self._finished:
            return session.send(pb.FromEdge(finished=pb.Finished(why=self._finished)))
        if session.device and session.device != device:
            raise ProtocolError("A session serves one device.")
        old = self._sessions.get(device)
        if old is not None and old is not session:
            log.warning("device %r checked in on another stream; the old one is ended", device)
            old.send(
                _refused("replaced", f"Another device has checked in as {device!r}. Give each an --id of its own.")
            )
            old.end()
        session.device, session.is_known = device, True
        session.shown = None if self._entrance.admit is None else shown(check_in)
        self._sessions[device] = session
        self._forget_lost_work(device)
        session.stays = check_in.stay
        if not session.has_arrived:
            session.has_arrived = True
            self._seen.count("check_ins")
            self._pace.arrived(1, self._clock.now_s())
        if not session.stays and not session.waiting and self._num_waiting >= self._pace.pool:
            self._seen.count("told_later")
            low, high = self._again()
            later = pb.Later(delay_min_s=low, delay_max_s=high, why="enough devices wait for now")
            return session.send(pb.FromEdge(later=later))
        self._wait(session)

    def _stop_waiting(self, session: Session) -> None:
        self._num_waiting -= session.waiting
        session.waiting = False

    def _left(self, device: str) -> None:
        self._told().left(device)
        nonce = self._nonces.get(device)
        if nonce is not None and self._updates.state(nonce) is g.Member.JOINED:
            self._seen.away(nonce, self._clock.now_s())
            self._told().away(nonce)

    def _forget_lost_work(self, device: str) -> None:
        """One who checks in has nothing in hand: what it had of a version before is lost, and its place is free."""
        nonce = self._nonces.pop(device, None)
        held, present = self._updates.held(nonce), self._updates.configuration
        if nonce is not None and held is not None and present is not None and held.base_version < present.base_version:
            self._updates.sums.step(g.Gone(nonce, "it checked in anew"))

    def _wait(self, session: Session) -> None:
        if not session.waiting:  # one who asks again before the answer waits no less
            session.waiting, session.waiting_since_s = True, self._clock.now_s()
            self._num_waiting += 1
            self._told().arrived(session.device)

    def _gave_up(self, message: pb.GaveUp) -> None:
        nonce = self._updates.read_token(message.token).nonce
        log.info("a device gave up in %r: %r", message.stage[:40], message.why[:200])
        self._seen.gave_up(nonce, message.stage, self._clock.now_s())
        self._updates.gave_up(nonce, message.why)

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        """The bytes of one blob that the token gives a right to. Raises ProtocolError for any other."""
        version = self._updates.read_token(request.token).base_version
        async for piece in self._offers.get(version, self._offer).pull(request):
            self._down_bytes += len(piece.data)
            yield piece

    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply:
        """Takes slices of an update in, as `Updates.push` does."""
        return await self._updates.push(slices)

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        """What became of an assignment, as `Updates.status` says."""
        return await self._updates.status(request)

    # Between the machine and the devices.

    def _tell(self, held: Held | None, tell: g.Tell) -> None:
        self._refused += tell.outcome == "refused"
        self._released += tell.outcome == "released"
        session = held.session if held is not None else None
        if held is None or session is None:
            return  # the token outlives the session: the device will ask
        low, high = self._again()
        match tell.outcome:
            case "moved":
                why = tell.reason or "too few devices are here"
                later = pb.Later(delay_max_s=MOVING_S, why=why, other_edge=self._other_edge)
                session.send(pb.FromEdge(later=later))
                return session.end()
            case "counted":
                session.send(
                    pb.FromEdge(
                        counted=pb.Counted(version=tell.version, token=held.token, delay_min_s=low, delay_max_s=high)
                    )
                )
            case "refused":
                answer = pb.Refused(
                    reason=tell.reason, detail=tell.detail, token=held.token, delay_min_s=low, delay_max_s=high
                )
                session.send(pb.FromEdge(refused=answer))
            case "released":
                session.send(
                    pb.FromEdge(
                        released=pb.Released(why=tell.reason, token=held.token, delay_min_s=low, delay_max_s=high)
                    )
                )
        if tell.outcome != "refused" and session.stays and self._sessions.get(session.device) is session:
            self._wait(session)

    def _again(self) -> tuple[float, float]:
        """From when to when, in seconds from now, a device that goes away should come again."""
        return self._pace.window(self._clock.now_s())

    async def _token_row(self, nonce: bytes) -> TokenRow | None:
        return await self._told().token_row(nonce)

    def _told(self) -> Coordinator:
        assert self._coordinator is not None, "connect comes first"
        return self._coordinator


def _refused(reason: str, detail: str) -> pb.FromEdge:
    return pb.FromEdge(refused=pb.Refused(reason=reason, detail=detail))
