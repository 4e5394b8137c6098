"""Updates on their way from devices into sums: by token, held whole until they are checked, whatever their streams do."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from shoal.clock import Clock
from shoal.codec.packed import unpack
from shoal.errors import NetworkError, ProtocolError, UpdateRefused
from shoal.fixed import FixedPoint, refuse_bad_weight
from shoal.fleet import group as g
from shoal.fleet.configuration import Configuration
from shoal.fleet.group_sums import GroupResult, GroupSums
from shoal.fleet.offer import MAX_INLINE_BYTES
from shoal.fleet.session import Session
from shoal.fleet.staging import Limits, StagedUpdate, most_updates
from shoal.fleet.token import read_token
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.record.store import TokenRow
from shoal.tensors import TensorSpec, total_bytes

log = logging.getLogger("shoal.edge")

MAX_SLICE_BYTES: Final = 1 << 20
MAX_KNOWN_TOKENS: Final = 50_000
OPEN_WAIT_S: Final = 20.0


@dataclass
class Held:
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


class Updates:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self,
        manifest: Manifest,
        *,
        run: str,
        population: str,
        token_key: Ed25519PublicKey,
        clock: Clock,
        limits: Limits,
        token_row: Callable[[bytes], Awaitable[TokenRow | None]],
        tell: Callable[[Held | None, g.Tell], None],
        again: Callable[[], tuple[float, float]],
    ) -> None:
        """
        Args:
            manifest, run, population, token_key: of the plan, the run, its devices, its Coordinator.
            clock: time.
            limits: of what is staged.
            token_row: what the record says of a nonce.
            tell: tells a member how it ended; None where nothing is held of it any more.
            again: from when to when, in seconds from now, a device that goes away should come again.
        """
        self._manifest, self._run, self._key, self._clock, self._limits = manifest, run, token_key, clock, limits
        self._population = population
        self._token_row, self._tell_device, self._again = token_row, tell, again
        self.sums = GroupSums(manifest, self, clock.now_s)
        self.up_bytes = 0
        """What has come in."""
        self.num_staged = 0
        """Updates of which something is here."""
        self._specs = self._sent(manifest)
        self._most_staged = most_updates(self._specs, limits)
        self._held: dict[bytes, Held] = {}
        self._known: dict[bytes, tuple[bytes, pb.Assignment]] = {}
        self._fixed: Mapping[str, FixedPoint] = {}
        self._closed: asyncio.Future[None] | None = None
        self._is_open = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushes = asyncio.Semaphore(4)

    @staticmethod
    def _sent(manifest: Manifest) -> tuple[TensorSpec, ...]:
        """What devices push."""
        return manifest.update

    def _awaits(self, nonce: bytes) -> bool:
        """Whether what a member pushes is still to come."""
        return self.state(nonce) is g.Member.JOINED

    def state(self, nonce: bytes) -> g.Member | None:
        """Where a member is; None where it is none."""
        return self.sums.groups.state(nonce)

    # Rounds.

    @property
    def configuration(self) -> Configuration | None:
        """Of the round that is open, or was last."""
        return self.sums.configuration

    def open(self, configuration: Configuration, *, taken: Mapping[int, int]) -> None:
        """A round begins. The groups of a round that was abandoned go on."""
        self.sums.configuration, self._fixed = configuration, self._looked_at(configuration)
        self.sums.step(g.Open(configuration.base_version, tuple(taken.items())))
        for nonce in [n for n in self._held if self.state(n) is None]:
            self._forget(self._held.pop(nonce))
        self._is_open.set()

    def _looked_at(self, configuration: Configuration) -> Mapping[str, FixedPoint]:
        """What values are held to while they come in."""
        return configuration.fixed(self._manifest)

    async def close(self, *, final: bool) -> list[GroupResult]:
        """The sums that are to be seen, once an addition under way is done. Raises StoreError: they are broken."""
        self._closed = asyncio.get_running_loop().create_future()
        if final:
            self._is_open.clear()
        self.sums.step(g.Close(final))
        await self._closed
        return self.sums.take_closed(lambda nonce: self._held[nonce].expires_s)

    def finish(self) -> None:
        """No round opens any more: whoever waits for one is answered."""
        self._is_open.set()

    async def drop(self) -> None:
        """Forgets what is staged."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for held in self._held.values():
            self._forget(held)
        self._held.clear()

    # Tokens.

    def assigned(self, token: pb.Token, assignment: pb.Assignment, session: Session) -> None:
        """A device is given an assignment."""
        self._know(token, assignment)
        self._hold(assignment, token, session)

    def held(self, nonce: bytes | None) -> Held | None:
        """What is held of a member."""
        return self._held.get(nonce) if nonce is not None else None

    def gave_up(self, nonce: bytes, why: str) -> None:
        """The device will not send its update; its place is free."""
        self.sums.step(g.Gone(nonce, why[:200]))
        if self.state(nonce) is None and nonce in self._held:
            self._forget(self._held.pop(nonce))

    def read_token(self, token: pb.Token) -> pb.Assignment:
        """The assignment of a token. Raises ProtocolError: it is not one of this run, or has expired."""
        signed, assignment = self._known.get(token.signature, (b"", None))
        if assignment is None or signed != token.signed or assignment.expires_s <= self._clock.wall_s():
            assignment = read_token(token, self._key, wall_s=self._clock.wall_s())
            self._know(token, assignment)  # a signature is checked once, not with every call
        if assignment.run != self._run:
            raise ProtocolError("The token is of another run; check in again.")
        return assignment

    def _know(self, token: pb.Token, assignment: pb.Assignment) -> None:
        if len(self._known) >= MAX_KNOWN_TOKENS:
            self._known.clear()
        self._known[token.signature] = (token.signed, assignment)

    def _hold(self, assignment: pb.Assignment, token: pb.Token, session: Session | None) -> Held:
        held = self._held.setdefault(assignment.nonce, Held(assignment.base_version, assignment.expires_s, token))
        held.session, held.token = session or held.session, token
        held.expires_s = max(held.expires_s, assignment.expires_s)
        self.sums.step(g.Joined(assignment.nonce, assignment.base_version))
        return held

    async def _admit(self, session: Session | None, token: pb.Token) -> tuple[Held | None, bytes]:
        """The token's place in the open group; None (and an answer, where there is a session) if it has none any more.

        Raises:
            ProtocolError: the token is not one of this run, or has expired.
            NetworkError: no round is open, and none opens soon.
        """
        assignment = self.read_token(token)
        nonce = assignment.nonce
        row: TokenRow | None = None
        if self._place(nonce) is None:
            row = await self._settled(nonce)
        held = self._place(nonce)
        if held is None and row is None and self._takes(assignment):
            held = self._hold(assignment, token, session)
            if self.state(nonce) is None:
                return None, nonce  # the round is closing, and has told it so
        if held is not None:
            held.session = session or held.session
            if session is not None:
                session.is_known = True
        elif session is not None:
            if row is None:
                self.sums.analytics.count("refused_late")
            session.send(_answer(row, token, self._again()))
        return held, nonce

    async def _settled(self, nonce: bytes) -> TokenRow | None:
        """What the record says of a nonce, as of the round that is open now."""
        while True:
            await self._until_open()
            before = self.configuration
            row = await self._token_row(nonce)
            if self._is_open.is_set() and self.configuration is before:
                return row

    def _place(self, nonce: bytes) -> Held | None:
        return self._held.get(nonce) if self.state(nonce) is not None else None

    def _takes(self, assignment: pb.Assignment) -> bool:
        present = self.configuration
        late = -1 if present is None else present.base_version - assignment.base_version
        return self._is_open.is_set() and 0 <= late <= self._manifest.server.rounds.max_staleness

    async def _until_open(self) -> None:
        # Between two rounds, and after a restart before the first, nobody can say yet what a token is worth.
        try:
            async with asyncio.timeout(OPEN_WAIT_S):
                await self._is_open.wait()
        except TimeoutError:
            raise NetworkError("No round is open at the moment; try again.") from None

    # What devices send.

    async def report(self, session: Session, report: pb.Report) -> None:
        """An update that is here, or comes with the report. Raises as `push`."""
        held, nonce = await self._admit(session, report.token)
        if held is None:
            return
        async with held.lock:
            if self.state(nonce) is not g.Member.JOINED:
                return  # reported before, and told when the round ends; or the round has ended, and it was told
            try:
                self.sums.analytics.sending(nonce, self._clock.now_s())
                update = self._update(held, report.root)
                for part in report.slices:
                    await self._write(held, update, part.tensor, part)
            except (ProtocolError, UpdateRefused) as error:
                return self._refuse(nonce, error)
            if self.state(nonce) is not g.Member.JOINED:
                return  # the round has closed meanwhile, and told it so
            if missing := update.missing[:100]:
                return session.send(pb.FromEdge(incomplete=pb.Incomplete(token=report.token, missing=missing)))
            held.root, held.weight, held.costs = report.root, report.weight, report.costs
            self.sums.step(g.Offered(nonce))

    async def hear(self, session: Session, message: pb.GroupMessage) -> None:
        """A message of a group with several phases. Raises ProtocolError: this one has none."""
        raise ProtocolError("This task's groups have no phases.")

    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply:
        """Takes slices of an update in, each a serialized `PushSlice`; says how much of each tensor is here.

        Those that wait for their turn are not parsed yet: with many devices pushing at once that is what memory goes to.

        A slice that begins before what is here adds what is new in it: a device that sends again does no harm.

        Raises:
            ProtocolError: the token is wrong, or the slices are; the update is refused then.
            NetworkError: not now.
        """
        held: Held | None = None
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

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        """What became of an assignment, and how much of its update is here. Raises NetworkError: not now."""
        try:
            assignment = self.read_token(request.token)
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

    async def _take(self, held: Held, nonce: bytes, root: str, name: str, part: pb.PushSlice) -> bool:
        async with held.lock:
            if not self._awaits(nonce) or self._held.get(nonce) is not held:
                return False  # what comes is late, or of a group before
            try:
                self.sums.analytics.sending(nonce, self._clock.now_s())
                await self._write(held, self._update(held, root), name, part)
            except (ProtocolError, UpdateRefused) as error:
                self._refuse(nonce, error)
                raise ProtocolError(str(error)) from error
        return True

    async def _received(self, held: Held, nonce: bytes) -> dict[str, int]:
        async with held.lock:
            if self.state(nonce) is not None and not self._awaits(nonce):
                return {spec.name: spec.size_bytes for spec in self._specs}
            return held.update.received if held.update is not None else {}

    # What is staged.

    def _update(self, held: Held, root: str) -> StagedUpdate:
        """What is staged of an update; begun here, and begun anew where it is another than before."""
        if held.update is not None and root and held.root and root != held.root:
            held.update.close()
            held.update = None
            self.num_staged -= 1
        held.root = root or held.root
        if held.update is None:
            if self.num_staged >= self._most_staged:
                size = total_bytes(self._specs)
                raise NetworkError(
                    f"This Edge holds {self.num_staged} updates of {size} bytes, as many as it may; try again later."
                )
            held.update = StagedUpdate(self._specs, self._fixed, self._limits)
            self.num_staged += 1
        return held.update

    async def _write(self, held: Held, update: StagedUpdate, name: str, part: pb.PushSlice) -> None:
        size = max(len(part.data), part.unpacked)
        if size > MAX_SLICE_BYTES:
            raise ProtocolError(f"Expected slices of at most {MAX_SLICE_BYTES} bytes, got {size}.")
        self.up_bytes += len(part.data)
        if size > MAX_INLINE_BYTES:
            await _in_thread(_take_in, update, name, part)
        else:
            _take_in(update, name, part)
        if update.refusal is not None:
            raise update.refusal  # nothing that follows can make it good

    def _refuse(self, nonce: bytes, error: Exception) -> None:
        reason = error.reason if isinstance(error, UpdateRefused) else "wrong slices"
        log.warning("an update was refused: %s", error)
        self.sums.step(g.Checked(nonce, reason, str(error)))

    def _forget(self, held: Held) -> None:
        update, held.update = held.update, None
        if update is None:
            return
        self.num_staged -= 1
        if held.lock.locked():
            self._spawn(_close_behind(update, held.lock))
        else:
            update.close()

    # What the groups want.

    def check(self, nonce: bytes) -> g.Checked:
        """Whether the update may be added."""
        held = self._held[nonce]
        assert held.update is not None
        try:
            refuse_bad_weight(held.weight, self._manifest.training.max_weight)
            held.update.check(held.root)
        except UpdateRefused as refusal:
            log.warning("an update was refused: %s", refusal)
            return g.Checked(nonce, refusal.reason, str(refusal))
        return g.Checked(nonce)

    def add(self, nonce: bytes, group: int, discount: float) -> g.Added | None:
        """Adds an update to a sum, a large one in a thread."""
        held = self._held[nonce]
        assert held.update is not None
        self.sums.begin_adding(group, held.costs)
        if self._manifest.update_bytes > self._limits.memory_bytes:
            self._spawn(self._add_behind(nonce, held, held.update, group, discount))
            return None
        self.sums.add(group, held.update.pieces(), weight=held.weight, discount=discount)
        self._forget(held)
        return g.Added(nonce)

    async def _add_behind(self, nonce: bytes, held: Held, update: StagedUpdate, group: int, discount: float) -> None:
        await _in_thread(lambda: self.sums.add(group, update.pieces(), weight=held.weight, discount=discount))
        self._forget(held)
        self.sums.step(g.Added(nonce))

    def tell(self, tell: g.Tell) -> None:
        """How a member ended; nothing is held of it any more."""
        held = self._held.pop(tell.nonce, None)
        if held is not None:
            self._forget(held)
        self._tell_device(held, tell)

    def closed(self) -> None:
        """The sums are there that `close` waits for."""
        assert self._closed is not None
        self._closed.set_result(None)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _take_in(update: StagedUpdate, name: str, part: pb.PushSlice) -> None:
    data = part.data
    if part.unpacked:
        if part.offset + part.unpacked <= update.received.get(name, 0):
            return  # nothing in it is new
        data = unpack(data, update.dtype(name), part.unpacked)
    update.write(name, part.offset, data)


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
