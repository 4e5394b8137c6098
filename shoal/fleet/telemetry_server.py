"""Telemetry behind gRPC: what a host takes from devices, and a helper from a host. Bytes in, messages out."""

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

MOST_WAITING: Final = 8
"""Batches that a helper has before it."""
_BATCH_BYTES: Final = MOST_REPORTS * (SEALED_BYTES + 8) + 1024


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
        if self._calls.num >= MOST_WAITING:
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


async def _abort(context: Any, error: Exception) -> NoReturn:
    code = grpc.StatusCode.INVALID_ARGUMENT if isinstance(error, ProtocolError) else grpc.StatusCode.UNAVAILABLE
    await context.abort(code, str(error)[:1000])
    raise AssertionError("abort raises")
