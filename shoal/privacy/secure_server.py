"""A secure group as its server sees it: a machine that passes messages between members, and learns their sum.

The machine holds keys, shares and numbers, no vectors: `takes_vector` says whether a member's is to be added, and it is told `Added` before
anything else; in the end it says `Open` with the masks that are to be taken off. A phase ends when all who are left have answered, or at its
deadline; who has not answered is lost, and the group fails where fewer are left than any sum may be over.

Invariants (tests cite them by number):
    (1) The sum that `Open` opens is over the survivors: those that were added, and nobody else.
    (2) It asks of no member both kinds of shares of one neighbour, and for survivors once only.
    (3) Who sends what it must not is lost, with its reason; the others go on.
    (4) No message of a member makes it hold more than its share: a roster's worth of bytes for each.
"""

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shoal.errors import InvalidTransition, ProtocolError
from shoal.privacy import masks, shamir
from shoal.privacy.identity import Certificate, Trusted, is_signed
from shoal.privacy.neighbours import MAX_MEMBERS, Graph, neighbours
from shoal.privacy.secure_member import pair_mask, self_mask, signed_text
from shoal.privacy.secure_terms import Terms, survivors_text, to_bitmap
from shoal.privacy.wire import secure_pb2 as pb

MOST_TRIES: Final = 64
"""Sets of shares that are tried where some do not fit."""


@dataclass(frozen=True, slots=True)
class Advertised:
    """A member's keys are here; `member` is any name that the shell knows it by."""

    member: bytes
    advert: pb.Advert


@dataclass(frozen=True, slots=True)
class Full:
    """The group is to be made of those that have advertised."""


@dataclass(frozen=True, slots=True)
class Shared:
    member: bytes
    shares: pb.Shares


@dataclass(frozen=True, slots=True)
class Added:
    """The member's masked vector is in the sum."""

    member: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    member: bytes
    signed: pb.Signed


@dataclass(frozen=True, slots=True)
class Unmasked:
    member: bytes
    unmask: pb.Unmask


@dataclass(frozen=True, slots=True)
class Gone:
    """The member will not go on."""

    member: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = Advertised | Full | Shared | Added | Signed | Unmasked | Gone | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send this to the member."""

    member: bytes
    message: pb.Roster | pb.Shares | pb.Survivors | pb.Agreement


@dataclass(frozen=True, slots=True)
class Lost:
    """The member is no part of the group any more."""

    member: bytes
    why: str


@dataclass(frozen=True, slots=True)
class Open:
    """Take these masks off the sum: it is then that of `survivors`."""

    survivors: tuple[bytes, ...]
    opening: "Opening"


@dataclass(frozen=True, slots=True)
class Failed:
    """No sum comes of this group."""

    why: str
    spent: tuple[bytes, ...]
    """Members that have revealed shares: they will not offer the same update again."""


Command = Send | Lost | Open | Failed


@dataclass(frozen=True)
class Opening:
    """What opens a sum. Computing `masks` takes a while: do it beside."""

    context: bytes
    threshold: int
    adverts: Mapping[int, pb.Advert]
    seeds: Mapping[int, Mapping[int, bytes]]
    """Survivor -> holder -> share of its self seed."""
    keys: Mapping[int, Mapping[int, bytes]]
    """Lost -> holder -> share of its mask key."""
    peers: Mapping[int, Sequence[int]]
    """Lost -> its neighbours that survive: whose vectors have masks with it."""

    def masks(self) -> list[tuple[bytes, int]]:
        """(key, sign) of all that are to be added to the masked sum. Raises ProtocolError: shares do not fit."""
        made = [
            (self_mask(self._secret(number, shares, of_seed=True), self.context), -1)
            for number, shares in self.seeds.items()
        ]
        for number, shares in self.keys.items():
            private = self._secret(number, shares, of_seed=False)
            for peer in self.peers[number]:
                # What the peer added with its sign is what the lost one would have cancelled with its own.
                made.append(pair_mask(private, self.adverts[peer].mask_key, self.context, number, peer))
        return made

    def _secret(self, number: int, shares: Mapping[int, bytes], *, of_seed: bool) -> bytes:
        advert = self.adverts[number]
        for some in _subsets(sorted(shares), self.threshold):
            secret = shamir.join({holder: shares[holder] for holder in some})
            if secret is None:
                continue
            if (
                (hashlib.sha256(secret).digest() == advert.seed_digest)
                if of_seed
                else (masks.public_key(secret) == advert.mask_key)
            ):
                return secret
        raise ProtocolError(
            f"What was revealed of member {number} is no secret of its: it shared another, or others revealed wrong shares."
        )


def _key(advert: pb.Advert) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(advert.identity_key)


def _subsets(holders: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """So many holders, others each time: the first, then shifted by one, around the end."""
    whole = [*holders, *holders]
    windows = (whole[at : at + size] for at in range(len(holders) if len(holders) > size else 1))
    return itertools.islice(windows, MOST_TRIES)


@dataclass(slots=True)
class _Member:
    name: bytes
    advert: pb.Advert
    phase: str = "advertised"
    """The last that it has answered: advertised, shares, masked, signed, unmask; or lost."""
    sealed: dict[int, bytes] = field(default_factory=dict)


class SecureServer:
    """See the module's text."""

    def __init__(
        self, terms: Terms, group: bytes, *, trusted: Trusted | None = None, phase_s: float = 60.0, wall_s: float = 0.0
    ) -> None:
        """
        Args:
            terms: of the group.
            group: 16 bytes, never used before.
            trusted: the authority, so that members without its certificate are lost at once.
            phase_s: longest time that members have for one answer.
            wall_s: now, seconds since the epoch, for certificates.
        """
        self.terms, self.group = terms, group
        self._trusted, self._phase_s, self._wall_s = trusted, phase_s, wall_s
        self.phase = "adverts"
        self.graph: Graph | None = None
        self._adverts: dict[bytes, pb.Advert] = {}
        self._members: dict[int, _Member] = {}
        self._numbers: dict[bytes, int] = {}
        self._peers: Mapping[int, Sequence[int]] = {}
        self._context = self._bitmap = b""
        self._masking: set[int] = set()
        self._survivors: set[int] = set()  # whose vectors are in the sum, though they may have gone since
        self._signatures: dict[int, bytes] = {}
        self._revealed: dict[int, dict[int, bytes]] = {}  # of -> holder -> share
        self._spent: set[int] = set()
        self._deadline_s = float("inf")

    def step(self, event: Event, now_s: float) -> list[Command]:
        """Advances by one event."""
        match event:
            case Advertised(member, advert) if self.phase == "adverts":
                return self._advertised(member, advert)
            case Advertised(member):
                return [] if member in self._numbers else [Lost(member, "the group is made already")]
            case Full() if self.phase == "adverts":
                return self._full(now_s)
            case Gone(member) if self.phase == "adverts":
                self._adverts.pop(member, None)
                return []
            case Gone(member):
                return self._lose(member, "it went away") + self._go_on(now_s)
            case Shared(member, shares) if self._awaits(member, "shares"):
                return self._shared(member, shares) + self._go_on(now_s)
            case Added(member) if self._awaits(member, "masked"):
                self._of(member).phase = "masked"
                self._survivors.add(self._numbers[member])
                return self._go_on(now_s)
            case Signed(member, signed) if self._awaits(member, "signed"):
                return self._signed(member, signed) + self._go_on(now_s)
            case Unmasked(member, unmask) if self._awaits(member, "unmask"):
                return self._unmasked(member, unmask) + self._go_on(now_s)
            case Tick():
                return self._go_on(now_s) if now_s >= self._deadline_s else []
            case Added(member) if self.phase in ("shares", "masked", "signed", "unmask"):
                return self._fail("a vector was added that was not to be: the sum is nobody's")
            case Shared() | Added() | Signed() | Unmasked():
                return []  # late, or from somebody who is lost already
        raise InvalidTransition(f"{event} is not allowed in phase {self.phase!r}.")

    @property
    def deadline_s(self) -> float:
        """When this phase ends without those who have not answered; infinity where it has no such end."""
        return self._deadline_s

    def takes_vector(self, member: bytes) -> bool:
        """Whether the member's masked vector is to be added now."""
        return self._awaits(member, "masked")

    # Phases.

    def _advertised(self, member: bytes, advert: pb.Advert) -> list[Command]:
        keys = advert.mask_key, advert.seal_key, advert.seed_digest, advert.identity_key
        if {*map(len, keys)} != {masks.KEY_BYTES} or len(advert.signature) != 64 or len(advert.certificate) > 64:
            return [Lost(member, "its keys have wrong lengths")]
        if any(name != member and known.identity_key == advert.identity_key for name, known in self._adverts.items()):
            return [Lost(member, "a member with its identity is here already")]
        if member not in self._adverts and len(self._adverts) >= MAX_MEMBERS:
            return [Lost(member, "the group is full")]
        if not is_signed(_key(advert), advert.signature, signed_text(self.group, advert)):
            return [Lost(member, "its keys are not signed by it for this group")]
        if not masks.are_keys(advert.mask_key, advert.seal_key):
            return [Lost(member, "its keys are no keys")]
        certificate = Certificate(until_s=advert.certified_until_s, signature=advert.certificate)
        if self.terms.certified and not (
            self._trusted and self._trusted.vouches(advert.identity_key, certificate, wall_s=self._wall_s)
        ):
            return [Lost(member, "it is not certified")]
        self._adverts[member] = kept = pb.Advert()
        kept.CopyFrom(advert)
        kept.DiscardUnknownFields()
        return []

    def _full(self, now_s: float) -> list[Command]:
        order = sorted(self._adverts, key=lambda member: self._adverts[member].identity_key)
        try:
            self.graph = self.terms.graph(len(order))
        except ValueError as error:
            return self._fail(str(error))
        self._members = {at: _Member(name, self._adverts[name]) for at, name in enumerate(order, 1)}
        self._numbers = {name: at for at, name in enumerate(order, 1)}
        identities = b"".join(member.advert.identity_key for member in self._members.values())
        keys = (
            [signed_text(self.group, member.advert) for member in self._members.values()]
            if self.terms.certified
            else []
        )
        self._context = self.terms.context(self.group, identities, keys)
        self._peers = neighbours(self.graph, self.terms.context(self.group, identities))
        self._begin("shares", now_s)
        return [
            Send(member.name, pb.Roster(number=number, identities=identities, neighbours=[
                pb.NeighbourAdvert(number=peer, advert=self._members[peer].advert) for peer in self._peers[number]
            ]))
            for number, member in self._members.items()
        ]  # fmt: skip

    def _shared(self, member: bytes, shares: pb.Shares) -> list[Command]:
        number = self._numbers[member]
        given = {sealed.peer: sealed.data for sealed in shares.sealed}
        size = 2 * shamir.SHARE_BYTES + 16
        if sorted(given) != list(self._peers[number]) or any(len(data) != size for data in given.values()):
            return self._lose(member, "its shares are not one for each neighbour")
        self._members[number].sealed, self._members[number].phase = given, "shares"
        return []

    def _signed(self, member: bytes, signed: pb.Signed) -> list[Command]:
        if not is_signed(_key(self._of(member).advert), signed.signature, survivors_text(self._context, self._bitmap)):
            return self._lose(member, "it has not signed the survivors")
        self._signatures[self._numbers[member]] = signed.signature
        self._of(member).phase = "signed"
        return []

    def _unmasked(self, member: bytes, unmask: pb.Unmask) -> list[Command]:
        number = self._numbers[member]
        given = {revealed.of: revealed.share for revealed in unmask.revealed}
        expected = {peer for peer in self._peers[number] if peer in self._masking}
        self._spent.add(number)
        if given.keys() != expected or any(len(share) != shamir.SHARE_BYTES for share in given.values()):
            return self._lose(member, "its shares are not one for each neighbour")
        for of, share in given.items():
            self._revealed.setdefault(of, {})[number] = share
        self._of(member).phase = "unmask"
        return []

    def _go_on(self, now_s: float) -> list[Command]:
        """To the next phase, once nobody is waited for any more."""
        told: list[Command] = []
        if now_s >= self._deadline_s:
            for number in self._waiting():
                told += self._lose(self._members[number].name, "it did not answer in time")
        if self.phase in ("adverts", "done", "failed") or self._waiting():
            return told
        assert self.graph is not None
        left = {number for number, member in self._members.items() if member.phase == self.phase}
        if self.phase != "unmask" and len(left) < self.graph.least_survivors:
            return told + self._fail(
                f"{len(left)} of {self.graph.members} members are left after {self.phase!r}, {self.graph.least_survivors} are needed"
            )
        after = {
            "shares": self._after_shares,
            "masked": self._after_masked,
            "signed": self._after_signed,
            "unmask": self._after_unmask,
        }
        return told + after[self.phase](left, now_s)

    def _after_shares(self, left: set[int], now_s: float) -> list[Command]:
        self._masking = left
        self._begin("masked", now_s)
        return [
            Send(self._members[number].name, pb.Shares(sealed=[
                pb.Sealed(peer=peer, data=self._members[peer].sealed[number])
                for peer in self._peers[number] if peer in left
            ]))
            for number in sorted(left)
        ]  # fmt: skip

    def _after_masked(self, left: set[int], now_s: float) -> list[Command]:
        assert self.graph is not None
        self._bitmap = to_bitmap(self._survivors, self.graph.members)
        for member in self._members.values():
            member.sealed = {}
        self._begin("signed" if self.terms.certified else "unmask", now_s)
        return [Send(self._members[number].name, pb.Survivors(bitmap=self._bitmap)) for number in sorted(left)]

    def _after_signed(self, left: set[int], now_s: float) -> list[Command]:
        self._begin("unmask", now_s)
        agreement = pb.Agreement(signatures=[
            pb.Signature(
                number=number, signature=self._signatures[number],
                certificate=self._members[number].advert.certificate,
                certified_until_s=self._members[number].advert.certified_until_s,
            )
            for number in sorted(left)
        ])  # fmt: skip
        return [Send(self._members[number].name, agreement) for number in sorted(left)]

    def _after_unmask(self, left: set[int], now_s: float) -> list[Command]:
        del left, now_s
        assert self.graph is not None
        threshold, lost = self.graph.threshold, self._masking - self._survivors
        poor = [number for number in self._masking if len(self._revealed.get(number, {})) < threshold]
        # A lost member without surviving neighbours has left no mask in the sum.
        peers = {number: [peer for peer in self._peers[number] if peer in self._survivors] for number in lost}
        poor = [number for number in poor if number in self._survivors or peers[number]]
        if poor:
            return self._fail(f"the secrets of {len(poor)} members have fewer than {threshold} shares")
        self.phase, self._deadline_s = "done", float("inf")
        opening = Opening(
            context=self._context, threshold=threshold,
            adverts={number: member.advert for number, member in self._members.items()},
            seeds={number: self._revealed[number] for number in sorted(self._survivors)},
            keys={number: self._revealed[number] for number in sorted(lost) if peers[number]},
            peers=peers,
        )  # fmt: skip
        return [Open(tuple(self._members[number].name for number in sorted(self._survivors)), opening)]

    # Small things.

    def _begin(self, phase: str, now_s: float) -> None:
        self.phase, self._deadline_s = phase, now_s + self._phase_s

    def _waiting(self) -> list[int]:
        """Who has still to answer in this phase."""
        before = {"shares": "advertised", "masked": "shares", "signed": "masked", "unmask": "signed"}.get(
            self.phase, ""
        )
        if self.phase == "unmask" and not self.terms.certified:
            before = "masked"
        return [number for number, member in self._members.items() if member.phase == before]

    def _awaits(self, member: bytes, phase: str) -> bool:
        return self.phase == phase and self._numbers.get(member, 0) in self._waiting()

    def _of(self, member: bytes) -> _Member:
        return self._members[self._numbers[member]]

    def _lose(self, member: bytes, why: str) -> list[Command]:
        number = self._numbers.get(member)
        if number is None or self._members[number].phase == "lost":
            return []
        self._members[number].phase = "lost"
        return [Lost(member, why)]

    def _fail(self, why: str) -> list[Command]:
        self.phase, self._deadline_s = "failed", float("inf")
        return [Failed(why, tuple(self._members[number].name for number in sorted(self._spent)))]
