"""Both ends of a push's wire: bytes in, messages out. What is decided is decided in `push.py` and `take.py`."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any, Final

import grpc

from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.grpc_server import OPTIONS, SERVER_OPTIONS, STALLED_S, Calls, Tls, address_of, listen
from shoal.fleet.push import NotAllowed, NotYours, Push
from shoal.fleet.wire import data_pb2 as pb
from shoal.fleet.wire import data_pb2_grpc as rpc

CALL_TIMEOUT_S: Final = 60.0
MAX_REQUEST_BYTES: Final = 4 << 10
"""All that a taker says is small."""
MAX_CONNECTIONS: Final = 1_000
_CODES: Final[dict[type[Exception], grpc.StatusCode]] = {
    NotYours: grpc.StatusCode.ABORTED,
    NotAllowed: grpc.StatusCode.PERMISSION_DENIED,
    ProtocolError: grpc.StatusCode.INVALID_ARGUMENT,
    NetworkError: grpc.StatusCode.UNAVAILABLE,
    StoreError: grpc.StatusCode.UNAVAILABLE,
}
_FINAL: Final = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED}


class DataServer:
    """Serves a push on one address."""

    def __init__(self, push: Push, *, address: str, tls: Tls | None = None) -> None:
        """
        Args:
            push: what is served.
            address: host:port.
            tls: key and certificate; None: in the clear.
        """
        self._address, self._tls = address, tls
        changed = {
            "grpc.max_receive_message_length": MAX_REQUEST_BYTES,
            "grpc.max_allowed_incoming_connections": MAX_CONNECTIONS,
        }
        options = [option for option in SERVER_OPTIONS if option[0] not in changed]
        self._server = grpc.aio.server(options=[*options, *changed.items()])
        rpc.add_DataServicer_to_server(_Servicer(push), self._server)  # type: ignore[no-untyped-call]
        self.port = 0

    async def start(self) -> None:
        """Raises NetworkError where the port is taken or cannot be used."""
        self.port = listen(self._server, self._address, self._tls)
        await self._server.start()

    async def close(self, *, grace_s: float = 1.0) -> None:
        """Ends all calls."""
        await self._server.stop(grace_s)


class _Servicer:
    def __init__(self, push: Push) -> None:
        self._push, self._calls = push, Calls()

    async def Offer(self, request: pb.OfferRequest, context: Any) -> pb.OfferReply:
        async with self._call(context):
            return self._push.offer(request)

    async def Claim(self, request: pb.ClaimRequest, context: Any) -> pb.ClaimReply:
        async with self._call(context) as address:
            return self._push.claim(request, address)

    async def Pull(self, request: pb.PullRequest, context: Any) -> None:
        async with self._call(context), aclosing(self._push.pull(request)) as pieces:
            async for piece in pieces:
                try:
                    async with asyncio.timeout(STALLED_S):
                        await context.write(piece)
                except (grpc.aio.UsageError, grpc.aio.InternalError) as error:
                    raise NetworkError(f"The call has ended: {error}") from error

    async def Held(self, request: pb.HeldRequest, context: Any) -> pb.HeldReply:
        async with self._call(context):
            return self._push.held(request)

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncGenerator[str, None]:
        """One of a bounded number, from an address; what goes wrong in it is an answer to the taker."""
        address = address_of(context)
        try:
            self._calls.begin(address)
        except NetworkError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        try:
            yield address
        except TimeoutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"Nothing went on for {STALLED_S:g} s; try again.")
        except tuple(_CODES) as error:
            code = next(code for kind, code in _CODES.items() if isinstance(error, kind))
            await context.abort(code, str(error)[:1000])
        finally:
            self._calls.end(address)


class DataLink:
    """A taker's way to a push."""

    def __init__(self, address: str, *, ca: bytes | None = None, server_name: str | None = None) -> None:
        """
        Args:
            address: host:port.
            ca: PEM of the authority that signed the server's certificate; None: no TLS.
            server_name: the name in the certificate, where it is not the host's.
        """
        options = [
            *OPTIONS,
            *([("grpc.ssl_target_name_override", server_name)] if server_name else []),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca), options=options)
        self._stub: Any = rpc.DataStub(self._channel)  # type: ignore[no-untyped-call]

    async def offer(self, request: pb.OfferRequest) -> pb.OfferReply:
        with _translated():
            reply: pb.OfferReply = await self._stub.Offer(request, timeout=CALL_TIMEOUT_S)
            return reply

    async def claim(self, request: pb.ClaimRequest) -> pb.ClaimReply:
        with _translated():
            reply: pb.ClaimReply = await self._stub.Claim(request, timeout=CALL_TIMEOUT_S)
            return reply

    async def pull(self, request: pb.PullRequest) -> AsyncGenerator[pb.Piece, None]:
        call = self._stub.Pull(request)
        try:
            with _translated():
                while True:
                    async with asyncio.timeout(STALLED_S):
                        piece = await call.read()
                    if piece is grpc.aio.EOF:
                        return
                    yield piece
        except TimeoutError as error:
            raise NetworkError(f"No piece came for {STALLED_S:g} s.") from error
        finally:
            call.cancel()

    async def held(self, request: pb.HeldRequest) -> pb.HeldReply:
        with _translated():
            reply: pb.HeldReply = await self._stub.Held(request, timeout=CALL_TIMEOUT_S)
            return reply

    async def close(self) -> None:
        await self._channel.close()


@contextmanager
def _translated() -> Iterator[None]:
    """gRPC's errors as ours."""
    try:
        yield
    except grpc.RpcError as error:
        code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
        details = (error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)) or ""
        if code is grpc.StatusCode.ABORTED:
            raise NotYours(details) from error
        if code is grpc.StatusCode.PERMISSION_DENIED:
            raise NotAllowed(details) from error
        if code in _FINAL:
            raise ProtocolError(details) from error
        name = code.name.lower().replace("_", " ") if code is not None else "broken"
        raise NetworkError(f"{name}: {details[:300]}") from error
