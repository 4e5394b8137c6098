"""Telemetry over sockets: device to host to helper, with and without TLS; noise on both ports."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
import pytest

from shoal.clock import SystemClock
from shoal.errors import NetworkError, ProtocolError
from shoal.fleet import telemetry_server
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.telemetry_device import report_of
from shoal.fleet.telemetry_diary import Tell
from shoal.fleet.telemetry_helper import Helper, OpenedSeeds, Terms
from shoal.fleet.telemetry_host import TelemetryHost
from shoal.fleet.telemetry_link import GrpcHelperLink, GrpcTelemetryLink
from shoal.fleet.telemetry_server import HelperServer, serve_reports
from shoal.fleet.tls import make_tls
from shoal.fleet.wire import fleet_pb2
from shoal.fleet.wire import telemetry_pb2 as pb
from shoal.privacy.masks import public_key
from shoal.privacy.telemetry import DAY_S, Day
from tests.fleet import toy

pytestmark = pytest.mark.integration

PRIVATE = bytes(range(32))
TERMS = Terms(minimum=3, noise=1.0)


@dataclass
class Served:
    fleet: toy.Fleet
    telemetry: TelemetryHost
    server: GrpcServer
    helper: HelperServer

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@asynccontextmanager
async def served(*, tls: Tls | None = None, ca: bytes | None = None) -> AsyncIterator[Served]:
    helper = HelperServer(
        Helper(PRIVATE, OpenedSeeds(None), terms=TERMS), address="127.0.0.1:0", clock=SystemClock(), tls=tls
    )
    await helper.start()
    async with toy.fleet(toy.plan(toy.exact("a")), rounds=1) as fleet:
        link = GrpcHelperLink(f"127.0.0.1:{helper.port}", ca=ca)
        telemetry = TelemetryHost(fleet.host.store, fleet.host.run_id, link, clock=SystemClock())
        server = fleet.host.server(address="127.0.0.1:0", tls=tls)
        serve_reports(server.unstarted, telemetry)
        await server.start()
        try:
            yield Served(fleet, telemetry, server, helper)
        finally:
            await server.close(grace_s=0.2)
            await helper.close()


def report() -> pb.Report:
    day = int(time.time() // DAY_S) - 1
    return report_of(Tell(day, Day(hours=frozenset({3}))), public_key(PRIVATE), os.urandom)


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
@toy.in_loop
async def test_reports_reach_the_record_as_a_sum(with_tls: bool) -> None:
    key, chain, ca = make_tls(["127.0.0.1"])
    given = {"tls": Tls(key, chain), "ca": ca} if with_tls else {}
    async with served(**given) as here:  # type: ignore[arg-type]
        link = GrpcTelemetryLink(here.address, ca=ca if with_tls else None)
        for _ in range(4):
            await link.tell(report())
        await here.telemetry.open_closed(all=True)
        (row,) = here.fleet.host.store.telemetry(here.fleet.host.run_id)
        assert row.reports == 4 and abs(row.sums[3] - 4) <= 8


@toy.in_loop
async def test_no_two_reports_come_on_one_connection_nor_on_a_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    peers: list[str] = []

    async with served() as here:
        monkeypatch.setattr(telemetry_server, "address_of", lambda context: peers.append(context.peer()) or "one")
        other = GrpcLink(here.address)
        async with other.session() as stream:
            await stream.send(fleet_pb2.FromDevice(ping=fleet_pb2.Ping()))
            link = GrpcTelemetryLink(here.address)
            for _ in range(3):
                await link.tell(report())
        await other.close()
    assert len(set(peers)) == 3


@toy.in_loop
async def test_a_host_without_telemetry_says_so() -> None:
    async with toy.fleet(toy.plan(toy.exact("a")), rounds=1) as fleet:
        server = fleet.host.server(address="127.0.0.1:0")
        await server.start()
        try:
            with pytest.raises(ProtocolError, match="without --telemetry"):
                await GrpcTelemetryLink(f"127.0.0.1:{server.port}").tell(report())
        finally:
            await server.close(grace_s=0.2)
    with pytest.raises(NetworkError):
        await GrpcTelemetryLink(f"127.0.0.1:{server.port}").tell(report())


@toy.in_loop
async def test_noise_on_either_port_is_answered_and_what_is_good_goes_on() -> None:
    async with served() as here:
        for port, method in ((here.server.port, "Telemetry/Tell"), (here.helper.port, "Helper/Open")):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = channel.unary_unary(f"/shoal.telemetry.v1.{method}")
                for size in (0, 1, 10, 300, 5000, 100_000):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await asyncio.wait_for(call(os.urandom(size)), 10)
        for _ in range(3):
            await GrpcTelemetryLink(here.address).tell(report())
        await here.telemetry.open_closed(all=True)
        assert [row.reports for row in here.fleet.host.store.telemetry(here.fleet.host.run_id)] == [3]
