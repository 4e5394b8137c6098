"""What a secure group's members and its server agree on before they begin, and what binds all they say to it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from shoal import validate
from shoal.privacy import packing
from shoal.privacy.neighbours import Assumptions, Graph, find

GROUP_BYTES: Final = 16
_CONTEXT: Final = b"shoal secure group v1\0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Elements of a vector that are summed modulo 2^bits."""

    size: int
    bits: int

    def __post_init__(self) -> None:
        validate.between(0, 1 << 40, size=self.size)
        validate.between(1, packing.MAX_BITS, bits=self.bits)


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Of one group. Members take them from the signed plan and the round configuration, not from what the server says later."""

    purpose: bytes
    """SHA-256 of what the sum is for: run, version, configuration."""
    segments: tuple[Segment, ...]
    minimum: int = 8
    """Honest members in whatever the server learns, at least."""
    assumptions: Assumptions = field(default_factory=Assumptions)
    certified: bool = False
    """Whether identities are certified, and survivors signed: for a server that may lie."""

    @property
    def size(self) -> int:
        """Elements of a vector."""
        return sum(segment.size for segment in self.segments)

    @property
    def packed_bytes(self) -> int:
        """Bytes of a masked vector on the wire."""
        return sum(packing.packed_bytes(segment.size, segment.bits) for segment in self.segments)

    def graph(self, members: int) -> Graph:
        """The numbers of a group of so many. Raises ValueError: so many cannot be a group on these terms."""
        return find(members, self.assumptions, self.minimum, self.certified)

    def context(self, group: bytes, identities: bytes, keys: Iterable[bytes] = ()) -> bytes:
        """32 bytes that seals, masks and signatures of one group are bound to.

        Args:
            group: its number, 16 bytes.
            identities: of all its members.
            keys: what each of them has signed of its keys, in the same order, where members are certified. A member's keys are new each
                time: so what it signs when it is asked again under the same number is good for nothing here, and nobody masks
                before the last has shown its keys (the proof in `docs/trust.md` needs both).
        """
        segments = [(segment.size, segment.bits) for segment in self.segments]
        numbers = self.minimum, self.assumptions.colluders, self.assumptions.dropouts, self.certified
        text = repr((self.purpose.hex(), segments, numbers)).encode()
        bound = hashlib.sha256(text).digest() + hashlib.sha256(b"".join(keys)).digest()
        return hashlib.sha256(_CONTEXT + group + bound + identities).digest()

    def reduced(self, vector: np.ndarray) -> np.ndarray:
        """The vector (size,) uint32, each element modulo its segment's 2^bits; in place."""
        for segment, part in zip(self.segments, self._parts(vector), strict=True):
            np.bitwise_and(part, np.uint32((1 << segment.bits) - 1), out=part)
        return vector

    def pack(self, vector: np.ndarray) -> bytes:
        """A reduced vector as it travels."""
        parts = zip(self.segments, self._parts(vector), strict=True)
        return b"".join(packing.pack(part, segment.bits) for segment, part in parts)

    def unpack(self, data: bytes) -> np.ndarray:
        """The vector again, (size,) uint32. Raises ValueError for another length."""
        if len(data) != self.packed_bytes:
            raise ValueError(f"Expected a masked vector of {self.packed_bytes} bytes, got {len(data)}.")
        made, at = [], 0
        for segment in self.segments:
            end = at + packing.packed_bytes(segment.size, segment.bits)
            made.append(packing.unpack(data[at:end], segment.size, segment.bits))
            at = end
        return np.concatenate(made) if made else np.empty(0, np.uint32)

    def _parts(self, vector: np.ndarray) -> list[np.ndarray]:
        if vector.shape != (self.size,) or vector.dtype != np.uint32:
            raise ValueError(f"Expected a vector ({self.size},) uint32, got {vector.shape} {vector.dtype}.")
        return np.split(vector, np.cumsum([segment.size for segment in self.segments])[:-1])


def advert_text(group: bytes, mask_key: bytes, seal_key: bytes, seed_digest: bytes) -> bytes:
    """What a member signs of its advert."""
    return b"shoal advert v1\0" + group + mask_key + seal_key + seed_digest


def survivors_text(context: bytes, bitmap: bytes) -> bytes:
    """What a member signs of the survivors."""
    return b"shoal survivors v1\0" + context + bitmap


def pair_purpose(what: bytes, context: bytes, sender: int, receiver: int) -> bytes:
    """What a key of two members is for."""
    return what + b"\0" + context + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")


def to_bitmap(numbers: set[int], members: int) -> bytes:
    """Numbers from 1 as bits."""
    flags = np.zeros(members, np.uint8)
    flags[[number - 1 for number in numbers]] = 1
    return np.packbits(flags, bitorder="little").tobytes()


def of_bitmap(bitmap: bytes, members: int) -> set[int]:
    """The numbers. Raises ValueError for another length, or bits of nobody."""
    if len(bitmap) != -(-members // 8):
        raise ValueError(f"Expected a bitmap of {members} members, got {len(bitmap)} bytes.")
    flags = np.unpackbits(np.frombuffer(bitmap, np.uint8), bitorder="little")
    if flags[members:].any():
        raise ValueError(f"The bitmap names more than {members} members.")
    return {int(at) + 1 for at in np.flatnonzero(flags)}
