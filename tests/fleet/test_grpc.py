"""The same fleet over real sockets, with and without TLS; noise on the port; a proxy that cuts connections."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from shoal.errors import NetworkError, PlanError, ProtocolError
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.session import MAX_OUTGOING
from shoal.fleet.tls import make_tls
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.policy import RoundPolicy
from shoal.record.store import Store
from tests.fleet import toy
from tests.fleet.test_fleet import BIG, DELTA, FLOAT, stream_of, until

pytestmark = pytest.mark.integration


@asynccontextmanager
async def served(fleet: toy.Fleet, *, tls: Tls | None = None) -> AsyncIterator[GrpcServer]:
    server = fleet.host.server(address="127.0.0.1:0", tls=tls)
    await server.start()
    try:
        yield server
    finally:
        await server.close(grace_s=0.2)


@asynccontextmanager
async def linked(port: int, ca: bytes | None = None) -> AsyncIterator[GrpcLink]:
    link = GrpcLink(f"127.0.0.1:{port}", ca=ca)
    try:
        yield link
    finally:
        await link.close()


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "tls"])
@toy.in_loop
async def test_devices_train_a_model_over_sockets(with_tls: bool) -> None:
    key, chain, ca = make_tls(["127.0.0.1"])
    tls = Tls(key, chain) if with_tls else None
    async with toy.fleet(toy.plan(toy.exact("a", "b"), BIG), rounds=2) as fleet, served(fleet, tls=tls) as server:
        async with linked(server.port, ca if with_tls else None) as link:
            fleet.start(toy.device("a", link, value=1.0), toy.device("b", link, value=3.0))
            await asyncio.gather(*fleet.tasks)
        np.testing.assert_array_equal(fleet.model["params/big"], np.full(700_000, 4.0, np.float32))


@toy.in_loop
async def test_noise_on_the_port_harms_nobody() -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet) as server:
        noises = [
            os.urandom(5000),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(900),
            b"",
        ]
        for noise in noises:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(noise)
            writer.write_eof()
            with_answer = await asyncio.wait_for(reader.read(1 << 16), timeout=5)
            assert len(with_answer) < 1 << 16
            writer.close()
        async with linked(server.port) as link:
            fleet.start(toy.device("a", link))
            await asyncio.gather(*fleet.tasks)


@pytest.mark.parametrize("method", ["Session", "Push", "Pull", "Status"])
@toy.in_loop
async def test_messages_that_are_none_end_their_own_call(method: str) -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet) as server, linked(server.port) as link:
        path, noise = f"/shoal.fleet.v1.Fleet/{method}", b"\xff\xff\xff\xff"
        match method:
            case "Session":
                call = link._channel.stream_stream(path, response_deserializer=pb.FromEdge.FromString)(iter([noise]))
                answer = await asyncio.wait_for(call.read(), timeout=10)
                assert answer.refused.reason == "protocol" and "got other bytes" in answer.refused.detail
                assert await call.read() is grpc.aio.EOF
            case "Push":
                call = link._channel.stream_unary(path)(iter([noise]))
            case "Pull":
                call = link._channel.unary_stream(path)(noise)
            case _:
                call = link._channel.unary_unary(path)(noise)
        code = await asyncio.wait_for(call.code(), timeout=10)
        assert code is not None
        assert method != "Push" or code is grpc.StatusCode.INVALID_ARGUMENT
        fleet.start(toy.device("a", link))
        await asyncio.gather(*fleet.tasks)


@toy.in_loop
async def test_what_is_wrong_arrives_as_one_line() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, served(fleet) as server, linked(server.port) as link, toy.peer(link) as peer:
        token = (await peer.assigned()).token
        for call in (
            link.push(stream_of(pb.PushSlice(tensor=DELTA, data=FLOAT))),
            link.push(stream_of(pb.PushSlice(token=token, tensor="x", data=FLOAT))),
        ):
            with pytest.raises(ProtocolError, match=r"Expected a tensor|not one of this Coordinator's"):
                await call
        with pytest.raises(ProtocolError, match="no part of the plan"):
            async for _ in link.pull(pb.PullRequest(token=token, hash="0" * 64)):
                pass
        with pytest.raises(NetworkError, match="larger than max"):
            await link.push(stream_of(pb.PushSlice(token=token, tensor=DELTA, data=bytes(3 << 20))))


def other_bytes(store: Store, hash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the store reads other bytes of the same length under this hash."""
    kind, real = type(store.blobs), type(store.blobs).read

    def read(self: Any, asked: str, offset: int, size: int) -> bytes:
        data: bytes = real(self, asked, offset, size)
        return bytes(byte ^ 1 for byte in data) if asked == hash else data

    monkeypatch.setattr(kind, "read", read)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("signature", "The signature of the plan of task 'toy' is wrong. Nothing of it was run."),
        ("key", "this device trusts"),
        ("program", "Expected bytes with hash"),
        ("manifest", "Expected bytes with hash"),
    ],
)
@toy.in_loop
async def test_a_plan_that_is_not_what_was_signed_is_never_loaded(
    wrong: str, line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, loaded = toy.plan(toy.exact("a")), list[Plan]()
    if wrong == "signature":
        made = replace(made, signature=bytes(64))
    shared = toy.device_host(lambda plan: (loaded.append(plan), toy.ToyRunner(plan))[1])
    if wrong == "key":
        shared.trusted_key = bytes(32)
    async with toy.fleet(made) as fleet, served(fleet) as server, linked(server.port) as link:
        if wrong in ("program", "manifest"):
            hash = made.manifest.programs[0].hash if wrong == "program" else made.hash
            other_bytes(fleet.store, hash, monkeypatch)
        with pytest.raises(PlanError) as refused:
            await toy.device("a", link, host=shared).run()
        assert line in str(refused.value) and "\n" not in str(refused.value)
        assert not loaded and not [record for record in caplog.records if record.levelname == "ERROR"]


@toy.in_loop
async def test_a_server_is_quiet_once_the_last_session_is_over() -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet) as server, linked(server.port) as link:
        with pytest.raises(TimeoutError):
            async with toy.peer(link) as peer:
                await peer.check_in()
                await until(lambda: fleet.host.edge.statistics().sessions_now == 1)
                await asyncio.wait_for(server.until_quiet(quiet_s=0.0, longest_s=30.0), timeout=0.1)
        await asyncio.wait_for(server.until_quiet(quiet_s=0.05, longest_s=30.0), timeout=10)
        assert fleet.host.edge.statistics().sessions_now == 0
        async with toy.peer(link) as peer:
            await peer.check_in()
            await until(lambda: fleet.host.edge.statistics().sessions_now == 1)
            await server.until_quiet(quiet_s=0.0, longest_s=0.1)  # one that stays is not waited for


@toy.in_loop
async def test_a_port_that_is_taken_is_said() -> None:
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet, served(fleet) as server:
        second = fleet.host.server(address=f"127.0.0.1:{server.port}")
        with pytest.raises(NetworkError, match="the port is in use"):
            await second.start()


class Proxy:
    """Forwards to a port; cuts a connection after so many bytes from the device, a few times."""

    def __init__(self, port: int, *, after: int, times: int) -> None:
        self.port, self.after, self.times = port, after, times
        self.tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> int:
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        port: int = self.server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.port)
        tasks = {
            asyncio.create_task(self.forward(reader, up_writer, cut=True)),
            asyncio.create_task(self.forward(up_reader, writer, cut=False)),
        }
        self.tasks |= tasks
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        writer.close()
        up_writer.close()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        passed = 0
        while data := await reader.read(1 << 16):
            passed += len(data)
            if cut and self.times and passed > self.after:
                self.times -= 1
                return
            writer.write(data)
            await writer.drain()


@toy.in_loop
async def test_connections_that_are_cut_lose_no_work() -> None:
    made = toy.plan(toy.exact("a"), BIG)
    async with toy.fleet(made) as fleet, served(fleet) as server:
        proxy = Proxy(server.port, after=1_000_000, times=2)
        async with proxy as port, linked(port) as link:
            fleet.start(toy.device("a", link, runner=toy.RandomRunner))
            await asyncio.gather(*fleet.tasks)
        assert proxy.times == 0
        again = fleet.host.edge.statistics().up_bytes - made.manifest.update_bytes
        assert again <= 1 << 20, "only what was on its way is sent again"


class DeafProxy(Proxy):
    """Passes on what a device says; what it is told only while `hearing` is set."""

    def __init__(self, port: int) -> None:
        super().__init__(port, after=0, times=0)
        self.hearing = asyncio.Event()
        self.hearing.set()

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        while data := await reader.read(1 << 16):
            if not cut:
                await self.hearing.wait()
            writer.write(data)
            await writer.drain()


@toy.in_loop
async def test_a_device_that_never_reads_does_not_fill_the_server_and_others_go_on() -> None:
    made, num_pulls = toy.plan(RoundPolicy(goal=2, minimum_group=2, over_selection=1.5), BIG), 40
    async with toy.fleet(made) as fleet, served(fleet) as server, linked(server.port) as link:
        proxy, edge = DeafProxy(server.port), fleet.host.edge
        async with proxy as port, linked(port) as deaf, toy.peer(deaf) as peer:
            fleet.start(toy.device("a", link), toy.device("b", link))
            token = (await peer.assigned()).token
            proxy.hearing.clear()
            head = fleet.store.last_commit(fleet.host.run_id)
            assert head is not None
            entry = max(head.model, key=lambda entry: entry.spec.size_bytes)
            calls = [deaf._stub.Pull(pb.PullRequest(token=token, hash=entry.hash)) for _ in range(num_pulls)]
            for _ in range(1000):
                await peer.say(ping=pb.Ping())  # each is answered
            await asyncio.wait_for(fleet.tasks[0], timeout=15)
            assert fleet.members == [0, 2]
            asked_bytes = num_pulls * entry.spec.size_bytes
            assert edge.statistics().down_bytes < asked_bytes / 4, "what cannot be sent is not read from the record"
            session = edge._sessions.get("peer")
            assert session is None or session.num_outgoing <= MAX_OUTGOING
            for call in calls:
                call.cancel()
