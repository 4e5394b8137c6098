"""Peers that mean harm, over sockets: whatever comes is answered or ended, and an honest device is served meanwhile."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shoal.clock import SystemClock
from shoal.errors import NetworkError, ProtocolError
from shoal.fleet import grpc_link, grpc_server, streams
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import RoundPolicy
from tests.fleet import toy
from tests.fleet.test_fleet import BIG, DELTA, FLOAT, honest_two_are_counted, until
from tests.fleet.test_grpc import DeafProxy, linked, served

pytestmark = pytest.mark.integration

SERVICE = "/shoal.fleet.v1.Fleet/"
TWO_OF_THREE = RoundPolicy(goal=2, minimum_group=2, over_selection=1.5)
TWO = RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
RUNTIME = pb.RuntimeInfo(kind="toy", version=[1, 0, 0], calling_convention=9, platforms=["cpu"])


class Fuzzer:
    """One connection that sends any bytes; what it is told is read and forgotten."""

    def __init__(self, link: GrpcLink, token: pb.Token) -> None:
        self.channel, self.token = link._channel, token
        self.calls: list[Any] = []
        self._stream: Any = None

    def messages(self) -> list[bytes]:
        """Good ones, of every kind."""
        check_in = pb.CheckIn(device_id="fuzz", runtime=RUNTIME, stay=True)
        root = "0" * 64
        slices = [pb.PushSlice(tensor=DELTA, data=FLOAT)]
        kinds: list[dict[str, Any]] = [
            {"check_in": check_in},
            {"check_in": pb.CheckIn(device_id="fuzz2", runtime=RUNTIME)},
            {"report": pb.Report(token=self.token, root=root, weight=3, slices=slices)},
            {"report": pb.Report(token=self.token, root=root, weight=3)},
            {"gave_up": pb.GaveUp(token=self.token, stage="x", why="y")},
            {"ping": pb.Ping()},
            {"group": pb.GroupMessage(token=self.token)},
        ]
        return [pb.FromDevice(**kind).SerializeToString() for kind in kinds]

    async def say(self, data: bytes) -> None:
        """On the control stream: a new one, where the Edge has ended the last."""
        if self._stream is None or self._stream.done():
            self._stream = self.channel.stream_stream(SERVICE + "Session")()
            self.calls.append(self._stream)
        try:
            await asyncio.wait_for(self._stream.write(data), timeout=10)
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.InvalidStateError, TimeoutError):
            self._stream = None  # it was ended, or is not read any more

    async def call(self, method: str, *data: bytes) -> None:
        """One of the other calls, to its end."""
        try:
            match method:
                case "Push":
                    await asyncio.wait_for(self.channel.stream_unary(SERVICE + method)(_all(data)), timeout=10)
                case "Pull":
                    pulling = self.channel.unary_stream(SERVICE + method)(data[0])
                    self.calls.append(pulling)
                    await asyncio.wait_for(pulling.read(), timeout=10)
                case _:
                    await asyncio.wait_for(self.channel.unary_unary(SERVICE + method)(data[0]), timeout=10)
        except (grpc.RpcError, grpc.aio.UsageError, TimeoutError):
            pass  # an answer

    def close(self) -> None:
        for call in self.calls:
            call.cancel()


async def _all(data: tuple[bytes, ...]) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


@st.composite
def acts(draw: st.DrawFn) -> tuple[Any, ...]:
    """(what, a kind of message, where it is broken, bytes, how often)"""
    return (
        draw(st.sampled_from(["say", "say", "Push", "Pull", "Status"])),
        draw(st.integers(0, 6)),
        draw(st.sampled_from(["good", "other", "flipped", "cut", "doubled", "huge"])),
        draw(st.binary(max_size=60)),
        draw(st.sampled_from([1, 1, 1, 2, 300])),
    )


def broken(good: bytes, how: str, other: bytes) -> bytes:
    place = (other[0] if other else 0) % max(1, len(good))
    match how:
        case "other":
            return other
        case "flipped":
            return good[:place] + bytes((good[place] ^ (1 + other[-1] % 255),)) + good[place + 1 :] if other else good
        case "cut":
            return good[:place]
        case "doubled":
            return good + good
        case "huge":
            return good + b"\x9a\x3e" + b"\x80\x80\xc0\x01" + b"x" * (3 << 20)  # an unknown field of 3 MiB
    return good


def bulk(fuzzer: Fuzzer, method: str, other: bytes) -> bytes:
    number = int.from_bytes(other[:8], "big")
    match method:
        case "Push":
            name = DELTA if number % 2 else other.hex()
            part = pb.PushSlice(token=fuzzer.token, tensor=name, offset=number % 7, data=other, root=other.hex())
            return part.SerializeToString()
        case "Pull":
            asked = pb.PullRequest(token=fuzzer.token, hash=other.hex(), offset=number, ids=list(other))
            return asked.SerializeToString()
    return pb.StatusRequest(token=fuzzer.token).SerializeToString()


@settings(max_examples=3, deadline=None)
@given(st.lists(acts(), max_size=10))
@example([("say", kind, how, b"\x07\x80\xff", 1) for kind in range(7) for how in ("good", "flipped", "cut")])
@example([("Push", 0, how, b"\x01" * 9, 300) for how in ("good", "other", "huge")])
@example([("say", 5, "good", b"", 1000), ("say", 0, "good", b"", 1000)])
def test_whatever_is_said_two_honest_devices_are_counted(said: list[tuple[Any, ...]]) -> None:
    asyncio.run(asyncio.wait_for(_fuzzed(said), timeout=50))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@settings(
    max_examples=max(150, int(os.environ.get("SHOAL_FUZZ", "0")) // 600), deadline=None
)  # 600 messages each, on average
@given(st.lists(acts(), max_size=20))
def test_much_more_of_it(said: list[tuple[Any, ...]]) -> None:
    asyncio.run(asyncio.wait_for(_fuzzed(said), timeout=50))


async def _fuzzed(said: list[tuple[Any, ...]]) -> None:
    async with (
        toy.fleet(toy.plan(TWO_OF_THREE)) as fleet,
        served(fleet) as server,
        linked(server.port) as link,
        linked(server.port) as bad,
        toy.peer(bad, "fuzz") as peer,
    ):
        await peer.check_in()
        await until(lambda: fleet.host.edge.statistics().check_ins == 1)
        fleet.start(device := toy.device("a", link))
        await until(lambda: fleet.host.edge.statistics().check_ins == 2)
        other = asyncio.create_task(_late_b(fleet, link))
        fuzzer = Fuzzer(bad, (await peer.hear())[1].token)
        for what, kind, how, data, times in said:
            for _ in range(times):
                if what == "say":
                    await fuzzer.say(broken(fuzzer.messages()[kind], how, data))
                else:
                    await fuzzer.call(what, broken(bulk(fuzzer, what, data), how, data))
        statistics = fleet.host.edge.statistics()
        assert statistics.staged_now <= 3
        assert statistics.sessions_now <= 3 + len(fuzzer.calls)
        await other
        fuzzer.close()
        assert device.progress.failures == 0


async def _late_b(fleet: toy.Fleet, link: GrpcLink) -> None:
    fleet.start(toy.device("b", link))
    await honest_two_are_counted(fleet)


class Skewed(SystemClock):
    """A device's clock that is hours off."""

    def __init__(self, hours: float) -> None:
        self._off_s = 3600.0 * hours

    def wall_s(self) -> float:
        return super().wall_s() + self._off_s


@toy.in_loop
async def test_devices_whose_clocks_are_hours_off_take_part() -> None:
    async with toy.fleet(toy.plan(TWO), rounds=2) as fleet, served(fleet) as server, linked(server.port) as link:
        hosts = [
            DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, clock=Skewed(hours)) for hours in (-30.0, 30.0)
        ]
        devices = [toy.device(name, link, host=host) for name, host in zip("ab", hosts, strict=True)]
        fleet.start(*devices)
        await asyncio.gather(*fleet.tasks)
        assert fleet.members == [0, 2, 2]
        assert all(device.progress.refused == device.progress.failures == 0 for device in devices)


# Streams and calls that come to nothing.


@toy.in_loop
async def test_streams_that_never_check_in_are_ended_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHECK_IN_WAIT_S", 0.3)
    async with toy.fleet(toy.plan(TWO)) as fleet, served(fleet) as server, linked(server.port) as link:
        peers = [link._stub.Session() for _ in range(200)]
        for number, call in enumerate(peers):
            if number % 2:
                await call.write(pb.FromDevice(ping=pb.Ping()))  # a word that says nothing
        edge = fleet.host.edge
        fleet.start(toy.device("a", link), toy.device("b", link))
        await honest_two_are_counted(fleet)
        for number, call in enumerate(peers):
            heard = [message.WhichOneof("kind") async for message in call]
            assert heard == (["ping", "later"] if number % 2 else ["later"])
        await until(lambda: edge.statistics().sessions_now <= 2)


@toy.in_loop
async def test_who_waits_for_its_turn_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHECK_IN_WAIT_S", 0.1)
    async with (
        toy.fleet(toy.plan(TWO_OF_THREE)) as fleet,
        served(fleet) as server,
        linked(server.port) as link,
        toy.peer(link) as peer,
    ):
        await peer.check_in()
        await asyncio.sleep(0.3)
        fleet.start(toy.device("a", link), toy.device("b", link))
        assert (await peer.hear())[0] == "assigned"


@toy.in_loop
async def test_a_flood_of_strangers_ends_its_own_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_STRANGERS", 10)
    async with toy.fleet(toy.plan(TWO)) as fleet, served(fleet) as server, linked(server.port) as link:
        calls = [link._stub.Session() for _ in range(300)]
        for call in calls:
            await call.wait_for_connection()
        fleet.start(toy.device("a", link), toy.device("b", link))
        await honest_two_are_counted(fleet)
        await until(lambda: fleet.host.edge.statistics().sessions_now <= 10 + 2)
        for call in calls:
            call.cancel()


@toy.in_loop
async def test_pushes_that_never_end_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "STALLED_S", 0.3)
    monkeypatch.setattr(grpc_server, "MAX_CALLS", 100)
    made, held = toy.plan(TWO_OF_THREE, BIG), asyncio.Event()
    async with (
        toy.fleet(made) as fleet,
        served(fleet) as server,
        linked(server.port) as link,
        linked(server.port) as bad,
        toy.peer(bad) as peer,
    ):
        await peer.check_in()
        await until(lambda: fleet.host.edge.statistics().check_ins == 1)
        fleet.start(toy.device("a", link), toy.device("b", link))
        token = (await peer.hear())[1].token

        async def never_ending() -> AsyncIterator[pb.PushSlice]:
            yield pb.PushSlice(token=token, tensor="delta/params/big", data=b"\0" * 1000)
            await held.wait()

        pushes = [asyncio.create_task(bad.push(never_ending())) for _ in range(300)]
        await asyncio.wait_for(fleet.tasks[0], timeout=20)
        ended = await asyncio.gather(*pushes, return_exceptions=True)
        assert all(isinstance(error, NetworkError) for error in ended), "each may try again"
        told = {str(error) for error in ended}
        assert any("as many calls as it may" in line for line in told) and any(
            "Nothing went on" in line for line in told
        )
        assert fleet.members == [0, 2] and fleet.host.edge.statistics().staged_now == 0


@toy.in_loop
async def test_half_open_connections_harm_nobody_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [(k, 500 if k == "grpc.server_handshake_timeout_ms" else v) for k, v in grpc_server.SERVER_OPTIONS]
    monkeypatch.setattr(grpc_server, "SERVER_OPTIONS", options)
    async with toy.fleet(toy.plan(TWO)) as fleet, served(fleet) as server:
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(100)]
        for number, (_, writer) in enumerate(opened):
            writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[: number % 24])
        async with linked(server.port) as link:
            fleet.start(toy.device("a", link), toy.device("b", link))
            await honest_two_are_counted(fleet)
        for reader, writer in opened:
            with pytest.raises(EOFError):  # the server says its settings, and ends
                while True:
                    await asyncio.wait_for(reader.readexactly(1), timeout=10)
            writer.close()


@toy.in_loop
async def test_connections_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "_most_connections", lambda: 5)
    async with toy.fleet(toy.plan(TWO)) as fleet, served(fleet) as server, linked(server.port) as link:
        fleet.start(toy.device("a", link))
        await until(lambda: fleet.host.edge.statistics().check_ins == 1)
        opened = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(20)]
        ended = [reader for reader, _ in opened if await _is_ended(reader)]
        assert len(ended) >= 15
        fleet.start(toy.device("b", link))
        await honest_two_are_counted(fleet)
        for _, writer in opened:
            writer.close()


async def _is_ended(reader: asyncio.StreamReader) -> bool:
    try:
        while await asyncio.wait_for(reader.read(1 << 10), timeout=0.5):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.slow
@toy.in_loop
async def test_pulls_that_nobody_reads_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "STALLED_S", 0.3)
    async with toy.fleet(toy.plan(TWO_OF_THREE, BIG)) as fleet, served(fleet) as server, linked(server.port) as link:
        proxy = DeafProxy(server.port)
        async with proxy as port, linked(port) as deaf, toy.peer(deaf) as peer:
            await peer.check_in()
            await until(lambda: fleet.host.edge.statistics().check_ins == 1)
            fleet.start(toy.device("a", link), toy.device("b", link))
            token = (await peer.hear())[1].token
            proxy.hearing.clear()
            head = fleet.store.last_commit(fleet.host.run_id)
            assert head is not None
            entry = max(head.model, key=lambda entry: entry.spec.size_bytes)
            calls = [deaf._stub.Pull(pb.PullRequest(token=token, hash=entry.hash)) for _ in range(40)]
            await until(lambda: server._servicer.num_calls >= 10)
            await asyncio.wait_for(fleet.tasks[0], timeout=15)
            await until(lambda: server._servicer.num_calls == 0)
            for call in calls:
                call.cancel()


@toy.in_loop
async def test_no_address_takes_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_CALLS", 20)
    monkeypatch.setattr(grpc_server, "MAX_CALLS_OF_ONE", 10)
    calls = grpc_server.Calls()
    for _ in range(10):
        calls.begin("ipv4:10.0.0.1")
    with pytest.raises(NetworkError):
        calls.begin("ipv4:10.0.0.1")
    for number in range(10):
        calls.begin(f"ipv4:10.0.0.{2 + number}")
    with pytest.raises(NetworkError):
        calls.begin("ipv4:10.0.0.99")
    calls.end("ipv4:10.0.0.1")
    calls.begin("ipv4:10.0.0.99")
    assert calls.num == 20


@pytest.mark.parametrize("method", ["Status", "Push"])
@toy.in_loop
async def test_bytes_that_are_no_message_are_a_protocol_error(method: str) -> None:
    async with toy.fleet(toy.plan(TWO_OF_THREE)) as fleet, served(fleet) as server, linked(server.port) as link:
        with pytest.raises((ProtocolError, grpc.RpcError)):
            if method == "Push":
                await link._channel.stream_unary(SERVICE + method)(_all((b"\xff" * 40,)))
            else:
                await link._channel.unary_unary(SERVICE + method)(b"\xff" * 40)


@toy.in_loop
async def test_a_host_of_another_version_is_said_to_be_one() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with linked(port) as link:
        with pytest.raises(ProtocolError, match=r"does not speak shoal\.fleet\.v1\.Fleet: it is of another version"):
            async with toy.peer(link) as peer:
                await peer.check_in()
                await peer.hear()
        device = toy.device("a", link)
        running = asyncio.create_task(device.run())
        await until(lambda: "another version" in device.progress.last_error)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await server.stop(0)


class StallingHost:
    """Answers a pull with one slice, reads one of a push, and then does nothing."""

    async def pull(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        yield pb.Slice(data=b"x", total=9).SerializeToString()
        await asyncio.sleep(1000)

    async def push(self, requests: AsyncIterator[bytes], context: Any) -> bytes:
        await anext(requests)
        await asyncio.sleep(1000)
        return b""


@toy.in_loop
async def test_a_host_that_stalls_does_not_keep_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_link, "STALLED_S", 0.3)
    host, server = StallingHost(), grpc.aio.server()
    methods = {
        "Pull": grpc.unary_stream_rpc_method_handler(host.pull),
        "Push": grpc.stream_unary_rpc_method_handler(host.push),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.strip("/"), methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def slices() -> AsyncIterator[pb.PushSlice]:
        for _ in range(1_000):
            yield pb.PushSlice(data=bytes(64 << 10))

    async with linked(port) as link:
        heard = []
        with pytest.raises(NetworkError, match="stall"):
            async for piece in link.pull(pb.PullRequest()):
                heard.append(piece.data)
        assert heard == [b"x"]
        with pytest.raises(NetworkError, match="stall"):
            await link.push(slices())
    await server.stop(0)
