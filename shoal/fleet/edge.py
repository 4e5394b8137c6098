"""The Edge: holds device sessions, sends plans and models, takes updates in, closes groups. No JAX here.

One asyncio actor. Everything that decides is a machine (`group.py`, and the Coordinator's `round.py`); this file moves
bytes and messages between them and the devices. It trusts no device: every message is bounded, every token verified,
every hash recomputed, and whatever a device sends ends in an answer to that device, never in the fall of the Edge.

    CheckIn ─> Coordinator.arrived … assign ─> Assigned ─> Pull* ─> Push* + Report ─> group: check, add ─> Counted
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, runtime_checkable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from shoal.aggregate.accumulator import Accumulator
from shoal.clock import Clock
from shoal.errors import NetworkError, PlanError, ProtocolError, StoreError, UpdateRefused
from shoal.fixed import FixedPoint, refuse_bad_weight
from shoal.fleet import group as g
from shoal.fleet.configuration import Configuration
from shoal.fleet.costs import Costs
from shoal.fleet.offer import MAX_INLINE_BYTES, Offer
from shoal.fleet.pace import Pace
from shoal.fleet.session import Session
from shoal.fleet.staging import Limits, StagedUpdate
from shoal.fleet.token import read_token
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Runtime
from shoal.plan.plan import Plan
from shoal.record.store import Blobs, TokenRow
from shoal.tensors import Index

log = logging.getLogger("shoal.edge")

MAX_CONTROL_BYTES: Final = 64 << 10
MAX_SLICE_BYTES: Final = 1 << 20
MAX_DEVICE_ID_BYTES: Final = 200
MAX_SESSIONS: Final = 20_000
MAX_KNOWN_TOKENS: Final = 50_000
OPEN_WAIT_S: Final = 20.0
BUSY_DELAY_S: Final = (5.0, 15.0)


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
class GroupResult:
    """A closed group: its sum, who is in it, what it cost."""

    base_version: int
    """The version whose sum it is part of."""
    sums: Accumulator
    counted: tuple[tuple[bytes, float], ...]
    """(nonce, expiry) of every member."""
    costs: Costs


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


@dataclass
class _Held:
    """A token that may still count: on which session its device is, and what has come in."""

    base_version: int
    expires_s: float
    token: pb.Token
    session: Session | None = None
    update: StagedUpdate | None = None
    root: str = ""
    weight: int = 0
    costs: pb.Costs = field(default_factory=pb.Costs)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while slices are written: two calls for one token do not mix, and what is written is not closed."""


class Edge:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        plan: Plan,
        run: str,
        token_key: Ed25519PublicKey,
        blobs: Blobs,
        clock: Clock,
        limits: Limits | None = None,
    ) -> None:
        self._plan, self._manifest, self._run, self._key = plan, plan.manifest, run, token_key
        self._blobs, self._clock, self._limits = blobs, clock, limits or Limits()
        self._coordinator: Coordinator | None = None
        self._sessions: dict[str, Session] = {}
        self._num_sessions = 0
        self._held: dict[bytes, _Held] = {}
        self._nonces: dict[str, bytes] = {}  # device -> what it was assigned last
        takes = self._manifest.server.rounds.most_at_once
        self._pace = Pace(devices_a_round=takes, now_s=clock.now_s())
        self._pool = takes + max(takes, 10)  # devices that come and go are let in to wait
        self._num_waiting = 0
        self._configuration: Configuration | None = None
        self._known: dict[bytes, tuple[bytes, pb.Assignment]] = {}
        policy = self._manifest.server.rounds
        self._groups: g.Groups = g.ClearGroups(policy, most=policy.max_members)
        self._sums: dict[int, Accumulator] = {}
        self._costs: dict[int, Costs] = {}
        self._fixed: Mapping[str, FixedPoint] = {}
        self._closed: asyncio.Future[tuple[int, ...]] | None = None
        self._is_open = asyncio.Event()
        self._broken: dict[int, str] = {}  # groups of which an addition broke off
        self._offer = Offer(plan, Index(()), blobs)
        self._assigned = pb.Assigned()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushes = asyncio.Semaphore(4)
        self._finished = ""
        self._check_ins = self._counted = self._refused = self._released = 0
        self._down_bytes = self._up_bytes = 0
        self._bytes_before = (0, 0)

    def connect(self, coordinator: Coordinator) -> None:
        """Whom to tell of arrivals and members. Called once, before the first session."""
        self._coordinator = coordinator

    def statistics(self) -> Statistics:
        return Statistics(
            sessions_now=self._num_sessions,
            staged_now=sum(held.update is not None for held in self._held.values()),
            check_ins=self._check_ins,
            counted=self._counted,
            refused=self._refused,
            released=self._released,
            down_bytes=self._down_bytes,
            up_bytes=self._up_bytes,
        )

    # What the Coordinator says.

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        """A round begins. The groups of a round that was abandoned go on.

        Args:
            configuration: the round's.
            model: what its devices start from.
            taken: version -> members that sums of the record hold already.
        """
        if self._configuration is None or self._configuration.base_version != configuration.base_version:
            self._pace.opened(self._clock.now_s())
            self._offer = Offer(self._plan, model, self._blobs)
        self._configuration, self._fixed = configuration, configuration.fixed(self._manifest)
        self._assigned = self._offer.assigned(configuration, run=self._run)
        self._do(self._groups.step(g.Open(configuration.base_version, tuple(taken.items())), self._clock.now_s()))
        for nonce in [n for n in self._held if self._groups.state(n) is None]:
            self._forget(self._held.pop(nonce))
        self._nonces = {device: nonce for device, nonce in self._nonces.items() if nonce in self._held}
        self._is_open.set()

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        """Sends a device its assignment; False where it has gone."""
        session = self._sessions.get(device)
        if session is None or self._configuration is None:
            return False
        self._know(token, assignment)
        self._hold(assignment, token, session)
        self._nonces[device] = assignment.nonce
        self._stop_waiting(session)
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
        self._closed = asyncio.get_running_loop().create_future()
        if final:
            self._is_open.clear()
        self._do(self._groups.step(g.Close(final), self._clock.now_s()))
        groups = await self._closed
        if broken := [self._broken.pop(group) for group in groups if group in self._broken]:
            for group in groups:
                del self._sums[group], self._costs[group]
            raise StoreError(f"The sum of a group is broken: {broken[0]}")
        down, up = self._bytes_before
        if groups:
            costs = self._costs[groups[0]]
            costs.down_bytes, costs.up_bytes = self._down_bytes - down, self._up_bytes - up
            self._bytes_before = (self._down_bytes, self._up_bytes)
        return [self._result(group) for group in groups]

    def _result(self, group: int) -> GroupResult:
        counted = tuple((nonce, self._held[nonce].expires_s) for nonce in self._groups.members(group))
        return GroupResult(self._groups.base_version(group), self._sums.pop(group), counted, self._costs.pop(group))

    def stored(self) -> None:
        """The sums that were closed are durable, and wait for a commit: their members are told."""
        self._do(self._groups.step(g.Stored(), self._clock.now_s()))

    def committed(self, version: int) -> None:
        """The sums that were closed are durable, in this version: their members are told."""
        self._do(self._groups.step(g.Committed(version), self._clock.now_s()))

    def failed(self, why: str) -> None:
        """The sums that were closed could not be used; their members are told, and train anew."""
        self._do(self._groups.step(g.Failed(why), self._clock.now_s()))

    def finish(self, why: str) -> None:
        """The run is over: every device is told."""
        self._finished = why
        self._is_open.set()  # whoever waits for a round is answered
        for session in list(self._sessions.values()):
            session.send(pb.FromEdge(finished=pb.Finished(why=why)))

    async def close(self) -> None:
        """Ends every session and forgets what is staged."""
        for session in list(self._sessions.values()):
            session.end()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drop_updates()

    # What devices say.

    async def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncGenerator[pb.FromEdge, None]:
        """One control stream: yields what the device is to be told until either side ends it."""
        session = Session()
        self._num_sessions += 1
        reader = asyncio.create_task(self._read(session, messages))
        try:
            while (message := await session.next()) is not None:
                yield message
        finally:
            self._num_sessions -= 1
            reader.cancel()
            self._stop_waiting(session)
            if session.device and self._sessions.get(session.device) is session:
                del self._sessions[session.device]
                self._left(session.device)

    async def _read(self, session: Session, messages: AsyncIterator[pb.FromDevice]) -> None:
        try:
            async for message in messages:
                if message.ByteSize() > MAX_CONTROL_BYTES:
                    raise ProtocolError(
                        f"Expected control messages of at most {MAX_CONTROL_BYTES} bytes, got {message.ByteSize()}. "
                        "Send a larger update with Push."
                    )
                await self._handle(session, message)
        except ProtocolError as error:
            session.send(pb.FromEdge(refused=pb.Refused(reason="protocol", detail=str(error))))
        except (NetworkError, StoreError) as error:
            log.warning("a device is told to come later: %s", error)
            session.send(pb.FromEdge(later=_busy(str(error))))
        except Exception:  # our bug; it ends this session and nothing else
            log.exception("a message of a device could not be handled")
            session.send(pb.FromEdge(later=_busy("the server has failed at this message; it was logged there")))
        finally:
            session.end()

    async def _handle(self, session: Session, message: pb.FromDevice) -> None:
        match message.WhichOneof("kind"):
            case "check_in":
                self._check_in(session, message.check_in)
            case "report":
                await self._report(session, message.report)
            case "gave_up":
                self._gave_up(message.gave_up)
            case "ping":
                session.send(pb.FromEdge(ping=pb.Ping()))
            case _:
                raise ProtocolError("Expected check_in, report, gave_up or ping.")

    def _check_in(self, session: Session, check_in: pb.CheckIn) -> None:
        self._check_ins += 1
        device = check_in.device_id
        if not 0 < len(device.encode()) <= MAX_DEVICE_ID_BYTES:
            raise ProtocolError(f"Expected a device id of 1 to {MAX_DEVICE_ID_BYTES} bytes.")
        if check_in.tasks and self._manifest.task not in check_in.tasks:
            needs = f"a device that serves task {self._manifest.task!r}; this one serves {list(check_in.tasks)[:3]}"
            return session.send(pb.FromEdge(incompatible=pb.Incompatible(needs=needs)))
        if self._finished:
            return session.send(pb.FromEdge(finished=pb.Finished(why=self._finished)))
        try:
            self._manifest.pick(_runtime(check_in.runtime))
        except PlanError as error:
            return session.send(pb.FromEdge(incompatible=pb.Incompatible(needs=str(error))))
        if device not in self._sessions and len(self._sessions) >= MAX_SESSIONS:
            return session.send(pb.FromEdge(later=_busy("full")))
        if session.device and session.device != device:
            raise ProtocolError("A session serves one device.")
        old = self._sessions.get(device)
        if old is not None and old is not session:
            log.warning("device %s checked in on another stream; the old one is ended", device)
            old.send(
                _refused("replaced", f"Another device has checked in as {device!r}. Give each an --id of its own.")
            )
            old.end()
        session.device = device
        self._sessions[device] = session
        self._forget_lost_work(device)
        session.stays = check_in.stay
        self._pace.arrived(1, self._clock.now_s())
        if not session.stays and not session.waiting and self._num_waiting >= self._pool:
            low, high = self._again()
            later = pb.Later(delay_min_s=low, delay_max_s=high, why="enough devices wait for now")
            return session.send(pb.FromEdge(later=later))
        self._wait(session)

    def _stop_waiting(self, session: Session) -> None:
        self._num_waiting -= session.waiting
        session.waiting = False

    def _left(self, device: str) -> None:
        self._to_coordinator(lambda c: c.left(device))
        nonce = self._nonces.get(device)
        if nonce is not None and self._groups.state(nonce) is g.Member.JOINED:
            self._to_coordinator(lambda c: c.away(nonce))

    def _forget_lost_work(self, device: str) -> None:
        """One who checks in has nothing in hand: what it had of a version before is lost, and its place is free."""
        nonce = self._nonces.pop(device, None)
        held = self._held.get(nonce) if nonce is not None else None
        present = self._configuration
        if nonce is not None and held is not None and present is not None and held.base_version < present.base_version:
            self._do(self._groups.step(g.Gone(nonce, "it checked in anew"), self._clock.now_s()))

    def _wait(self, session: Session) -> None:
        if not session.waiting:  # one who asks again before the answer waits no less
            session.waiting = True
            self._num_waiting += 1
            self._to_coordinator(lambda c: c.arrived(session.device))

    async def _report(self, session: Session, report: pb.Report) -> None:
        held, nonce = await self._admit(session, report.token)
        if held is None:
            return
        async with held.lock:
            if self._groups.state(nonce) is not g.Member.JOINED:
                return  # reported before, and told when the round ends; or the round has ended, and it was told
            try:
                update = self._update(held, report.root)
                for part in report.slices:
                    await self._write(held, update, part.tensor, part.offset, part.data)
            except (ProtocolError, UpdateRefused) as error:
                return self._refuse(nonce, error)
            if self._groups.state(nonce) is not g.Member.JOINED:
                return  # the round has closed meanwhile, and told it so
            if missing := update.missing[:100]:
                return session.send(pb.FromEdge(incomplete=pb.Incomplete(token=report.token, missing=missing)))
            held.root, held.weight, held.costs = report.root, report.weight, report.costs
            self._do(self._groups.step(g.Offered(nonce), self._clock.now_s()))

    async def _admit(self, session: Session | None, token: pb.Token) -> tuple[_Held | None, bytes]:
        """The token's place in the open group; None (and an answer, where there is a session) if it has none any more.

        Raises:
            ProtocolError: the token is not one of this run, or has expired.
            NetworkError: no round is open, and none opens soon.
        """
        assignment = self._read_token(token)
        nonce = assignment.nonce
        row: TokenRow | None = None
        if self._place(nonce) is None:
            row = await self._settled(nonce)
        held = self._place(nonce)
        if held is None and row is None and self._takes(assignment):
            held = self._hold(assignment, token, session)
            if self._groups.state(nonce) is None:
                return None, nonce  # the round is closing, and has told it so
        if held is not None:
            held.session = session or held.session
        elif session is not None:
            session.send(_answer(row, token, self._again()))
        return held, nonce

    async def _settled(self, nonce: bytes) -> TokenRow | None:
        """What the record says of a nonce, as of the round that is open now."""
        while True:
            await self._until_open()
            before = self._configuration
            row = await self._coordinator_row(nonce)
            if self._is_open.is_set() and self._configuration is before:
                return row

    def _place(self, nonce: bytes) -> _Held | None:
        return self._held.get(nonce) if self._groups.state(nonce) is not None else None

    def _takes(self, assignment: pb.Assignment) -> bool:
        present = self._configuration
        late = -1 if present is None else present.base_version - assignment.base_version
        return self._is_open.is_set() and 0 <= late <= self._manifest.server.rounds.max_staleness

    async def _until_open(self) -> None:
        # Between two rounds, and after a restart before the first, nobody can say yet what a token is worth.
        try:
            async with asyncio.timeout(OPEN_WAIT_S):
                await self._is_open.wait()
        except TimeoutError:
            raise NetworkError("No round is open at the moment; try again.") from None

    def _gave_up(self, message: pb.GaveUp) -> None:
        nonce = self._read_token(message.token).nonce
        log.info("a device gave up in %s: %s", message.stage[:40], message.why[:200])
        self._do(self._groups.step(g.Gone(nonce, message.why[:200]), self._clock.now_s()))
        if self._groups.state(nonce) is None and nonce in self._held:
            self._forget(self._held.pop(nonce))

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        """The bytes of one blob that the token gives a right to. Raises ProtocolError for any other."""
        self._read_token(request.token)
        async for piece in self._offer.pull(request):
            self._down_bytes += len(piece.data)
            yield piece

    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply:
        """Takes slices of an update in, each a serialized `PushSlice`; says how much of each tensor is here.

        Those that wait for their turn are not parsed yet: with many devices pushing at once that is what memory goes to.

        A slice that begins before what is here adds what is new in it: a device that sends again does no harm.

        Raises:
            ProtocolError: the token is wrong, or the slices are; the update is refused then.
            NetworkError: not now.
        """
        held: _Held | None = None
        nonce, name, root = b"", "", ""
        async for data in slices:
            async with self._pushes:
                part = _parsed(data)
                if held is None:
                    held, nonce = await self._admit(None, part.token)
                    root = part.root
                name = part.tensor or name
                if held is None or not await self._take(held, nonce, root, name, part):
                    break  # the round has closed, or the update is whole: what comes now is for nothing
        return pb.PushReply(received=await self._received(held, nonce) if held is not None else {})

    async def _take(self, held: _Held, nonce: bytes, root: str, name: str, part: pb.PushSlice) -> bool:
        async with held.lock:
            if self._groups.state(nonce) is not g.Member.JOINED:
                return False
            try:
                await self._write(held, self._update(held, root), name, part.offset, part.data)
            except (ProtocolError, UpdateRefused) as error:
                self._refuse(nonce, error)
                raise ProtocolError(str(error)) from error
        return True

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        """What became of an assignment, and how much of its update is here. Raises NetworkError: not now."""
        try:
            assignment = self._read_token(request.token)
        except ProtocolError as error:
            return pb.StatusReply(state=pb.StatusReply.EXPIRED, reason=str(error))
        nonce = assignment.nonce
        if (held := self._place(nonce)) is not None:
            received = await self._received(held, nonce)
            return pb.StatusReply(state=pb.StatusReply.PENDING, received=received)
        row = await self._settled(nonce)
        if row is not None and row.state == "counted":
            return pb.StatusReply(state=pb.StatusReply.COUNTED, version=row.version or 0)
        if row is not None and row.state == "refused":
            return pb.StatusReply(state=pb.StatusReply.REFUSED, reason=row.reason)
        if not self._takes(assignment):
            return pb.StatusReply(state=pb.StatusReply.REFUSED, reason="late")
        return pb.StatusReply(state=pb.StatusReply.UNKNOWN)

    async def _received(self, held: _Held, nonce: bytes) -> dict[str, int]:
        async with held.lock:
            if self._groups.state(nonce) not in (g.Member.JOINED, None):
                return {spec.name: spec.size_bytes for spec in self._manifest.update}
            return held.update.received if held.update is not None else {}

    # Between the machine and the world.

    async def _write(self, held: _Held, update: StagedUpdate, name: str, offset: int, data: bytes) -> None:
        if len(data) > MAX_SLICE_BYTES:
            raise ProtocolError(f"Expected slices of at most {MAX_SLICE_BYTES} bytes, got {len(data)}.")
        self._up_bytes += len(data)
        if len(data) > MAX_INLINE_BYTES:
            await _in_thread(update.write, name, offset, data)
        else:
            update.write(name, offset, data)
        if update.refusal is not None:
            raise update.refusal  # nothing that follows can make it good

    def _refuse(self, nonce: bytes, error: Exception) -> None:
        reason = error.reason if isinstance(error, UpdateRefused) else "wrong slices"
        log.warning("an update was refused: %s", error)
        self._do(self._groups.step(g.Checked(nonce, reason, str(error)), self._clock.now_s()))

    def _do(self, commands: list[g.Command]) -> None:
        for command in commands:
            match command:
                case g.Check(nonce):
                    self._check(nonce)
                case g.Add(nonce, group, discount):
                    self._add(nonce, group, discount)
                case g.Merge(source, target):
                    self._merge(source, target)
                case g.Tell():
                    self._tell(command)
                case g.JoinRound(nonce, version):
                    self._to_coordinator(lambda c, n=nonce, v=version: c.joined(n, v))  # type: ignore[misc]
                case g.CountMember(nonce, staleness):
                    self._count(nonce, staleness)
                case g.ReleaseMember(nonce):
                    self._to_coordinator(lambda c, n=nonce: c.released(n))  # type: ignore[misc]
                case g.Closed(groups):
                    assert self._closed is not None
                    self._closed.set_result(groups)

    def _check(self, nonce: bytes) -> None:
        held = self._held[nonce]
        assert held.update is not None
        try:
            refuse_bad_weight(held.weight, self._manifest.training.max_weight)
            held.update.check(held.root)
            checked = g.Checked(nonce)
        except UpdateRefused as refusal:
            log.warning("an update was refused: %s", refusal)
            checked = g.Checked(nonce, refusal.reason, str(refusal))
        self._do(self._groups.step(checked, self._clock.now_s()))

    def _add(self, nonce: bytes, group: int, discount: float) -> None:
        held = self._held[nonce]
        assert held.update is not None and self._configuration is not None
        if group not in self._sums:
            self._sums[group], self._costs[group] = self._configuration.accumulator(self._manifest), Costs()
        work = (held.update, held.weight, discount, group)
        self._costs[group].add(held.costs)
        if self._manifest.update_bytes > self._limits.memory_bytes:
            self._spawn(self._add_behind(nonce, held, work))
            return
        self._add_pieces(*work)
        self._added(nonce, held)

    async def _add_behind(self, nonce: bytes, held: _Held, work: tuple[StagedUpdate, int, float, int]) -> None:
        await _in_thread(self._add_pieces, *work)
        self._added(nonce, held)

    def _add_pieces(self, update: StagedUpdate, weight: int, discount: float, group: int) -> None:
        try:
            self._sums[group].add_checked(update.pieces(), weight=weight, discount=discount)
        except Exception as error:  # half of it may be in the sum: nothing can be done with that any more
            log.exception("an update could not be added")
            self._broken[group] = f"an update could not be added: {error}"

    def _added(self, nonce: bytes, held: _Held) -> None:
        self._forget(held)
        self._do(self._groups.step(g.Added(nonce), self._clock.now_s()))

    def _merge(self, source: int, target: int) -> None:
        sums, costs = self._sums.pop(source), self._costs.pop(source)
        if source in self._broken:
            self._broken[target] = self._broken.pop(source)
        if target not in self._sums:
            self._sums[target], self._costs[target] = sums, costs
            return
        self._sums[target].merge_all(sums)
        self._costs[target].merge(costs)

    def _count(self, nonce: bytes, staleness: int) -> None:
        assert self._configuration is not None
        self._counted += 1
        version = self._configuration.base_version
        self._to_coordinator(lambda c: c.counted(nonce, version, staleness))

    def _tell(self, tell: g.Tell) -> None:
        held = self._held.pop(tell.nonce, None)
        if held is not None:
            self._forget(held)
        self._refused += tell.outcome == "refused"
        self._released += tell.outcome == "released"
        session = held.session if held is not None else None
        if held is None or session is None:
            return  # the token outlives the session: the device will ask
        low, high = self._again()
        match tell.outcome:
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

    def _hold(self, assignment: pb.Assignment, token: pb.Token, session: Session | None) -> _Held:
        held = self._held.setdefault(assignment.nonce, _Held(assignment.base_version, assignment.expires_s, token))
        held.session, held.token = session or held.session, token
        held.expires_s = max(held.expires_s, assignment.expires_s)
        self._do(self._groups.step(g.Joined(assignment.nonce, assignment.base_version), self._clock.now_s()))
        return held

    def _update(self, held: _Held, root: str) -> StagedUpdate:
        """What is staged of an update; begun here, and begun anew where it is another than before."""
        if held.update is not None and root and held.root and root != held.root:
            held.update.close()
            held.update = None
        held.root = root or held.root
        if held.update is None:
            if sum(h.update is not None for h in self._held.values()) >= self._limits.updates:
                raise NetworkError("This Edge holds as many updates as it may; try again later.")
            held.update = StagedUpdate(self._manifest.update, self._fixed, self._limits)
        return held.update

    def _forget(self, held: _Held) -> None:
        update, held.update = held.update, None
        if update is None:
            return
        if held.lock.locked():
            self._spawn(_close_behind(update, held.lock))
        else:
            update.close()

    def _know(self, token: pb.Token, assignment: pb.Assignment) -> None:
        if len(self._known) >= MAX_KNOWN_TOKENS:
            self._known.clear()
        self._known[token.signature] = (token.signed, assignment)

    def _read_token(self, token: pb.Token) -> pb.Assignment:
        signed, assignment = self._known.get(token.signature, (b"", None))
        if assignment is None or signed != token.signed or assignment.expires_s <= self._clock.wall_s():
            assignment = read_token(token, self._key, wall_s=self._clock.wall_s())
            self._know(token, assignment)  # a signature is checked once, not with every call
        if assignment.run != self._run:
            raise ProtocolError("The token is of another run; check in again.")
        return assignment

    def _drop_updates(self) -> None:
        for held in self._held.values():
            self._forget(held)
        self._held.clear()

    def _to_coordinator(self, say: Callable[[Coordinator], None]) -> None:
        assert self._coordinator is not None, "connect comes first"
        say(self._coordinator)

    async def _coordinator_row(self, nonce: bytes) -> TokenRow | None:
        assert self._coordinator is not None, "connect comes first"
        return await self._coordinator.token_row(nonce)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _in_thread(work: Callable[..., None], *args: object) -> None:
    """Runs in a thread; one who is cancelled still waits for its end, so that a lock outlives what it guards."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise


async def _close_behind(update: StagedUpdate, lock: asyncio.Lock) -> None:
    async with lock:
        update.close()


def _parsed(data: bytes) -> pb.PushSlice:
    try:
        return pb.PushSlice.FromString(data)
    except DecodeError as error:
        raise ProtocolError(f"Expected a slice, got {len(data)} bytes that are none.") from error


def _runtime(info: pb.RuntimeInfo) -> Runtime:
    if len(info.version) != 3:
        raise ProtocolError(f"Expected a runtime version of three numbers, got {list(info.version)[:4]}.")
    major, minor, patch = info.version
    return Runtime(
        kind=info.kind,
        version=(major, minor, patch),
        calling_convention=info.calling_convention,
        platforms=tuple(info.platforms),
    )


def _refused(reason: str, detail: str) -> pb.FromEdge:
    return pb.FromEdge(refused=pb.Refused(reason=reason, detail=detail))


def _busy(why: str) -> pb.Later:
    low, high = BUSY_DELAY_S
    return pb.Later(delay_min_s=low, delay_max_s=high, why=why)


def _answer(row: TokenRow | None, token: pb.Token, again: tuple[float, float]) -> pb.FromEdge:
    low, high = again
    if row is not None and row.state == "counted":
        return pb.FromEdge(counted=pb.Counted(version=row.version or 0, token=token, delay_min_s=low, delay_max_s=high))
    if row is not None and row.state == "refused":
        return pb.FromEdge(refused=pb.Refused(reason=row.reason, token=token, delay_min_s=low, delay_max_s=high))
    return pb.FromEdge(
        refused=pb.Refused(
            reason="late", detail="The round has closed.", token=token, delay_min_s=low, delay_max_s=high
        )
    )
