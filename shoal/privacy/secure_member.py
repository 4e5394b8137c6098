"""A secure group as one member sees it: a machine that checks all it is told, and reveals as little as it must.

Invariants (tests cite them by number):
    (1) Of each neighbour it reveals one share or none: of the self seed, or of the mask key.
    (2) It reveals shares for one set of survivors only: that which is large enough, has itself in it, and (certified) which enough
        members have signed.
    (3) It masks one vector, under keys made for this group.
    (4) It masks only where at least `threshold` neighbours can unmask it, each of whom has shown (certified: signed) its keys.
"""

import hashlib
from collections.abc import Callable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shoal.errors import InvalidTransition, ProtocolError
from shoal.privacy import masks, shamir
from shoal.privacy.identity import Certificate, Identity, Trusted, is_signed
from shoal.privacy.neighbours import Graph, neighbours
from shoal.privacy.secure_terms import GROUP_BYTES, Terms, advert_text, of_bitmap, pair_purpose, survivors_text
from shoal.privacy.wire import secure_pb2 as pb


class SecureMember:
    """See the module's text. Its methods are called in the order in which they stand; each raises ProtocolError where the
    server's message is not one of an honest server, after which the member takes no further part."""

    def __init__(
        self,
        terms: Terms,
        group: bytes,
        identity: Identity,
        *,
        trusted: Trusted | None,
        random: Callable[[int], bytes],
        wall_s: float,
        least_colluders: int = 0,
    ) -> None:
        """
        Args:
            terms: from the signed plan and the round configuration.
            group: 16 bytes that the server gave.
            identity: of this member; one made for the group where nobody certifies.
            trusted: the authority, where terms are certified.
            random: so many unpredictable bytes: `os.urandom` but in tests.
            wall_s: now, seconds since the epoch, for certificates.
            least_colluders: that the group must withstand, however small the server makes it.
        """
        if terms.certified and (trusted is None or identity.certificate is None):
            raise ValueError("A certified group needs an authority to trust and a certificate of one's own.")
        if len(group) != GROUP_BYTES:
            raise ProtocolError(f"Expected a group number of {GROUP_BYTES} bytes, got {len(group)}.")
        self._terms, self._group, self._identity, self._trusted = terms, group, identity, trusted
        self._random, self._wall_s, self._least_colluders = random, wall_s, least_colluders
        self._mask_key, self._seal_key, self._seed = (random(masks.KEY_BYTES) for _ in range(3))
        self._phase = "advert"
        self._identities: list[bytes] = []
        self._adverts: dict[int, pb.Advert] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}
        self._signed: bytes | None = None
        self.is_spent = False
        """Whether it has revealed shares: its values may be in a sum, and must never be masked again."""

    def advert(self) -> pb.Advert:
        """Its keys."""
        self._begin("advert")
        keys = masks.public_key(self._mask_key), masks.public_key(self._seal_key), hashlib.sha256(self._seed).digest()
        certificate = self._identity.certificate or Certificate(until_s=0.0, signature=b"")
        self._own_text = advert_text(self._group, *keys)
        self._phase = "shares"
        return pb.Advert(
            mask_key=keys[0], seal_key=keys[1], seed_digest=keys[2], identity_key=self._identity.public,
            certificate=certificate.signature, certified_until_s=certificate.until_s,
            signature=self._identity.key.sign(self._own_text),
        )  # fmt: skip

    def shares(self, roster: pb.Roster) -> pb.Shares:
        """Shares of its secrets for its neighbours, once the roster is found right."""
        self._begin("shares")
        self._read(roster)
        graph, holders = self._graph, sorted(self._adverts)
        of_seed = shamir.split(self._seed, holders, graph.threshold, self._random)
        of_key = shamir.split(self._mask_key, holders, graph.threshold, self._random)
        made = pb.Shares(sealed=[
            pb.Sealed(peer=peer, data=masks.seal(
                self._sealing(peer, sender=self._number, receiver=peer), of_seed[peer] + of_key[peer], self._context
            ))
            for peer in holders
        ])  # fmt: skip
        self._phase = "masked"
        return made

    def masked(self, delivery: pb.Shares, values: np.ndarray) -> bytes:
        """The values, masked and packed.

        Args:
            delivery: what the neighbours that go on have sealed for this member.
            values: (size,) uint32, each below its segment's 2^bits.
        """
        self._begin("masked")
        if not np.array_equal(self._terms.reduced(values.copy()), values):
            raise ValueError("Expected values below 2^bits of their segments.")
        for sealed in delivery.sealed:
            if sealed.peer not in self._adverts or sealed.peer in self._held:
                raise ProtocolError(f"Shares of member {sealed.peer}, which is no neighbour or was there before.")
            key = self._sealing(sealed.peer, sender=sealed.peer, receiver=self._number)
            opened = masks.unseal(key, sealed.data, self._context)
            if opened is None or len(opened) != 2 * shamir.SHARE_BYTES:
                raise ProtocolError(
                    f"The shares of member {sealed.peer} were not sealed by it for this member and group."
                )
            self._held[sealed.peer] = opened[: shamir.SHARE_BYTES], opened[shamir.SHARE_BYTES :]
        if len(self._held) < self._graph.threshold:
            raise ProtocolError(f"{len(self._held)} neighbours go on, {self._graph.threshold} are needed.")
        made = np.array(values, np.uint32)
        masks.add_masks(made, [(self_mask(self._seed, self._context), 1), *self._pair_masks()])
        self._phase = "survivors"
        return self._terms.pack(self._terms.reduced(made))

    @property
    def graph(self) -> Graph:
        """The numbers of its group, once it has the roster."""
        return self._graph

    def sign(self, survivors: pb.Survivors) -> pb.Signed:
        """Its signature of the survivors, of one set only."""
        self._begin("survivors")
        self._check(survivors.bitmap)
        self._signed, self._phase = survivors.bitmap, "agreement"
        return pb.Signed(signature=self._identity.key.sign(survivors_text(self._context, survivors.bitmap)))

    def unmask(self, survivors: pb.Survivors, agreement: pb.Agreement | None = None) -> pb.Unmask:
        """The shares that open the sum; from here on the member's values are spent."""
        self._begin("agreement" if self._terms.certified else "survivors")
        alive = self._check(survivors.bitmap)
        if self._terms.certified and (agreement is None or survivors.bitmap != self._signed):
            raise ProtocolError("The survivors are not those that this member has signed.")
        if self._terms.certified and agreement is not None:
            self._check_agreement(survivors.bitmap, agreement)
        self.is_spent, self._phase = True, "done"
        return pb.Unmask(revealed=[
            pb.Revealed(of=peer, share=of_seed if peer in alive else of_key)
            for peer, (of_seed, of_key) in self._held.items()
        ])  # fmt: skip

    # Checks.

    def _begin(self, phase: str) -> None:
        if self._phase != phase:
            raise InvalidTransition(f"The member is at {self._phase!r}, not at {phase!r}.")
        self._phase = "failed"  # unless the step comes to its end

    def _read(self, roster: pb.Roster) -> None:
        whole = roster.identities
        identities = [whole[at : at + masks.KEY_BYTES] for at in range(0, len(whole), masks.KEY_BYTES)]
        if len(whole) % masks.KEY_BYTES or identities != sorted(set(identities)):
            raise ProtocolError("The roster is not one of different members in ascending order.")
        number = roster.number
        if not 1 <= number <= len(identities) or identities[number - 1] != self._identity.public:
            raise ProtocolError("The roster does not have this member where it says.")
        try:
            self._graph = self._terms.graph(len(identities))
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if self._graph.colluders < self._least_colluders:
            raise ProtocolError(
                f"A group of {len(identities)} withstands {self._graph.colluders} colluders; this member asks for {self._least_colluders}."
            )
        self._number, self._identities = number, identities
        expected = neighbours(self._graph, self._terms.context(self._group, whole))[number]
        self._adverts = {each.number: each.advert for each in roster.neighbours}
        if sorted(self._adverts) != list(expected) or len(roster.neighbours) != len(expected):
            raise ProtocolError("The roster does not name the neighbours that follow from it.")
        for peer, advert in self._adverts.items():
            self._check_advert(peer, advert)
        texts = {
            number: self._own_text,
            **{peer: signed_text(self._group, advert) for peer, advert in self._adverts.items()},
        }
        keys = [text for _, text in sorted(texts.items())] if self._terms.certified else []
        self._context = self._terms.context(self._group, whole, keys)

    def _check_advert(self, peer: int, advert: pb.Advert) -> None:
        keys = advert.mask_key, advert.seal_key, advert.seed_digest
        if advert.identity_key != self._identities[peer - 1] or {*map(len, keys)} != {masks.KEY_BYTES}:
            raise ProtocolError(f"The keys of member {peer} are not those of the roster.")
        key = Ed25519PublicKey.from_public_bytes(advert.identity_key)
        if not is_signed(key, advert.signature, signed_text(self._group, advert)):
            raise ProtocolError(f"The keys of member {peer} are not signed by it for this group.")
        if not masks.are_keys(advert.mask_key, advert.seal_key):
            raise ProtocolError(f"The keys of member {peer} are no keys.")
        self._check_certificate(peer, advert.certificate, advert.certified_until_s)

    def _check_certificate(self, peer: int, signature: bytes, until_s: float) -> None:
        if not self._terms.certified:
            return
        assert self._trusted is not None
        certificate = Certificate(until_s=until_s, signature=signature)
        if not self._trusted.vouches(self._identities[peer - 1], certificate, wall_s=self._wall_s):
            raise ProtocolError(f"Member {peer} is not certified by the authority.")

    def _check(self, bitmap: bytes) -> set[int]:
        graph = self._graph
        try:
            alive = of_bitmap(bitmap, graph.members)
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        if self._number not in alive or len(alive) < graph.least_survivors:
            raise ProtocolError(
                f"Of {graph.members} members {len(alive)} survive, {graph.least_survivors} are needed, this one among them."
            )
        if any(peer in alive for peer in self._adverts if peer not in self._held):
            raise ProtocolError("A neighbour is said to survive that had no part in the masks.")
        if len(alive & self._held.keys()) < graph.threshold:
            raise ProtocolError("Too few neighbours survive to open what this member has masked.")
        return alive

    def _check_agreement(self, bitmap: bytes, agreement: pb.Agreement) -> None:
        text = survivors_text(self._context, bitmap)
        alive, signers = of_bitmap(bitmap, self._graph.members), set()
        for each in agreement.signatures:
            if each.number not in alive or each.number in signers:
                raise ProtocolError(f"A signature of member {each.number}, which does not survive or was there before.")
            self._check_certificate(each.number, each.certificate, each.certified_until_s)
            key = Ed25519PublicKey.from_public_bytes(self._identities[each.number - 1])
            if not is_signed(key, each.signature, text):
                raise ProtocolError(f"Member {each.number} has not signed these survivors.")
            signers.add(each.number)
        if len(signers) < self._graph.least_signatures:
            raise ProtocolError(f"{len(signers)} members have signed, {self._graph.least_signatures} are needed.")

    # Keys.

    def _sealing(self, peer: int, *, sender: int, receiver: int) -> bytes:
        purpose = pair_purpose(b"seal", self._context, sender, receiver)
        return masks.agree(self._seal_key, self._adverts[peer].seal_key, purpose)

    def _pair_masks(self) -> list[tuple[bytes, int]]:
        return [
            pair_mask(self._mask_key, self._adverts[peer].mask_key, self._context, self._number, peer)
            for peer in self._held
        ]


def signed_text(group: bytes, advert: pb.Advert) -> bytes:
    """What an advert's signature is of."""
    return advert_text(group, advert.mask_key, advert.seal_key, advert.seed_digest)


def self_mask(seed: bytes, context: bytes) -> bytes:
    """The key of a member's own mask."""
    return masks.derive(seed, b"self\0" + context)


def pair_mask(private: bytes, public: bytes, context: bytes, number: int, peer: int) -> tuple[bytes, int]:
    """The key of the mask of two members, and how `number` adds it: the one with the lower number plus, the other minus."""
    low, high = sorted((number, peer))
    return masks.agree(private, public, pair_purpose(b"mask", context, low, high)), 1 if number == low else -1
