"""An update's way through secure groups, as its device sees it: what it answers, and what it never does.

It keeps the two rules of docs/trust.md. *One at a time*: who begins in a group has given up the one before, for good. *Spent*: once it has
revealed shares the update is offered no more, and that is written down before they leave. Messages may come twice, as streams break:
the same answer goes out again.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from shoal.errors import InvalidTransition, ProtocolError
from shoal.fleet.floor import Floor
from shoal.fleet.secure_phases import MASKED
from shoal.fleet.spent import SpentUpdates
from shoal.plan.manifest import Manifest
from shoal.plan.secure import layout, members_noise, terms, update_of
from shoal.privacy.identity import Identity
from shoal.privacy.secure_member import SecureMember
from shoal.privacy.wire import secure_pb2 as pb
from shoal.tensors import Tensors

MOST_ANSWERS: Final = 16
"""That are kept of one group."""


class SecureOffer:
    """See the module's text."""

    def __init__(
        self,
        manifest: Manifest,
        model: str,
        sums: Tensors,
        weight: int,
        *,
        spent: SpentUpdates,
        floor: Floor,
        identity: Identity | None,
        wall_s: Callable[[], float],
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        """
        Args:
            manifest: of the plan, which passed `Floor.check`.
            model: root of the tensors that were trained from.
            sums, weight: of the update.
            spent: what the device has spent.
            floor: what it asks for.
            identity: with its certificate, where it has one.
            wall_s: now, seconds since the epoch.
            random: so many unpredictable bytes.

        Raises:
            UpdateRefused: the update is not finite, or out of bounds.
        """
        self._terms, self._update = terms(manifest, model=model), update_of(manifest, model)
        self._layout, self._noise = layout(manifest), members_noise(manifest)
        self._values: np.ndarray = self._layout.vector(sums, weight=weight)
        self._spent, self._floor, self._identity = spent, floor, identity
        self._wall_s, self._random = wall_s, random
        self._member: SecureMember | None = None
        self._survivors = pb.Survivors()
        self._answers: dict[bytes, tuple[str, bytes]] = {}
        self.has_revealed = False
        """Whether it has revealed shares: it is in a sum, or in none."""

    @property
    def is_spent(self) -> bool:
        """Whether it may be in a sum, or has revealed shares: it is offered to no other group."""
        return self._update in self._spent

    def hear(self, phase: str, data: bytes) -> tuple[str, bytes]:
        """The answer to a message of the group: its phase and bytes. One to leave the group by is a `complaint`, in words."""
        asked = hashlib.sha256(phase.encode() + b"\0" + data).digest()
        if asked in self._answers:
            return self._answers[asked]
        if phase != "begin" and len(self._answers) >= MOST_ANSWERS:
            return "complaint", b"more messages than a group has"
        try:
            answer = self._answer(phase, data)
        except (ProtocolError, InvalidTransition, DecodeError, ValueError) as error:
            self._member = None
            answer = "complaint", str(error).encode()[:500]
        self._answers[asked] = answer
        return answer

    def _answer(self, phase: str, data: bytes) -> tuple[str, bytes]:
        if phase == "begin":
            return "advert", self._begin(data).advert().SerializeToString()
        if self._member is None:
            raise ProtocolError(f"Expected a group to begin, got {phase[:40]!r}.")
        match phase:
            case "roster":
                return "shares", self._member.shares(pb.Roster.FromString(data)).SerializeToString()
            case "shares":
                return MASKED, self._member.masked(pb.Shares.FromString(data), self._with_noise(self._member))
            case "survivors":
                self._survivors = pb.Survivors.FromString(data)
                if self._terms.certified:
                    return "signed", self._member.sign(self._survivors).SerializeToString()
                return self._reveal(self._member.unmask(self._survivors))
            case "agreement":
                return self._reveal(self._member.unmask(self._survivors, pb.Agreement.FromString(data)))
        raise ProtocolError(f"Expected begin, roster, shares, survivors or agreement, got {phase[:40]!r}.")

    def _with_noise(self, member: SecureMember) -> np.ndarray:
        """The update's vector, and where devices add the noise this one's share of it.

        Then the update is spent from here on, not only once shares are revealed: whoever is in the sum need not have been asked for shares, and
        two sums of one update would have less noise together than the ledger counts.
        """
        if self._noise is None:
            return self._values
        self._spend()
        return self._layout.with_noise(self._values, self._noise.draw(member.graph, self._random))

    def _begin(self, group: bytes) -> SecureMember:
        if self.is_spent:
            raise ProtocolError("The update has been revealed in a sum; it is offered no more.")
        certificate = self._identity.certificate if self._identity is not None else None
        if certificate is not None and certificate.until_s <= self._wall_s():
            raise ProtocolError(
                "This device's certificate has ended: have its key certified again (shoal enrol certify)."
            )
        self._answers.clear()  # and with them goes the group before
        self._member = SecureMember(
            self._terms,
            group,
            self._identity or Identity.of_seed(self._random(32)),
            trusted=self._floor.authority,
            random=self._random,
            wall_s=self._wall_s(),
            least_colluders=self._floor.colluders,
        )
        return self._member

    def _spend(self) -> None:
        if not self.is_spent:
            self._spent.add(self._update)

    def _reveal(self, shares: pb.Unmask) -> tuple[str, bytes]:
        self._spend()
        self.has_revealed = True
        return "unmask", shares.SerializeToString()
