"""Edges in other processes, here over real sockets within one: `test_sigkill.py` kills them, `world.py` plays them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.clock import ManualClock, SystemClock
from shoal.errors import ProtocolError, StoreError
from shoal.fleet import remote_edge, streams
from shoal.fleet.edge_node import EdgeNode
from shoal.fleet.entrance import Entrance
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.grpc_server import GrpcServer
from shoal.fleet.host import Host
from shoal.fleet.link import LocalLink
from shoal.fleet.remote_edge import EdgesServer, RemoteEdge
from shoal.fleet.wire import edges_pb2
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.run_plan import begin_run
from shoal.policy import Late, Privacy, RoundPolicy, Secure
from shoal.record.blobs import FolderBlobs
from shoal.record.memory import MemoryStore
from shoal.record.store import Store
from tests.fleet import toy
from tests.fleet.test_fleet import until
from tests.fleet.test_grpc import DeafProxy

SHAPES = {"params/w": (3,), "params/large": (5000,)}


@dataclass
class Node:
    """One Edge, with its server for devices."""

    edge: EdgeNode
    server: GrpcServer
    running: "asyncio.Task[None]"

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    async def end(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.server.close(grace_s=0)


@dataclass
class ManyEdges:
    """A host, and the Edges that are attached to it."""

    store: Store
    host: Host
    server: EdgesServer
    folder: Path

    async def node(self, name: str, *, credential: bytes = toy.KEYS.edge_credential, port: int = 0) -> Node:
        """`port`: of what stands before the host's; 0: nothing does."""
        edge = EdgeNode(
            f"127.0.0.1:{port or self.server.port}",
            credential=credential,
            name=name,
            blobs=FolderBlobs(self.folder / name),
            clock=SystemClock(),
        )
        server = GrpcServer(edge.door, address="127.0.0.1:0")
        await server.start()
        edge.address = f"127.0.0.1:{server.port}"
        return Node(edge, server, asyncio.create_task(edge.run()))


@asynccontextmanager
async def many_edges(
    policy: RoundPolicy,
    folder: Path,
    *,
    rounds: int = 5,
    privacy: Privacy | None = None,
    entrance: Entrance | None = None,
) -> AsyncIterator[ManyEdges]:
    """A running host that serves no devices itself."""
    made = toy.plan(policy, SHAPES, privacy=privacy, max_weight=16 if privacy else 1 << 20)
    store = MemoryStore()
    model = {s.name: np.zeros(s.shape, s.numpy_dtype) for s in made.manifest.broadcast}
    run_id = begin_run(store, made, model, kind="host", rounds=rounds, seed=0)
    host = Host(store, run_id, toy.KEYS, rng=np.random.default_rng(0), several_edges=True, entrance=entrance)
    server = host.edges_server(address="127.0.0.1:0")
    await server.start()
    running = asyncio.create_task(host.run())
    try:
        yield ManyEdges(store, host, server, folder)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await server.close(grace_s=0)


def members(fleet: ManyEdges) -> list[int]:
    return [commit.members for commit in fleet.store.commits(fleet.host.run_id)][1:]


def policy(**changes: object) -> RoundPolicy:
    return RoundPolicy(
        **{"goal": 4, "minimum_group": 2, "selection_window_s": 0.3, "reporting_window_s": 5.0, **changes}
    )  # type: ignore[arg-type]


@toy.in_loop
async def test_devices_at_two_edges_are_in_the_same_versions(tmp_path: Path) -> None:
    exact = toy.exact(*"abcd", reporting_window_s=5.0)
    async with many_edges(exact, tmp_path) as fleet:
        nodes = [await fleet.node("one"), await fleet.node("two")]
        links = [GrpcLink(node.address) for node in nodes]
        devices = [toy.device(name, links[i % 2], value=i) for i, name in enumerate("abcd")]
        await asyncio.gather(*(device.run() for device in devices))
        assert members(fleet) == [4] * 5
        assert [device.progress.counted for device in devices] == [5] * 4
        commit = fleet.store.last_commit(fleet.host.run_id)
        assert commit is not None
        model = {entry.spec.name: fleet.store.blobs.view(entry.hash, entry.spec) for entry in commit.model}
        np.testing.assert_allclose(model["params/large"], 5 * 1.5, rtol=1e-6)
        for link in links:
            await link.close()
        for node in nodes:
            await asyncio.wait_for(node.running, 5)
            await node.end()


@toy.in_loop
async def test_the_bits_are_those_of_one_edge(tmp_path: Path) -> None:
    exact = toy.exact(*"abc", reporting_window_s=5.0)
    roots = []
    for num_edges in (1, 3):
        async with many_edges(exact, tmp_path / str(num_edges)) as fleet:
            nodes = [await fleet.node(str(i)) for i in range(num_edges)]
            links = [GrpcLink(node.address) for node in nodes]
            values = {"a": 0.1, "b": 0.2, "c": 0.7}
            devices = [toy.device(n, links[i % num_edges], value=v) for i, (n, v) in enumerate(values.items())]
            await asyncio.gather(*(device.run() for device in devices))
            commit = fleet.store.last_commit(fleet.host.run_id)
            assert commit is not None and commit.version == 5
            roots.append(commit.model.root)
            for link in links:
                await link.close()
            for node in nodes:
                await node.end()
    assert roots[0] == roots[1]


@toy.in_loop
async def test_a_wrong_credential_is_refused(tmp_path: Path) -> None:
    async with many_edges(policy(), tmp_path) as fleet:
        node = await fleet.node("liar", credential=bytes(32))
        with pytest.raises(ProtocolError, match="credential"):
            await node.running
        await node.end()
        assert fleet.host.edges is not None and fleet.host.edges.names == ("host",)


@toy.in_loop
async def test_an_edge_that_ends_gives_its_devices_to_another(tmp_path: Path) -> None:
    exact = toy.exact(*"ab", reporting_window_s=5.0)
    async with many_edges(exact, tmp_path, rounds=300) as fleet:
        one, two = await fleet.node("one"), await fleet.node("two")
        link, other = GrpcLink(one.address), GrpcLink(two.address)
        a, b = toy.device("a", link), toy.device("b", other)
        running = [asyncio.create_task(device.run()) for device in (a, b)]
        while len(members(fleet)) < 5:
            await asyncio.sleep(0.01)
        await one.end()
        a._link = a._home = other  # a load balancer would do so
        before = len(members(fleet))
        while len(members(fleet)) < before + 5:
            await asyncio.sleep(0.01)
        assert set(members(fleet)) == {2}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await link.close()
        await other.close()
        await two.end()


@toy.in_loop
async def test_groups_that_are_too_small_come_together(tmp_path: Path) -> None:
    few = policy(goal=3, minimum_group=3, minimum_fraction=1.0, over_selection=1.0, reporting_window_s=1.0)
    async with many_edges(few, tmp_path, rounds=2) as fleet:
        nodes = [await fleet.node(name) for name in ("one", "two", "three")]
        links = [GrpcLink(node.address) for node in nodes]
        devices = [toy.device(name, link) for name, link in zip("abc", links, strict=True)]
        await asyncio.gather(*(device.run() for device in devices))
        assert members(fleet) == [3, 3]
        for link in links:
            await link.close()
        for node in nodes:
            await node.end()


@pytest.mark.parametrize(("edges", "each"), [(2, 8), (3, 3)])
@toy.in_loop
async def test_secure_groups_form_at_each_edge_or_come_together(tmp_path: Path, edges: int, each: int) -> None:
    """Eight devices of an Edge are a group of their own; of three and three and three one is made."""
    privacy = Privacy(delta_bound=8.0, clip_norm=1e4, secure=Secure(members=16, colluders=0.0, dropouts=0.3))
    rules = policy(goal=edges * each, minimum_group=4, over_selection=1.0, reporting_window_s=2.0, minimum_fraction=0.5)
    async with many_edges(rules, tmp_path, rounds=1, privacy=privacy) as fleet:
        nodes = [await fleet.node(str(number)) for number in range(edges)]
        links = [GrpcLink(node.address) for node in nodes]
        host = toy.device_host()
        devices = [toy.device(f"d{i}", links[i % edges], value=1.0, num=2, host=host) for i in range(edges * each)]
        running = [asyncio.create_task(device.run()) for device in devices]
        while not members(fleet):
            await asyncio.sleep(0.02)
        assert members(fleet) == [edges * each]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for link in links:
            await link.close()
        for node in nodes:
            await node.end()


@toy.in_loop
async def test_edges_outlive_the_coordinator(tmp_path: Path) -> None:
    exact = toy.exact("a", late=Late(), reporting_window_s=5.0)
    async with many_edges(exact, tmp_path, rounds=10_000) as fleet:
        node = await fleet.node("one")
        link = GrpcLink(node.address)
        device = toy.device("a", link)
        running = asyncio.create_task(device.run())
        while len(members(fleet)) < 3:
            await asyncio.sleep(0.01)
        address = f"127.0.0.1:{fleet.server.port}"
        await fleet.server.close(grace_s=0)
        last = len(members(fleet)) + 5
        again = Host(fleet.store, fleet.host.run_id, toy.KEYS, rounds=last, several_edges=True)
        fleet.host.coordinator._edge.finish = lambda why: None  # type: ignore[method-assign]  # it is dead
        server = again.edges_server(address=address)
        await server.start()
        await asyncio.wait_for(again.run(), 15)
        await asyncio.wait_for(running, 10)
        assert fleet.store.last_version(again.run_id) == last
        await server.close(grace_s=0)
        await link.close()
        with contextlib.suppress(asyncio.CancelledError):
            await node.end()


@toy.in_loop
async def test_an_edge_that_is_full_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with many_edges(policy(), tmp_path) as fleet:
        nodes = [await fleet.node("one"), await fleet.node("two")]
        link = GrpcLink(nodes[0].address)
        async with toy.peer(link, "first") as first:
            await first.check_in()
            monkeypatch.setattr(streams, "MAX_SESSIONS", 1)
            named = ""
            while not named:  # until the other has come, and this one knows
                async with toy.peer(link, "second") as second:
                    kind, later = await second.hear()
                    assert kind == "later"
                    named = later.other_edge
            assert named == nodes[1].address
        await link.close()
        for node in nodes:
            await node.end()


@toy.in_loop
async def test_an_edge_whose_stream_breaks_while_its_sums_are_on_their_way_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SHAPES, "params/large", (1_500_000,))
    taken = RemoteEdge._closed
    closes = 0

    def closed(edge: RemoteEdge, groups: edges_pb2.Closed) -> None:
        nonlocal closes
        closes += 1
        if closes == 1:
            raise ProtocolError("as if the Coordinator had died")
        taken(edge, groups)

    monkeypatch.setattr(RemoteEdge, "_closed", closed)
    async with many_edges(toy.exact("a", reporting_window_s=5.0), tmp_path, rounds=1) as fleet:
        node = await fleet.node("one")
        link = GrpcLink(node.address)
        await toy.device("a", link).run()
        assert members(fleet) == [1] and closes == 2
        await link.close()
        await node.end()


def test_an_edge_says_that_its_clock_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    node = EdgeNode("nowhere:1", credential=bytes(32), name="a", blobs=FolderBlobs(tmp_path), clock=ManualClock(1e9))
    node._compare_clocks(1e9 - 5)
    assert not caplog.text
    node._compare_clocks(1e9 - 3600)
    assert "3600 s ahead of the Coordinator's" in caplog.text and "expire too early" in caplog.text


@toy.in_loop
async def test_an_edge_behind_a_line_that_swallows_what_is_said_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {
        "grpc.keepalive_time_ms": 500, "grpc.http2.ping_timeout_ms": 500, "grpc.http2.min_ping_interval_without_data_ms": 300,
    }  # fmt: skip
    for place in ("remote_edge", "edge_node"):
        monkeypatch.setattr(f"shoal.fleet.{place}.EDGE_OPTIONS", [*{**dict(remote_edge.EDGE_OPTIONS), **quick}.items()])
    async with many_edges(RoundPolicy(goal=2, minimum_group=2), tmp_path) as fleet:
        edges, line = fleet.host.edges, DeafProxy(fleet.server.port)
        assert edges is not None
        async with line as port:
            node = await fleet.node("far", port=port)
            await until(lambda: "far" in edges.names)
            line.hearing.clear()
            await until(lambda: "far" not in edges.names)
            await node.end()


@toy.in_loop
async def test_edges_ask_the_coordinator_who_may_come_in(tmp_path: Path) -> None:
    answers: dict[str, Any] = {"stranger": "an invitation", "early": StoreError("the disk is full")}

    async def admit(check_in: pb.CheckIn) -> str:
        assert check_in.credential == b"shown" and check_in.population == "default"
        answer = answers.get(check_in.device_id, "")
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    policy = RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    async with many_edges(policy, tmp_path, rounds=1, entrance=Entrance(admit=admit)) as fleet:
        node = await fleet.node("far")
        await until(lambda: node.edge.door.edge is not None)
        link = GrpcLink(node.address)
        heard = {}
        for name in ("stranger", "early"):
            async with toy.peer(link, name) as peer:
                await peer.check_in(credential=b"shown", population="default")
                heard[name] = await peer.hear()
        assert heard["stranger"][0] == "incompatible" and heard["stranger"][1].needs == "an invitation"
        assert heard["early"][0] == "later" and heard["early"][1].why == "the disk is full"
        members = [toy.device(name, link) for name in ("a", "b")]
        for member in members:
            member._credential = b"shown"
        await asyncio.gather(*(member.run() for member in members))
        await link.close()
        await node.end()


@toy.in_loop
async def test_who_waits_to_be_let_in_when_the_coordinator_goes_is_told_to_come_later(tmp_path: Path) -> None:
    async def never(check_in: pb.CheckIn) -> str:
        await asyncio.sleep(1000)
        return ""

    policy = RoundPolicy(goal=2, minimum_group=2)
    async with many_edges(policy, tmp_path, entrance=Entrance(admit=never)) as fleet:
        node = await fleet.node("far")
        await until(lambda: node.edge.door.edge is not None)
        edge = node.edge.door.edge
        assert edge is not None
        async with toy.peer(LocalLink(edge), "a") as peer:
            await peer.check_in()
            hearing = asyncio.create_task(peer.hear())
            await until(lambda: edge.statistics().check_ins == 1)
            await fleet.server.close(grace_s=0)
            kind, message = await hearing
        assert kind == "later" and "away" in message.why
        await node.end()
