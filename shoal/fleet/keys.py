"""A host's keys: what plans and tokens are signed with, and nonces made of. One file in the run folder, mode 0600."""

import hashlib
import hmac
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.errors import StoreError
from shoal.fleet.token import TokenKey

FILE_NAME: Final = "host.key"
_BYTES: Final = 64  # 32 of the signing key, 32 of the nonces' secret


@dataclass(frozen=True)
class HostKeys:
    """See the module's text. Its repr shows nothing."""

    data: bytes

    def __repr__(self) -> str:
        return "HostKeys(…)"

    @classmethod
    def make(cls) -> Self:
        return cls(os.urandom(_BYTES))

    @property
    def signing(self) -> Ed25519PrivateKey:
        return Ed25519PrivateKey.from_private_bytes(self.data[:32])

    @property
    def token(self) -> TokenKey:
        return TokenKey(private=self.signing, secret=self.data[32:])

    @property
    def public(self) -> bytes:
        """What devices trust, 32 bytes."""
        return self.signing.public_key().public_bytes_raw()

    @property
    def edge_credential(self) -> bytes:
        """What Edges of other processes show, 32 bytes; of no use for signing."""
        return hmac.new(self.data[32:], b"shoal edges v1", hashlib.sha256).digest()

    @property
    def noise_secret(self) -> bytes:
        """What the noise of this run's versions follows from, 32 bytes."""
        return hmac.new(self.data[32:], b"shoal noise v1", hashlib.sha256).digest()

    @classmethod
    def load_or_make(cls, folder: Path) -> Self:
        """The keys of a run folder; made there the first time."""
        path = folder / FILE_NAME
        if path.exists():
            data = path.read_bytes()
            if len(data) != _BYTES:
                raise StoreError(
                    f"Expected {_BYTES} bytes in {path}, got {len(data)}. Tokens of this run cannot be read."
                )
            return cls(data)
        made = cls.make()
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(made.data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        return made
