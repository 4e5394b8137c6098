"""Enrolment: an authority that is not the server certifies devices, for secure groups whose server may lie.

Each side keeps one secret of 32 bytes in a file of mode 0600; what passes between them is public: a device's key to the authority, a
certificate (authority's key, when it ends, signature; 104 bytes) back.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.errors import DataError
from shoal.privacy.identity import Authority, Certificate, Identity, Trusted

_SECRET_BYTES: Final = 32
_FORM: Final = struct.Struct(">32sd64s")


@dataclass(frozen=True)
class Enrolled:
    """A device that an authority knows."""

    identity: Identity
    authority: Trusted

    @classmethod
    def of(cls, secret: bytes, certificate: str, *, population: str, wall_s: float) -> Self:
        """
        Args:
            secret: of the device, 32 bytes.
            certificate: as `certify` gave it.
            population: that the device is of.
            wall_s: now, seconds since the epoch.

        Raises:
            DataError: the certificate is not for this device and population, or has ended.
        """
        try:
            key, until_s, signature = _FORM.unpack(bytes.fromhex(certificate.strip()))
        except (ValueError, struct.error):
            raise DataError(
                f"Expected a certificate of {2 * _FORM.size} hexadecimal digits, as `shoal enrol certify` prints it, got {certificate[:40]!r}."
            ) from None
        made = Identity.of_seed(secret, Certificate(until_s=until_s, signature=signature))
        trusted = Trusted(Ed25519PublicKey.from_public_bytes(key), population)
        assert made.certificate is not None
        if not until_s > wall_s:
            raise DataError("The certificate has ended. Have the device's key certified again: shoal enrol certify.")
        if not trusted.vouches(made.public, made.certificate, wall_s=wall_s):
            raise DataError(
                f"The certificate is not for this device's key in population {population!r}: it was made for another of them."
            )
        return cls(made, trusted)


def certify(secret: bytes, public: bytes, *, population: str, until_s: float) -> str:
    """A certificate as text.

    Args:
        secret: the authority's, 32 bytes.
        public: the device's key, 32 bytes.
        population: that it is of.
        until_s: when the certificate ends, seconds since the epoch.
    """
    key = Ed25519PrivateKey.from_private_bytes(secret)
    made = Authority(key, population).certify(public, until_s)
    return _FORM.pack(key.public_key().public_bytes_raw(), made.until_s, made.signature).hex()


def make_secret(path: Path) -> bytes:
    """A new secret in a new file. Raises DataError: there is one already."""
    secret = os.urandom(_SECRET_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret.hex() + "\n")
    except FileExistsError:
        raise DataError(
            f"{path} is there already, and is not written over: what it holds cannot be made again."
        ) from None
    return secret


def read_secret(path: Path) -> bytes:
    """The secret of a file. Raises DataError: it holds none."""
    try:
        secret = bytes.fromhex(path.read_text().strip())
    except (OSError, ValueError):
        secret = b""
    if len(secret) != _SECRET_BYTES:
        raise DataError(f"Expected a file that `shoal enrol` made, got {path}.")
    return secret


def public_key(secret: bytes) -> bytes:
    """What others know a secret by, 32 bytes."""
    return Identity.of_seed(secret).public
