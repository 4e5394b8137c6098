"""Telemetry over gRPC: from a device to a host, and from a host to its helper. Bytes in, messages out."""

import asyncio
import threading
from typing import Any, Final, NoReturn

import grpc

from shoal.clock import Clock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.grpc_server import SERVER_OPTIONS, Calls, Tls, address_of, listen
from shoal.fleet.telemetry_helper import MOST_REPORTS, Helper
from shoal.fleet.telemetry_host import TelemetryHost
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.fleet.wire import telemetry_pb2_grpc as rpc
from shoal.privacy.split_sums import SEALED_BYTES

TELL_S: Final = 30.0
OPEN_S: Final = 120.0
"""For the largest batch; a helper opens several thousand seals a second."""
_BATCH_BYTES: Final = MOST_REPORTS * (SEALED_BYTES + 8) + 1024


class GrpcTelemetryLink:
    """A device's way to a host: a connection for each report, which nothing else uses."""

    def __init__(
        self,
        address: str,
        *,
        ca: bytes | None = None,
        server_name: str | None = None,
        client: tuple[bytes, bytes] | None = None,
    ) -> None:
        """As for `GrpcLink`; `client`: PEM of a key and its certificate chain, for a host that asks devices for one, and so knows who comes."""
        self._address, self._ca, self._server_name, self._client = address, ca, server_name, client

    async def tell(self, report: pb.Report) -> None:
        """Raises NetworkError or ProtocolError: it was not taken, or nobody knows."""
        async with _channel(self._address, self._ca, self._server_name, self._client) as channel:
            stub: Any = rpc.TelemetryStub(channel)  # type: ignore[no-untyped-call]
            try:
                await stub.Tell(report, timeout=TELL_S)
            except grpc.aio.AioRpcError as error:
                raise _translated(error) from error


class GrpcHelperLink:
    """A host's way to its helper."""

    def __init__(self, address: str, *, ca: bytes | None = None) -> None:
        """As for `GrpcLink`."""
        self._address, self._ca = address, ca

    async def open(self, batch: pb.Batch) -> pb.Opened:
        """Raises NetworkError (try again) or ProtocolError (do not)."""
        async with _channel(self._address, self._ca) as channel:
            stub: Any = rpc.HelperStub(channel)  # type: ignore[no-untyped-call]
            try:
                opened: pb.Opened = await stub.Open(batch, timeout=OPEN_S)
                return opened
            except grpc.aio.AioRpcError as error:
                raise _translated(error) from error


def serve_reports(server: Any, host: TelemetryHost) -> None:
    """Lets a gRPC server, before it is started, take telemetry."""
    rpc.add_TelemetryServicer_to_server(_Reports(host), server)  # type: ignore[no-untyped-call]


class HelperServer:
    """Serves a helper on one address."""

    def __init__(self, helper: Helper, *, address: str, clock: Clock, tls: Tls | None = None) -> None:
        """As for `GrpcServer`; `clock`: says which days are opened."""
        self._address, self._tls = address, tls
        options = [option for option in SERVER_OPTIONS if option[0] != "grpc.max_receive_message_length"]
        self._server = grpc.aio.server(options=[*options, ("grpc.max_receive_message_length", _BATCH_BYTES)])
        rpc.add_HelperServicer_to_server(_Opens(helper, clock), self._server)  # type: ignore[no-untyped-call]
        self.port = 0

    async def start(self) -> None:
        """Raises NetworkError where the port is taken or cannot be used."""
        self.port = listen(self._server, self._address, self._tls)
        await self._server.start()

    async def close(self) -> None:
        await self._server.stop(1.0)


class _Reports:
    def __init__(self, host: TelemetryHost) -> None:
        self._host = host

    async def Tell(self, report: pb.Report, context: Any) -> pb.Told:
        try:
            self._host.tell(report, address=address_of(context))
        except (ProtocolError, NetworkError) as error:
            await _abort(context, error)
        return pb.Told()


class _Opens:
    """One batch is opened at a time, beside the event loop; so many more wait."""

    def __init__(self, helper: Helper, clock: Clock) -> None:
        self._helper, self._clock, self._turn, self._calls = helper, clock, threading.Lock(), Calls()

    async def Open(self, batch: pb.Batch, context: Any) -> pb.Opened:
        address = address_of(context)
        if self._calls.num >= 8:
            await _abort(context, NetworkError("This helper opens as many batches as it may; try again."))
        self._calls.begin(address)
        try:
            return await asyncio.to_thread(self._open, batch)
        except (ProtocolError, NetworkError, StoreError) as error:
            await _abort(context, error)
        finally:
            self._calls.end(address)

    def _open(self, batch: pb.Batch) -> pb.Opened:
        with self._turn:
            return self._helper.open(batch, wall_s=self._clock.wall_s())


def _channel(
    address: str, ca: bytes | None, server_name: str | None = None, client: tuple[bytes, bytes] | None = None
) -> Any:
    # A pool of its own: else gRPC may put the call on a connection that is there already, a session's.
    options = [("grpc.use_local_subchannel_pool", 1)]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))  # type: ignore[arg-type]
    if ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, *(client or ())), options=options)


async def _abort(context: Any, error: Exception) -> NoReturn:
    code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, ProtocolError) else grpc.StatusCode.UNAVAILABLE
    await context.abort(code, str(error)[:1000])
    raise AssertionError("abort raises")


def _translated(error: grpc.aio.AioRpcError) -> NetworkError | ProtocolError:
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError("this host takes no telemetry: it was started without --telemetry")
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return ProtocolError(details)
    return NetworkError(f"{error.code().name.lower().replace('_', ' ')}: {details[:300]}")
