"""An update whose device moves from Edge to Edge while it is asked about: it may be at one of them."""

import asyncio
from typing import Any

import numpy as np
import pytest

from shoal.aggregate.commit import WeightedMean
from shoal.clock import SystemClock
from shoal.errors import NetworkError, ProtocolError
from shoal.fleet import remote_edge
from shoal.fleet.configuration import configure
from shoal.fleet.coordinator import Coordinator
from shoal.fleet.costs import Costs
from shoal.fleet.edge_node import _Far
from shoal.fleet.edges import Edges, Grants
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.remote_edge import RemoteEdge
from shoal.fleet.round_events import Arrived, Left
from shoal.fleet.wire import edges_pb2 as pb
from shoal.policy import Late, RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.record.store import TokenRow
from shoal.tensors import Index
from tests.fleet import toy

NONCE = bytes(16)
PLAN = toy.plan(RoundPolicy(goal=4, minimum_group=2, late=Late.patch(max_staleness=2)))


class SlowRecord(Coordinator):
    """Its record answers when it is let."""

    def __init__(self, edges: Edges) -> None:
        store, manifest = MemoryStore(), PLAN.manifest
        super().__init__(
            store=store, run="run", manifest=manifest, edge=edges, aggregator=WeightedMean(manifest.server.rule),
            token_key=toy.KEYS.token, run_seed=bytes(32), last_version=1, clock=SystemClock(), rng=np.random.default_rng(0),
        )  # fmt: skip
        self.may_answer = asyncio.Event()

    async def token_row(self, nonce: bytes) -> TokenRow | None:
        await self.may_answer.wait()
        return None


class Fleet:
    """A Coordinator and Edges, whose ends of the streams are looked into."""

    def __init__(self, *names: str) -> None:
        self.edges = Edges(PLAN.manifest.server.rounds)
        self.coordinator = SlowRecord(self.edges)
        self.edge = {name: RemoteEdge(name, PLAN.manifest) for name in names}
        for name, edge in self.edge.items():
            self.edges.join(name, edge, address=name)

    def ask(self, name: str) -> "asyncio.Task[TokenRow | None]":
        seat: Any = self.edge[name]._told
        return asyncio.ensure_future(seat.token_row(NONCE))

    def answer(self, name: str, *, gone: bool) -> None:
        self.edge[name].hear(pb.Event(withdrawn=pb.Withdrawn(nonce=NONCE, gone=gone)))

    def said(self, name: str, kind: str) -> int:
        return sum(command.WhichOneof("kind") == kind for command in self.edge[name].outgoing._items)


async def moment() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@toy.in_loop
async def test_one_that_was_withdrawn_while_the_record_was_asked_may_not_be_there() -> None:
    fleet = Fleet("a", "b")
    first = fleet.ask("a")
    await moment()
    second = fleet.ask("b")
    await moment()
    fleet.answer("a", gone=True)
    fleet.coordinator.may_answer.set()
    with pytest.raises(NetworkError, match="another Edge"):
        await first
    assert await second is None


@toy.in_loop
async def test_who_asked_and_went_does_no_harm_to_the_edge_that_answers() -> None:
    fleet = Fleet("a", "b")
    fleet.coordinator.may_answer.set()
    await fleet.ask("a")
    asking = fleet.ask("b")
    await moment()
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    fleet.answer("a", gone=True)


@toy.in_loop
async def test_an_answer_that_is_here_says_nothing_once_the_update_is_let_go_of() -> None:
    far = _Far()
    asking = [asyncio.ensure_future(far.token_row(NONCE)) for _ in range(2)]
    await moment()
    far.answer(pb.Answer(number=1))  # in the same message as what lets go of it
    far.forget(NONCE)
    far.answer(pb.Answer(number=2))
    for each in asking:
        with pytest.raises(NetworkError, match="another Edge"):
            await each


@toy.in_loop
async def test_while_an_edge_is_asked_to_let_go_nobody_is_given_the_update() -> None:
    fleet = Fleet("a", "b", "c")
    fleet.coordinator.may_answer.set()
    await fleet.ask("a")
    b = fleet.ask("b")
    await moment()
    for name in ("a", "c"):
        with pytest.raises(NetworkError, match="another Edge"):
            await fleet.ask(name)
    assert fleet.said("a", "withdraw") == 1
    fleet.answer("a", gone=True)
    assert await b is None


@toy.in_loop
async def test_groups_come_together_also_where_an_edge_keeps_those_of_versions_before() -> None:
    fleet = Fleet("a", "b")
    fleet.coordinator.may_answer.set()
    for name, nonce, version in (("a", b"1", 0), ("b", b"2", 1), ("a", b"3", 1)):
        if name == "b":
            fleet.edges.committed(1)
        seat: Any = fleet.edge[name]._told
        await seat.token_row(nonce)
        fleet.edge[name].hear(pb.Event(joined=pb.Joined(nonce=nonce, version=version)))
        fleet.edge[name].hear(pb.Event(counted=pb.Counted(nonce=nonce, version=version)))
    fleet.edges.gather()
    assert fleet.said("a", "dissolve") + fleet.said("b", "dissolve") == 1


@toy.in_loop
async def test_who_waits_at_one_edge_waits_though_another_that_it_left_says_so_late() -> None:
    fleet = Fleet("a", "b")
    told = fleet.coordinator._events
    for name in ("b", "a"):  # it was at `a` before: that is the slower link
        fleet.edge[name].hear(pb.Event(arrived=pb.Arrived(devices=["device"])))
    fleet.edge["a"].hear(pb.Event(left="device"))
    events = [told.get_nowait() for _ in range(told.qsize())]
    assert events[-1] == Arrived(("device",), "b")
    fleet.edge["b"].hear(pb.Event(left="device"))
    assert told.get_nowait() == Left("device") and not fleet.edges._at


@toy.in_loop
async def test_what_an_edge_let_go_of_before_it_was_given_it_again_it_still_has() -> None:
    fleet = Fleet("a", "b")
    fleet.coordinator.may_answer.set()
    seat: Any = fleet.edge["a"]._told
    for number in (1, 2):  # one Ask, one Answer: commands 1 and 2, which give it the same update twice
        fleet.edge["a"].hear(pb.Event(ask=pb.Ask(number=number, nonce=NONCE)))
        await moment()
    assert fleet.edges.is_at(seat, NONCE)
    fleet.edge["a"].hear(pb.Event(released=NONCE, heard=fleet.said("a", "answer") - 1))
    assert fleet.edges.is_at(seat, NONCE), "said before it had heard the last answer"
    fleet.edge["a"].hear(pb.Event(released=NONCE, heard=100))
    assert not fleet.edges.is_at(seat, NONCE)


@toy.in_loop
async def test_what_is_in_a_small_group_is_still_there_after_it_was_given_again() -> None:
    fleet = Fleet("a", "b")
    fleet.coordinator.may_answer.set()
    seat: Any = fleet.edge["a"]._told
    await fleet.ask("a")
    fleet.edge["a"].hear(pb.Event(joined=pb.Joined(nonce=NONCE, version=0)))
    await fleet.ask("a")  # its device came again, and it was given the same assignment
    configuration = configure(PLAN.manifest, run_seed=bytes(32), round=9, base_version=8)
    fleet.edges.open_groups(configuration, Index(()), taken={})
    assert fleet.edges.is_at(seat, NONCE)


def test_what_was_given_is_forgotten_once_it_was_heard() -> None:
    grants = Grants()
    for number in range(100):
        grants.said(number.to_bytes(2))
        assert grants.knew(b"", number)
    assert len(grants._given) == 1


@toy.in_loop
async def test_an_edge_that_hangs_while_its_sums_are_wanted_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_edge, "SILENCE_S", 0.05)
    fleet = Fleet("a", "b")
    closing = asyncio.ensure_future(fleet.edges.close_groups())
    await moment()
    to_close = fleet.edge["b"]._closing
    assert to_close is not None
    to_close.set_result([])
    assert await closing == []
    assert fleet.edges.names == ("b",)


@pytest.mark.parametrize("nonces", [(NONCE,), (bytes(15) + b"\1",) * 2])
def test_sums_with_updates_that_are_not_its_own_cost_an_edge_its_stream(nonces: tuple[bytes, ...]) -> None:
    async def test() -> None:
        fleet = Fleet("a", "b")
        fleet.coordinator.may_answer.set()
        await fleet.ask("a")
        closing = asyncio.ensure_future(fleet.edges.close_groups())
        await moment()
        configuration = configure(PLAN.manifest, run_seed=bytes(32), round=1, base_version=0)
        sums = configuration.accumulator(PLAN.manifest)
        counted = tuple((nonce, 1e9) for nonce in nonces)
        for name, groups in {"a": [], "b": [GroupResult(0, sums, counted, Costs())]}.items():
            to_close = fleet.edge[name]._closing
            assert to_close is not None
            to_close.set_result(groups)
        assert await closing == []
        assert fleet.edges.names == ("a",)

    asyncio.run(test())


@toy.in_loop
async def test_an_edge_that_adds_an_update_twice_is_caught_before_the_round_hears_of_it() -> None:
    fleet = Fleet("a")
    fleet.coordinator.may_answer.set()
    await fleet.ask("a")
    edge, counted = fleet.edge["a"], pb.Event(counted=pb.Counted(nonce=NONCE, version=0, staleness=0))
    edge.hear(pb.Event(joined=pb.Joined(nonce=NONCE, version=0)))
    edge.hear(counted)
    with pytest.raises(ProtocolError, match="twice"):
        edge.hear(counted)
    edge.hear(pb.Event(released=NONCE))
    await fleet.ask("a")
    edge.hear(pb.Event(joined=pb.Joined(nonce=NONCE, version=0)))
    edge.hear(counted)
