"""Secure groups in a live fleet: sums that are exact, of which the Edge sees no part, whoever goes away, whatever stream breaks."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import NetworkError, PlanError
from shoal.fleet import forming
from shoal.fleet.device import Device
from shoal.fleet.device_file import DeviceFile
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.enrolment import Enrolled, certify, public_key
from shoal.fleet.floor import Floor
from shoal.fleet.forming import FormingGroups
from shoal.fleet.host import Host
from shoal.fleet.link import LocalLink, Stream
from shoal.fleet.secure_offer import SecureOffer
from shoal.fleet.spent import SpentUpdates
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.plan.secure import update_of
from shoal.policy import Privacy, RoundPolicy, Secure
from shoal.privacy.identity import Trusted
from tests.fleet import toy
from tests.fleet.toy import in_loop

SECURE = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=Secure(members=16, colluders=0.0, dropouts=0.3))
NUM = 12


def policy(**changes: Any) -> RoundPolicy:
    return RoundPolicy(**{"goal": NUM, "minimum_group": 4, "over_selection": 1.0, "selection_window_s": 5.0, **changes})


def plan(shapes: dict[str, tuple[int, ...]] | None = None, **changes: Any) -> Plan:
    made = policy(**changes.pop("rounds", {}))
    return toy.plan(made, shapes or toy.ONE, **{"privacy": SECURE, "max_weight": 16, **changes})


def devices(link: Any, num: int = NUM, **named: Any) -> list[Device]:
    return [toy.device(f"device-{i}", link, value=0.25 * i - 1.0, num=1 + i % 4, **named) for i in range(num)]


def mean(of: Sequence[int] = range(NUM)) -> float:
    """Of these devices' updates."""
    weights = np.array([1 + i % 4 for i in of])
    return float(np.sum(weights * (0.25 * np.array(of) - 1.0)) / np.sum(weights))


@in_loop
async def test_a_round_in_a_secure_group_is_the_exact_mean_with_weights() -> None:
    async with toy.fleet(plan()) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert fleet.members == [0, NUM]
        assert fleet.model["params/w"] == pytest.approx(mean(), abs=1e-6)


@in_loop
async def test_a_round_commits_with_fewer_than_its_goal() -> None:
    rounds = {"reporting_window_s": 1.0, "selection_window_s": 0.2, "minimum_fraction": 0.5}
    async with toy.fleet(plan(rounds=rounds)) as fleet:
        fleet.start(*devices(fleet.link)[1:])
        await fleet.tasks[0]
        assert fleet.members == [0, NUM - 1]
        assert fleet.model["params/w"] == pytest.approx(mean(range(1, NUM)), abs=1e-6)


@in_loop
async def test_what_was_revealed_when_a_host_is_told_to_end_is_kept() -> None:
    """Groups of six are formed before the round has its twelve; then the host ends, and another goes on."""
    secure = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=Secure(members=6, colluders=0.0, dropouts=0.2))
    made = plan(privacy=secure, rounds={"selection_window_s": 0.3, "minimum_fraction": 0.5})
    async with toy.fleet(made) as fleet:
        fleet.start(*devices(fleet.link)[:8])
        while (
            sum(
                len(group.members) for group in fleet.host.edge._updates.sums.groups._groups.values() if group.is_formed
            )
            < 6
        ):  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        fleet.tasks[0].cancel()
        await asyncio.gather(fleet.tasks[0], return_exceptions=True)
        (kept,) = fleet.store.groups(fleet.host.run_id, waiting=True)
        assert kept.members == 6
    host = Host(fleet.store, fleet.host.run_id, toy.KEYS, rng=np.random.default_rng(0))
    running = asyncio.create_task(host.run())
    link = LocalLink(host.edge)
    others = [asyncio.create_task(toy.device(f"new-{i}", link).run()) for i in range(6)]
    await running
    assert [commit.members for commit in fleet.store.commits(host.run_id)] == [0, NUM]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await host.edge.close()


@in_loop
async def test_large_vectors_are_pushed() -> None:
    shapes = {"params/w": (300, 100), "params/b": (7,)}
    async with toy.fleet(plan(shapes)) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert np.allclose(fleet.model["params/w"], mean(), atol=1e-6)
        assert fleet.host.edge.statistics().staged_now == 0


@in_loop
async def test_several_rounds_and_groups() -> None:
    secure = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=Secure(members=6, colluders=0.0, dropouts=0.2))
    async with toy.fleet(plan(privacy=secure), rounds=3) as fleet:
        fleet.start(*devices(fleet.link))
        await fleet.tasks[0]
        assert fleet.members == [0, NUM, NUM, NUM]
        assert fleet.model["params/w"] == pytest.approx(3 * mean(), abs=1e-5)


class BreakingLink(LocalLink):
    """Its first stream breaks once, at the n-th message of a group in one direction."""

    def __init__(self, edge: Any, *, at: int, sending: bool) -> None:
        super().__init__(edge)
        self._at, self._sending = at, sending
        self.has_broken = False

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Stream, None]:
        async with super().session() as stream:
            yield _Breaking(stream, self)

    def count(self, message: Any, *, sending: bool) -> None:
        if sending == self._sending and message.WhichOneof("kind") == "group":
            self._at -= 1
            if self._at == 0:
                self.has_broken = True
                raise NetworkError("The stream broke.")


class _Breaking:
    def __init__(self, stream: Stream, link: BreakingLink) -> None:
        self._stream, self._link = stream, link

    async def send(self, message: pb.FromDevice) -> None:
        self._link.count(message, sending=True)
        await self._stream.send(message)

    async def receive(self) -> pb.FromEdge:
        message = await self._stream.receive()
        self._link.count(message, sending=False)
        return message


@pytest.mark.parametrize("sending", [False, True], ids=["hears", "says"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
@in_loop
async def test_a_stream_that_breaks_in_a_group_is_gone_on_with(at: int, sending: bool) -> None:
    async with toy.fleet(plan({"params/w": (9000,)})) as fleet:
        link = BreakingLink(fleet.host.edge, at=at, sending=sending)
        fleet.start(*devices(fleet.link)[1:], toy.device("device-0", link, value=-1.0, num=1))
        await fleet.tasks[0]
        assert link.has_broken
        assert fleet.members == [0, NUM]
        assert np.allclose(fleet.model["params/w"], mean(), atol=1e-6)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@in_loop
async def test_members_that_go_away_in_a_group_are_left_out_or_counted(at: int) -> None:
    async with toy.fleet(plan(rounds={"reporting_window_s": 3.0, "minimum_fraction": 0.5})) as fleet:
        lost = [BreakingLink(fleet.host.edge, at=at, sending=False) for _ in range(2)]
        leaving = [toy.device(f"lost-{i}", link, value=5.0, num=2) for i, link in enumerate(lost)]
        fleet.start(*devices(fleet.link)[2:])
        gone = [asyncio.create_task(device.run()) for device in leaving]
        while not all(link.has_broken for link in lost):
            await asyncio.sleep(0.01)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        await fleet.tasks[0]
        stayed = [i for i in range(NUM) if i >= 2]
        values = [(1 + i % 4, 0.25 * i - 1.0) for i in stayed] + ([(2, 5.0)] * 2 if at == 4 else [])
        expected = sum(weight * value for weight, value in values) / sum(weight for weight, _ in values)
        assert fleet.members == [0, len(values)], "whose vector is in the sum is counted, whatever became of it"
        assert fleet.model["params/w"] == pytest.approx(expected, abs=1e-6)


@in_loop
async def test_the_edge_sees_nothing_of_a_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []
    add = FormingGroups.add

    async def spy(forming: FormingGroups, nonce: bytes, data: bytes) -> None:
        seen.append(data)
        await add(forming, nonce, data)

    monkeypatch.setattr(FormingGroups, "add", spy)
    async with toy.fleet(plan({"params/w": (4096,)})) as fleet:
        fleet.start(*(toy.device(f"device-{i}", fleet.link, value=0.0, num=1) for i in range(NUM)))
        await fleet.tasks[0]
    assert len(seen) == NUM
    for data in seen:
        counts = np.bincount(np.frombuffer(data, np.uint8), minlength=256)
        chi_square = float(np.sum((counts - counts.mean()) ** 2) / counts.mean())
        assert chi_square < 400, "bytes of zeros under masks are as good as uniform (255 expected, 400 once in 10^8)"


@pytest.mark.parametrize(
    ("floor", "made", "text"),
    [
        (Floor(secure=True), {"privacy": None}, "takes part in secure groups only"),
        (Floor(minimum_group=5), {}, "at least 4 members, this device asks for 5"),
        (Floor(colluders=1), {}, "withstand 0 colluders, this device asks for 1"),
        (Floor(noise=1.0), {}, "no noise that its members add themselves"),
        (
            Floor(noise=2.5),
            {"privacy": replace(SECURE, distributed=True, noise_multiplier=2.0), "max_weight": 1},
            "add noise of 2 clip norms, this device asks for 2.5",
        ),
        (Floor(authority=Trusted(Ed25519PrivateKey.generate().public_key(), "default")), {}, "that nobody certifies"),
    ],
)
@in_loop
async def test_a_device_asks_for_a_floor(floor: Floor, made: dict[str, Any], text: str) -> None:
    host = DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, floor=floor)
    async with toy.fleet(plan(**made)) as fleet:
        with pytest.raises(PlanError, match=text):
            fleet.start(*devices(fleet.link)[1:])
            await toy.device("device-0", fleet.link, host=host).run()


def an_offer() -> SecureOffer:
    made = plan()
    return SecureOffer(
        made.manifest, "root", toy.update(made), 3, spent=SpentUpdates(DeviceFile(None), "a"), floor=Floor(), identity=None, wall_s=lambda: 0.0
    )  # fmt: skip


def test_a_server_that_speaks_out_of_turn_hears_a_complaint() -> None:
    offer = an_offer()
    assert offer.hear("begin", bytes(16))[0] == "advert"
    assert offer.hear("survivors", b"")[0] == "complaint"
    assert offer.hear("begin", bytes(15))[0] == "complaint"


def test_what_a_server_sends_is_not_kept_without_end() -> None:
    offer = an_offer()
    for number in range(100):
        offer.hear("roster", number.to_bytes(4, "big"))
    assert len(offer._answers) <= 16
    assert offer.hear("begin", bytes(16))[0] == "advert", "another group may begin all the same"


@in_loop
async def test_a_mistake_of_ours_ends_a_group_and_not_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> Any:
        raise RuntimeError("our bug")

    async with toy.fleet(plan()) as fleet:
        monkeypatch.setattr(FormingGroups, "_opened", fail)
        first = devices(fleet.link)
        fleet.start(*first)
        while any(device.progress.refused == 0 for device in first):
            await asyncio.sleep(0.01)
        monkeypatch.undo()
        fleet.start(*(toy.device(f"other-{i}", fleet.link, value=2.0) for i in range(NUM)))
        await fleet.tasks[0]
        assert fleet.model["params/w"] == pytest.approx(2.0)


def test_an_update_is_known_by_what_makes_its_numbers() -> None:
    one, other = plan().manifest, plan(rounds={"goal": 11}).manifest
    assert one.hash != other.hash and update_of(one, "root") == update_of(other, "root")
    assert update_of(one, "root") != update_of(one, "another root")


@in_loop
async def test_what_was_revealed_is_offered_no_more(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hosts = [
        DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, state_folder=tmp_path / str(i)) for i in range(NUM)
    ]
    async with toy.fleet(plan()) as fleet:
        toy.fail_once(monkeypatch, fleet.host)  # the sum is known by then, and not used
        first = [toy.device(f"device-{i}", fleet.link, value=1.0, host=hosts[i]) for i in range(NUM)]
        fleet.start(*first)
        while any(device.progress.refused == 0 for device in first):
            await asyncio.sleep(0.01)
        again = DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, state_folder=tmp_path / "0")
        late = toy.device("device-0", fleet.link, host=again)
        fleet.start(late)
        while "revealed in a secure group before" not in late.progress.last_error:
            await asyncio.sleep(0.01)
        fleet.start(*(toy.device(f"other-{i}", fleet.link, value=2.0) for i in range(NUM)))
        await fleet.tasks[0]
        assert fleet.model["params/w"] == pytest.approx(2.0), "others train, those whose update is spent do not"
        assert sum(device.progress.counted for device in first) == 0


@in_loop
async def test_with_noise_of_its_own_an_update_is_spent_before_it_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    answer = SecureOffer._answer

    def watched(self: SecureOffer, phase: str, data: bytes) -> tuple[str, bytes]:
        made = answer(self, phase, data)
        seen.append((made[0], self.is_spent))
        return made

    monkeypatch.setattr(SecureOffer, "_answer", watched)
    noisy = replace(SECURE, distributed=True, noise_multiplier=1e-9)
    async with toy.fleet(plan(privacy=noisy, max_weight=1)) as fleet:
        fleet.start(*(toy.device(f"device-{i}", fleet.link, value=0.25 * i - 1.0, num=1) for i in range(NUM)))
        await fleet.tasks[0]
        assert fleet.model["params/w"] == pytest.approx(np.mean(0.25 * np.arange(NUM) - 1.0), abs=1e-4)
    assert {said for said in seen if said[0] in ("shares", "masked")} == {("shares", False), ("masked", True)}


@in_loop
async def test_a_stolen_device_file_has_no_secret_of_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heard: list[bytes] = []
    hear = SecureOffer.hear

    def watched(self: SecureOffer, phase: str, data: bytes) -> tuple[str, bytes]:
        heard.append(data)
        return hear(self, phase, data)

    monkeypatch.setattr(SecureOffer, "hear", watched)
    hosts = [
        DeviceHost(make_runner=toy.ToyRunner, runtime=toy.RUNTIME, state_folder=tmp_path / str(i)) for i in range(NUM)
    ]
    async with toy.fleet(plan(), rounds=2) as fleet:
        fleet.start(*(toy.device(f"device-{i}", fleet.link, value=1.0, host=hosts[i]) for i in range(NUM)))
        await fleet.tasks[0]
    files = b"".join(path.read_bytes() for path in (tmp_path / "0").iterdir())
    words = {data[at : at + 16] for data in heard for at in range(0, len(data) - 16, 16)}
    assert len(words) > 100 and not [word for word in words if word in files]


@in_loop
async def test_certified_members_only() -> None:
    key = Ed25519PrivateKey.generate()
    secret, authority = key.private_bytes_raw(), key.public_key().public_bytes_raw().hex()
    secure = Secure(members=16, colluders=0.0, dropouts=0.1, authority=authority)

    def host(name: str, population: str = "default") -> DeviceHost:
        own = name.encode().ljust(32)
        made = certify(secret, public_key(own), population=population, until_s=time.time() + 60)
        enrolled = Enrolled.of(own, made, population=population, wall_s=time.time())
        trusted = Trusted(key.public_key(), "default")
        return DeviceHost(
            make_runner=toy.ToyRunner, runtime=toy.RUNTIME, identity=enrolled.identity, floor=Floor(authority=trusted)
        )

    privacy = Privacy(delta_bound=8.0, clip_norm=1000.0, secure=secure)
    async with toy.fleet(
        plan(privacy=privacy, rounds={"over_selection": 1.1, "reporting_window_s": 2.0, "selection_window_s": 0.3})
    ) as fleet:
        stranger = toy.device("stranger", fleet.link, value=7.0, host=host("stranger", "elsewhere"))
        members = [
            toy.device(f"device-{i}", fleet.link, value=0.25 * i - 1.0, num=1 + i % 4, host=host(f"device-{i}"))
            for i in range(NUM)
        ]
        fleet.start(stranger, *members)
        await fleet.tasks[0]
        counted = [i for i, device in enumerate(members) if device.progress.counted]
        assert stranger.progress.counted == 0 and len(counted) >= NUM - 1, "a place may have gone to the stranger"
        assert fleet.members == [0, len(counted)]
        assert fleet.model["params/w"] == pytest.approx(mean(counted), abs=1e-6)


PHASES = ("advert", "shares", "masked", "signed", "unmask", "complaint", "x")
STUFF = st.one_of(st.binary(max_size=80), st.just(b""), st.just(bytes(4 * 1024)))


@pytest.fixture
def short_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forming, "SHORTEST_PHASE_S", 0.2)


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(says=st.lists(st.tuples(st.sampled_from(PHASES), STUFF), min_size=1, max_size=6), at=st.integers(0, 3))
def test_hostile_members_bring_down_nobody(short_phases: None, says: list[tuple[str, bytes]], at: int) -> None:
    """Three of 27 are honest up to a message of the group, and then say anything."""

    async def play() -> None:
        async with toy.fleet(plan(rounds={"over_selection": 1.25, "reporting_window_s": 2.0})) as fleet:
            fleet.start(*(_Hostile(f"bad-{i}", fleet.link, says, at) for i in range(3)))
            honest = devices(fleet.link, 2 * NUM)
            fleet.start(*honest)
            await fleet.tasks[0]
            while sum(device.progress.counted for device in honest) < fleet.members[-1] - 3:
                await asyncio.sleep(0.01)
            counted = [i for i, device in enumerate(honest) if device.progress.counted]
            if len(counted) == fleet.members[-1]:  # else a hostile member's own vector is in the sum
                assert fleet.model["params/w"] == pytest.approx(mean(counted), abs=1e-6)

    asyncio.run(asyncio.wait_for(play(), timeout=25))


class _Hostile(Device):
    def __init__(self, name: str, link: Any, says: list[tuple[str, bytes]], at: int) -> None:
        host = toy.device_host()
        super().__init__(name, lambda: toy.examples(0.0, 1), link=link, host=host, rng=np.random.default_rng(0))
        self._says, self._at = says, at

    async def _answer(self, work: Any, secure: Any, message: pb.GroupMessage, stream: Stream) -> None:
        if self._at > 0:
            self._at -= 1
            return await super()._answer(work, secure, message, stream)
        for phase, data in self._says:
            told = pb.GroupMessage(token=message.token, phase=phase, data=data)
            await stream.send(pb.FromDevice(group=told))
