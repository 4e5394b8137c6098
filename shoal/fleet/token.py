"""Tokens: assignments signed by the Coordinator, that outlive any connection.

The nonce is a keyed hash of run, version and device: the same device gets the same nonce for the same version, also from
a Coordinator that was killed and started again. So "one update per device per commit" is the uniqueness of nonces, and
no store ever holds a device's id.

Guarantees:
    * A token that `read_token` returns was signed by the Coordinator and has not expired.
    * Nonces of one device in two versions cannot be linked without the Coordinator's secret.
"""

import hmac
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError

from shoal.errors import ProtocolError
from shoal.fleet.wire import fleet_pb2 as pb

NONCE_BYTES = 16
_CONTEXT = b"shoal token v1\0"  # a signature made for a token is good for nothing else


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenKey:
    """What a Coordinator signs with, and makes nonces with."""

    private: Ed25519PrivateKey
    secret: bytes
    """32 bytes."""

    def nonce(self, run: str, version: int, device_id: str) -> bytes:
        """16 bytes that stand for this device in this version."""
        text = f"{run}\0{version}\0{device_id}".encode()
        return hmac.digest(self.secret, text, "sha256")[:NONCE_BYTES]

    def sign(self, assignment: pb.Assignment) -> pb.Token:
        """The token of an assignment."""
        data = assignment.SerializeToString(deterministic=True)
        return pb.Token(signed=data, signature=self.private.sign(_CONTEXT + data))


def read_token(token: pb.Token, public: Ed25519PublicKey, *, wall_s: float) -> pb.Assignment:
    """The assignment of a token.

    Args:
        token: as a peer sent it.
        public: the Coordinator's key.
        wall_s: now, in seconds since the epoch.

    Raises:
        ProtocolError: the signature is wrong, or it has expired.
    """
    try:
        public.verify(token.signature, _CONTEXT + token.signed)
        assignment = pb.Assignment.FromString(token.signed)
    except (InvalidSignature, DecodeError, ValueError) as error:
        raise ProtocolError("The token is not one of this Coordinator's; check in again.") from error
    if assignment.expires_s <= wall_s:
        raise ProtocolError(f"The token expired {wall_s - assignment.expires_s:.0f} s ago; check in again.")
    return assignment
