"""A host that says anything at all to a device: the device ends in order or goes on, and runs nothing that was not signed."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.clock import SystemClock
from shoal.errors import NetworkError, ShoalError
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.grpc_link import MAX_EDGES, GrpcLink
from shoal.fleet.link import Link
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.tensors import Index, to_bytes
from tests.fleet import toy

PLAN = toy.plan(toy.exact("a"))
TOKEN = pb.Token(signed=b"t", signature=b"s")
CONFIGURATION = pb.RoundConfiguration(seed=bytes(32), codec_down="packed/1", codec_up="packed/1")


MODEL = {"params/w": np.zeros(1, np.float32)}
INDEX = Index.of(MODEL)
BLOBS = [
    pb.Blob(hash=PLAN.hash, data=PLAN.manifest.data),
    *(pb.Blob(hash=hash, data=data) for hash, data in PLAN.programs.items()),
    pb.Blob(hash=INDEX.root, data=INDEX.data),
    *(pb.Blob(hash=entry.hash, data=to_bytes(MODEL[entry.spec.name])) for entry in INDEX),
]


def assigned(**changes: Any) -> pb.Assigned:
    return pb.Assigned(
        **{
            "token": TOKEN, "configuration": CONFIGURATION, "plan": PLAN.hash, "plan_signature": PLAN.signature,
            "plan_public_key": PLAN.public_key, "model": INDEX.root, "group": "clear", "run": "r",
            "inline": BLOBS, **changes,
        }
    )  # fmt: skip


MESSAGES = [
    {"assigned": assigned()},
    {"assigned": assigned(plan_signature=bytes(64))},
    {"assigned": assigned(inline=[pb.Blob(hash=PLAN.hash, data=b"{}")])},
    {"assigned": assigned(inline=BLOBS[:1])},
    {"assigned": assigned(model="0" * 64)},
    {"assigned": assigned(group="secure", token=pb.Token(signed=b"u"))},
    {"later": pb.Later(delay_min_s=float("nan"), delay_max_s=float("inf"), other_edge="nowhere:1")},
    {"later": pb.Later(delay_min_s=-1e300, delay_max_s=1e300)},
    {"incompatible": pb.Incompatible(needs="x")},
    {"counted": pb.Counted(version=9, token=TOKEN)},
    {"refused": pb.Refused(reason="late", detail="y")},
    {"refused": pb.Refused(reason="protocol", detail="z", token=TOKEN)},
    {"released": pb.Released(why="w", token=TOKEN)},
    {"incomplete": pb.Incomplete(token=TOKEN, missing=["delta/params/w"])},
    {"group": pb.GroupMessage(token=TOKEN, phase="roster", data=b"x")},
    {"ping": pb.Ping()},
]


class AnyHost:
    """Says what it is given, then that the run is over; answers calls with what comes next of it, or breaks."""

    def __init__(self, messages: list[pb.FromEdge], bulk: list[bytes], *, waits: bool) -> None:
        self.waits = waits  # before the last word, for a report
        self.messages, self.bulk = messages[::-1], bulk[::-1]
        self.heard: list[str] = []

    @asynccontextmanager
    async def session(self) -> AsyncGenerator["AnyHost", None]:
        yield self

    async def send(self, message: pb.FromDevice) -> None:
        self.heard.append(message.WhichOneof("kind") or "")
        await asyncio.sleep(0)

    async def receive(self) -> pb.FromEdge:
        await asyncio.sleep(0)
        while self.waits and not self.messages and "report" not in self.heard:
            await asyncio.sleep(0.01)
        return self.messages.pop() if self.messages else pb.FromEdge(finished=pb.Finished(why="enough"))

    def _next(self, kind: Any) -> Any:
        try:
            return kind.FromString(self.bulk.pop()) if self.bulk else kind()
        except DecodeError as error:
            raise NetworkError("broken") from error

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        yield self._next(pb.Slice)

    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
        async for _ in slices:
            pass
        return self._next(pb.PushReply)  # type: ignore[no-any-return]

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        return self._next(pb.StatusReply)  # type: ignore[no-any-return]

    def elsewhere(self, address: str) -> Link:
        return self


class Hasty(SystemClock):
    """Nobody waits."""

    async def sleep_until(self, deadline_s: float) -> None:
        assert deadline_s < self.now_s() + 2 * 86_400.0
        await asyncio.sleep(0)


@st.composite
def said(draw: st.DrawFn) -> pb.FromEdge:
    """A message of any kind, as it is or with a byte that is another."""
    data = bytearray(pb.FromEdge(**draw(st.sampled_from(MESSAGES))).SerializeToString())
    for place, byte in draw(st.lists(st.tuples(st.integers(0, 4_000), st.integers(0, 255)), max_size=2)):
        if data:
            data[place % len(data)] = byte
    try:
        return pb.FromEdge.FromString(bytes(data))
    except DecodeError:
        return pb.FromEdge()


slices = st.builds(
    pb.Slice, offset=st.sampled_from([0, 1, 1 << 63]), data=st.binary(max_size=30), total=st.sampled_from([0, 3, 30, 1 << 62]),
    unpacked=st.sampled_from([0, 3, 1 << 20, 1 << 63]), is_delta=st.booleans(),
).map(pb.Slice.SerializeToString)  # fmt: skip


def played(messages: list[pb.FromEdge], bulk: list[bytes], *, waits: bool = False) -> list[str]:
    """The kinds of what a device has said to such a host, once it has ended."""
    run, link = list[Plan](), AnyHost(messages, bulk, waits=waits)

    def make_runner(plan: Plan) -> toy.ToyRunner:
        run.append(plan)
        return toy.ToyRunner(plan)

    async def play() -> None:
        host = DeviceHost(make_runner=make_runner, runtime=toy.RUNTIME, clock=Hasty())
        device = Device("a", toy.examples, link=link, host=host, rng=np.random.default_rng(0))
        try:
            await asyncio.wait_for(device.run(), timeout=10)
        except ShoalError as error:
            assert str(error)
        finally:
            host.close()

    asyncio.run(play())
    for plan in run:
        plan.verify(PLAN.public_key)
    return link.heard


conversations = given(
    st.lists(said(), max_size=25), st.lists(slices | st.binary(max_size=20), max_size=30)
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@conversations
def test_whatever_a_host_says_a_device_ends_in_order(messages: list[pb.FromEdge], bulk: list[bytes]) -> None:
    played(messages, bulk)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@conversations
def test_whatever_a_host_says_for_long(messages: list[pb.FromEdge], bulk: list[bytes]) -> None:
    played(messages, bulk)


def test_what_is_said_in_order_is_done() -> None:
    """Else the tests above would never come as far as a training."""
    assert "report" in played([pb.FromEdge(assigned=assigned())], [], waits=True)


@pytest.mark.integration
@toy.in_loop
async def test_other_edges_that_a_host_names_are_bounded_and_may_be_anything() -> None:
    link = GrpcLink("127.0.0.1:1")
    named = ["", ":", "\x00", "[", "unix:/etc/passwd", "dns:///x", "x" * 300, "x" * 301, "é:1", "%:x"]
    for address in [*named, *(f"127.0.0.1:{port}" for port in range(2, 300))]:
        link.elsewhere(address)
    assert len(link._known) <= MAX_EDGES
    await link.close()


def test_a_host_that_does_not_say_what_it_needs_is_told_of() -> None:
    played([pb.FromEdge(incompatible=pb.Incompatible())], [])
