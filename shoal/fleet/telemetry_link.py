"""Telemetry over gRPC: a device's way to a host, and a host's to its helper. A connection for each call."""

from typing import Any, Final

import grpc

from shoal.errors import NetworkError, ProtocolError
from shoal.fleet.proxy import proxy_options
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.fleet.wire import telemetry_pb2_grpc as rpc

TELL_S: Final = 30.0
OPEN_S: Final = 120.0
"""For the largest batch; a helper opens several thousand seals a second."""


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
                raise _translated(error, "This host takes no telemetry: it was started without --telemetry.") from error


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
                raise _translated(error, "There is no telemetry helper of this version there.") from error


def _channel(
    address: str, ca: bytes | None, server_name: str | None = None, client: tuple[bytes, bytes] | None = None
) -> Any:
    # A pool of its own: else gRPC may put the call on a connection that is there already, a session's.
    options = [("grpc.use_local_subchannel_pool", 1), *proxy_options(address)]
    if server_name:
        options.append(("grpc.ssl_target_name_override", server_name))
    if ca is None:
        return grpc.aio.insecure_channel(address, options=options)
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca, *(client or ())), options=options)


def _translated(error: grpc.aio.AioRpcError, if_unknown: str) -> NetworkError | ProtocolError:
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(if_unknown)
    if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return ProtocolError(details)
    return NetworkError(f"{error.code().name.lower().replace('_', ' ')}: {details[:300]}")
