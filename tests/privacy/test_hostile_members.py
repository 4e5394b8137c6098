"""A hostile member brings down neither the server nor the others, and is itself the one that is lost.

Numbers in brackets are invariants of `secure_server.py`. What a hostile member can do is in `docs/trust.md`: spoil the sum of its group.
"""

import random as stdlib_random
from collections.abc import Callable

import numpy as np
import pytest

from shoal.privacy import masks
from shoal.privacy import secure_server as server
from shoal.privacy.neighbours import MAX_MEMBERS
from shoal.privacy.secure_member import SecureMember
from shoal.privacy.secure_terms import Terms
from shoal.privacy.wire import secure_pb2 as pb
from tests.privacy.test_hostile_server import GROUP, MEMBERS, TRUSTED, identity, messages, terms


def member(number: int, given: Terms) -> SecureMember:
    source = stdlib_random.Random(number).randbytes
    return SecureMember(given, GROUP, identity(number), trusted=TRUSTED, random=source, wall_s=0.0)


def machine(given: Terms) -> server.SecureServer:
    return server.SecureServer(given, GROUP, trusted=TRUSTED)


# Keys.


@pytest.mark.parametrize("field", ["mask_key", "seal_key", "seed_digest", "signature"])
def test_keys_that_nobody_has_signed_are_not_passed_on(field: str) -> None:
    """Its neighbours would leave the group, all of them."""
    advert = member(1, terms(certified=False)).advert()
    setattr(advert, field, b"x" * len(getattr(advert, field)))
    told = machine(terms(certified=False)).step(server.Advertised(b"m", advert), 0.0)
    assert told == [server.Lost(b"m", "its keys are not signed by it for this group")]


def test_who_shows_anothers_identity_does_not_keep_it_out() -> None:
    given = terms(certified=True)
    under, victim = machine(given), member(1, given).advert()
    stolen = pb.Advert()
    stolen.CopyFrom(victim)
    stolen.mask_key = masks.public_key(b"thief" + bytes(27))
    assert under.step(server.Advertised(b"thief", stolen), 0.0) == [
        server.Lost(b"thief", "its keys are not signed by it for this group")
    ]
    assert under.step(server.Advertised(b"victim", victim), 0.0) == []


@pytest.mark.parametrize("field", ["_mask_key", "_seal_key"])
def test_a_key_of_low_order_loses_its_member_alone(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    hostile = member(1, terms(certified=False))
    zero, real = getattr(hostile, field), masks.public_key
    monkeypatch.setattr(masks, "public_key", lambda private: bytes(32) if private == zero else real(private))
    told = machine(terms(certified=False)).step(server.Advertised(b"m", hostile.advert()), 0.0)
    assert told == [server.Lost(b"m", "its keys are no keys")]


def test_what_is_added_to_an_advert_goes_to_nobody() -> None:
    """(4) A field that the message does not have is kept by the library, and would go to every neighbour."""
    given = terms(certified=False)
    under = machine(given)
    for number in range(MEMBERS):
        advert = member(number, given).advert()
        if number == 0:
            advert = pb.Advert.FromString(advert.SerializeToString() + b"\xfa\x07\xd0\x0f" + b"x" * 2000)  # field 127
        assert under.step(server.Advertised(bytes([number]), advert), 0.0) == []
    assert max(roster.ByteSize() for roster in messages(under.step(server.Full(), 0.0))) < 300 * MEMBERS + 100


def test_more_than_a_group_can_have_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """(4)"""
    monkeypatch.setattr(server, "MAX_MEMBERS", 2)
    under = machine(terms(certified=False))
    told = [
        under.step(server.Advertised(bytes([n]), member(n, terms(certified=False)).advert()), 0.0) for n in range(3)
    ]
    assert told == [[], [], [server.Lost(b"\2", "the group is full")]]
    assert MAX_MEMBERS == 1000


def test_who_comes_late_or_again_is_told_so() -> None:
    under, members = begun(terms(certified=False))
    under.step(server.Full(), 0.0)
    late = member(MEMBERS, terms(certified=False)).advert()
    assert under.step(server.Advertised(b"late", late), 0.0) == [server.Lost(b"late", "the group is made already")]
    again = SecureMember(
        terms(certified=False),
        GROUP,
        members[0]._identity,
        trusted=None,
        random=stdlib_random.Random(0).randbytes,
        wall_s=0.0,
    )
    assert under.step(server.Advertised(b"\0", again.advert()), 0.0) == []
    assert under.phase == "shares"


def begun(given: Terms) -> tuple[server.SecureServer, list[SecureMember]]:
    """A group whose members, by number, have their rosters."""
    under = machine(given)
    members = sorted((member(number, given) for number in range(MEMBERS)), key=lambda each: each._identity.public)
    for at, each in enumerate(members):
        assert under.step(server.Advertised(bytes([at]), each.advert()), 0.0) == []
    return under, members


# Signatures.


def test_a_wrong_signature_of_the_survivors_loses_its_member_alone() -> None:
    """Passed on it would make every member leave."""
    under, members = begun(terms(certified=True))
    names = {bytes([at]): each for at, each in enumerate(members)}
    queue, answered, found = under.step(server.Full(), 0.0), 0, list[server.Command]()
    kept: dict[bytes, pb.Survivors] = {}
    while queue:
        command = queue.pop(0)
        if not isinstance(command, server.Send):
            found.append(command)
            continue
        name, who = command.member, names[command.member]
        match command.message:
            case pb.Roster() as roster:
                queue += under.step(server.Shared(name, who.shares(roster)), 0.0)
            case pb.Shares() as delivery:
                who.masked(delivery, np.zeros(64, np.uint32))
                queue += under.step(server.Added(name), 0.0)
            case pb.Survivors() as survivors:
                kept[name], signed = survivors, who.sign(survivors)
                queue += under.step(
                    server.Signed(name, pb.Signed(signature=bytes(64)) if name == b"\3" else signed), 0.0
                )
            case pb.Agreement() as agreement:
                answered += 1
                queue += under.step(server.Unmasked(name, who.unmask(kept[name], agreement)), 0.0)
    assert answered == MEMBERS - 1
    assert [each for each in found if isinstance(each, server.Lost)] == [
        server.Lost(b"\3", "it has not signed the survivors")
    ]
    assert any(isinstance(each, server.Open) for each in found)


# Going away.


@pytest.mark.parametrize("certified", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_the_sum_is_that_of_whom_it_names_whenever_members_go(seed: int, certified: bool) -> None:
    """(1) Answers come in any order, and members go at any time between them: also after their vector was added."""
    given = terms(certified=certified)
    under, members = begun(given)
    names = {bytes([at]): each for at, each in enumerate(members)}
    chance = stdlib_random.Random(seed)
    gone = chance.sample(sorted(names), given.graph(MEMBERS).dropouts)
    total, kept, found = np.zeros(64, np.uint32), dict[bytes, pb.Survivors](), list[server.Command]()
    queue: list[Callable[[], list[server.Command]]] = []

    def answer(name: bytes, message: object) -> list[server.Command]:
        who = names[name]
        match message:
            case pb.Roster():
                return under.step(server.Shared(name, who.shares(message)), 0.0)
            case pb.Shares() if under.takes_vector(name):
                total[:] += given.unpack(who.masked(message, np.full(64, 1 << name[0], np.uint32)))
                return under.step(server.Added(name), 0.0)
            case pb.Survivors() if certified:
                kept[name] = message
                return under.step(server.Signed(name, who.sign(message)), 0.0)
            case pb.Survivors():
                return under.step(server.Unmasked(name, who.unmask(message)), 0.0)
            case pb.Agreement():
                return under.step(server.Unmasked(name, who.unmask(kept[name], message)), 0.0)
        return []

    def take(commands: list[server.Command]) -> None:
        for command in commands:
            if isinstance(command, server.Send):
                queue.append(
                    lambda command=command: (
                        answer(command.member, command.message) if command.member not in left else []
                    )
                )  # type: ignore[misc]
            else:
                found.append(command)

    left: set[bytes] = set()
    take(under.step(server.Full(), 0.0))
    while queue or gone:
        if gone and (not queue or chance.random() < 0.05):
            name = gone.pop()
            left.add(name)
            take(under.step(server.Gone(name), 0.0))
        else:
            take(queue.pop(chance.randrange(len(queue)))())
    done = [command for command in found if isinstance(command, server.Open)]
    assert len(done) == 1, found
    masks.add_masks(total, done[0].opening.masks())
    expected = sum(1 << name[0] for name in done[0].survivors)
    np.testing.assert_array_equal(given.reduced(total), np.full(64, expected, np.uint32))


def test_a_vector_that_was_not_to_be_added_fails_the_group_and_is_not_opened_as_if_nothing_were() -> None:
    """(1) The shell adds a member's vector twice, or one of a member that is lost."""
    for once_more in (b"\0", b"\1"):
        under, members = begun(terms(certified=False))
        rosters, told = messages(under.step(server.Full(), 0.0)), list[server.Command]()
        for at, roster in enumerate(rosters):
            told += under.step(server.Shared(bytes([at]), members[at].shares(roster)), 0.0)
        assert under.step(server.Added(b"\0"), 0.0) == []
        under.step(server.Gone(b"\1"), 0.0)
        assert not under.takes_vector(once_more)
        (failed,) = under.step(server.Added(once_more), 0.0)
        assert isinstance(failed, server.Failed)
        assert under.phase == "failed"


# Anything.


@pytest.mark.parametrize("seed", range(6))
def test_whatever_a_hostile_member_sends_the_others_get_their_sum_or_a_reason(seed: int) -> None:
    """(3) One member sends broken messages at any time, of any kind, under its own name and names that nobody has."""
    given = terms(certified=bool(seed % 2))
    under, members = begun(given)
    chance = stdlib_random.Random(seed)
    names = {bytes([at]): each for at, each in enumerate(members)}
    hostile = chance.choice(sorted(names))
    total, kept, found = np.zeros(64, np.uint32), dict[bytes, pb.Survivors](), list[server.Command]()
    queue = under.step(server.Full(), 0.0)

    def honest(name: bytes, message: object) -> server.Event:
        match message:
            case pb.Roster():
                return server.Shared(name, names[name].shares(message))
            case pb.Shares():
                total[:] += given.unpack(names[name].masked(message, np.full(64, 1 << name[0], np.uint32)))
                return server.Added(name)
            case pb.Survivors() if given.certified:
                kept[name] = message
                return server.Signed(name, names[name].sign(message))
            case pb.Survivors():
                return server.Unmasked(name, names[name].unmask(message))
        return server.Unmasked(name, names[name].unmask(kept[name], message))

    while queue:
        for _ in range(3):
            queue += under.step(broken(chance, hostile), 0.0)
        command = queue.pop(0)
        if not isinstance(command, server.Send):
            found.append(command)
        elif command.member != hostile:
            queue += under.step(honest(command.member, command.message), 0.0)
        if not queue:
            queue = under.step(server.Tick(), 1e9) if under.phase not in ("done", "failed") else []
    assert {each.member for each in found if isinstance(each, server.Lost)} <= {hostile, b"nobody"}
    done = [command for command in found if isinstance(command, server.Open)]
    assert len(done) == 1, found
    masks.add_masks(total, done[0].opening.masks())
    expected = sum(1 << name[0] for name in done[0].survivors)
    np.testing.assert_array_equal(given.reduced(total), np.full(64, expected, np.uint32))


def broken(chance: stdlib_random.Random, hostile: bytes) -> server.Event:
    """A message that no member sends, or not now."""
    name = chance.choice([hostile, b"nobody"])
    some = [chance.randbytes(chance.choice([0, 1, 16, 32, 33, 64, 82, 200])) for _ in range(12)]
    numbers = [chance.choice([0, 1, 2, 9, 10, 11, (1 << 32) - 1]) for _ in range(12)]
    return chance.choice([
        server.Advertised(name, pb.Advert(
            mask_key=chance.choice(some), seal_key=bytes(32), seed_digest=bytes(32), identity_key=bytes([1, *bytes(31)]),
            certificate=chance.choice(some), certified_until_s=chance.choice([float("nan"), float("inf"), -1.0]), signature=bytes(64),
        )),
        server.Shared(name, pb.Shares(sealed=[pb.Sealed(peer=at, data=data) for at, data in zip(numbers, some, strict=True)])),
        server.Signed(name, pb.Signed(signature=chance.choice(some))),
        server.Unmasked(name, pb.Unmask(revealed=[pb.Revealed(of=at, share=data) for at, data in zip(numbers, some, strict=True)])),
    ])  # fmt: skip
