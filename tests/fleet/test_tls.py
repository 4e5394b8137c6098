"""Who is believed: pinned certificates, an authority of one's own, devices' certificates; and hosts that stall or lie on the way there."""

import asyncio
import contextlib
import datetime
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import DataError, NetworkError, ProtocolError, StoreError
from shoal.fleet import handshake
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.grpc_server import Tls
from shoal.fleet.handshake import ClientCertificate, pinned_certificate, refusal, unreached
from shoal.fleet.tls import load_or_make_tls, make_tls, names_in, pin_of, read_tls
from shoal.fleet.tls_authority import issue, make_authority
from shoal.fleet.wire import fleet_pb2 as pb
from tests.fleet import toy
from tests.fleet.test_grpc import served

pytestmark = pytest.mark.integration

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)


def own(folder: Path, name: str = "127.0.0.1") -> tuple[Path, Tls]:
    """An authority of one's own and a server's key and chain of it."""
    ca = make_authority(folder, now=NOW)
    certificate, key = issue(folder, "server", [name], now=NOW, days=1)
    return ca, read_tls(key, certificate)


def device_certificate(folder: Path, *, now: datetime.datetime = NOW, name: str = "anna") -> ClientCertificate:
    return ClientCertificate(*issue(folder, "device", [name], now=now, days=1))


async def answers(port: int, ca: bytes, client: ClientCertificate | None = None, **options: str) -> bool:
    """Whether a device gets through to the host."""
    link = GrpcLink(f"127.0.0.1:{port}", ca=ca, client=client.read() if client else None, **options)  # type: ignore[arg-type]
    try:
        await asyncio.wait_for(link.status(pb.StatusRequest()), timeout=10)
    except ProtocolError:  # it read the token, which is none
        return True
    except NetworkError:
        return False
    finally:
        await link.close()
    return True


@toy.in_loop
async def test_a_device_finds_the_pinned_certificate_and_believes_that_alone(tmp_path: Path) -> None:
    tls, ca = load_or_make_tls(tmp_path, address="127.0.0.1")
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=tls) as server:
        found = await asyncio.to_thread(pinned_certificate, f"127.0.0.1:{server.port}", pin_of(tls.chain))
        assert found.split() == ca.read_bytes().split()
        assert await answers(server.port, found)
    other, _ = load_or_make_tls(tmp_path / "other", address="127.0.0.1")
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=other) as between:
        with pytest.raises(ProtocolError, match=r"somebody is in between.*Nothing was sent"):
            await asyncio.to_thread(pinned_certificate, f"127.0.0.1:{between.port}", pin_of(tls.chain))
        assert not await answers(between.port, found), "one who steps in between later is not believed either"


@pytest.mark.parametrize("pinned", ["authority", "server"])
@toy.in_loop
async def test_the_last_certificate_of_a_chain_is_enough_to_believe(pinned: str, tmp_path: Path) -> None:
    key, server, authority = make_tls(["127.0.0.1"])
    tls = Tls(key, server + authority if pinned == "authority" else server)
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=tls) as host:
        address = f"127.0.0.1:{host.port}"
        found = await asyncio.to_thread(pinned_certificate, address, pin_of(tls.chain))
        assert await answers(host.port, found)
        assert await asyncio.to_thread(refusal, address, ca=found) == ""


@toy.in_loop
async def test_a_host_that_is_reached_under_another_name_is_known_by_its_own(tmp_path: Path) -> None:
    _, tls = own(tmp_path, "train.example.org")
    ca = (tmp_path / "ca.pem").read_bytes()
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=tls) as server:
        assert not await answers(server.port, ca)
        assert await answers(server.port, ca, server_name="train.example.org")
        why = await asyncio.to_thread(refusal, f"127.0.0.1:{server.port}", ca=ca)
        assert "not to be believed" in why and "--ca" in why


@pytest.mark.parametrize("shown", ["good", "none", "of another", "ended", "of a server"])
@toy.in_loop
async def test_only_devices_with_a_certificate_of_the_authority_come_in(shown: str, tmp_path: Path) -> None:
    ca, tls = own(tmp_path)
    make_authority(tmp_path / "other", now=NOW)
    client = {
        "good": device_certificate(tmp_path),
        "none": None,
        "of another": device_certificate(tmp_path / "other"),
        "ended": device_certificate(tmp_path, now=NOW - 3 * DAY, name="bert"),
        "of a server": ClientCertificate(tmp_path / "127.0.0.1.pem", tmp_path / "127.0.0.1.key"),
    }[shown]
    tls = replace(tls, client_ca=ca.read_bytes())
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=tls) as server:
        assert await answers(server.port, ca.read_bytes(), client) == (shown == "good")
        why = await asyncio.to_thread(refusal, f"127.0.0.1:{server.port}", ca=ca.read_bytes(), client=client)
    if shown == "good":
        assert why == ""
    else:
        assert "hangs up on this device" in why and "--client-cert" in why
        assert ("no certificate" if client is None else "the certificate CN=") in why


@toy.in_loop
async def test_a_devices_certificate_serves_nobody(tmp_path: Path) -> None:
    ca, _ = own(tmp_path)
    stolen = device_certificate(tmp_path, name="127.0.0.1")
    tls = read_tls(stolen.key, stolen.certificate)
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=tls) as server:
        assert not await answers(server.port, ca.read_bytes())


def test_an_authority_is_not_written_over_and_its_files_are_secret(tmp_path: Path) -> None:
    ca, tls = own(tmp_path, "host.example.org")
    assert names_in(tls.chain) == ["host.example.org"]
    for key in tmp_path.glob("*.key"):
        assert key.stat().st_mode & 0o777 == 0o600
    with pytest.raises(DataError, match="not written over"):
        make_authority(tmp_path, now=NOW)
    for name in ("authority", "ca", "../x", "", "a b"):
        with pytest.raises(DataError, match="name"):
            issue(tmp_path, "device", [name], now=NOW, days=1)
    with pytest.raises(DataError, match="enrol tls-authority"):
        issue(tmp_path / "nothing", "device", ["anna"], now=NOW, days=1)
    assert ca.read_bytes() in (tmp_path / "host.example.org.pem").read_bytes()
    with pytest.raises(StoreError, match="PEM"):
        pin_of(b"nothing")


def test_a_certificate_that_is_none_is_said(tmp_path: Path) -> None:
    make_authority(tmp_path, now=NOW)
    made = device_certificate(tmp_path)
    ca = (tmp_path / "ca.pem").read_bytes()
    with pytest.raises(ValueError, match="PEM certificate"):
        refusal("127.0.0.1:1", ca=b"nothing")
    with pytest.raises(ValueError, match=r"anna\.key"):
        refusal("127.0.0.1:1", ca=ca, client=ClientCertificate(made.key, made.key))
    with pytest.raises(StoreError, match=r"nothing\.pem"):
        refusal("127.0.0.1:1", ca=ca, client=ClientCertificate(tmp_path / "nothing.pem", made.key))
    assert refusal("127.0.0.1:1", ca=ca, client=made) == "", "that it is not there yet is no refusal"


# Hosts that mean harm on the way there.


@contextlib.contextmanager
def hostile(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A port where every connection is served so."""

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=run, args=(connection,), daemon=True).start()

    def run(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def silent(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def drips(connection: socket.socket) -> None:
    hello = bytes.fromhex("160303") + (16_000).to_bytes(2, "big") + b"\x02" + (15_000).to_bytes(3, "big")
    connection.sendall(hello)
    while True:
        connection.sendall(b"\x03")
        time.sleep(0.02)


def floods(connection: socket.socket) -> None:
    record = bytes.fromhex("160303") + (16_000).to_bytes(2, "big") + b"\x02\xff\xff\xff" + bytes(15_996)
    while True:
        connection.sendall(record)


def speaks_other(connection: socket.socket) -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def hangs_up(connection: socket.socket) -> None:
    connection.recv(1 << 16)


@pytest.mark.parametrize("serve", [silent, drips, floods, speaks_other, hangs_up])
def test_a_host_that_stalls_drips_or_floods_is_left(
    serve: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "MAX_HANDSHAKE_BYTES", 64 << 10)
    begun_s = time.monotonic()
    with hostile(serve) as address:
        with pytest.raises(NetworkError):
            pinned_certificate(address, bytes(32), timeout_s=0.3)
        assert refusal(address, ca=make_tls(["localhost"])[2], timeout_s=0.3) == ""
    assert time.monotonic() - begun_s < 5.0


@toy.in_loop
async def test_a_handshake_that_stalls_is_ended_and_an_honest_device_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from shoal.fleet import grpc_server

    options = [option for option in grpc_server.SERVER_OPTIONS if option[0] != "grpc.server_handshake_timeout_ms"]
    monkeypatch.setattr(grpc_server, "SERVER_OPTIONS", [*options, ("grpc.server_handshake_timeout_ms", 500)])
    key, chain, ca = make_tls(["127.0.0.1"])
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet, tls=Tls(key, chain)) as server:
        half_a_hello = bytes.fromhex("1603010200010001fc0303")
        stalled = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        for _, writer in stalled:
            writer.write(half_a_hello)
        assert await answers(server.port, ca)
        for reader, writer in stalled:
            assert await asyncio.wait_for(reader.read(100), timeout=5) == b""
            writer.close()


def test_whether_anybody_answers_is_found_out_before_it_is_needed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert unreached(f"127.0.0.1:{port}") == ""
    assert f"Cannot reach 127.0.0.1:{port}" in unreached(f"127.0.0.1:{port}")
