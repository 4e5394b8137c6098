"""An Edge behind gRPC: bytes in, messages out. What is decided is decided in `edge.py`."""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.door import Door
from shoal.fleet.entrance import neighbourhood
from shoal.fleet.process import allowed_files
from shoal.fleet.streams import MAX_SESSIONS
from shoal.fleet.wire import fleet_pb2 as pb

log = logging.getLogger("shoal.edge")

MAX_MESSAGE_BYTES: Final = 2 << 20
OPTIONS: Final = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 50_000),  # below the minute after which middle boxes forget a connection
    ("grpc.keepalive_timeout_ms", 20_000),
    # What ends a half-open connection, 90 s after its last word: the timeout above does not (grpcio 1.85). A slow line has to bring the answer
    # to a ping in that time, behind all that is on its way.
    ("grpc.http2.ping_timeout_ms", 40_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
]
"""Of both ends."""
MAX_CALLS: Final = 8_000
"""Pulls, pushes and questions at once."""
MAX_CALLS_OF_ONE: Final = 4_000
"""Of them, those of one address."""
STALLED_S: Final = 60.0
"""How long a call waits for a slice, or for its device to take one."""
OWN_FILES: Final = 200
"""File descriptors that connections leave to the rest of the process."""
SERVER_OPTIONS: Final = [
    *OPTIONS,
    # What may be under way on one connection before it is read. Probing the line would let it grow to megabytes, times
    # the devices. What it costs: a device at 50 ms round trip sends 1.3 MB/s at most.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 64 << 10),
    # Streams that wait to be looked at: by default a burst of a thousand devices is turned away.
    ("grpc.server.max_pending_requests", MAX_SESSIONS),
    ("grpc.server.max_pending_requests_hard_limit", MAX_SESSIONS),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # A connection without a call: whoever comes back later connects anew.
    ("grpc.max_connection_idle_ms", 300_000),
]


@dataclass(frozen=True)
class Tls:
    """PEM files of a server: its key, its certificate chain, and what devices' certificates are to be signed by."""

    key: bytes
    chain: bytes
    client_ca: bytes | None = None
    """None: devices show no certificate."""

    def credentials(self) -> grpc.ServerCredentials:
        """As gRPC takes them."""
        return grpc.ssl_server_credentials([(self.key, self.chain)], self.client_ca, self.client_ca is not None)


class GrpcServer:
    """Serves an Edge on one address."""

    def __init__(self, edge: Door, *, address: str, tls: Tls | None = None, own_address: str = "") -> None:
        """
        Args:
            edge: what is served.
            address: host:port.
            tls: key and certificate; None: in the clear.
            own_address: a second one; where it is given, other processes listen on the first port too, and the system
                deals connections out to them.
        """
        self._edge, self._address, self._own_address, self._tls = edge, address, own_address, tls
        options = [option for option in SERVER_OPTIONS if option[0] != "grpc.so_reuseport"]
        options += [
            ("grpc.so_reuseport", int(bool(own_address))),
            ("grpc.max_allowed_incoming_connections", _most_connections()),
        ]
        self._server = grpc.aio.server(options=options)
        self._servicer = _Servicer(edge)
        self._server.add_generic_rpc_handlers((_handlers(self._servicer),))
        self.port = self.own_port = 0

    @property
    def unstarted(self) -> Any:
        """The gRPC server; before `start` other services may go on it."""
        return self._server

    async def start(self) -> None:
        """Raises NetworkError where the port is taken or cannot be used."""
        self.port = self.own_port = listen(self._server, self._address, self._tls)
        if self._own_address:
            self.own_port = listen(self._server, self._own_address, self._tls)
        await self._server.start()

    async def until_quiet(self, *, quiet_s: float, longest_s: float) -> None:
        """Waits until no device has had a session for `quiet_s`, but not longer than `longest_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                while (left_s := self._servicer.busy_s(quiet_s)) != 0.0:
                    self._servicer.changed.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(left_s):
                            await self._servicer.changed.wait()

    async def close(self, *, grace_s: float = 1.0) -> None:
        """Ends all sessions."""
        await self._edge.close()
        await self._server.stop(grace_s)


def listen(server: Any, address: str, tls: Tls | None) -> int:
    """Gives a gRPC server an address; returns the port. Raises NetworkError where that is taken or cannot be used."""
    try:
        if tls is None:
            port: int = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, tls.credentials())
    except RuntimeError as error:
        raise NetworkError(
            f"Cannot listen on {address}: the port is in use or not allowed. "
            "Choose another with --port, or --port 0 for any free one."
        ) from error
    return port


def _most_connections() -> int:
    """A connection takes a file descriptor: without one the process could not even say no, nor open its record."""
    return max(100, min(MAX_SESSIONS, allowed_files() - OWN_FILES))


def _handlers(servicer: "_Servicer") -> Any:
    # What the generated code registers, but for the slices of Push: the Edge parses those when their turn has come.
    return grpc.method_handlers_generic_handler(
        pb.DESCRIPTOR.services_by_name["Fleet"].full_name,
        {
            "Session": grpc.stream_stream_rpc_method_handler(
                servicer.Session, pb.FromDevice.FromString, pb.FromEdge.SerializeToString
            ),
            "Pull": grpc.unary_stream_rpc_method_handler(
                servicer.Pull, pb.PullRequest.FromString, pb.Slice.SerializeToString
            ),
            "Push": grpc.stream_unary_rpc_method_handler(servicer.Push, None, pb.PushReply.SerializeToString),
            "Status": grpc.unary_unary_rpc_method_handler(
                servicer.Status, pb.StatusRequest.FromString, pb.StatusReply.SerializeToString
            ),
        },
    )


class _Servicer:
    def __init__(self, edge: Door) -> None:
        self._edge = edge
        self._num_sessions = 0
        self._calls = Calls()
        self._left_s = asyncio.get_running_loop().time()
        """When the last session ended (at first, when the server was made), by the event loop's clock."""
        self.changed = asyncio.Event()
        """A session has begun or ended."""

    @property
    def num_calls(self) -> int:
        """Pulls, pushes and questions under way."""
        return self._calls.num

    def busy_s(self, quiet_s: float) -> float | None:
        """How long until there was no session for `quiet_s`, if none begins; None while there is one."""
        if self._num_sessions:
            return None
        return max(0.0, self._left_s + quiet_s - asyncio.get_running_loop().time())

    async def Session(self, requests: object, context: Any) -> None:
        self._num_sessions += 1
        self.changed.set()
        try:
            await self._edge.hold(_Stream(context))
        finally:
            self._num_sessions -= 1
            self._left_s = asyncio.get_running_loop().time()
            self.changed.set()

    async def Pull(self, request: pb.PullRequest, context: Any) -> None:
        async with self._call(context):
            async for piece in self._edge.pull(request):
                try:
                    async with asyncio.timeout(STALLED_S):
                        await context.write(piece)
                except (grpc.aio.UsageError, grpc.aio.InternalError) as error:
                    raise NetworkError(f"The call has ended: {error}") from error

    async def Push(self, requests: AsyncIterator[bytes], context: Any) -> pb.PushReply:
        async with self._call(context):
            return await self._edge.push(_steady(requests))

    async def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        async with self._call(context):
            return await self._edge.status(request)

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncGenerator[None, None]:
        """One of a bounded number; what goes wrong in it is an answer to the device."""
        address = address_of(context)
        try:
            self._calls.begin(address)
        except NetworkError as error:
            await _abort(context, error)
        try:
            yield
        except TimeoutError:
            await _abort(context, NetworkError(f"Nothing went on for {STALLED_S:g} s; try again."))
        except (ProtocolError, NetworkError, StoreError) as error:
            await _abort(context, error)
        finally:
            self._calls.end(address)


class Calls:
    """How many calls there are, and from where: one whose device does not read may be there until its connection ends."""

    def __init__(self) -> None:
        self.num = 0
        self._of: Counter[str] = Counter()

    def begin(self, address: str) -> None:
        """Raises NetworkError where there are too many."""
        if self.num >= MAX_CALLS or self._of[address] >= MAX_CALLS_OF_ONE:
            raise NetworkError("This server serves as many calls as it may; try again later.")
        self.num += 1
        self._of[address] += 1

    def end(self, address: str) -> None:
        self.num -= 1
        self._of[address] -= 1
        if not self._of[address]:
            del self._of[address]


async def _steady(slices: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Raises TimeoutError where the next one does not come; while one is worked on nobody waits for it."""
    while True:
        async with asyncio.timeout(STALLED_S):
            part = await anext(slices, None)
        if part is None:
            return
        yield part


def address_of(context: Any) -> str:
    """The peer's, as far as it says who it is."""
    return neighbourhood(context.peer())


async def _abort(context: Any, error: Exception) -> None:
    code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, ProtocolError) else grpc.StatusCode.UNAVAILABLE
    await context.abort(code, str(error)[:1000])


class _Stream:
    """A control stream. A device that vanishes ends its own stream and nothing else."""

    __slots__ = ("_context",)

    def __init__(self, context: Any) -> None:
        self._context = context

    @property
    def address(self) -> str:
        return address_of(self._context)

    async def read(self) -> pb.FromDevice | None:
        try:
            message = await self._context.read()
        except DecodeError as error:
            raise ProtocolError(f"Expected messages of shoal.fleet.v1, got other bytes: {error}.") from error
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            log.debug("a session broke: %s", error)
            return None
        return None if message is grpc.aio.EOF else message

    async def write(self, message: pb.FromEdge) -> None:
        try:
            await self._context.write(message)
        except (grpc.RpcError, grpc.aio.BaseError) as error:
            raise NetworkError(f"The stream has ended: {error}") from error
