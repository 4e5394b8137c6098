"""The Plan: a task made portable. A signed manifest, and programs by hash. Data, not code.

File format: one frame of `tensors.pack` whose header is ``{"format": "shoal-plan/1", "manifest": hash,
"public_key": hex, "signature": hex}`` and whose tensors are uint8: ``manifest``, ``server`` (the server half,
left out of what devices get) and one per program, named by hash.

Guarantees:
    * A plan that `verify` has passed was signed, whole, by the holder of the key.
    * No program's bytes are handed out before their hash was compared with the signed one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from shoal.errors import PlanError, ProtocolError
from shoal.plan.manifest import FORMAT, Manifest, Program
from shoal.plan.signature import is_good
from shoal.tensors import PARSE_ERRORS, pack, sha256, unpack

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_CONTEXT = b"shoal plan v1\0"  # a signature made for a plan is good for nothing else


@dataclass(frozen=True)
class Plan:
    """A manifest, its signature, and such programs as are at hand."""

    manifest: Manifest
    programs: Mapping[str, bytes]
    """Hash -> bytes; a device holds only the variants that it runs."""
    public_key: bytes = b""
    """Ed25519, 32 bytes; empty while unsigned."""
    signature: bytes = b""
    """Ed25519 over the manifest's bytes, 64 bytes."""

    @property
    def hash(self) -> str:
        return self.manifest.hash

    def sign(self, key: "Ed25519PrivateKey") -> Self:
        """The same plan, signed."""
        public = key.public_key().public_bytes_raw()
        return type(self)(self.manifest, self.programs, public, key.sign(_CONTEXT + self.manifest.data))

    def verify(self, trusted_key: bytes, is_good: Callable[[bytes, bytes, bytes], bool] = is_good) -> None:
        """Raises PlanError unless the manifest was signed by the trusted key and every program at hand has its hash.

        `is_good` says whether a key's signature of a message is.
        """
        if self.public_key != trusted_key:
            raise PlanError(
                f"The plan of task {self.manifest.task!r} is signed by {self.public_key.hex()[:16] or 'nobody'}…, "
                f"this device trusts {trusted_key.hex()[:16]}…. Nothing of it was run."
            )
        if not is_good(self.public_key, self.signature, _CONTEXT + self.manifest.data):
            raise PlanError(
                f"The signature of the plan of task {self.manifest.task!r} is wrong. Nothing of it was run."
            )
        self.check_programs()

    def check_programs(self) -> None:
        """Raises PlanError unless every program at hand has the hash that the manifest names it by."""
        for hash, data in self.programs.items():
            if sha256(data) != hash:
                raise PlanError(
                    f"A program of task {self.manifest.task!r} has not the hash that was signed. Nothing of it was run."
                )

    def program(self, chosen: Program) -> bytes:
        """The bytes of a program, compared with its hash."""
        data = self.programs.get(chosen.hash)
        if data is None:
            raise PlanError(f"Program {chosen.name!r} ({chosen.hash[:12]}…) is not at hand.")
        if sha256(data) != chosen.hash:
            raise PlanError(f"Program {chosen.name!r} has not the hash that was signed. It was not run.")
        return data

    def to_bytes(self) -> bytes:
        """The plan as one file."""
        header = {
            "format": FORMAT,
            "manifest": self.hash,
            "public_key": self.public_key.hex(),
            "signature": self.signature.hex(),
        }
        half = {"server": self.manifest.half.data} if self.manifest.half is not None else {}
        blobs = {"manifest": self.manifest.data, **half, **dict(sorted(self.programs.items()))}
        return pack({name: np.frombuffer(data, np.uint8) for name, data in blobs.items()}, header)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """Reads what `to_bytes` wrote; does not verify. Raises PlanError for anything else."""
        try:
            tensors, header = unpack(data)
            if header.get("format") != FORMAT:
                raise ValueError(f"format is {header.get('format')!r}, this version reads {FORMAT!r}")
            blobs = {name: array.tobytes() for name, array in tensors.items()}
            manifest = Manifest.parse(blobs.pop("manifest"), server=blobs.pop("server", None))
            key, signature = bytes.fromhex(header["public_key"]), bytes.fromhex(header["signature"])
            if header["manifest"] != manifest.hash:
                raise ValueError("the manifest has not the hash that the header names")
        except (ProtocolError, *PARSE_ERRORS) as error:
            raise PlanError(f"Expected a plan, got {data[:40]!r}…: {error}.") from error
        return cls(manifest, blobs, key, signature)

    def save(self, path: Path) -> None:
        path.write_bytes(self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises PlanError if it is no plan, OSError if it cannot be read."""
        return cls.parse(path.read_bytes())
