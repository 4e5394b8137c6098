"""Edges of other processes and machines, at the Coordinator: what it says to them, and what they say.

Every Edge holds one stream (`wire/edges.proto`); the stream is its life. What is said goes out in batches, in order. An
Edge is of the operator's own and shows the run's credential, but it may be broken: what it sends is bounded and checked,
and an Edge that says nonsense loses its stream and nothing else.
"""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import grpc
import numpy as np

from shoal.clock import Clock
from shoal.errors import ProtocolError, ShoalError, StoreError
from shoal.fleet import edge as e
from shoal.fleet.analytics import Seen
from shoal.fleet.batches import Batches
from shoal.fleet.configuration import Configuration
from shoal.fleet.costs import Costs
from shoal.fleet.edges import EdgeLost, Edges, Grants
from shoal.fleet.entrance import Admit, admit_all
from shoal.fleet.forming import LONGEST_PHASE_S
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.grpc_server import OPTIONS, Tls, listen
from shoal.fleet.packed_slices import Readable
from shoal.fleet.wire import edges_pb2 as pb
from shoal.fleet.wire import fleet_pb2 as fleet
from shoal.plan.manifest import Manifest
from shoal.tensors import PARSE_ERRORS, Index, parse_json

log = logging.getLogger("shoal.coordinator")

VERSION: Final = 3
MAX_MESSAGE_BYTES: Final = 8 << 20
SLICE_BYTES: Final = 1 << 20
ALIVE_S: Final = 5.0
"""After so long without a word either side asks whether the other is there."""
ANSWER_S: Final = 15.0
"""An answer takes no longer, behind sums that are on their way: else the Edge is lost."""
SILENCE_S: Final = 60.0
"""An Edge that is asked for its sums and says nothing for so long hangs, whatever its link answers."""
EDGE_OPTIONS: Final = [
    *(
        option
        for option in OPTIONS
        if not option[0].startswith(("grpc.max_", "grpc.keepalive_time", "grpc.http2.min_", "grpc.http2.ping_"))
    ),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", int(ALIVE_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(ALIVE_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(ANSWER_S * 1000)),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
]
"""Of both ends of a link between Coordinator and Edge."""


class RemoteEdge:
    """One Edge in one of its lives, as a member of `Edges`."""

    def __init__(self, name: str, manifest: Manifest, admit: Admit = admit_all) -> None:
        """
        Args:
            name: its own among the Edges.
            manifest: of the plan.
            admit: what it asks of devices that check in.
        """
        self.name, self._manifest, self._admit = name, manifest, admit
        self.outgoing: Batches[pb.Command] = Batches()
        self._told: e.Coordinator | None = None
        self._configuration: Configuration | None = None
        self._closing: asyncio.Future[list[GroupResult]] | None = None
        self._sums: _Sums | None = None
        self._asked: dict[bytes, list[Callable[[bool], None]]] = {}
        self._grants = Grants()
        self._num_heard = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._lost = ""
        self._seen = Seen()

    # What the Coordinator says.

    def connect(self, coordinator: e.Coordinator) -> None:
        self._told = coordinator

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        self._configuration = configuration
        self._say(
            open=pb.Open(
                round=configuration.round,
                base_version=configuration.base_version,
                seed=configuration.seed,
                max_members=configuration.max_members,
                reporting_window_s=configuration.reporting_window_s,
                model=model.data.decode(),
                taken=[pb.Taken(version=version, members=members) for version, members in taken.items()],
            )
        )

    def assign(self, device: str, token: fleet.Token, assignment: fleet.Assignment) -> bool:
        self._say(assignment.nonce, assign=pb.Assign(device=device, token=token))
        return True

    def close_groups(self, *, final: bool = True) -> Coroutine[Any, Any, list[GroupResult]]:
        self._closing = asyncio.get_running_loop().create_future()
        self._say(close=final)
        return self._until_closed(self._closing)

    async def _until_closed(self, closing: "asyncio.Future[list[GroupResult]]") -> list[GroupResult]:
        # Members of secure groups may take so long, phase by phase, and nothing is to be said meanwhile.
        silence_s = SILENCE_S if self._manifest.promises.privacy.secure is None else SILENCE_S + 5 * LONGEST_PHASE_S
        while not (closing.done() or self._lost):
            heard = self._num_heard
            await asyncio.wait([closing], timeout=silence_s)
            if not closing.done() and self._num_heard == heard:
                raise EdgeLost(f"it was asked for its sums and has said nothing for {silence_s:.0f} s")
        if self._lost:  # also where the answer came just before: what it held has been given up
            raise EdgeLost(self._lost)
        return closing.result()

    def gather(self) -> None:
        """Nothing to do: `Edges` sees to it."""

    def stored(self) -> None:
        self._say(stored=True)

    def committed(self, version: int) -> None:
        self._say(committed=version)

    def failed(self, why: str) -> None:
        self._say(failed=why)

    def finish(self, why: str) -> None:
        self._say(finish=why)

    def withdraw(self, nonce: bytes, answer: Callable[[bool], None]) -> None:
        if self._lost:
            return answer(True)
        self._asked.setdefault(nonce, []).append(answer)
        self._say(withdraw=nonce)

    def neighbours(self, addresses: Sequence[str]) -> None:
        self._say(neighbours=pb.Neighbours(addresses=addresses))

    def dissolve(self, address: str) -> None:
        self._say(dissolve=address)

    def send_away(self, device: str) -> None:
        self._say(send_away=device)

    def _say(self, gives: bytes | None = None, /, **command: Any) -> None:
        self._grants.said(gives)
        self.outgoing.put(pb.Command(**command))

    def lose(self, why: str) -> None:
        """Ends its stream; what was asked of it is answered as from one that holds nothing."""
        self._lost = why
        self.outgoing.end()
        if self._closing is not None and not self._closing.done():
            self._closing.set_result([])
        for nonce, answers in list(self._asked.items()):
            for _ in list(answers):
                self._withdrawn(nonce, True)
        for task in self._tasks:
            task.cancel()

    # What it says.

    def hear(self, event: pb.Event) -> None:
        """Raises ProtocolError for what no Edge says."""
        told = self._told
        assert told is not None
        self._num_heard += 1
        match event.WhichOneof("kind"):
            case "arrived":
                told.arrived(*event.arrived.devices)
            case "left":
                told.left(event.left)
            case "joined":
                told.joined(event.joined.nonce, event.joined.version)
            case "counted":
                told.counted(event.counted.nonce, event.counted.version, event.counted.staleness)
            case "released":
                if self._grants.knew(event.released, event.heard):
                    told.released(event.released)
            case "away":
                told.away(event.away)
            case "ask":
                self._spawn(self._answer(event.ask))
            case "admit":
                self._spawn(self._answer_admit(event.admit))
            case "withdrawn":
                self._withdrawn(event.withdrawn.nonce, event.withdrawn.gone)
            case "closed":
                self._closed(event.closed)
            case "sums":
                self._take(event.sums)
            case kind:
                raise ProtocolError(f"Expected an event of an Edge, got {kind}.")

    async def _answer(self, ask: pb.Ask) -> None:
        assert self._told is not None
        answer = pb.Answer(number=ask.number)
        try:
            row = await self._told.token_row(ask.nonce)
        except ShoalError as error:
            answer.elsewhere, answer.reason = True, str(error)
        else:
            if row is not None:
                answer.state, answer.reason, answer.expires_s = row.state, row.reason, row.expires_s
                answer.has_version, answer.version = row.version is not None, row.version or 0
        is_given = not answer.elsewhere and not answer.state
        self._say(ask.nonce if is_given else None, answer=answer)

    async def _answer_admit(self, asked: pb.Admit) -> None:
        answer = pb.Admitted(number=asked.number)
        try:
            answer.needs = await self._admit(asked.check_in)
        except ShoalError as error:
            answer.later = str(error)
        self._say(admitted=answer)

    def _withdrawn(self, nonce: bytes, is_gone: bool) -> None:
        answers = self._asked.pop(nonce, [])  # it answers each that asks, in order
        if answers[1:]:
            self._asked[nonce] = answers[1:]
        if answers:
            answers[0](is_gone)

    def _closed(self, closed: pb.Closed) -> None:
        if self._closing is None or self._closing.done() or self._sums is not None or self._configuration is None:
            raise ProtocolError("Expected the answer to one close, got another.")
        self._seen.merge(self._analytics(closed.seen))
        if closed.error:
            return self._closing.set_exception(StoreError(closed.error))
        most = 2 + self._manifest.server.rounds.max_staleness + self._configuration.max_members
        if len(closed.groups) > most:
            raise ProtocolError(f"Expected at most {most} groups, got {len(closed.groups)}.")
        self._sums = _Sums(closed, self._configuration, self._manifest)
        self._take(b"")

    def _analytics(self, text: str) -> Seen:
        try:
            seen = Seen.from_json(parse_json(text.encode()))
        except PARSE_ERRORS as error:
            raise ProtocolError(f"Expected the analytics of an Edge, got {text[:60]!r}: {error}.") from error
        for errors in seen.errors.values():
            errors.edge = self.name
        return seen

    def take_analytics(self) -> Seen:
        seen, self._seen = self._seen, Seen()
        return seen

    def _take(self, data: bytes) -> None:
        if self._sums is None or self._closing is None:
            raise ProtocolError("Expected sums only after their groups.")
        if self._sums.take(data):
            self._closing.set_result(self._sums.groups)
            self._sums = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Sums:
    """Sums of closed groups as they come in: straight into accumulators, one group after the other."""

    def __init__(self, closed: pb.Closed, configuration: Configuration, manifest: Manifest) -> None:
        self.groups: list[GroupResult] = []
        self._left: list[memoryview] = []
        for group in closed.groups:
            if len(group.nonces) != len(group.expires_s) or len(group.nonces) != group.members:
                raise ProtocolError(f"Expected the nonces of {group.members} members, got {len(group.nonces)}.")
            most, present = manifest.training.max_weight, configuration.base_version
            if not group.members <= group.weight <= group.members * most:
                raise ProtocolError(
                    f"Expected {group.members} members to weigh 1 to {most} each, got {group.weight} together."
                )
            if not 0 <= present - group.base_version <= manifest.server.rounds.max_staleness:
                raise ProtocolError(
                    f"Expected a group of version {present} or one that may be late for it, got one of {group.base_version}."
                )
            sums = configuration.accumulator(manifest)
            sums.members, sums.weight = group.members, group.weight
            counted = tuple(zip(group.nonces, group.expires_s, strict=True))
            self.groups.append(GroupResult(group.base_version, sums, counted, Costs.from_json(group.costs)))
        self._empty = (view for group in self.groups for view in views(group))
        self._at, self._view = 0, next(self._empty, None)

    def take(self, data: bytes) -> bool:
        """Whether all is there. Raises ProtocolError for more than that."""
        rest = memoryview(data)
        while self._view is not None and (len(rest) or not len(self._view)):
            size = min(len(rest), len(self._view) - self._at)
            self._view[self._at : self._at + size] = rest[:size]
            self._at, rest = self._at + size, rest[size:]
            if self._at == len(self._view):
                self._at, self._view = 0, next(self._empty, None)
        if len(rest):
            raise ProtocolError(f"Expected no more sums, got {len(rest)} bytes of them.")
        return self._view is None


def views(group: GroupResult) -> list[memoryview]:
    """The sums of a group as bytes, in the manifest's order."""
    flat = (group.sums.totals[spec.tensor.name].reshape(-1) for spec in group.sums.specs)
    return [memoryview(total.view(np.uint8)) for total in flat if total.size]  # type: ignore[arg-type]


class EdgesServer:
    """Where Edges attach."""

    def __init__(
        self,
        edges: Edges,
        *,
        welcome: pb.Welcome,
        manifest: Manifest,
        blobs: Readable,
        credential: bytes,
        address: str,
        clock: Clock,
        tls: Tls | None = None,
        admit: Admit = admit_all,
    ) -> None:
        """
        Args:
            edges: the Coordinator's.
            welcome: what an Edge is told first, but for the time.
            manifest: of the plan.
            blobs: the record's.
            credential: what Edges must show, 32 bytes.
            address: where to listen.
            clock: time.
            tls: key and certificate; None: in the clear.
            admit: what Edges ask of devices that check in, where `welcome` says that they do.
        """
        self._admit = admit
        self._edges, self._welcome, self._manifest, self._blobs = edges, welcome, manifest, blobs
        self._credential, self._address, self._tls, self._clock = credential, address, tls, clock
        self._server = grpc.aio.server(options=EDGE_OPTIONS)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        self._num_attached = 0
        self.changed = asyncio.Event()
        """An Edge has come or gone."""
        self.port = 0

    async def start(self) -> None:
        """Raises NetworkError where the port is taken or cannot be used."""
        self.port = listen(self._server, self._address, self._tls)
        await self._server.start()

    async def until_gone(self, *, longest_s: float) -> None:
        """Waits until every Edge that has attached is gone, but not longer than that."""
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                while self._num_attached:
                    self.changed.clear()
                    await self.changed.wait()

    async def close(self, *, grace_s: float = 1.0) -> None:
        """Ends every Edge's life."""
        await self._server.stop(grace_s)

    def _handlers(self) -> Any:
        return grpc.method_handlers_generic_handler(
            pb.DESCRIPTOR.services_by_name["Edges"].full_name,
            {
                "Attach": grpc.stream_stream_rpc_method_handler(
                    self._attach, pb.Said.FromString, pb.Told.SerializeToString
                ),
                "Fetch": grpc.unary_stream_rpc_method_handler(
                    self._fetch, pb.FetchRequest.FromString, fleet.Slice.SerializeToString
                ),
            },
        )

    async def _attach(self, requests: AsyncIterator[pb.Said], context: Any) -> AsyncIterator[pb.Told]:
        hello = await self._hello(requests, context)
        edge = RemoteEdge(hello.name, self._manifest, self._admit)
        welcome = pb.Welcome()
        welcome.CopyFrom(self._welcome)
        welcome.wall_s = self._clock.wall_s()
        edge.outgoing.put(pb.Command(welcome=welcome))
        self._edges.join(hello.name, edge, address=hello.address)
        self._num_attached += 1
        log.info("Edge %s has come%s", hello.name, f" (devices find it at {hello.address})" if hello.address else "")
        self.changed.set()
        hearing = asyncio.create_task(self._hear(edge, requests))
        hearing.add_done_callback(lambda _: edge.outgoing.end())
        try:
            async for commands in edge.outgoing:
                yield pb.Told(commands=commands)
        finally:
            hearing.cancel()
            self._num_attached -= 1
            self._edges.lost(hello.name, edge, why="its stream has ended")
            log.warning("Edge %s is gone", hello.name)
            self.changed.set()

    async def _hello(self, requests: AsyncIterator[pb.Said], context: Any) -> pb.Hello:
        said = await anext(aiter(requests), None)
        first = said.events[0] if said is not None and said.events else pb.Event()
        hello = first.hello
        if not hmac.compare_digest(hello.credential, self._credential):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Expected the credential of this run's Edges.")
        if hello.version != VERSION or not 0 < len(hello.name) <= 200 or len(hello.address) > 300:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"Expected a name and protocol version {VERSION}, got {hello.version}.",
            )
        return hello

    async def _hear(self, edge: RemoteEdge, requests: AsyncIterator[pb.Said]) -> None:
        try:
            async for said in requests:
                for event in said.events:
                    edge.hear(event)
        except (grpc.RpcError, grpc.aio.UsageError) as error:
            log.debug("the stream of Edge %s broke: %s", edge.name, error)
        except ProtocolError as error:
            log.error("Edge %s is cut off: %s", edge.name, error)
        except Exception:  # our bug; it ends this Edge's life and nothing else
            log.exception("what Edge %s said could not be handled", edge.name)

    async def _fetch(self, request: pb.FetchRequest, context: Any) -> AsyncIterator[fleet.Slice]:
        if not hmac.compare_digest(request.credential, self._credential):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "Expected the credential of this run's Edges.")
        try:
            total = await asyncio.to_thread(self._blobs.size, request.hash)
            offset = min(request.offset, total)
            while True:
                data = await asyncio.to_thread(self._blobs.read, request.hash, offset, SLICE_BYTES)
                yield fleet.Slice(offset=offset, data=data, total=total)
                offset += len(data)
                if offset >= total or not data:
                    return
        except (StoreError, ValueError) as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error)[:1000])
