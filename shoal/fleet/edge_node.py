"""An Edge whose Coordinator is in another process or on another machine.

    devices ─ sessions ─> Edge ─ events ─> one stream ─> Coordinator
                               <─ commands, model ─

The stream is the Edge's life. When it breaks, all that the Edge held is forgotten and its devices' streams end: they keep
their updates, and offer them at the next life or at another Edge. So an Edge may be killed at any time, and needs no disk
but for a copy of the plan and the present model.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any, Final, cast

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shoal.clock import Clock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.batches import Batches
from shoal.fleet.check_in import shown
from shoal.fleet.configuration import Configuration
from shoal.fleet.edge import Edge
from shoal.fleet.entrance import Entrance
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.proxy import proxy_options
from shoal.fleet.remote_edge import EDGE_OPTIONS, SLICE_BYTES, VERSION, views
from shoal.fleet.session import Stream, piped
from shoal.fleet.staging import Limits
from shoal.fleet.streams import busy
from shoal.fleet.wire import edges_pb2 as pb
from shoal.fleet.wire import edges_pb2_grpc as rpc
from shoal.fleet.wire import fleet_pb2 as fleet
from shoal.plan.plan import Plan
from shoal.record.store import Blobs, TokenRow, TokenState
from shoal.tensors import Index

log = logging.getLogger("shoal.edge")

RETRY_S: Final = (0.1, 2.0)
MODELS_KEPT: Final = 8
"""Models of versions before, at most, that devices may still fetch here, where they may be late."""
SKEW_S: Final = 10.0
"""Two clocks that are further apart are not of the same time."""
PATIENCE_S: Final = 20.0
"""How long a device waits for an Edge that has no Coordinator at the moment."""


class EdgeNode:
    """See the module's text. Serve `door` to devices, and run `run` beside it."""

    def __init__(
        self,
        coordinator: str,
        *,
        credential: bytes,
        name: str,
        blobs: Blobs,
        clock: Clock,
        address: str = "",
        ca: bytes | None = None,
        server_name: str | None = None,
        limits: Limits | None = None,
        entrance: Entrance | None = None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            coordinator: host:port of its server for Edges.
            credential: of the run's Edges.
            name: its own among them.
            blobs: where copies of plan and model are kept.
            clock: time.
            address: where devices find just this Edge; empty: nowhere.
            ca: PEM of the authority that signed the Coordinator's certificate; None: no TLS.
            server_name: the name in the certificate, where it is not the host's.
            limits: of staged updates.
            entrance: who may come in, as far as the Coordinator does not say; None: whoever comes, with the default bounds.
            on_lost: called whenever the Coordinator does not answer.
        """
        self._coordinator, self._credential, self._name, self.address = coordinator, credential, name, address
        self._blobs, self._clock, self._limits, self._on_lost = blobs, clock, limits, on_lost
        self._entrance = entrance or Entrance()
        self._ca, self._server_name = ca, server_name
        self._models: list[frozenset[str]] = []
        """Hashes of the tensors that are here, by version."""
        self._num_kept = 1
        self.door = Doorstep()
        self.is_finished = False
        """The run is over; the Edge tells that to whoever comes, until the server for devices is closed."""

    async def run(self) -> None:
        """One life after the other, until the run is over.

        Raises:
            ProtocolError: the Coordinator refuses this Edge.
        """
        first, longest = RETRY_S
        wait_s = first
        while not self.is_finished:
            try:
                async with self._channel() as channel:
                    await self._live(rpc.EdgesStub(channel))  # type: ignore[no-untyped-call]
                wait_s = first
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT):
                    raise ProtocolError(f"The Coordinator refuses this Edge: {error.details()}") from error
                if wait_s == first:
                    log.warning("no Coordinator at %s: %s", self._coordinator, (error.details() or "")[:200])
            if not self.is_finished:
                self._on_lost()
                await self._clock.sleep_until(self._clock.now_s() + wait_s)
                wait_s = min(2 * wait_s, longest)

    def _channel(self) -> Any:
        name = [("grpc.ssl_target_name_override", self._server_name)] if self._server_name else []
        options = [*EDGE_OPTIONS, *name, *proxy_options(self._coordinator), ("grpc.use_local_subchannel_pool", 1)]
        if self._ca is None:
            return grpc.aio.insecure_channel(self._coordinator, options=options)
        credentials = grpc.ssl_channel_credentials(self._ca)
        return grpc.aio.secure_channel(self._coordinator, credentials, options=options)

    async def _live(self, stub: Any) -> None:
        """From attaching to the end of the stream."""
        far = _Far()
        far.outgoing.put(pb.Event(hello=self._hello()))
        edge: Edge | None = None
        call = stub.Attach(_said(far.outgoing))
        call.add_done_callback(lambda _: far.end())  # also while sums are on their way, and nobody reads
        try:
            async for told in call:
                for command in told.commands:
                    if edge is None:
                        edge = await self._begin(command, stub, far)
                    else:
                        await self._carry_out(command, edge, far, stub)
                if self.is_finished:
                    return
        finally:
            far.end()
            call.cancel()
            if not self.is_finished:  # else whoever comes is told so
                self.door.edge = None
                if edge is not None:
                    await edge.close()

    def _hello(self) -> pb.Hello:
        return pb.Hello(credential=self._credential, name=self._name, address=self.address, version=VERSION)

    async def _begin(self, command: pb.Command, stub: Any, far: "_Far") -> Edge:
        welcome = command.welcome
        await self._ensure(welcome.plan, stub)
        plan = Plan.parse(self._blobs.get(welcome.plan))
        self._compare_clocks(welcome.wall_s)
        # The one before, too: what devices hold that were in its round, and are sent the difference.
        self._num_kept = max(2, 1 + min(MODELS_KEPT, plan.manifest.server.rounds.max_staleness))
        self._blobs.put_all([plan.manifest.data, *plan.programs.values()])
        edge = Edge(
            plan=plan,
            run=welcome.run,
            token_key=Ed25519PublicKey.from_public_bytes(welcome.token_key),
            blobs=self._blobs,
            clock=self._clock,
            limits=self._limits,
            population=welcome.population,
            entrance=replace(self._entrance, admit=far.admit) if welcome.asks else self._entrance,
        )
        edge.connect(far)
        self.door.edge = edge
        return edge

    def _compare_clocks(self, wall_s: float) -> None:
        ahead_s = self._clock.wall_s() - wall_s
        if wall_s and abs(ahead_s) > SKEW_S:
            log.error(
                "this machine's clock is %.0f s %s the Coordinator's: devices' tokens are taken to expire too %s; set it",
                abs(ahead_s), *(("ahead of", "early") if ahead_s > 0 else ("behind", "late")),
            )  # fmt: skip

    async def _carry_out(self, command: pb.Command, edge: Edge, far: "_Far", stub: Any) -> None:
        far.num_heard += 1
        match command.WhichOneof("kind"):
            case "open":
                await self._open(command.open, edge, stub)
            case "assign":
                assign = command.assign
                # What comes on this stream is the Coordinator's: a signature is for what devices bring back.
                assignment = fleet.Assignment.FromString(assign.token.signed)
                if not edge.assign(assign.device, assign.token, assignment):
                    far.released(assignment.nonce)
            case "close":
                await self._close(command.close, edge, far)
            case "stored":
                edge.stored()
            case "committed":
                edge.committed(command.committed)
            case "failed":
                edge.failed(command.failed)
            case "finish":
                self.is_finished = True
                edge.finish(command.finish)
            case "answer":
                far.answer(command.answer)
            case "admitted":
                far.admitted(command.admitted)
            case "withdraw":
                nonce = command.withdraw
                far.forget(nonce)
                edge.withdraw(nonce, lambda gone: far.say(withdrawn=pb.Withdrawn(nonce=nonce, gone=gone)))
            case "dissolve":
                edge.dissolve(command.dissolve)
            case "neighbours":
                edge.neighbours(command.neighbours.addresses)
            case "send_away":
                edge.send_away(command.send_away)
            case kind:
                log.warning("ignored what the Coordinator said: %s", kind)  # it is of a later version

    async def _open(self, opened: pb.Open, edge: Edge, stub: Any) -> None:
        model = Index.parse(opened.model.encode())
        hashes = frozenset(entry.hash for entry in model)
        for hash in hashes:
            await self._ensure(hash, stub)
        if hashes not in self._models[-1:]:  # else the round before was abandoned
            before, self._models = self._models, [*self._models, hashes][-self._num_kept :]
            for hash in frozenset().union(*before) - frozenset().union(*self._models):
                self._blobs.forget(hash)
        configuration = Configuration(
            round=opened.round,
            base_version=opened.base_version,
            seed=opened.seed,
            max_members=opened.max_members,
            reporting_window_s=opened.reporting_window_s,
        )
        edge.open_groups(configuration, model, taken={taken.version: taken.members for taken in opened.taken})

    async def _ensure(self, hash: str, stub: Any) -> None:
        """Makes a copy of a blob. Raises StoreError: the Coordinator sent another."""
        if await asyncio.to_thread(self._blobs.has, hash):
            return
        writer = self._blobs.writer()
        try:
            async for piece in stub.Fetch(pb.FetchRequest(credential=self._credential, hash=hash)):
                await asyncio.to_thread(writer.write, piece.data)
            made = await asyncio.to_thread(writer.finish)
        except BaseException:
            writer.discard()
            raise
        if made != hash:
            raise StoreError(f"Expected blob {hash} from the Coordinator, got {made}.")

    async def _close(self, final: bool, edge: Edge, far: "_Far") -> None:
        try:
            groups = await edge.close_groups(final=final)
        except StoreError as error:
            return far.say(closed=pb.Closed(error=str(error), seen=_seen(edge)))
        far.say(closed=pb.Closed(groups=[_group(group) for group in groups], seen=_seen(edge)))
        for group in groups:
            for view in views(group):
                for at in range(0, len(view), SLICE_BYTES):
                    await far.outgoing.drained()
                    far.say(sums=bytes(view[at : at + SLICE_BYTES]))


def _seen(edge: Edge) -> str:
    return json.dumps(edge.take_analytics().to_json())


def _group(group: GroupResult) -> pb.Group:
    return pb.Group(
        base_version=group.base_version,
        members=group.sums.members,
        weight=group.sums.weight,
        nonces=[nonce for nonce, _ in group.counted],
        expires_s=[expires_s for _, expires_s in group.counted],
        costs=group.costs.to_json(),
    )


async def _said(outgoing: Batches[pb.Event]) -> AsyncIterator[pb.Said]:
    async for events in outgoing:
        yield pb.Said(events=events)


class _Far:
    """The Coordinator, as the Edge sees it, at the other end of a stream."""

    def __init__(self) -> None:
        self.outgoing: Batches[pb.Event] = Batches()
        self._asked: dict[int, tuple[bytes, asyncio.Future[TokenRow | None]]] = {}
        self._admits: dict[int, asyncio.Future[str]] = {}
        self._numbers = count(1)
        self._is_ended = False
        self.num_heard = 0
        """Commands carried out."""

    def say(self, **event: Any) -> None:
        self.outgoing.put(pb.Event(**event))

    def arrived(self, *devices: str) -> None:
        self.say(arrived=pb.Arrived(devices=devices))

    def left(self, device: str) -> None:
        self.say(left=device)

    def joined(self, nonce: bytes, version: int) -> None:
        self.say(joined=pb.Joined(nonce=nonce, version=version))

    def counted(self, nonce: bytes, version: int, staleness: int) -> None:
        self.say(counted=pb.Counted(nonce=nonce, version=version, staleness=staleness))

    def released(self, nonce: bytes) -> None:
        self.say(released=nonce, heard=self.num_heard)

    def away(self, nonce: bytes) -> None:
        self.say(away=nonce)

    async def token_row(self, nonce: bytes) -> TokenRow | None:
        if self._is_ended:
            raise NetworkError("The Coordinator is away; try again.")
        number = next(self._numbers)
        answered: asyncio.Future[TokenRow | None] = asyncio.get_running_loop().create_future()
        self._asked[number] = (nonce, answered)
        self.say(ask=pb.Ask(number=number, nonce=nonce))
        try:
            row = await answered
        finally:
            is_here = self._asked.pop(number, None) is not None
        if not is_here:
            raise NetworkError("The update is at another Edge; ask again.")
        return row

    async def admit(self, check_in: fleet.CheckIn) -> str:
        """As `Entrance.admit`: what the Coordinator says. Raises NetworkError where it is away, or does not know now."""
        if self._is_ended:
            raise NetworkError("The Coordinator is away; try again.")
        number = next(self._numbers)
        answered: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._admits[number] = answered
        self.say(admit=pb.Admit(number=number, check_in=shown(check_in)))
        try:
            return await answered
        finally:
            del self._admits[number]

    def admitted(self, answer: pb.Admitted) -> None:
        """The answer to it."""
        asked = self._admits.get(answer.number)
        if asked is None or asked.done():
            return
        if answer.later:
            asked.set_exception(NetworkError(answer.later))
        else:
            asked.set_result(answer.needs)

    def forget(self, nonce: bytes) -> None:
        """An update is let go of: what was asked of it before says nothing any more, also if the answer is here."""
        for number in [number for number, (of, _) in self._asked.items() if of == nonce]:
            _, answered = self._asked.pop(number)
            if not answered.done():
                answered.set_result(None)

    def answer(self, answer: pb.Answer) -> None:
        nonce, asked = self._asked.get(answer.number, (b"", None))
        if asked is None or asked.done():
            return
        if answer.elsewhere:
            return asked.set_exception(NetworkError(answer.reason))
        if not answer.state:
            return asked.set_result(None)
        asked.set_result(
            TokenRow(
                nonce=nonce,
                state=cast(TokenState, answer.state),
                version=answer.version if answer.has_version else None,
                reason=answer.reason,
                expires_s=answer.expires_s,
            )
        )

    def end(self) -> None:
        """The stream is broken: whoever waits for an answer is told."""
        self._is_ended = True
        self.outgoing.end()
        waiting: list[asyncio.Future[Any]] = [*(asked for _, asked in self._asked.values()), *self._admits.values()]
        for asked in waiting:
            if not asked.done():
                asked.set_exception(NetworkError("The Coordinator is away; try again."))


class Doorstep:
    """What devices come to: the Edge of the present life, for which they wait a little, or a word to come later."""

    def __init__(self) -> None:
        self._edge: Edge | None = None
        self._is_here = asyncio.Event()

    @property
    def edge(self) -> Edge | None:
        return self._edge

    @edge.setter
    def edge(self, edge: Edge | None) -> None:
        self._edge = edge
        self._is_here.clear() if edge is None else self._is_here.set()

    async def _present(self) -> Edge:
        try:
            async with asyncio.timeout(PATIENCE_S):
                while self._edge is None:
                    await self._is_here.wait()
        except TimeoutError:
            raise NetworkError("The Coordinator is away; try again.") from None
        return self._edge

    def session(self, messages: AsyncIterator[fleet.FromDevice]) -> AsyncGenerator[fleet.FromEdge, None]:
        return piped(self.hold, messages)

    async def hold(self, stream: Stream) -> None:
        try:
            edge = await self._present()
        except NetworkError as error:
            with suppress(NetworkError):
                await stream.write(fleet.FromEdge(later=busy(str(error))))
            return
        await edge.hold(stream)

    async def pull(self, request: fleet.PullRequest) -> AsyncIterator[fleet.Slice]:
        async for piece in (await self._present()).pull(request):
            yield piece

    async def push(self, slices: AsyncIterator[bytes]) -> fleet.PushReply:
        return await (await self._present()).push(slices)

    async def status(self, request: fleet.StatusRequest) -> fleet.StatusReply:
        return await (await self._present()).status(request)

    async def close(self) -> None:
        if self._edge is not None:
            await self._edge.close()
