"""Through an HTTP proxy that tunnels (CONNECT), as gRPC and as what looks at certificates; and over lines that go silent."""

import asyncio
import base64
from pathlib import Path

import pytest

from shoal.errors import NetworkError
from shoal.fleet import grpc_link
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.grpc_server import OPTIONS, SERVER_OPTIONS
from shoal.fleet.handshake import pinned_certificate
from shoal.fleet.proxy import Proxy, proxy_for, proxy_options
from shoal.fleet.telemetry_link import GrpcTelemetryLink
from shoal.fleet.tls import load_or_make_tls, pin_of
from shoal.fleet.wire import telemetry_pb2
from tests.fleet import toy
from tests.fleet.test_fleet import until

from tests.fleet.test_grpc import DeafProxy, Proxy as Relay, linked, served  # isort: skip

NAME = "train.shoal.test"
"""Which nobody but the proxy knows the address of."""


@pytest.mark.parametrize(
    ("environ", "address", "expected"),
    [
        ({}, "a.example:1", None),
        ({"HTTPS_PROXY": "http://proxy:3128"}, "a.example:1", Proxy("proxy", 3128)),
        ({"https_proxy": "proxy:3128", "HTTPS_PROXY": "http://other:1"}, "a.example:1", Proxy("proxy", 3128)),
        ({"http_proxy": "http://proxy/"}, "a.example:1", Proxy("proxy", 80)),
        ({"https_proxy": "http://u:p%40@[2001:db8::1]:8"}, "a.example:1", Proxy("2001:db8::1", 8, "u:p%40")),
        ({"https_proxy": "http://proxy:1", "no_proxy": "example"}, "a.example:1", None),
        ({"https_proxy": "http://proxy:1", "NO_PROXY": "b.example,192.0.2.7"}, "192.0.2.7:1", None),
        ({"https_proxy": "http://proxy:1", "NO_PROXY": "*"}, "a.example:1", None),
        ({"https_proxy": "http://proxy:1", "no_proxy": "b.example"}, "a.example:1", Proxy("proxy", 1)),
        ({"https_proxy": "http://proxy:1"}, "127.0.0.1:1", None),
        ({"https_proxy": "http://proxy:1"}, "[::1]:1", None),
        ({"https_proxy": "http://proxy:1"}, "localhost:1", None),
    ],
)
def test_the_proxy_that_the_environment_names(environ: dict[str, str], address: str, expected: Proxy | None) -> None:
    found = proxy_for(address, environ)
    assert found == expected
    assert found is None or ("p%40" not in repr(found) and proxy_for(address, {"https_proxy": found.url}) == found)


@pytest.mark.parametrize("value", ["https://proxy:1", "socks5://u:secret@proxy:1", "http://", "http://proxy:x"])
def test_a_proxy_that_cannot_be_used_is_said_without_its_password(value: str) -> None:
    with pytest.raises(ValueError, match=r"Expected https_proxy of the form http://") as refused:
        proxy_for("a.example:1", {"https_proxy": value})
    assert "secret" not in str(refused.value)


class Tunnel(Relay):
    """A proxy that knows one host, and by CONNECT alone."""

    def __init__(self, port: int, *, user: str = "", answer: bytes = b"HTTP/1.1 200 OK\r\nVia: test\r\n\r\n") -> None:
        super().__init__(port, after=0, times=0)
        self.user, self.answer = user, answer
        self.asked: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.asked.append(request.splitlines()[0])
        allowed = not self.user or base64.b64encode(self.user.encode()).decode() in request
        writer.write(self.answer if allowed else b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
        if self.port:
            return await super().serve(reader, writer)
        await reader.read()
        writer.close()


@pytest.mark.integration
@toy.in_loop
async def test_a_device_takes_part_through_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tls, _ = load_or_make_tls(tmp_path, address=NAME)
    async with toy.fleet(toy.plan(toy.exact("a")), rounds=2) as fleet, served(fleet, tls=tls) as server:
        tunnel = Tunnel(server.port, user="anna:s e c")
        async with tunnel as port:
            monkeypatch.setenv("HTTPS_PROXY", f"http://anna:s%20e%20c@127.0.0.1:{port}")
            found = await asyncio.to_thread(pinned_certificate, f"{NAME}:443", pin_of(tls.chain))
            link = GrpcLink(f"{NAME}:443", ca=found)
            fleet.start(toy.device("a", link))
            await asyncio.gather(*fleet.tasks)
            await link.close()
        assert len(tunnel.asked) >= 2 and set(tunnel.asked) == {f"CONNECT {NAME}:443 HTTP/1.1"}


@pytest.mark.integration
@toy.in_loop
async def test_telemetry_goes_through_the_same_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    tunnel = Tunnel(0, answer=b"HTTP/1.1 403 Forbidden\r\n\r\n")
    async with tunnel as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        with pytest.raises(NetworkError):
            await GrpcTelemetryLink(f"{NAME}:443").tell(telemetry_pb2.Report())
    assert set(tunnel.asked) == {f"CONNECT {NAME}:443 HTTP/1.1"}


@pytest.mark.integration
@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 403 Forbidden\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 9_000, b""],
    ids=["no", "other", "endless", "silent"],
)
@toy.in_loop
async def test_a_proxy_that_does_not_connect_is_said(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Tunnel(0, answer=answer) as port:
        monkeypatch.setenv("https_proxy", f"127.0.0.1:{port}")
        with pytest.raises(NetworkError, match=r"proxy 127\.0\.0\.1:.* does not connect to|is silent|in time"):
            await asyncio.to_thread(pinned_certificate, f"{NAME}:443", bytes(32), timeout_s=0.4)
        monkeypatch.setenv("no_proxy", NAME)
        with pytest.raises(NetworkError, match=f"Cannot reach {NAME}"):
            await asyncio.to_thread(pinned_certificate, f"{NAME}:443", bytes(32), timeout_s=0.4)


def test_no_proxy_is_looked_for_where_none_is_to_be_used() -> None:
    assert proxy_options("127.0.0.1:1") == [("grpc.enable_http_proxy", 0)]


def test_both_ends_keep_a_connection_alive_within_a_minute() -> None:
    for options in (dict(OPTIONS), dict(SERVER_OPTIONS)):
        assert options["grpc.keepalive_time_ms"] < 60_000
        assert options["grpc.keepalive_permit_without_calls"] == 1
        # Else the other end hangs up on one that pings so often.
        assert options["grpc.http2.min_ping_interval_without_data_ms"] < options["grpc.keepalive_time_ms"]
        assert options["grpc.http2.max_pings_without_data"] == 0


class Pings(Relay):
    """Counts PING frames of HTTP/2 (RFC 9113, section 6.7) that are no answers, each way."""

    def __init__(self, port: int) -> None:
        super().__init__(port, after=0, times=0)
        self.up = self.down = 0

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        if cut:
            writer.write(await reader.readexactly(24))  # the client's preface
        while True:
            head = await reader.readexactly(9)
            is_ping = head[3] == 6 and not head[4] & 1
            self.up += cut and is_ping
            self.down += not cut and is_ping
            writer.write(head + await reader.readexactly(int.from_bytes(head[:3], "big")))


@pytest.mark.slow
@pytest.mark.integration
@toy.in_loop
async def test_pings_go_both_ways_over_a_line_where_nobody_says_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"grpc.keepalive_time_ms": 1_000, "grpc.http2.min_ping_interval_without_data_ms": 400}
    for place, options in (("grpc_link.OPTIONS", OPTIONS), ("grpc_server.SERVER_OPTIONS", SERVER_OPTIONS)):
        monkeypatch.setattr(f"shoal.fleet.{place}", [*{**dict(options), **quick}.items()])
    async with toy.fleet(toy.plan(toy.exact("a", "b"))) as fleet, served(fleet) as server:
        relay = Pings(server.port)
        async with relay as port, linked(port) as link, toy.peer(link, "a") as peer:
            await peer.check_in()
            await until(lambda: relay.up >= 2 and relay.down >= 2)
            assert fleet.host.edge.statistics().sessions_now == 1


@pytest.mark.integration
@toy.in_loop
async def test_a_device_leaves_a_line_that_swallows_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {
        "grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500, "grpc.http2.min_ping_interval_without_data_ms": 400,
    }  # fmt: skip
    assert quick.keys() <= dict(OPTIONS).keys(), "what is quick here has its own time there"
    monkeypatch.setattr(grpc_link, "OPTIONS", [*{**dict(OPTIONS), **quick}.items()])
    async with toy.fleet(toy.plan(toy.exact("a", "b"))) as fleet, served(fleet) as server:
        line = DeafProxy(server.port)
        async with line as port, linked(port) as link, toy.peer(link, "a") as peer:
            await peer.check_in()
            await until(lambda: fleet.host.edge.statistics().check_ins == 1)
            line.hearing.clear()
            with pytest.raises(NetworkError):
                await asyncio.wait_for(peer.stream.receive(), timeout=10)
