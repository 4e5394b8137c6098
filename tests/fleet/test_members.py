"""Hosts that serve members only: who becomes one, by what, and who does not."""

import asyncio
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.errors import DataError, PlanError, StoreError
from shoal.fleet import streams
from shoal.fleet.device import Device
from shoal.fleet.device_secret import credential
from shoal.fleet.entrance import Entrance
from shoal.fleet.members import Members, invite, remove
from shoal.fleet.several import SeveralHosts
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.policy import RoundPolicy
from tests.fleet import toy

TOKEN, OTHER = b"t" * 16, b"o" * 16
NOW_S, END_S = 1_000.0, 2_000


def asks(device: str, *, token: bytes = TOKEN, secret: bytes = b"s" * 32, population: str = "") -> pb.CheckIn:
    return pb.CheckIn(device_id=device, population=population, credential=credential(token, secret))


@pytest.fixture
def members(tmp_path: Path) -> Members:
    """Of a run with an invitation for two."""
    made = Members.begin(tmp_path)
    invite(tmp_path, TOKEN, population="default", expires_s=END_S, uses=2)
    return made


def test_an_invitation_makes_as_many_members_as_it_has_uses(members: Members) -> None:
    assert [members.refusal(asks(name), NOW_S) for name in ("a", "b", "a", "b")] == [""] * 4
    assert "was for 2" in members.refusal(asks("c"), NOW_S)
    assert len(members) == 2


def test_a_member_stays_one_when_its_invitation_has_ended(members: Members) -> None:
    assert members.refusal(asks("a"), NOW_S) == ""
    assert members.refusal(asks("a"), END_S + 1.0) == ""
    assert "has not ended, as this one has" in members.refusal(asks("b"), END_S)


@pytest.mark.parametrize(
    "shown",
    [
        asks("a", token=OTHER),
        asks("a", population="watches"),
        pb.CheckIn(device_id="a"),
        pb.CheckIn(device_id="a", credential=TOKEN),
        pb.CheckIn(device_id="a", credential=b"\x02" + bytes(48)),
        pb.CheckIn(device_id="a", credential=b"\x01" + bytes(5_000)),
    ],
)
def test_what_is_no_invitation_makes_nobody_a_member(members: Members, shown: pb.CheckIn) -> None:
    assert "an invitation" in members.refusal(shown, NOW_S)
    assert len(members) == 0


def test_nobody_takes_a_members_name(members: Members) -> None:
    assert members.refusal(asks("a"), NOW_S) == ""
    taken = asks("a", secret=b"x" * 32)
    assert "a member already" in members.refusal(taken, NOW_S)
    stranger = asks("a", secret=b"x" * 32, token=OTHER)
    assert "member already" not in members.refusal(stranger, NOW_S), "who was not invited is not told who is a member"


def test_a_member_that_was_removed_is_none_and_nobody_else_is_in_its_name(members: Members, tmp_path: Path) -> None:
    assert members.refusal(asks("a"), NOW_S) == ""
    remove(tmp_path, "a", population="default")
    for shown in (asks("a"), asks("a", secret=b"x" * 32)):
        assert "was removed" in members.refusal(shown, NOW_S)
    assert members.refusal(asks("b"), NOW_S) == ""
    for name, population in (("c", "default"), ("b", "watches")):
        with pytest.raises(DataError, match="No member"):
            remove(tmp_path, name, population=population)


def test_members_outlive_the_host_and_a_line_that_was_torn(members: Members, tmp_path: Path) -> None:
    assert members.refusal(asks("a"), NOW_S) == members.refusal(asks("b"), NOW_S) == ""
    file = tmp_path / "members" / "members.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    again = Members(tmp_path)
    assert len(again) == 1 and again.refusal(asks("a"), END_S + 1.0) == ""
    assert again.refusal(asks("b"), NOW_S) == "", "it was never told that it is one, and has its use again"
    assert file.read_bytes() == whole
    assert "was for 2" in Members(tmp_path).refusal(asks("c"), NOW_S)


def test_what_is_kept_makes_nobody_a_member(members: Members, tmp_path: Path) -> None:
    members.refusal(asks("anna", secret=b"sesame!!" * 4), NOW_S)
    kept = b"".join(path.name.encode() + path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in (TOKEN, b"sesame", b"anna", TOKEN.hex().encode()):
        assert secret not in kept


def test_a_run_that_served_members_only_goes_on_doing_so(tmp_path: Path) -> None:
    assert Members.of(tmp_path) is None
    Members.begin(tmp_path)
    assert Members.of(tmp_path) is not None


def test_members_that_cannot_be_read_or_written_are_said(members: Members, tmp_path: Path) -> None:
    file = tmp_path / "members" / "members.jsonl"
    file.mkdir()
    with pytest.raises(StoreError, match="cannot be written down"):
        members.refusal(asks("a"), NOW_S)
    file.rmdir()
    file.write_text("{}\n")
    with pytest.raises(StoreError, match=r"Line 1 .* is not a member"):
        Members(tmp_path)
    with pytest.raises(ValueError, match="uses"):
        invite(tmp_path, OTHER, population="default", expires_s=END_S, uses=0)


def member(name: str, fleet: toy.Fleet, shown: bytes) -> Device:
    return Device(
        name, toy.examples, link=fleet.link, host=toy.device_host(), rng=np.random.default_rng(0), credential=shown
    )


@toy.in_loop
async def test_a_host_of_members_trains_with_them_and_tells_others_why(tmp_path: Path) -> None:
    members = Members.begin(tmp_path)
    invite(tmp_path, TOKEN, population="default", expires_s=1 << 40, uses=1)
    entrance = Entrance(admit=members.admit)
    async with toy.fleet(toy.plan(toy.exact("a")), entrance=entrance) as fleet:
        with pytest.raises(PlanError, match="The host asks for an invitation, as this host serves members only"):
            await member("a", fleet, b"").run()
        fleet.start(member("a", fleet, credential(TOKEN, b"s" * 32)))
        await asyncio.gather(*fleet.tasks)
        assert fleet.members == [0, 1]
        with pytest.raises(PlanError, match="was for 1"):  # the line, pasted once more elsewhere
            await member("b", fleet, credential(TOKEN, b"x" * 32)).run()


@pytest.mark.parametrize("has_frontdoor", [False, pytest.param(True, marks=pytest.mark.slow)])
@toy.in_loop
async def test_who_was_removed_is_gone_soon_and_who_was_not_keeps_its_stream(
    has_frontdoor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LOOK_AGAIN_S", 0.05)
    entrance = Entrance(admit=Members.begin(tmp_path).admit)
    invite(tmp_path, TOKEN, population="default", expires_s=1 << 40, uses=3)
    async with toy.fleet(
        toy.plan(toy.exact("a", "c")), rounds=200, entrance=None if has_frontdoor else entrance
    ) as fleet:
        hosts = SeveralHosts([fleet.host], entrance=entrance)
        link = toy.LocalLink(hosts.frontdoor) if has_frontdoor else fleet.link
        async with toy.peer(link, "b") as peer:
            await peer.check_in(credential=credential(TOKEN, b"t" * 32))
            hearing = asyncio.create_task(peer.hear())
            await asyncio.sleep(0.3)
            assert not hearing.done(), "it is a member"
            remove(tmp_path, "b", population="default")
            kind, message = await hearing
            assert kind == "incompatible" and "was removed" in message.needs
        async with toy.peer(link, "b") as peer:
            await peer.check_in(credential=credential(TOKEN, b"t" * 32))
            kind, message = await peer.hear()
            assert kind == "incompatible" and "was removed" in message.needs
        devices = [toy.device(name, link) for name in ("a", "c")]
        for name, stays in zip(("a", "c"), devices, strict=True):
            stays._credential = credential(TOKEN, name.encode() * 32)
            stays._drawn = lambda answer: 0.0  # type: ignore[method-assign]
            fleet.start(stays)
        await fleet.tasks[0]
        assert fleet.members == [0, *[2] * 200]
        assert [each.progress.failures + each._laters for each in devices] == [0, 0]
        await hosts.frontdoor.close()


@toy.in_loop
async def test_a_look_at_members_takes_nobodys_place_in_a_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "LOOK_AGAIN_S", 0.05)
    entrance = Entrance(admit=Members.begin(tmp_path).admit)
    invite(tmp_path, TOKEN, population="default", expires_s=1 << 40, uses=4)
    policy = RoundPolicy(goal=2, minimum_group=1, minimum_fraction=1.0, over_selection=1.0)
    trained: set[str] = set()
    async with toy.fleet(toy.plan(policy), rounds=1, entrance=entrance) as fleet:
        for name in ("a", "b", "c", "d"):
            device = toy.device(name, fleet.link)
            device._credential = credential(TOKEN, name.encode() * 32)

            def slowly(work: Any, prepared: Any, name: str = name, train: Any = device._training._train_now) -> Any:
                trained.add(name)
                time.sleep(1.0)
                return train(work, prepared)

            device._training._train_now = slowly  # type: ignore[method-assign]
            fleet.start(device)
        await fleet.tasks[0]
        assert fleet.members == [0, 2] and len(trained) == 2


@toy.in_loop
async def test_before_several_runs_members_are_asked_for_once(tmp_path: Path) -> None:
    entrance = Entrance(admit=Members.begin(tmp_path).admit)
    async with toy.fleet(toy.plan(toy.exact("a"))) as fleet:
        hosts = SeveralHosts([fleet.host], entrance=entrance)
        async with toy.peer(toy.LocalLink(hosts.frontdoor)) as peer:
            await peer.check_in()
            kind, message = await peer.hear()
        assert kind == "incompatible" and "an invitation" in message.needs
        await hosts.frontdoor.close()
