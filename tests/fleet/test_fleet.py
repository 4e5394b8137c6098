"""Real hosts and devices in one process: what goes right, and what bad peers can do."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import pytest

from shoal.clock import SystemClock
from shoal.data.store import Examples
from shoal.errors import DataError, NetworkError, ProgramError, ProtocolError
from shoal.fleet import device_host, packed_slices
from shoal.fleet.device import Device
from shoal.fleet.link import LocalLink
from shoal.fleet.session import MAX_OUTGOING
from shoal.fleet.staging import Limits
from shoal.fleet.token import TokenKey
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.runner import Update
from shoal.policy import RoundPolicy
from tests.fleet import toy

TWO_OF_THREE = RoundPolicy(goal=2, minimum_group=2, over_selection=1.5)
"""Three are taken, two are enough: one of them may be as bad as it likes."""
DELTA = "delta/params/w"


@toy.in_loop
async def test_devices_train_a_model() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b")), rounds=3) as fleet:
        fleet.start(toy.device("a", fleet.link, value=1.0), toy.device("b", fleet.link, value=3.0))
        await asyncio.gather(*fleet.tasks)
        np.testing.assert_array_equal(fleet.model["params/w"], [6.0])
        assert fleet.members == [0, 2, 2, 2]
        assert fleet.host.edge.statistics().counted == 6


async def honest_two_are_counted(fleet: toy.Fleet) -> None:
    await asyncio.wait_for(fleet.tasks[0], timeout=15)
    assert fleet.members == [0, 2]
    np.testing.assert_array_equal(fleet.model["params/w"], [1.0])


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.002)


def honest_two(fleet: toy.Fleet) -> None:
    fleet.start(toy.device("a", fleet.link), toy.device("b", fleet.link))


# Updates that are wrong: one clear line to the device, and nobody else is touched.


def sliced(*slices: tuple[str, int, bytes]) -> dict[str, Any]:
    return {"slices": [pb.PushSlice(tensor=name, offset=offset, data=data) for name, offset, data in slices]}


FLOAT = np.ones(1, np.float32).tobytes()
BAD: dict[str, tuple[float, dict[str, Any], str, str]] = {
    # value, changes of the report, reason, a part of the line
    "NaN": (np.nan, {}, "not finite", "NaN"),
    "infinite": (np.inf, {}, "not finite", "infinity"),
    "too large": (1e6, {}, "out of bounds", "<= 256"),
    "another root": (1.0, {"root": "0" * 64}, "wrong hash", "root"),
    "no root": (1.0, {"root": ""}, "wrong hash", "root"),
    "weight 0": (1.0, {"weight": 0}, "bad weight", "got 0"),
    "weight -1": (1.0, {"weight": 2**64 - 1}, "bad weight", "weight <= 1048576"),
    "weight 2^40": (1.0, {"weight": 2**40}, "bad weight", "weight <= 1048576"),
    "another dtype": (1.0, sliced((DELTA, 0, np.ones(1).tobytes())), "wrong slices", "Expected 4 bytes"),
    "another shape": (1.0, sliced((DELTA, 0, FLOAT * 3)), "wrong slices", "float32[1]"),
    "unknown tensor": (1.0, sliced(("delta/other", 0, FLOAT)), "wrong slices", "Expected a tensor of the update"),
    "no tensor": (1.0, sliced(("", 0, FLOAT)), "wrong slices", "Expected a tensor of the update"),
    "a gap": (1.0, sliced((DELTA, 2, FLOAT[:2])), "wrong slices", "go on at byte 0"),
    "reordered": (1.0, sliced((DELTA, 2, FLOAT[:2]), (DELTA, 0, FLOAT[2:])), "wrong slices", "go on at byte 0"),
    "after the end": (1.0, sliced((DELTA, 0, FLOAT), (DELTA, 4, b"x")), "wrong slices", "up to 5"),
    "far away": (1.0, sliced((DELTA, 2**63, b"x")), "wrong slices", "go on at byte 0"),
    "overlapping, other bytes": (
        1.0, sliced((DELTA, 0, b"\1\1"), (DELTA, 0, FLOAT)), "wrong hash", "root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
@toy.in_loop
async def test_a_bad_update_is_refused_with_one_clear_line(what: str) -> None:
    value, changes, reason, line = BAD[what]
    made = toy.plan(TWO_OF_THREE)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        honest_two(fleet)
        assigned = await peer.assigned()
        await peer.say(report=toy.report(assigned.token, toy.update(made, value), **changes))
        kind, refused = await peer.hear()
        assert (kind, refused.reason) == ("refused", reason)
        assert line in refused.detail and "\n" not in refused.detail
        assert refused.token == assigned.token
        await honest_two_are_counted(fleet)
        assert (await peer.hear())[0] == "finished", "nothing else was said to it"


@toy.in_loop
async def test_a_report_that_is_not_whole_is_asked_for_the_rest() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        assigned = await peer.assigned()
        await peer.say(report=toy.report(assigned.token, toy.update(made), **sliced((DELTA, 0, FLOAT[:3]))))
        kind, incomplete = await peer.hear()
        assert (kind, list(incomplete.missing)) == ("incomplete", [DELTA])
        status = await fleet.link.status(pb.StatusRequest(token=assigned.token))
        assert status.state == pb.StatusReply.PENDING and dict(status.received) == {DELTA: 3}
        await peer.say(report=toy.report(assigned.token, toy.update(made), **sliced((DELTA, 3, FLOAT[3:]))))
        assert (await peer.hear())[0] == "counted"


@toy.in_loop
async def test_slices_that_are_sent_again_do_no_harm() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        assigned = await peer.assigned()
        slices = sliced((DELTA, 0, FLOAT[:3]), (DELTA, 1, FLOAT[1:]), (DELTA, 0, FLOAT))
        await peer.say(report=toy.report(assigned.token, toy.update(made), **slices))
        assert (await peer.hear())[0] == "counted"


@toy.in_loop
async def test_absurd_costs_are_not_added_up() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        assigned = await peer.assigned()
        costs = pb.Costs(compute_s=float("nan"), wait_s=-1.0, wire_s=float("inf"), padding=1e300, joules=1e300)
        await peer.say(report=toy.report(assigned.token, toy.update(made), costs=costs))
        assert (await peer.hear())[0] == "counted"
        await fleet.tasks[0]
        usage = fleet.store.usage(fleet.host.run_id)
        assert all(0.0 <= row.seconds < 60.0 for row in usage)


@toy.in_loop
async def test_what_a_process_starts_once_is_counted_once_and_not_as_the_wire(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    class Slow(toy.ToyRunner):
        def compile(self) -> float:
            nonlocal now_s
            now_s += 3.0 if not self.models else 0.0  # the child starts and compiles at the first call
            return 0.0

    monkeypatch.setattr(device_host, "time", SimpleNamespace(perf_counter=lambda: now_s))
    async with toy.fleet(toy.plan(toy.exact("a", "b"))) as fleet:
        shared = toy.device_host(Slow)
        fleet.start(*(toy.device(name, fleet.link, host=shared) for name in ("a", "b")))
        await asyncio.gather(*fleet.tasks)
        seconds = {row.phase: row.seconds for row in fleet.store.usage(fleet.host.run_id)}
        assert seconds["compile"] == pytest.approx(3.0) and seconds["wire"] < 3.0


# Tokens that are wrong.


def altered(token: pb.Token, **changes: Any) -> pb.Token:
    assignment = pb.Assignment.FromString(token.signed)
    for name, value in changes.items():
        setattr(assignment, name, value)
    return toy.KEYS.token.sign(assignment)


def foreign(token: pb.Token) -> pb.Token:
    keys = toy.HostKeys.make()
    return TokenKey(private=keys.signing, secret=bytes(32)).sign(pb.Assignment.FromString(token.signed))


TOKENS: dict[str, tuple[Callable[[pb.Token], pb.Token], str]] = {
    "garbage": (lambda token: pb.Token(signed=b"\xff" * 90, signature=b"\x01" * 64), "not one of this Coordinator's"),
    "empty": (lambda token: pb.Token(), "not one of this Coordinator's"),
    "short signature": (lambda token: pb.Token(signed=token.signed, signature=b"x"), "not one of this Coordinator's"),
    "other words, same signature": (
        lambda token: pb.Token(signed=token.signed + b"\x08\x01", signature=token.signature), "not one of",
    ),
    "foreign": (foreign, "not one of this Coordinator's"),
    "expired": (lambda token: altered(token, expires_s=1e9), "expired"),
    "of another run": (lambda token: altered(token, run="other"), "of another run"),
}  # fmt: skip


@pytest.mark.parametrize("what", TOKENS)
@toy.in_loop
async def test_a_wrong_token_is_refused_everywhere(what: str) -> None:
    make, line = TOKENS[what]
    made = toy.plan(TWO_OF_THREE)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        honest_two(fleet)
        token = make((await peer.assigned()).token)
        await peer.say(report=toy.report(token, toy.update(made)))
        kind, refused = await peer.hear()
        assert (kind, refused.reason) == ("refused", "protocol") and line in refused.detail
        with pytest.raises(ProtocolError, match=line):
            await fleet.link.push(stream_of(pb.PushSlice(token=token, tensor=DELTA, data=FLOAT)))
        with pytest.raises(ProtocolError, match=line):
            async for _ in fleet.link.pull(pb.PullRequest(token=token, hash="0" * 64)):
                pass
        if what != "of another run":
            assert (await fleet.link.status(pb.StatusRequest(token=token))).state == pb.StatusReply.EXPIRED
        await honest_two_are_counted(fleet)


async def stream_of(*slices: pb.PushSlice) -> AsyncIterator[pb.PushSlice]:
    for part in slices:
        yield part


# Messages that are wrong.


async def says(peer: toy.Peer, what: str) -> None:
    match what:
        case "too long":
            await peer.check_in(software="x" * (70 << 10))
        case "nothing":
            await peer.say()
        case "secure":
            await peer.say(group=pb.GroupMessage(phase="keys"))
        case "no name":
            await peer.check_in(device_id="")
        case "long name":
            await peer.check_in(device_id="x" * 201)
        case "no version":
            await peer.check_in(runtime=pb.RuntimeInfo(kind="toy"))


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("too long", "at most 65536 bytes"),
        ("nothing", "Expected check_in, report, group, gave_up or ping"),
        ("secure", "groups have no phases"),
        ("no name", "device id of 1 to 200 bytes"),
        ("long name", "device id of 1 to 200 bytes"),
        ("no version", "three numbers"),
    ],
)
@toy.in_loop
async def test_a_wrong_message_ends_its_session_with_one_line(what: str, line: str) -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b"))) as fleet, toy.peer(fleet.link) as peer:
        await says(peer, what)
        kind, refused = await peer.hear()
        assert (kind, refused.reason) == ("refused", "protocol") and line in refused.detail
        with pytest.raises(NetworkError):
            await peer.hear()
        honest_two(fleet)
        await honest_two_are_counted(fleet)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"tasks": ["other"]}, "task 'toy'"),
        ({"runtime": pb.RuntimeInfo(kind="abacus", version=[1, 0, 0], platforms=["wood"])}, "needs toy 1.0.0"),
        ({"runtime": pb.RuntimeInfo(kind="toy", version=[0, 9, 0], calling_convention=9, platforms=["cpu"])}, "needs toy"),
    ],
)  # fmt: skip
@toy.in_loop
async def test_one_who_cannot_serve_is_told_what_is_needed(changes: dict[str, Any], line: str) -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b"))) as fleet, toy.peer(fleet.link) as peer:
        await peer.check_in(**changes)
        kind, message = await peer.hear()
        assert kind == "incompatible" and line in message.needs


@toy.in_loop
async def test_pulls_that_have_no_right() -> None:
    made = toy.plan(toy.exact("peer"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        token = (await peer.assigned()).token
        for request, line in (
            (pb.PullRequest(token=token, hash="0" * 64), "no part of the plan"),
            (pb.PullRequest(token=token, hash="../../etc/passwd"), "no part of the plan"),
            (pb.PullRequest(token=token, hash=made.hash, offset=1 << 40), "offset of at most"),
            (pb.PullRequest(token=token, hash=made.hash, ids=[1]), "single rows"),
        ):
            with pytest.raises(ProtocolError, match=line):
                async for _ in fleet.link.pull(request):
                    pass


MANY: Final = {f"params/w{n}": (9_000 + n,) for n in range(6)}


class Calls(LocalLink):
    """Counts pulls; each ends after so many slices, with an error or as if that were all there is."""

    def __init__(self, edge: Any, *, slices: int = 1 << 30, breaks: bool = False) -> None:
        super().__init__(edge)
        self.num, self._slices, self._breaks = 0, slices, breaks

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        self.num += 1
        left = self._slices
        async for piece in super().pull(request):
            yield piece
            left -= 1
            if not left:
                break
        if not left and self._breaks:
            raise NetworkError("it broke")


@pytest.mark.parametrize("how", [{}, {"slices": 1}, {"slices": 2, "breaks": True}], ids=str)
@toy.in_loop
async def test_a_model_comes_in_one_call_wherever_calls_end(how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SystemClock, "sleep_until", lambda self, deadline_s: asyncio.sleep(0))
    async with toy.fleet(toy.plan(toy.exact("a"), MANY)) as fleet:
        link = Calls(fleet.host.edge, **how)
        fleet.start(toy.device("a", link, value=2.0))
        await fleet.tasks[0]
        for name, shape in MANY.items():
            np.testing.assert_array_equal(fleet.model[name], np.full(shape, 2.0))
    if not how:
        assert link.num == 4  # the plan, its programs, the model's index, its tensors


@toy.in_loop
async def test_a_call_has_its_credit_and_no_more_than_all_there_is() -> None:
    made = toy.plan(toy.exact("peer"), MANY)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        token = (await peer.assigned()).token
        model = fleet.store.get_commit(fleet.host.run_id, 0).model
        first, *then = (entry.hash for entry in model)

        async def sizes(credit: int, wanted: list[str]) -> list[int]:
            request = pb.PullRequest(token=token, hash=first, credit=credit, then=[pb.Wanted(hash=hash) for hash in wanted])  # fmt: skip
            return [len(piece.data) async for piece in fleet.link.pull(request)]

        assert await sizes(0, then) == [4 * shape[0] for shape in MANY.values()]
        assert await sizes(36_000 + 100, then) == [36_000]  # less than a slice of the next
        assert await sizes(100, then) == [100]
        assert sum(await sizes(1 << 62, [then[-1]] * 1024)) <= model.size_bytes + sum(
            len(program) for program in made.programs.values()
        ) + len(made.manifest.data) + len(model.data)
        with pytest.raises(ProtocolError, match="at most 1024 blobs"):
            await sizes(0, [then[-1]] * 1025)


@toy.in_loop
async def test_a_call_ends_where_slices_do() -> None:
    """Else all that follows would come neither packed nor shared."""
    slice_ = packed_slices.SLICE_BYTES
    made = toy.plan(toy.exact("peer"), {"params/a": (100,), "params/b": (slice_,)})
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        token = (await peer.assigned()).token
        first, last = (entry.hash for entry in fleet.store.get_commit(fleet.host.run_id, 0).model)
        request = pb.PullRequest(token=token, hash=first, credit=2 * slice_, packed=True, then=[pb.Wanted(hash=last)])
        pieces = [piece async for piece in fleet.link.pull(request)]
        assert [piece.unpacked for piece in pieces] == [400, slice_]


# Devices that die, repeat themselves, or do not listen.


@pytest.mark.parametrize("phase", ["assigned", "pull", "push"])
@toy.in_loop
async def test_a_device_that_dies_does_not_keep_the_round_from_its_goal(phase: str) -> None:
    made = toy.plan(TWO_OF_THREE)
    async with toy.fleet(made) as fleet:
        honest_two(fleet)
        async with toy.peer(fleet.link) as peer:
            token = (await peer.assigned()).token
            if phase == "pull":
                await anext(fleet.link.pull(pb.PullRequest(token=token, hash=made.hash, credit=5)))
            if phase == "push":
                part = pb.PushSlice(token=token, tensor=DELTA, data=FLOAT[:2])
                assert (await fleet.link.push(stream_of(part))).received == {DELTA: 2}
        await honest_two_are_counted(fleet)


@toy.in_loop
async def test_a_device_that_dies_after_its_check_in_is_not_taken() -> None:
    async with toy.fleet(toy.plan(RoundPolicy(goal=2, minimum_group=2, over_selection=1.0))) as fleet:
        async with toy.peer(fleet.link) as peer:
            await peer.check_in()
            listening = asyncio.create_task(peer.stream.receive())
            await until(lambda: fleet.host.coordinator.snapshot().waiting == 1)
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
        honest_two(fleet)
        await honest_two_are_counted(fleet)


@toy.in_loop
async def test_a_device_that_dies_after_its_report_is_counted() -> None:
    made = toy.plan(toy.exact("peer", "a"))
    async with toy.fleet(made) as fleet:
        fleet.start(toy.device("a", fleet.link))
        async with toy.peer(fleet.link) as peer:
            assigned = await peer.assigned()
            await peer.say(report=toy.report(assigned.token, toy.update(made)))
            await until(lambda: fleet.host.edge.statistics().up_bytes > 0)
        await asyncio.wait_for(fleet.tasks[0], timeout=10)
        assert fleet.members == [0, 2]
        status = await fleet.link.status(pb.StatusRequest(token=assigned.token))
        assert (status.state, status.version) == (pb.StatusReply.COUNTED, 1)


@toy.in_loop
async def test_a_device_that_reports_twice_is_counted_once() -> None:
    made = toy.plan(toy.exact("peer", "a"), {"params/w": (1,)})
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        fleet.start(toy.device("a", fleet.link, value=3.0))
        assigned = await peer.assigned()
        for _ in range(5):
            await peer.say(report=toy.report(assigned.token, toy.update(made)))
        assert [(await peer.hear())[0] for _ in range(2)] == ["counted", "finished"]
        np.testing.assert_array_equal(fleet.model["params/w"], [2.0])


@toy.in_loop
async def test_a_device_that_gives_up_is_replaced() -> None:
    class Broken(toy.ToyRunner):
        def finish(self) -> Update:
            raise ProgramError("it is broken", program="finish")

    made = toy.plan(RoundPolicy(goal=2, minimum_group=2, over_selection=1.0))
    async with toy.fleet(made) as fleet:
        broken = toy.device("broken", fleet.link, runner=Broken)
        fleet.start(broken, toy.device("a", fleet.link), toy.device("b", fleet.link))
        await honest_two_are_counted(fleet)


@toy.in_loop
async def test_a_device_that_does_not_read_loses_its_session_only() -> None:
    async with toy.fleet(toy.plan(TWO_OF_THREE)) as fleet, toy.peer(fleet.link) as peer:
        honest_two(fleet)
        await peer.assigned()
        for _ in range(1000):
            await peer.say(ping=pb.Ping())
        await honest_two_are_counted(fleet)
        with pytest.raises(NetworkError):
            for _ in range(MAX_OUTGOING):
                await peer.hear()


@toy.in_loop
async def test_thousands_of_check_ins_of_one_device() -> None:
    async with toy.fleet(toy.plan(TWO_OF_THREE)) as fleet, toy.peer(fleet.link) as peer:
        for _ in range(3000):
            await peer.check_in()
        assert fleet.host.coordinator.snapshot().waiting <= 1
        honest_two(fleet)
        assert (await peer.hear())[0] == "assigned"
        await honest_two_are_counted(fleet)


@toy.in_loop
async def test_a_device_has_one_session_the_newest() -> None:
    async with toy.fleet(toy.plan(toy.exact("peer"))) as fleet, toy.peer(fleet.link) as old:
        await old.assigned()
        async with toy.peer(fleet.link) as new:
            again = await new.assigned()
            kind, told = await old.hear()
            assert kind == "refused" and told.reason == "replaced" and "--id" in told.detail
            with pytest.raises(NetworkError):
                await old.hear()
            assert again.token.signed


# Large updates.

BIG = {"params/big": (700_000,), "params/small": (3,), "params/empty": (0,)}
"""2.8 MB: slices, and above the memory limit."""


class BreakingLink(LocalLink):
    """Breaks each push after some slices, a few times."""

    def __init__(self, fleet: toy.Fleet, *, after: int, times: int) -> None:
        super().__init__(fleet.host.edge)
        self.after, self.times, self.sent = after, times, 0

    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
        if not self.times:
            return await super().push(self.counted(slices, 10**9))
        self.times -= 1
        await super().push(self.counted(slices, self.after))
        raise NetworkError("it broke")

    async def counted(self, slices: AsyncIterator[pb.PushSlice], most: int) -> AsyncIterator[pb.PushSlice]:
        async for part in slices:
            if most == 0:
                return
            most -= 1
            self.sent += part.unpacked or len(part.data)
            yield part


@toy.in_loop
async def test_a_large_update_is_spooled_and_counted() -> None:
    async with toy.fleet(toy.plan(toy.exact("a", "b"), BIG), rounds=2) as fleet:
        fleet.start(toy.device("a", fleet.link, value=1.0), toy.device("b", fleet.link, value=2.0))
        await asyncio.gather(*fleet.tasks)
        np.testing.assert_array_equal(fleet.model["params/big"], np.full(700_000, 3.0, np.float32))
        assert fleet.model["params/empty"].shape == (0,)


@toy.in_loop
async def test_a_broken_push_goes_on_where_it_broke() -> None:
    made = toy.plan(toy.exact("a"), BIG)
    async with toy.fleet(made) as fleet:
        link = BreakingLink(fleet, after=3, times=3)
        fleet.start(toy.device("a", link))
        await asyncio.gather(*fleet.tasks)
        assert link.sent == made.manifest.update_bytes
        assert fleet.host.edge.statistics().up_bytes < link.sent / 100, "all elements are alike"


@toy.in_loop
async def test_a_push_that_breaks_for_long_keeps_the_update() -> None:
    class Counting(toy.ToyRunner):
        trainings = 0

        def finish(self) -> Update:
            Counting.trainings += 1
            return super().finish()

    async with toy.fleet(toy.plan(toy.exact("a"), BIG)) as fleet:
        device = toy.device("a", BreakingLink(fleet, after=1, times=4), runner=Counting)
        device.push_tries = 1
        fleet.start(device)
        await asyncio.gather(*fleet.tasks)
        assert Counting.trainings == 1, "what was trained is offered again, not trained again"


@pytest.mark.parametrize(
    ("slices", "line"),
    [
        ([(0, b"x" * ((1 << 20) + 1))], "slices of at most 1048576 bytes"),
        ([(0, b"\0" * 400), (800, b"\0" * 400)], "go on at byte 400"),
        ([(0, np.full(10, np.nan, np.float32).tobytes())], "NaN"),
    ],
)
@toy.in_loop
async def test_a_bad_push_is_refused_at_once(slices: list[tuple[int, bytes]], line: str) -> None:
    made = toy.plan(RoundPolicy(goal=2, minimum_group=2, over_selection=1.5), BIG)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        honest_two(fleet)
        token = (await peer.assigned()).token
        parts = [pb.PushSlice(token=token, tensor="delta/params/big", offset=o, data=d) for o, d in slices]
        with pytest.raises(ProtocolError, match=line):
            await fleet.link.push(stream_of(*parts))
        kind, refused = await peer.hear()
        assert kind == "refused" and line in refused.detail
        await asyncio.wait_for(fleet.tasks[0], timeout=15)
        assert fleet.members == [0, 2]


@toy.in_loop
async def test_another_update_under_the_same_token_starts_anew() -> None:
    made = toy.plan(toy.exact("peer"), BIG)
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        token = (await peer.assigned()).token
        part = pb.PushSlice(token=token, tensor="delta/params/big", data=b"\0" * 400, root="1" * 64)
        assert (await fleet.link.push(stream_of(part))).received["delta/params/big"] == 400
        part.root = "2" * 64
        part.data = part.data[:40]
        assert (await fleet.link.push(stream_of(part))).received["delta/params/big"] == 40


# The host: stopped, and taken up again.


@toy.in_loop
async def test_a_host_that_is_stopped_ends_after_its_round_and_goes_on_later() -> None:
    async with toy.fleet(toy.plan(toy.exact("a")), rounds=1_000_000) as fleet:
        fleet.start(toy.device("a", fleet.link))
        await until(lambda: len(fleet.members) > 3)
        fleet.host.coordinator.stop()
        await asyncio.gather(*fleet.tasks)
        assert fleet.store.run(fleet.host.run_id).status == "stopped"
        assert all(row.state != "open" for row in fleet.store.rounds(fleet.host.run_id))


@toy.in_loop
async def test_one_that_reports_before_the_first_round_is_open_is_heard() -> None:
    """A host that was killed is up again; a device comes with its update before the Coordinator has opened a round."""
    made = toy.plan(toy.exact("peer", "a"))
    async with toy.fleet(made) as fleet, toy.peer(fleet.link) as peer:
        fleet.start(toy.device("a", fleet.link))
        token = (await peer.assigned()).token
        fleet.tasks[0].cancel()
        await asyncio.gather(fleet.tasks[0], return_exceptions=True)
        second = toy.Host(fleet.store, fleet.host.run_id, toy.KEYS)
        async with toy.peer(LocalLink(second.edge)) as again:
            await again.say(report=toy.report(token, toy.update(made)))
            asked = asyncio.create_task(second.edge.status(pb.StatusRequest(token=token)))
            heard = asyncio.create_task(again.hear())
            await asyncio.sleep(0.05)
            running = asyncio.create_task(second.run())
            assert (await asked).state in (pb.StatusReply.UNKNOWN, pb.StatusReply.PENDING)
            fleet.start(toy.device("a", LocalLink(second.edge)))
            assert (await heard)[0] == "counted"
            await running


@toy.in_loop
async def test_devices_that_stay_train_anew_after_a_commit_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = RoundPolicy(goal=2, minimum_group=1, over_selection=1.0)
    async with toy.fleet(toy.plan(policy), rounds=2) as fleet:
        toy.fail_once(monkeypatch, fleet.host)
        fleet.start(*(toy.device(name, fleet.link) for name in "ab"))
        await asyncio.gather(*fleet.tasks)
        assert fleet.members == [0, 2, 2]


@toy.in_loop
async def test_an_edge_that_holds_as_many_bytes_as_it_may_says_so() -> None:
    made = toy.plan(RoundPolicy(goal=2, minimum_group=1, over_selection=1.0), {"params/w": (4,)})
    async with (
        toy.fleet(made, rounds=1, limits=Limits(bytes_in_memory=31)) as fleet,
        toy.peer(fleet.link, "first") as first,
        toy.peer(fleet.link, "second") as second,
    ):
        await first.check_in()
        hearing = asyncio.create_task(first.hear())
        theirs = await second.assigned()
        _, mine = await hearing
        await first.say(report=toy.report(mine.token, toy.update(made), inline=False))
        assert (await first.hear())[0] == "incomplete"
        await second.say(report=toy.report(theirs.token, toy.update(made)))
        kind, later = await second.hear()
        assert kind == "later" and "holds 1 updates of 16 bytes, as many as it may" in later.why
        # There is room when the first has done with it.
        await first.say(report=toy.report(mine.token, toy.update(made)))
        async with toy.peer(fleet.link, "second") as again:
            await again.say(report=toy.report(theirs.token, toy.update(made)))
            assert (await again.hear())[0] == "counted"
        assert fleet.members == [0, 2]


@toy.in_loop
async def test_what_a_device_says_makes_no_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    forged = "x\n12:00:00 the run was deleted\x1b[2J"
    policy = RoundPolicy(goal=1, minimum_group=1, over_selection=1.0)
    async with toy.fleet(toy.plan(policy), rounds=1) as fleet, toy.peer(fleet.link, forged) as peer:
        assigned = await peer.assigned()
        await peer.say(gave_up=pb.GaveUp(token=assigned.token, stage=forged, why=forged))
        again = await peer.assigned()
        await peer.say(report=toy.report(again.token, toy.update(fleet.host.plan), root=forged))
        assert (await peer.hear())[0] == "refused"
        async with toy.peer(fleet.link, forged) as other:
            await other.assigned()
    said = [record.getMessage() for record in caplog.records if "x" in record.getMessage()]
    assert len([line for line in said if "the run was deleted" in line]) >= 2
    assert not any(character in line for line in said for character in "\n\x1b")


@toy.in_loop
async def test_what_is_wrong_with_examples_is_the_device_s_to_know(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Examples:
        raise DataError("Row 5 of /home/anna/results.csv: expected a number, got 'positive'.")

    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        device = Device("a", broken, link=fleet.link, host=toy.device_host(), rng=np.random.default_rng(0))
        with caplog.at_level(logging.INFO), pytest.raises(DataError, match="Row 5"):
            await device.run()
    (told,) = [record.getMessage() for record in caplog.records if "gave up in" in record.getMessage()]
    assert "examples do not fit" in told and "anna" not in told and "positive" not in told
