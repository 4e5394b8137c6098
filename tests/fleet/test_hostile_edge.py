"""An Edge that means harm: a device is neither hurt nor held for ever, and serves an honest one afterwards.

The device's end of the wire; the server's is `test_hostile.py`. `SHOAL_FUZZ=500000 pytest -m slow …` says more.
"""

import asyncio
import logging
import os
import random
import tracemalloc
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, Final

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError, Message

from shoal.clock import SystemClock
from shoal.errors import PlanError, ProtocolError, ShoalError
from shoal.fleet import device as device_module
from shoal.fleet import link as link_module
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost, Prepared, Spent
from shoal.fleet.link import LocalLink
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.runner import Limits
from shoal.plan.signature import is_good
from shoal.tensors import Index, sha256
from tests.fleet import toy

KINDS: Final = (
    "assigned",
    "later",
    "incompatible",
    "counted",
    "refused",
    "released",
    "incomplete",
    "finished",
    "group",
    "ping",
)


@dataclass
class Told:
    """An Edge that says what a test gives it; counts what is asked of it."""

    says: Callable[["Told"], AsyncIterator[pb.FromEdge]]
    slices: Callable[[pb.PullRequest], AsyncIterator[pb.Slice]]
    state: Callable[[], pb.StatusReply] = pb.StatusReply
    heard: list[pb.FromDevice] = field(default_factory=list)
    sessions: int = 0
    pushes: int = 0

    async def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncGenerator[pb.FromEdge, None]:
        self.sessions += 1
        hearing = asyncio.create_task(self._hear(messages))
        try:
            async for message in self.says(self):
                yield message
        finally:
            hearing.cancel()

    async def _hear(self, messages: AsyncIterator[pb.FromDevice]) -> None:
        async for message in messages:
            self.heard.append(message)
            del self.heard[:-100]

    def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        return self.slices(request)

    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply:
        self.pushes += 1
        async for _ in slices:
            pass
        return pb.PushReply()

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        return self.state()

    async def hold(self, stream: Any) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class Honest:
    """What an honest Edge has said: an assignment, and the blobs that it gives a right to."""

    assigned: pb.Assigned
    blobs: Mapping[str, bytes]
    plan: Plan

    async def slices(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        data = self.blobs.get(request.hash)
        if data is None:
            raise ProtocolError("No such blob.")
        yield pb.Slice(offset=request.offset, data=data[request.offset :], total=len(data))


async def honest(shapes: Mapping[str, tuple[int, ...]] = toy.ONE) -> Honest:
    made = toy.plan(toy.exact("a"), shapes)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link, "a") as peer:
        assigned = await peer.assigned()
        blobs = {blob.hash: blob.data for blob in assigned.inline}
        index = Index.parse(blobs.get(assigned.model) or await pulled(fleet.link, assigned, assigned.model))
        for hash in (
            assigned.plan,
            assigned.model,
            *(e.hash for e in index),
            *(p.hash for p in made.manifest.programs),
        ):
            if hash not in blobs:
                blobs[hash] = await pulled(fleet.link, assigned, hash)
    del assigned.inline[:]
    return Honest(assigned, blobs, made)


async def pulled(link: LocalLink, assigned: pb.Assigned, hash: str) -> bytes:
    request = pb.PullRequest(token=assigned.token, hash=hash, credit=1 << 30)
    return b"".join([piece.data async for piece in link.pull(request)])


def device(edge: Told, host: DeviceHost | None = None) -> Device:
    return toy.device("a", LocalLink(edge), host=host)


async def serves_an_honest_one(host: DeviceHost) -> None:
    """After all that, with the same process's plans, models and worker."""
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        fleet.start(toy.device("a", fleet.link, value=2.0, host=host))
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        np.testing.assert_array_equal(fleet.model["params/w"], [2.0])


@pytest.fixture
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses, so that much is said in little time."""
    monkeypatch.setattr(SystemClock, "sleep_until", lambda self, deadline_s: asyncio.sleep(0))
    monkeypatch.setattr(link_module, "STALLED_S", 0.2)


# Fuzzed.


class Fuzz:
    """Messages of every kind, whole, changed or nonsense."""

    def __init__(self, good: Honest, seed: int) -> None:
        self.good, self.draw, self.said = good, random.Random(seed), 0
        token = good.assigned.token
        made: dict[str, Message] = {
            "assigned": good.assigned, "later": pb.Later(delay_min_s=0.0, delay_max_s=1e9, other_edge="x:1"),
            "incompatible": pb.Incompatible(needs="more"), "counted": pb.Counted(token=token, version=1),
            "refused": pb.Refused(token=token, reason="late"), "released": pb.Released(token=token),
            "incomplete": pb.Incomplete(token=token, missing=["delta/params/w"]), "finished": pb.Finished(),
            "group": pb.GroupMessage(token=token, phase="begin", data=bytes(16)), "ping": pb.Ping(),
        }  # fmt: skip
        self.kinds = {kind: pb.FromEdge(**{kind: message}) for kind, message in made.items()}

    async def says(self, edge: Told) -> AsyncIterator[pb.FromEdge]:
        for _ in range(self.draw.randrange(40)):
            await asyncio.sleep(0)
            if (message := self.message()) is not None:
                self.said += 1
                yield message
        # Else a session that ends: the device comes again.

    def message(self) -> pb.FromEdge | None:
        kind = self.draw.choice(KINDS)
        if kind in ("finished", "incompatible") and self.draw.random() < 0.9:
            return None  # these end the device, and so the test of what comes after
        data = self.kinds[kind].SerializeToString()
        return self.changed(data, pb.FromEdge)

    def changed(self, data: bytes, kind: Any) -> Any:
        how = self.draw.randrange(4)
        changed = bytearray(data)
        if how == 1 and changed:
            for _ in range(self.draw.randrange(1, 4)):
                changed[self.draw.randrange(len(changed))] = self.draw.randrange(256)
        elif how == 2 and changed:
            del changed[self.draw.randrange(len(changed)) :]
        elif how == 3:
            changed += self.draw.randbytes(self.draw.randrange(20))
        try:
            return kind.FromString(bytes(changed))
        except DecodeError:
            return None  # gRPC ends the stream there

    async def slices(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        data = self.good.blobs.get(request.hash, b"")
        for offset in range(request.offset, max(len(data), request.offset + 1), 200):
            await asyncio.sleep(0)
            good = pb.Slice(offset=offset, data=data[offset : offset + 200], total=len(data))
            if self.draw.random() < 0.1:
                good.unpacked = self.draw.randrange(1 << 40)
            piece = self.changed(good.SerializeToString(), pb.Slice) if self.draw.random() < 0.05 else good
            if piece is not None:
                self.said += 1
                yield piece

    def state(self) -> pb.StatusReply:
        self.said += 1
        received = {"delta/params/w": self.draw.randrange(1 << 40)} if self.draw.random() < 0.3 else {}
        return pb.StatusReply(state=self.draw.randrange(5), received=received)  # type: ignore[arg-type]


async def fuzzed(number: int, *, seed: int, most_bytes: int) -> None:
    fuzz = Fuzz(await honest(), seed)
    edge = Told(fuzz.says, fuzz.slices, fuzz.state)
    host, ended, counted = toy.device_host(), 0, 0
    logging.disable(logging.WARNING)  # what is logged is kept by who runs the tests, and would be counted
    tracemalloc.start()
    try:
        while fuzz.said < number:
            running = device(edge, host)
            try:
                async with asyncio.timeout(30):
                    await running.run()
            except ShoalError:
                ended += 1
            counted += running.progress.counted
            if fuzz.said < number // 2:
                tracemalloc.clear_traces()  # what is held by then is what it holds
        assert tracemalloc.get_traced_memory()[0] < most_bytes
    finally:
        tracemalloc.stop()
        logging.disable(logging.NOTSET)
    assert ended and counted and edge.sessions > 10, "it got as far as that, and came back"
    await serves_an_honest_one(host)


@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("seed", [0])
@toy.in_loop
async def test_whatever_an_edge_says_the_device_goes_on(seed: int) -> None:
    await fuzzed(1_500, seed=seed, most_bytes=20 << 20)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("seed", range(5, 7))
def test_much_more_of_it(seed: int) -> None:
    asyncio.run(fuzzed(int(os.environ.get("SHOAL_FUZZ", "10000")), seed=seed, most_bytes=20 << 20))


# Named attacks.


async def only_assigns(good: Honest, assigned: pb.Assigned) -> "Told":
    async def says(edge: Told) -> AsyncIterator[pb.FromEdge]:
        yield pb.FromEdge(assigned=assigned)
        await asyncio.sleep(3600)

    return Told(says, good.slices)


def changed_plan(good: Honest, change: Callable[[bytes], bytes], *, signed_anew: bool) -> tuple[pb.Assigned, Honest]:
    """An assignment of a plan that was changed; by one who has the key or has not."""
    data = change(good.blobs[good.assigned.plan])
    assigned = pb.Assigned()
    assigned.CopyFrom(good.assigned)
    assigned.plan = sha256(data)
    if signed_anew:
        plan = Plan(Manifest.parse(data), good.plan.programs).sign(toy.KEYS.signing)
        assigned.plan_signature, assigned.plan_public_key = plan.signature, plan.public_key
    return assigned, Honest(assigned, {**good.blobs, assigned.plan: data}, good.plan)


@pytest.mark.parametrize(
    ("change", "signed_anew", "text"),
    [
        (lambda data: data.replace(b'"toy"', b'"toi"'), False, "signature"),
        (lambda data: data.replace(b"[1]", b"[1099511627776]"), True, "asks for .* of memory|sizes|at most"),
        (lambda data: data[:-1], False, "Expected the manifest of a plan"),
        (lambda data: b"[" * 100_000, False, "Expected the manifest of a plan"),
        (lambda data: b" " * (17 << 20), False, "Expected at most"),
    ],
)
@toy.in_loop
async def test_a_bad_plan_is_not_run(change: Callable[[bytes], bytes], signed_anew: bool, text: str) -> None:
    assigned, served = changed_plan(await honest(), change, signed_anew=signed_anew)

    def never(plan: Plan) -> toy.ToyRunner:
        raise AssertionError("no runner is made for it")

    host = DeviceHost(make_runner=never, runtime=toy.RUNTIME, limits=Limits(memory_bytes=1 << 30))
    edge = await only_assigns(served, assigned)
    with pytest.raises(PlanError, match=text):
        await asyncio.wait_for(device(edge, host).run(), timeout=10)


@toy.in_loop
async def test_more_blobs_than_were_asked_for_are_refused() -> None:
    good = await honest()

    async def more(request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        for hash in (request.hash, *(each.hash for each in request.then), request.hash):
            yield pb.Slice(data=good.blobs[hash], total=len(good.blobs[hash]))

    edge = await only_assigns(good, good.assigned)
    edge.slices = more
    with pytest.raises(PlanError, match="Expected 1 blobs, got more"):
        await asyncio.wait_for(device(edge).run(), timeout=10)


@toy.in_loop
async def test_a_plan_by_another_key_than_the_first_is_not_run() -> None:
    good = await honest()
    host = toy.device_host()
    host.trusted_key = bytes(32)
    with pytest.raises(PlanError, match="this device trusts 0000"):
        await asyncio.wait_for(device(await only_assigns(good, good.assigned), host).run(), timeout=10)


@toy.in_loop
async def test_of_two_plans_at_once_by_two_keys_one_is_run() -> None:
    good = await honest()
    other = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    data = good.blobs[good.assigned.plan].replace(b'"task":"toy"', b'"task":"toi"')
    plan = Plan(Manifest.parse(data), good.plan.programs).sign(other)
    second = pb.Assigned()
    second.CopyFrom(good.assigned)
    second.plan, second.plan_signature, second.plan_public_key = sha256(data), plan.signature, plan.public_key
    served = Honest(second, {**good.blobs, second.plan: data}, good.plan)
    both = Barrier(2)

    def is_signed(key: bytes, signature: bytes, message: bytes) -> bool:
        both.wait(timeout=10)  # each is checked before either is trusted
        return is_good(key, signature, message)

    host = toy.device_host()
    host.is_signed = is_signed
    link = LocalLink(await only_assigns(served, second))
    prepared = await asyncio.gather(
        *(host.prepare(assigned, link, Spent()) for assigned in (good.assigned, second)), return_exceptions=True
    )
    (refused,) = (each for each in prepared if isinstance(each, BaseException))
    (taken,) = (each for each in prepared if isinstance(each, Prepared))
    assert isinstance(refused, PlanError) and "this device trusts" in str(refused)
    assert host.trusted_key == taken.plan.public_key


async def endless(request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
    offset = request.offset
    while True:
        yield pb.Slice(offset=offset, data=bytes(1 << 20), total=1 << 50)
        offset += 1 << 20


async def silent(request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
    await asyncio.sleep(3600)
    yield pb.Slice()


async def drips(request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
    for offset in range(request.offset, 10_000):
        await asyncio.sleep(0.02)
        yield pb.Slice(offset=offset, data=b"x", total=10_000)


async def packed_bomb(request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
    yield pb.Slice(offset=0, data=b"\x01" * 1000, unpacked=1 << 40, total=1 << 40)


@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("slices", [endless, drips, packed_bomb])
@toy.in_loop
async def test_no_transfer_takes_for_ever(monkeypatch: pytest.MonkeyPatch, slices: Any) -> None:
    monkeypatch.setattr(link_module, "SLOWEST_BYTES_PER_S", 100 << 20)
    good = await honest()
    edge = await only_assigns(good, good.assigned)
    edge.slices = slices
    host = toy.device_host()
    running = device(edge, host)
    task = asyncio.create_task(running.run())
    while not running.progress.failures and not task.done():
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await serves_an_honest_one(host)


@toy.in_loop
async def test_an_edge_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "STALLED_S", 0.1)
    good = await honest({"params/w": (20_000,)})
    edge = await only_assigns(good, good.assigned)

    class Full(LocalLink):
        async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
            await asyncio.sleep(3600)
            return pb.PushReply()

    monkeypatch.setattr(link_module, "SLOWEST_BYTES_PER_S", 1 << 30)
    running = toy.device("a", Full(edge))
    task = asyncio.create_task(running.run())
    while "takes slices too slowly" not in running.progress.last_error:
        await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@toy.in_loop
async def test_an_edge_that_sends_away_is_asked_less_and_less(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(self: Device, seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr(Device, "_sleep", sleep)

    async def says(edge: Told) -> AsyncIterator[pb.FromEdge]:
        yield pb.FromEdge(later=pb.Later())

    edge = Told(says, silent)
    task = asyncio.create_task(device(edge).run())
    while edge.sessions < 1_500 and not task.done():
        await asyncio.sleep(0)
    assert not task.done(), "for days, if need be"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert sum(slept[:5]) < 0.1, "one or two are as the host says"
    assert slept[-1] == device_module.BACK_OFF_S[1]


@pytest.mark.usefixtures("_in_a_hurry")
@toy.in_loop
async def test_an_update_is_not_sent_again_without_end() -> None:
    good = await honest({"params/w": (20_000,)})
    assigned = good.assigned

    async def says(edge: Told) -> AsyncIterator[pb.FromEdge]:
        yield pb.FromEdge(assigned=assigned)
        while True:
            await asyncio.sleep(0)
            if edge.pushes:
                yield pb.FromEdge(incomplete=pb.Incomplete(token=assigned.token, missing=["delta/params/w"]))

    edge = Told(says, good.slices)
    running = device(edge)
    task = asyncio.create_task(running.run())
    while "times for the same update" not in running.progress.last_error:
        await asyncio.sleep(0.01)
    assert edge.pushes <= 2 * device_module.MOST_REPEATS, "until it is looked at, the next may have begun"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@toy.in_loop
async def test_a_flood_of_words_does_not_keep_a_device_from_ending() -> None:
    async def says(edge: Told) -> AsyncIterator[pb.FromEdge]:
        while True:
            yield pb.FromEdge(ping=pb.Ping())

    edge = Told(says, silent)
    task = asyncio.create_task(device(edge).run())
    await asyncio.sleep(0.05)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=5)
    assert done


@toy.in_loop
async def test_an_edge_of_another_version_is_said() -> None:
    async def says(edge: Told) -> AsyncIterator[pb.FromEdge]:
        yield pb.FromEdge(incompatible=pb.Incompatible(needs="shoal 9.0"))

    with pytest.raises(PlanError, match=r"shoal 9\.0"):
        await device(Told(says, silent)).run()
