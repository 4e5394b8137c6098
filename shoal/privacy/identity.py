"""Who a member is: a long-lived Ed25519 key, and the authority that vouches for it.

Without an authority a server could play members itself and learn what the one honest member of a group sends. So the authority has to
be somebody whom the members trust not to help the server: where that is the operator, or nobody, the guarantee is one against a server
that follows the protocol, and the run says so.
"""

from dataclasses import dataclass
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_CERTIFICATE = b"shoal member v1\0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """An authority's word that a key is a member's."""

    until_s: float
    """Seconds since the epoch."""
    signature: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity:
    """A member's."""

    key: Ed25519PrivateKey
    certificate: Certificate | None = None

    @property
    def public(self) -> bytes:
        """32 bytes."""
        return self.key.public_key().public_bytes_raw()

    @classmethod
    def of_seed(cls, seed: bytes, certificate: Certificate | None = None) -> Self:
        """The identity of 32 secret bytes."""
        return cls(key=Ed25519PrivateKey.from_private_bytes(seed), certificate=certificate)


@dataclass(frozen=True, slots=True)
class Authority:
    """Who certifies members of a population."""

    key: Ed25519PrivateKey
    population: str

    def certify(self, public: bytes, until_s: float) -> Certificate:
        """A certificate of a member's public key, 32 bytes, good until that time in seconds since the epoch."""
        return Certificate(until_s=until_s, signature=self.key.sign(_text(self.population, public, until_s)))


@dataclass(frozen=True, slots=True)
class Trusted:
    """The authority that a member trusts."""

    key: Ed25519PublicKey
    population: str

    def vouches(self, public: bytes, certificate: Certificate, *, wall_s: float) -> bool:
        """Whether the certificate is the authority's for that key, and has not expired."""
        if not certificate.until_s > wall_s:
            return False
        return is_signed(self.key, certificate.signature, _text(self.population, public, certificate.until_s))


def is_signed(key: Ed25519PublicKey, signature: bytes, text: bytes) -> bool:
    """Whether the signature is that key's of that text."""
    try:
        key.verify(signature, text)
    except InvalidSignature:
        return False
    return True


def _text(population: str, public: bytes, until_s: float) -> bytes:
    return _CERTIFICATE + public + repr(float(until_s)).encode() + b"\0" + population.encode()
