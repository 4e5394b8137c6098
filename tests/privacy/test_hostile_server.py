"""A server that lies is found out by members, under the trust that is stated; what it sees of one member is noise.

Numbers in brackets are invariants of `secure_member.py`.
"""

import random as stdlib_random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from shoal.errors import InvalidTransition, ProtocolError
from shoal.privacy import masks, shamir
from shoal.privacy import secure_server as server
from shoal.privacy.identity import Authority, Identity, Trusted
from shoal.privacy.neighbours import Assumptions, _complete, find, neighbours
from shoal.privacy.secure_member import SecureMember, pair_mask, self_mask
from shoal.privacy.secure_terms import Segment, Terms, advert_text, survivors_text, to_bitmap
from shoal.privacy.wire import secure_pb2 as pb

MEMBERS = 10
GROUP = bytes(16)
AUTHORITY = Authority(Ed25519PrivateKey.from_private_bytes(b"a" * 32), "fleet")
TRUSTED = Trusted(AUTHORITY.key.public_key(), "fleet")


@dataclass
class Group:
    """Members that have come so far with an honest server."""

    members: list[SecureMember]
    rosters: list[pb.Roster]
    deliveries: list[pb.Shares]
    machine: server.SecureServer


def identity(number: int, authority: Authority = AUTHORITY, until_s: float = 1e9) -> Identity:
    plain = Identity.of_seed((number + 1).to_bytes(32, "big"))
    return Identity(key=plain.key, certificate=authority.certify(plain.public, until_s))


def terms(*, certified: bool) -> Terms:
    return Terms(
        purpose=bytes(32), segments=(Segment(size=64, bits=16),), minimum=3, certified=certified,
        assumptions=Assumptions(colluders=0.1, dropouts=0.2),
    )  # fmt: skip


def group(
    *,
    certified: bool = True,
    until: str = "rosters",
    who: Sequence[Identity] | None = None,
    random: Callable[[int], bytes] | None = None,
) -> Group:
    """A group up to rosters, deliveries or masked vectors, members by number."""
    given = terms(certified=certified)
    source = random or stdlib_random.Random(5).randbytes
    identities = sorted(who or [identity(number) for number in range(MEMBERS)], key=lambda each: each.public)
    members = [SecureMember(given, GROUP, each, trusted=TRUSTED, random=source, wall_s=0.0) for each in identities]
    machine = server.SecureServer(given, GROUP, trusted=TRUSTED)
    for number, member in enumerate(members):
        assert machine.step(server.Advertised(bytes([number]), member.advert()), 0.0) == []
    rosters = messages(machine.step(server.Full(), 0.0))
    made = Group(members, rosters, [], machine)
    if until != "rosters":
        told: list[server.Command] = []
        for number, member in enumerate(members):
            told += machine.step(server.Shared(bytes([number]), member.shares(rosters[number])), 0.0)
        made.deliveries = messages(told)
    if until == "masked":
        for number, member in enumerate(members):
            member.masked(made.deliveries[number], np.zeros(64, np.uint32))
    return made


def messages(commands: Sequence[server.Command]) -> list[Any]:
    return [command.message for command in commands if isinstance(command, server.Send)]


def everybody() -> pb.Survivors:
    return pb.Survivors(bitmap=to_bitmap({*range(1, MEMBERS + 1)}, MEMBERS))


# Keys.


@pytest.mark.parametrize("field", ["mask_key", "seal_key", "seed_digest"])
def test_a_swapped_key_is_found(field: str) -> None:
    """The server puts its own key in place of a neighbour's, to read what is shared with it."""
    made = group()
    setattr(made.rosters[0].neighbours[3].advert, field, b"s" * 32)
    with pytest.raises(ProtocolError, match="not signed by it"):
        made.members[0].shares(made.rosters[0])


def test_a_member_that_the_server_made_up_is_found_where_members_are_certified() -> None:
    forged = identity(99, Authority(Ed25519PrivateKey.from_private_bytes(b"x" * 32), "fleet"))
    who = [*(identity(number) for number in range(MEMBERS - 1)), forged]
    given = terms(certified=True)
    honest = SecureMember(given, GROUP, who[0], trusted=TRUSTED, random=stdlib_random.Random(1).randbytes, wall_s=0.0)
    own = [
        SecureMember(given, GROUP, each, trusted=TRUSTED, random=stdlib_random.Random(2).randbytes, wall_s=0.0)
        for each in who[1:]
    ]
    adverts = sorted([honest.advert(), *(each.advert() for each in own)], key=lambda advert: advert.identity_key)
    numbers = {advert.identity_key: at for at, advert in enumerate(adverts, 1)}
    number, whole = numbers[who[0].public], b"".join(advert.identity_key for advert in adverts)
    peers = neighbours(given.graph(MEMBERS), given.context(GROUP, whole))[number]
    roster = pb.Roster(
        number=number, identities=whole,
        neighbours=[pb.NeighbourAdvert(number=peer, advert=adverts[peer - 1]) for peer in peers],
    )  # fmt: skip
    assert numbers[forged.public] in peers, "else this group does not show it"
    with pytest.raises(ProtocolError, match="not certified"):
        honest.shares(roster)


def test_the_server_turns_away_who_is_not_certified_or_expired() -> None:
    machine = server.SecureServer(terms(certified=True), GROUP, trusted=TRUSTED, wall_s=10.0)
    for who in (Identity(key=identity(1).key, certificate=identity(2).certificate), identity(3, until_s=9.0)):
        member = SecureMember(
            terms(certified=True), GROUP, who, trusted=TRUSTED, random=stdlib_random.Random(1).randbytes, wall_s=0.0
        )
        assert machine.step(server.Advertised(b"m", member.advert()), 0.0) == [server.Lost(b"m", "it is not certified")]


def test_keys_of_another_group_are_no_keys_of_this_one() -> None:
    """Replay: a neighbour's advert from an earlier group."""
    made = group()
    old = SecureMember(
        terms(certified=True),
        b"o" * 16,
        identity(3),
        trusted=TRUSTED,
        random=stdlib_random.Random(8).randbytes,
        wall_s=0.0,
    )
    advert = old.advert()
    roster = made.rosters[0]
    at = next((each for each in roster.neighbours if each.advert.identity_key == advert.identity_key), None)
    if at is None:  # the member itself is number 1
        roster, at = (
            made.rosters[1],
            next(e for e in made.rosters[1].neighbours if e.advert.identity_key == advert.identity_key),
        )
    at.advert.CopyFrom(advert)
    with pytest.raises(ProtocolError, match="not signed by it for this group"):
        made.members[made.rosters.index(roster)].shares(roster)


@pytest.mark.parametrize("lie", ["order", "twice", "number", "left out", "other neighbours", "torn"])
def test_a_roster_that_is_not_right_is_refused(lie: str) -> None:
    made = group()
    roster = made.rosters[0]
    whole = roster.identities
    if lie == "order":
        roster.identities = whole[32:64] + whole[:32] + whole[64:]
    elif lie == "twice":
        roster.identities = whole[:32] + whole[:32] + whole[64:]
    elif lie == "number":
        roster.number = 2
    elif lie == "left out":
        roster.identities = whole[:-32]
    elif lie == "other neighbours":
        del roster.neighbours[0]
    else:
        roster.identities = whole[:-1]
    with pytest.raises(ProtocolError):
        made.members[0].shares(roster)


def test_shares_of_another_roster_do_not_open() -> None:
    """Two members that are shown different rosters: what one seals for the other says which it saw."""
    one, other = (
        group(until="deliveries"),
        group(until="deliveries", who=[identity(number) for number in range(1, MEMBERS + 1)]),
    )
    one.deliveries[0].sealed[0].data = other.deliveries[0].sealed[0].data
    with pytest.raises(ProtocolError, match="not sealed by it"):
        one.members[0].masked(one.deliveries[0], np.zeros(64, np.uint32))


# Survivors.


@pytest.mark.parametrize("lie", ["without me", "too few", "longer", "nobody's bit"])
def test_survivors_that_cannot_be_are_refused(lie: str) -> None:
    made = group(until="masked")
    bitmap = {
        "without me": to_bitmap({*range(2, MEMBERS + 1)}, MEMBERS),
        "too few": to_bitmap({1, 2, 3}, MEMBERS),
        "longer": bytes(3),
        "nobody's bit": b"\xff\xff",
    }[lie]
    with pytest.raises(ProtocolError):
        made.members[0].sign(pb.Survivors(bitmap=bitmap))
    assert not made.members[0].is_spent


@pytest.mark.parametrize("told", [2, 4, 5, 6, 8])
def test_there_is_one_set_of_survivors_only_even_where_the_server_shows_two(told: int) -> None:
    """(2) So many are told that all survive, the others that number 1 is lost; a colluder signs both. One set at most is unmasked."""
    made = group(until="masked")
    colluder = MEMBERS - 1
    sets = everybody(), pb.Survivors(bitmap=to_bitmap({*range(2, MEMBERS + 1)}, MEMBERS))
    shown = {number: sets[0] if number < told else sets[1] for number in range(MEMBERS)}
    signed = {number: made.members[number].sign(shown[number]) for number in range(MEMBERS)}
    unmasked = set()
    for survivors in sets:
        signers = [number for number in range(MEMBERS) if shown[number] is survivors and number != colluder]
        agreement = pb.Agreement(
            signatures=[signature(made, number, survivors, signed) for number in [*signers, colluder]]
        )
        for number in signers:
            try:
                made.members[number].unmask(survivors, agreement)
            except ProtocolError as error:
                assert "have signed" in str(error)
            if made.members[number].is_spent:
                unmasked.add(survivors.bitmap)
    assert len(unmasked) <= 1


def signature(made: Group, number: int, survivors: pb.Survivors, signed: dict[int, pb.Signed]) -> pb.Signature:
    advert = made.machine._adverts[bytes([number])]
    given = signed[number].signature
    if number == MEMBERS - 1:
        member = made.members[number]
        given = member._identity.key.sign(survivors_text(member._context, survivors.bitmap))
    return pb.Signature(
        number=number + 1, signature=given, certificate=advert.certificate, certified_until_s=advert.certified_until_s
    )


def test_a_member_unmasks_once_and_only_what_it_has_signed() -> None:
    """(1) (2)"""
    made = group(until="masked")
    signed = {number: member.sign(everybody()) for number, member in enumerate(made.members)}
    agreement = pb.Agreement(signatures=[signature(made, number, everybody(), signed) for number in signed])
    other = pb.Survivors(bitmap=to_bitmap({*range(1, MEMBERS)}, MEMBERS))
    with pytest.raises(ProtocolError, match="not those that this member has signed"):
        made.members[0].unmask(other, agreement)
    made.members[1].unmask(everybody(), agreement)
    assert made.members[1].is_spent
    with pytest.raises(InvalidTransition):
        made.members[1].unmask(everybody(), agreement)


def test_without_certificates_what_a_lying_server_can_do_is_as_documented() -> None:
    """Curious: two sets of survivors do open one member's vector. It is why certified groups sign; `docs/trust.md` says so."""
    made = group(certified=False, until="masked")
    revealed: dict[int, dict[int, bytes]] = {}
    graph = made.machine.graph
    assert graph is not None
    for number in range(1, MEMBERS):  # all but the first are told that the others, not the first, were lost
        alive = {1, number + 1} | {*list({*range(1, MEMBERS + 1)} - {1, number + 1})[: graph.least_survivors - 2]}
        unmask = made.members[number].unmask(pb.Survivors(bitmap=to_bitmap(alive, MEMBERS)))
        for each in unmask.revealed:
            revealed.setdefault(each.of, {})[number + 1] = each.share
    assert len(revealed[1]) >= graph.threshold, "its self seed can be put together"


# One member cut off from the others.


@pytest.mark.parametrize("as_for_a_curious_server", [True, False])
def test_a_member_whose_neighbours_are_all_said_to_be_lost_is_not_alone_in_a_sum(
    monkeypatch: pytest.MonkeyPatch, as_for_a_curious_server: bool
) -> None:
    """The server delivers to the victim the shares of just `threshold` neighbours, colluders first, and says afterwards that the honest of
    them were lost; the others, who know nothing of that, open the victim's own mask. With a threshold that suffices against a curious server
    its values are then bare; with that of a certified group enough of those who open it have masked with it."""
    members, victim, secret = 30, 0, np.arange(64, dtype=np.uint32)
    given = replace(terms(certified=True), assumptions=Assumptions(colluders=0.2, dropouts=0.3))
    if as_for_a_curious_server:
        curious = _complete(members, given.assumptions, given.minimum, certified=False)
        assert curious is not None
        monkeypatch.setattr(Terms, "graph", lambda terms, members: curious)
    graph = given.graph(members)
    people, deliveries = met(given, members)
    colluders = set(range(members - graph.colluders + 1, members + 1))
    kept = [*sorted(colluders), *range(2, members)][: graph.threshold]
    lost = set([number for number in kept if number not in colluders][: graph.dropouts])
    cut = pb.Shares(sealed=[each for each in deliveries[victim].sealed if each.peer in kept])
    bare = given.unpack(people[victim].masked(cut, secret))
    for person, delivery in zip(people[1:], deliveries[1:], strict=True):
        person.masked(delivery, np.zeros(64, np.uint32))
    revealed = opened(people, {*range(1, members + 1)} - lost, silent={victim + 1})
    seed = shamir.join(dict(list(revealed[1].items())[: graph.threshold]))
    assert seed == people[victim]._seed, "the others do open it: the victim is in the sum"
    known = [(self_mask(seed, people[victim]._context), -1)]
    for peer in (colluders | lost) & set(kept):
        if peer in lost:
            key = shamir.join(dict(list(revealed[peer].items())[: graph.threshold]))
            assert key == people[peer - 1]._mask_key
        key, sign = pair_mask(
            people[peer - 1]._mask_key, masks.public_key(people[victim]._mask_key), people[victim]._context, peer, 1
        )
        known.append((key, sign))
    masks.add_masks(bare, known)
    assert np.array_equal(given.reduced(bare), secret) == as_for_a_curious_server


def met(given: Terms, members: int, group: bytes = GROUP, seed: int = 5) -> tuple[list[SecureMember], list[pb.Shares]]:
    """Certified members by number, who have shared their secrets, and what is to be delivered to each."""
    source = stdlib_random.Random(seed).randbytes
    who = sorted((identity(number) for number in range(members)), key=lambda each: each.public)
    people = [SecureMember(given, group, each, trusted=TRUSTED, random=source, wall_s=0.0) for each in who]
    machine, told = server.SecureServer(given, group, trusted=TRUSTED), list[server.Command]()
    for at, person in enumerate(people):
        assert machine.step(server.Advertised(bytes([at]), person.advert()), 0.0) == []
    for at, roster in enumerate(messages(machine.step(server.Full(), 0.0))):
        told += machine.step(server.Shared(bytes([at]), people[at].shares(roster)), 0.0)
    return people, messages(told)


def opened(people: list[SecureMember], alive: set[int], silent: set[int]) -> dict[int, dict[int, bytes]]:
    """Of -> holder -> share: what members reveal for these survivors, of whom some are not asked."""
    survivors, asked = pb.Survivors(bitmap=to_bitmap(alive, len(people))), sorted(alive - silent)
    agreement = agreed({number: people[number - 1].sign(survivors).signature for number in asked}, people)
    revealed: dict[int, dict[int, bytes]] = {}
    for number in asked:
        for each in people[number - 1].unmask(survivors, agreement).revealed:
            revealed.setdefault(each.of, {})[number] = each.share
    return revealed


def agreed(signatures: dict[int, bytes], people: Sequence[SecureMember]) -> pb.Agreement:
    made = pb.Agreement()
    for number, data in sorted(signatures.items()):
        certificate = people[number - 1]._identity.certificate
        assert certificate is not None
        made.signatures.add(
            number=number, signature=data, certificate=certificate.signature, certified_until_s=certificate.until_s
        )
    return made


@pytest.mark.parametrize("members", [12, 30, 60, 100, 180])
@pytest.mark.parametrize(("colluders", "dropouts"), [(0.1, 0.3), (0.05, 0.1), (0.2, 0.2)])
def test_who_opens_a_member_has_masked_with_it(members: int, colluders: float, dropouts: float) -> None:
    """The count behind the test above, at its worst: of those that reveal a member's share all colluders, and all that were kept from it."""
    graph = find(members, Assumptions(colluders=colluders, dropouts=dropouts), 3, certified=True)
    kept_from_it = graph.members - 1 - graph.threshold
    assert graph.threshold - graph.colluders - kept_from_it >= graph.minimum - 1
    assert graph.threshold <= graph.members - 1 - graph.dropouts
    assert graph.least_signatures <= graph.members - graph.dropouts
    assert graph.is_complete, "else a server would look for a group number that stands colluders around its victim"


def test_members_that_are_asked_twice_under_one_group_number_do_not_open_two_sets() -> None:
    """The server runs the group twice at once. In each run it tells half of the members that all survive, half that number 1 is lost,
    and in the second the other way round: so it has everybody's signature of both sets."""
    first, second = (asked_again(seed) for seed in (5, 6))
    sets = everybody(), pb.Survivors(bitmap=to_bitmap({*range(2, MEMBERS + 1)}, MEMBERS))
    half, signatures = MEMBERS // 2, ({}, {})
    for run, people in enumerate((first, second)):
        for at, person in enumerate(people):
            which = int(at >= half) ^ run
            if at or not which:  # number 1 signs no set without itself
                signatures[which][at + 1] = person.sign(sets[which]).signature
    opened_sets = set()
    for at, person in enumerate(first):
        which = int(at >= half)
        try:
            person.unmask(sets[which], agreed(signatures[which], first))
        except ProtocolError as error:
            assert "has not signed" in str(error)
        if person.is_spent:
            opened_sets.add(which)
    assert len(opened_sets) <= 1


def asked_again(seed: int) -> list[SecureMember]:
    people, deliveries = met(terms(certified=True), MEMBERS, seed=seed)
    for person, delivery in zip(people, deliveries, strict=True):
        person.masked(delivery, np.zeros(64, np.uint32))
    return people


@pytest.mark.parametrize("number", [b"", bytes(15), bytes(48)])
def test_a_group_number_of_another_length_is_refused(number: bytes) -> None:
    """It stands in texts that are hashed and signed: were its end free, two groups could have one text."""
    with pytest.raises(ProtocolError, match="16 bytes"):
        SecureMember(terms(certified=True), number, identity(1), trusted=TRUSTED, random=bytes, wall_s=0.0)


@pytest.mark.parametrize("field", ["mask_key", "seal_key"])
def test_a_key_of_low_order_is_a_wrong_message_and_nothing_else(field: str) -> None:
    """Without certificates the server can sign for members that it makes up; its keys must not throw a member off its feet."""
    given = terms(certified=False)
    source = stdlib_random.Random(1).randbytes
    honest = SecureMember(given, GROUP, identity(1), trusted=None, random=source, wall_s=0.0)
    adverts = [honest.advert(), *(made_up(number, field) for number in range(2, MEMBERS + 1))]
    adverts.sort(key=lambda advert: advert.identity_key)
    me = [advert.identity_key for advert in adverts].index(honest._identity.public) + 1
    whole = b"".join(advert.identity_key for advert in adverts)
    peers = neighbours(given.graph(MEMBERS), given.context(GROUP, whole))[me]
    roster = pb.Roster(
        number=me, identities=whole, neighbours=[pb.NeighbourAdvert(number=at, advert=adverts[at - 1]) for at in peers]
    )
    with pytest.raises(ProtocolError, match="are no keys"):
        honest.shares(roster)


def made_up(number: int, zero: str) -> pb.Advert:
    keys = {
        "mask_key": masks.public_key(bytes([number] * 32)),
        "seal_key": masks.public_key(bytes([number] * 32)),
        zero: bytes(32),
    }
    who = identity(number)
    text = advert_text(GROUP, keys["mask_key"], keys["seal_key"], bytes(32))
    return pb.Advert(**keys, seed_digest=bytes(32), identity_key=who.public, signature=who.key.sign(text))


# What the server sees.


def test_a_masked_vector_is_uniform_to_the_server_and_all_colluders_but_one() -> None:
    """With the secrets of all members but two honest ones, and with the self seeds of those two, which every sum opens, each of the two looks
    uniform: chi-squared over 16 bins. Together they are what they hide."""
    bins, trials = np.zeros((2, 16)), 50
    for trial in range(trials):
        made, both = group(until="deliveries", random=stdlib_random.Random(trial).randbytes), np.zeros(64, np.uint32)
        for row, value in enumerate((0, 65535)):  # what they hide is as different as can be
            packed = made.members[row].masked(made.deliveries[row], np.full(64, value, np.uint32))
            masked = made.members[row]._terms.unpack(packed)
            # The server takes off every pair mask that a colluder knows, and the self mask; one mask of the two honest ones is left.
            member = made.members[row]
            known = [
                (key, -sign)
                for peer in member._held if peer > 2
                for key, sign in [pair_mask(member._mask_key, member._adverts[peer].mask_key, member._context, member._number, peer)]
            ]  # fmt: skip
            masks.add_masks(masked, [*known, (self_mask(member._seed, member._context), -1)])
            both += masked
            bins[row] += np.histogram(masked & 0xFFFF, 16, (0, 65536))[0]
        np.testing.assert_array_equal(both & 0xFFFF, 65535)
    expected = trials * 64 / 16
    chi = np.sum((bins - expected) ** 2 / expected, axis=1)
    assert np.all(chi < 44.3), chi  # 15 degrees of freedom, 1 in 10,000


# Anything.


@pytest.mark.parametrize("certified", [False, True])
def test_whatever_the_server_sends_a_member_refuses_it_with_one_error(certified: bool) -> None:
    """Each message of an honest group with one field changed, or one byte: it is read as the group goes on, or refused; nothing else."""
    chance, refused = stdlib_random.Random(3), 0
    for _ in range(25):
        made = group(certified=certified, until="deliveries")
        member, delivery = made.members[0], made.deliveries[0]
        fresh = group(certified=certified)
        steps: list[Callable[[], object]] = [
            lambda fresh=fresh: fresh.members[0].shares(changed(chance, fresh.rosters[0])),
            lambda member=member, delivery=delivery: member.masked(changed(chance, delivery), np.zeros(64, np.uint32)),
            lambda member=member: (
                member.sign(changed(chance, everybody())) if certified else member.unmask(changed(chance, everybody()))
            ),
        ]
        for step in steps:
            try:
                step()
            except (ProtocolError, InvalidTransition):
                refused += 1
    assert refused > 25


def changed(chance: stdlib_random.Random, message: Any) -> Any:
    """The message with a byte changed, where it is still one; else with what it says twice, or without it."""
    data = bytearray(message.SerializeToString())
    for _ in range(20):
        torn = bytearray(data)
        torn[chance.randrange(len(torn))] = chance.choice([0, 1, 0x7F, 0x80, 0xFF])
        try:
            return type(message).FromString(bytes(torn))
        except DecodeError:
            continue
    return type(message).FromString(bytes(data + data)) if chance.random() < 0.5 else type(message)()
