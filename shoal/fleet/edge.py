"""The Edge: holds device sessions, sends plans and models, takes updates in, closes groups. No JAX here.

One asyncio actor. Everything that decides is a machine (`group.py`, and the Coordinator's `round.py`); this file moves
bytes and messages between them and the devices. It trusts no device: every message is bounded, every token verified,
every hash recomputed, and whatever a device sends ends in an answer to that device, never in the fall of the Edge.

    CheckIn ─> Coordinator.arrived … assign ─> Assigned ─> Pull* ─> Push* + Report ─> group: check, add ─> Counted
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Final, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shoal.aggregate.accumulator import Accumulator
from shoal.clock import Clock
from shoal.errors import PlanError, ProtocolError, StoreError, UpdateRefused
from shoal.fixed import refuse_bad_weight
from shoal.fleet import group as g
from shoal.fleet.configuration import Configuration
from shoal.fleet.costs import Costs
from shoal.fleet.staging import Limits, StagedUpdate
from shoal.fleet.token import read_token
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Runtime
from shoal.plan.plan import Plan
from shoal.record.store import Blobs, TokenRow
from shoal.tensors import Index

log = logging.getLogger("shoal.edge")

MAX_CONTROL_BYTES: Final = 64 << 10
MAX_INLINE_BYTES: Final = 32 << 10
SLICE_BYTES: Final = 256 << 10
MAX_SLICE_BYTES: Final = 1 << 20
MAX_DEVICE_ID_BYTES: Final = 200
MAX_SESSIONS: Final = 20_000
MAX_OUTGOING: Final = 64
BUSY_DELAY_S: Final = (5.0, 15.0)


class Coordinator(Protocol):
    """What an Edge says to the Coordinator."""

    def arrived(self, device: str) -> None: ...
    def left(self, device: str) -> None: ...
    def joined(self, nonce: bytes) -> None: ...
    def counted(self, nonce: bytes) -> None: ...
    def released(self, nonce: bytes) -> None: ...
    async def token_row(self, nonce: bytes) -> TokenRow | None: ...


@dataclass(frozen=True)
class GroupResult:
    """A closed group: its sum, who is in it, what it cost."""

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
class _Session:
    outgoing: "asyncio.Queue[pb.FromEdge | None]" = field(default_factory=lambda: asyncio.Queue(MAX_OUTGOING))
    device: str = ""

    def send(self, message: pb.FromEdge) -> None:
        """Queues a message; a session that does not read is ended, its token lives on."""
        try:
            self.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        while self.outgoing.full():
            self.outgoing.get_nowait()
        self.outgoing.put_nowait(None)


@dataclass
class _Held:
    """A token of the open group: on which session its device is, and what has come in."""

    expires_s: float
    token: pb.Token
    session: _Session | None = None
    update: StagedUpdate | None = None
    root: str = ""
    weight: int = 0
    costs: pb.Costs = field(default_factory=pb.Costs)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        self._sessions: dict[str, _Session] = {}
        self._num_sessions = 0
        self._held: dict[bytes, _Held] = {}
        self._configuration: Configuration | None = None
        self._group = g.ClearGroup()
        self._closed = asyncio.Event()
        self._sums: Accumulator | None = None
        self._costs = Costs()
        self._model = Index(())
        self._allowed: dict[str, int] = {}
        self._inline: list[pb.Blob] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushes = asyncio.Semaphore(4)
        self._finished = ""
        self._check_ins = self._counted = self._refused = self._released = 0
        self._down_bytes = self._up_bytes = 0

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

    def open_group(self, configuration: Configuration, model: Index) -> None:
        """A round begins. The group of a round that was abandoned goes on; a new version has a new one."""
        old = self._configuration
        self._configuration = configuration
        if old is not None and old.base_version == configuration.base_version and self._sums is not None:
            return
        self._group, self._closed = g.ClearGroup(), asyncio.Event()
        self._sums, self._costs = configuration.accumulator(self._manifest), Costs()
        self._drop_updates()
        self._model = model
        self._allow(model)

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        """Sends a device its assignment; False where it has gone."""
        session = self._sessions.get(device)
        if session is None or self._configuration is None:
            return False
        self._hold(assignment, token, session)
        session.send(
            pb.FromEdge(
                assigned=pb.Assigned(
                    token=token,
                    configuration=self._configuration.to_proto(),
                    plan=self._plan.hash,
                    plan_signature=self._plan.signature,
                    plan_public_key=self._plan.public_key,
                    model=self._model.root,
                    inline=self._inline,
                    group="clear",
                )
            )
        )
        return True

    async def close_group(self) -> GroupResult:
        """Ends the group; returns its sum once an addition under way is done."""
        self._do(self._group.step(g.Close(), self._clock.now_s()))
        await self._closed.wait()
        assert self._sums is not None
        counted = tuple((nonce, self._held[nonce].expires_s) for nonce in self._group.added)
        return GroupResult(self._sums, counted, self._costs)

    def committed(self, version: int) -> None:
        """The group's sum is durable: its members are told."""
        self._do(self._group.step(g.Committed(version), self._clock.now_s()))
        self._reset()

    def failed(self, why: str) -> None:
        """The group's sum could not be used; its members may report again."""
        for nonce in self._group.added:
            self._tell(g.Tell(nonce, "refused", reason="failed", detail=why))
        self._reset()

    def finish(self, why: str) -> None:
        """The run is over: every device is told."""
        self._finished = why
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

    async def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncIterator[pb.FromEdge]:
        """One control stream: yields what the device is to be told until either side ends it."""
        session = _Session()
        self._num_sessions += 1
        reader = asyncio.create_task(self._read(session, messages))
        try:
            while (message := await session.outgoing.get()) is not None:
                yield message
        finally:
            self._num_sessions -= 1
            reader.cancel()
            if session.device and self._sessions.get(session.device) is session:
                del self._sessions[session.device]
                self._to_coordinator(lambda c: c.left(session.device))

    async def _read(self, session: _Session, messages: AsyncIterator[pb.FromDevice]) -> None:
        try:
            async for message in messages:
                if message.ByteSize() > MAX_CONTROL_BYTES:
                    raise ProtocolError(f"Expected control messages of at most {MAX_CONTROL_BYTES} bytes.")
                await self._handle(session, message)
        except ProtocolError as error:
            session.send(pb.FromEdge(refused=pb.Refused(reason="protocol", detail=str(error))))
        except StoreError as error:
            log.warning("the record cannot be read: %s", error)
            session.send(pb.FromEdge(later=_later("the record cannot be read")))
        finally:
            session.end()

    async def _handle(self, session: _Session, message: pb.FromDevice) -> None:
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

    def _check_in(self, session: _Session, check_in: pb.CheckIn) -> None:
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
            return session.send(pb.FromEdge(later=_later("full")))
        if session.device and session.device != device:
            raise ProtocolError("A session serves one device.")
        old = self._sessions.get(device)
        if old is not None and old is not session:
            old.end()
        session.device = device
        self._sessions[device] = session
        self._to_coordinator(lambda c: c.arrived(device))

    async def _report(self, session: _Session, report: pb.Report) -> None:
        held, assignment = await self._admit(session, report.token)
        if held is None:
            return
        async with held.lock:
            for part in report.slices:
                await self._write(assignment.nonce, held, part.tensor, part.offset, part.data)
        update = self._update(held)
        if update.missing:
            missing = update.missing[:100]
            return session.send(pb.FromEdge(incomplete=pb.Incomplete(token=report.token, missing=missing)))
        held.root, held.weight, held.costs = report.root, report.weight, report.costs
        self._do(self._group.step(g.Offered(assignment.nonce), self._clock.now_s()))

    async def _admit(self, session: _Session | None, token: pb.Token) -> tuple[_Held | None, pb.Assignment]:
        """The token's place in the open group; None (and an answer, where there is a session) if it has none any more."""
        assignment = self._read_token(token)
        nonce = assignment.nonce
        if nonce in self._held and self._group.state(nonce) is not None:
            held = self._held[nonce]
            held.session = session or held.session
            return held, assignment
        row = await self._coordinator_row(nonce)
        current = self._configuration
        if row is None and current is not None and assignment.base_version == current.base_version:
            self._hold(assignment, token, session)
            if self._group.state(nonce) is not None:
                return self._held[nonce], assignment
        if session is not None:
            session.send(_answer(row, token))
        return None, assignment

    def _gave_up(self, message: pb.GaveUp) -> None:
        assignment = self._read_token(message.token)
        log.info("a device gave up in %s: %s", message.stage[:40], message.why[:200])
        self._do(self._group.step(g.Gone(assignment.nonce, message.why[:200]), self._clock.now_s()))

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        """The bytes of one blob that the token gives a right to. Raises ProtocolError for any other."""
        self._read_token(request.token)
        total = self._allowed.get(request.hash)
        if total is None:
            raise ProtocolError(f"Blob {request.hash[:12]!r} is no part of the plan or of the open round's model.")
        if request.ids:
            raise ProtocolError("Pulling single rows of a table is not served by this version; pull the whole tensor.")
        if request.offset > total:
            raise ProtocolError(f"Expected an offset of at most {total}, got {request.offset}.")
        end = min(total, request.offset + request.credit) if request.credit else total
        offset = request.offset
        while offset < end or offset == request.offset:
            data = await self._read_blob(request.hash, offset, min(SLICE_BYTES, end - offset))
            self._down_bytes += len(data)
            yield pb.Slice(offset=offset, data=data, total=total)
            offset += len(data)
            if not data:
                break

    async def _read_blob(self, hash: str, offset: int, size: int) -> bytes:
        if hash == self._model.root:  # an index is a row of the record, not a blob
            return self._model.data[offset : offset + size]
        return await asyncio.to_thread(self._blobs.read, hash, offset, size)

    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
        """Takes slices of an update in; says how much of each tensor is here. Raises ProtocolError for wrong ones."""
        held: _Held | None = None
        nonce, name = b"", ""
        async for part in slices:
            if held is None:
                held, assignment = await self._admit(None, part.token)
                nonce = assignment.nonce
                if held is None:
                    return pb.PushReply()
            name = part.tensor or name
            async with self._pushes, held.lock:
                await self._write(nonce, held, name, part.offset, part.data)
        return pb.PushReply(received=self._update(held).received if held is not None else {})

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        """What became of an assignment, and how much of its update is here."""
        try:
            assignment = self._read_token(request.token)
        except ProtocolError as error:
            return pb.StatusReply(state=pb.StatusReply.EXPIRED, reason=str(error))
        row = await self._coordinator_row(assignment.nonce)
        if row is not None and row.state == "counted":
            return pb.StatusReply(state=pb.StatusReply.COUNTED, version=row.version)
        if row is not None and row.state == "refused":
            return pb.StatusReply(state=pb.StatusReply.REFUSED, reason=row.reason)
        current = self._configuration
        if current is None or assignment.base_version != current.base_version:
            return pb.StatusReply(state=pb.StatusReply.REFUSED, reason="late")
        held = self._held.get(assignment.nonce)
        if held is None or held.update is None:
            return pb.StatusReply(state=pb.StatusReply.UNKNOWN)
        return pb.StatusReply(state=pb.StatusReply.PENDING, received=held.update.received)

    # Between the machine and the world.

    async def _write(self, nonce: bytes, held: _Held, name: str, offset: int, data: bytes) -> None:
        if len(data) > MAX_SLICE_BYTES:
            raise ProtocolError(f"Expected slices of at most {MAX_SLICE_BYTES} bytes, got {len(data)}.")
        if self._group.state(nonce) is not g.Member.JOINED:
            return  # closed, or already whole: what comes now is for nothing
        update = self._update(held)
        self._up_bytes += len(data)
        if len(data) > MAX_INLINE_BYTES:
            await asyncio.to_thread(update.write, name, offset, data)
        else:
            update.write(name, offset, data)

    def _do(self, commands: list[g.Command]) -> None:
        for command in commands:
            match command:
                case g.Check(nonce):
                    self._check(nonce)
                case g.Add(nonce):
                    self._spawn(self._add(nonce))
                case g.Tell():
                    self._tell(command)
                case g.JoinRound(nonce):
                    self._to_coordinator(lambda c, n=nonce: c.joined(n))  # type: ignore[misc]
                case g.CountMember(nonce):
                    self._counted += 1
                    self._to_coordinator(lambda c, n=nonce: c.counted(n))  # type: ignore[misc]
                case g.ReleaseMember(nonce):
                    self._to_coordinator(lambda c, n=nonce: c.released(n))  # type: ignore[misc]
                case g.Closed():
                    self._closed.set()

    def _check(self, nonce: bytes) -> None:
        held = self._held[nonce]
        assert self._sums is not None
        try:
            refuse_bad_weight(held.weight, self._sums.weight_bound)
            self._update(held).check(held.root)
            checked = g.Checked(nonce)
        except UpdateRefused as refusal:
            checked = g.Checked(nonce, refusal.reason, str(refusal))
        self._do(self._group.step(checked, self._clock.now_s()))

    async def _add(self, nonce: bytes) -> None:
        held, sums = self._held[nonce], self._sums
        assert held.update is not None and sums is not None
        if self._manifest.update_bytes > self._limits.memory_bytes:
            await asyncio.to_thread(sums.add_checked, held.update.pieces(), weight=held.weight)
        else:
            sums.add_checked(held.update.pieces(), weight=held.weight)
        held.update.close()
        held.update = None
        self._costs.add(held.costs, down=self._model.size_bytes, up=self._manifest.update_bytes)
        self._do(self._group.step(g.Added(nonce), self._clock.now_s()))

    def _tell(self, tell: g.Tell) -> None:
        held = self._held.get(tell.nonce)
        if tell.outcome != "counted" and held is not None and held.update is not None:
            held.update.close()
            held.update = None
        self._refused += tell.outcome == "refused"
        self._released += tell.outcome == "released"
        session = held.session if held is not None else None
        if held is None or session is None:
            return  # the token outlives the session: the device will ask
        match tell.outcome:
            case "counted":
                session.send(pb.FromEdge(counted=pb.Counted(version=tell.version, token=held.token)))
            case "refused":
                answer = pb.Refused(reason=tell.reason, detail=tell.detail, token=held.token)
                session.send(pb.FromEdge(refused=answer))
            case "released":
                session.send(pb.FromEdge(released=pb.Released(why=tell.reason, token=held.token)))

    def _hold(self, assignment: pb.Assignment, token: pb.Token, session: _Session | None) -> None:
        held = self._held.setdefault(assignment.nonce, _Held(assignment.expires_s, token))
        held.session = session or held.session
        self._do(self._group.step(g.Joined(assignment.nonce), self._clock.now_s()))

    def _update(self, held: _Held) -> StagedUpdate:
        if held.update is None:
            assert self._sums is not None
            if sum(h.update is not None for h in self._held.values()) >= self._limits.updates:
                raise ProtocolError("This Edge holds as many updates as it may; try again later.")
            held.update = StagedUpdate(self._manifest.update, self._sums.fixed, self._limits)
        return held.update

    def _read_token(self, token: pb.Token) -> pb.Assignment:
        assignment = read_token(token, self._key, wall_s=self._clock.wall_s())
        if assignment.run != self._run:
            raise ProtocolError("The token is of another run; check in again.")
        return assignment

    def _reset(self) -> None:
        self._drop_updates()
        self._sums, self._group = None, g.ClearGroup()
        self._group.step(g.Close(), self._clock.now_s())  # between two rounds nothing joins

    def _drop_updates(self) -> None:
        for held in self._held.values():
            if held.update is not None:
                held.update.close()
        self._held.clear()

    def _allow(self, model: Index) -> None:
        plan = {self._manifest.hash: len(self._manifest.data)} | {p.hash: p.size_bytes for p in self._manifest.programs}
        tensors = {entry.hash: entry.spec.size_bytes for entry in model}
        self._allowed = plan | {model.root: len(model.data)} | tensors
        self._inline = []
        if len(model.data) + model.size_bytes <= MAX_INLINE_BYTES:
            whole = {model.root: model.data} | {e.hash: self._blobs.get(e.hash) for e in model}
            self._inline = [pb.Blob(hash=hash, data=data) for hash, data in whole.items()]

    def _to_coordinator(self, say: Callable[[Coordinator], None]) -> None:
        assert self._coordinator is not None, "connect comes first"
        say(self._coordinator)

    async def _coordinator_row(self, nonce: bytes) -> TokenRow | None:
        assert self._coordinator is not None, "connect comes first"
        return await self._coordinator.token_row(nonce)

    def _spawn(self, work: "asyncio.coroutines._CoroutineLike[None]") -> None:  # type: ignore[name-defined]
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


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


def _later(why: str) -> pb.Later:
    low, high = BUSY_DELAY_S
    return pb.Later(delay_min_s=low, delay_max_s=high, why=why)


def _answer(row: TokenRow | None, token: pb.Token) -> pb.FromEdge:
    if row is not None and row.state == "counted":
        return pb.FromEdge(counted=pb.Counted(version=row.version, token=token))
    if row is not None and row.state == "refused":
        return pb.FromEdge(refused=pb.Refused(reason=row.reason, token=token))
    return pb.FromEdge(refused=pb.Refused(reason="late", detail="The round has closed.", token=token))
