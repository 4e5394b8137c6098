"""A device's way to an Edge over gRPC. Many devices of a process share one connection."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc

from shoal.errors import NetworkError, ProtocolError
from shoal.fleet.address import is_address
from shoal.fleet.grpc_server import OPTIONS
from shoal.fleet.link import STALLED_S, Link, Stream
from shoal.fleet.proxy import proxy_options
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.fleet.wire import fleet_pb2_grpc as rpc

CALL_TIMEOUT_S: Final = 60.0
_STALLED: Final = "The host has let a transfer stall; it goes on where it was."
MAX_EDGES: Final = 100
_ENDED: Final = (grpc.aio.UsageError, asyncio.InvalidStateError)
"""What grpc raises, as it happens to notice it, where a call has ended under its user."""
SERVICE: Final[str] = pb.DESCRIPTOR.services_by_name["Fleet"].full_name
_FINAL: Final = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}


class GrpcLink:
    """One connection to an Edge, through the proxy that the environment names for it (`proxy.py`)."""

    def __init__(
        self,
        address: str,
        *,
        ca: bytes | None = None,
        server_name: str | None = None,
        client: tuple[bytes, bytes] | None = None,
    ) -> None:
        """
        Args:
            address: host:port.
            ca: PEM of the authority that signed the server's certificate; None: no TLS.
            server_name: the name in the certificate, where it is not the host's.
            client: PEM of a key and its certificate chain, for a host that asks devices for one.
        """
        self._ca, self._server_name, self._client = ca, server_name, client
        self._known: dict[str, GrpcLink] = {address: self}
        """Links to Edges of this host that were named, shared by them all."""
        name = [("grpc.ssl_target_name_override", server_name)] if server_name else []
        options = [
            *OPTIONS,
            *name,
            *proxy_options(address),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if ca is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(ca, *(client or ()))
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._stub: Any = rpc.FleetStub(self._channel)  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Stream, None]:
        call = self._stub.Session()
        try:
            yield _GrpcStream(call)
        finally:
            call.cancel()

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        call = self._stub.Pull(request)
        try:
            while True:
                async with asyncio.timeout(STALLED_S):
                    piece = await call.read()
                if piece is grpc.aio.EOF:
                    return
                yield piece
        except grpc.RpcError as error:
            raise _translated(error) from error
        except TimeoutError as error:
            raise NetworkError(_STALLED) from error
        finally:
            call.cancel()

    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
        loop = asyncio.get_running_loop()

        async def taken() -> AsyncIterator[pb.PushSlice]:
            async for part in slices:
                left.reschedule(loop.time() + STALLED_S)  # the one before was taken
                yield part

        try:
            async with asyncio.timeout(STALLED_S) as left:
                reply: pb.PushReply = await self._stub.Push(taken())
                return reply
        except grpc.RpcError as error:
            raise _translated(error) from error
        except TimeoutError as error:
            raise NetworkError(_STALLED) from error

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        try:
            reply: pb.StatusReply = await self._stub.Status(request, timeout=CALL_TIMEOUT_S)
            return reply
        except grpc.RpcError as error:
            raise _translated(error) from error

    def elsewhere(self, address: str) -> Link:
        """The link to another Edge, with the same authority; this one where too many were named already, or what is named is no HOST:PORT."""
        if address not in self._known and len(self._known) < MAX_EDGES and is_address(address):
            self._known[address] = other = GrpcLink(
                address, ca=self._ca, server_name=self._server_name, client=self._client
            )
            other._known = self._known
        return self._known.get(address, self)

    async def close(self) -> None:
        """Closes it and those to the Edges that were named."""
        for link in self._known.values():
            await link._channel.close()


class _GrpcStream:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def send(self, message: pb.FromDevice) -> None:
        try:
            await self._call.write(message)
        except grpc.RpcError as error:
            raise _translated(error) from error
        except _ENDED as error:  # under the writer
            raise NetworkError("The stream has ended.") from error

    async def receive(self) -> pb.FromEdge:
        try:
            message = await self._call.read()
        except grpc.RpcError as error:
            raise _translated(error) from error
        except _ENDED as error:
            raise NetworkError("The stream has ended.") from error
        if message is grpc.aio.EOF:
            raise NetworkError("The Edge ended the session.")
        assert isinstance(message, pb.FromEdge)
        return message


def _translated(error: grpc.RpcError) -> NetworkError | ProtocolError:
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    details = (error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)) or ""
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(
            f"The host does not speak {SERVICE}: it is of another version than this device, or no host of shoal ({details[:300]})."
        )
    if code in _FINAL:
        return ProtocolError(details)
    return NetworkError(f"{code.name.lower().replace('_', ' ') if code is not None else 'broken'}: {details[:300]}")
