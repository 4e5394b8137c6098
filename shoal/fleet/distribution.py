"""What `shoal data push` gives out: central data, cut into shards, as a signed manifest says it.

`shoal data push` serves until every shard is in the store of a device; devices are clients, and take by their own command, `shoal data take`:
that is the consent. The parts:

    distribution.py   what is given out: manifest, signature, how a shard's bytes are cut into slices
    dispatch.py       who has which shard: a machine without I/O
    push.py           the folder of a push, and the calls of takers; grpc_data.py both ends of the wire
    take.py           a taker: from the manifest to examples in its store

A shard's bytes are its fields one after the other, in the manifest's order, each (examples, …) little-endian; its hash is over all of them.
They travel in slices of at most `SLICE_BYTES` of one field, packed without loss: a broken transfer goes on with the slice after the last.

The manifest is canonical JSON (`Distribution.data`), and its SHA-256, the root, with a shard's number is the shard's name everywhere. It is signed by
the key of the push's folder (Ed25519, with a context of its own, so that no signature of a plan is one of a manifest, nor the other way).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Final, NamedTuple, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from shoal.data.example_store import bytes_each
from shoal.data.store import Spec
from shoal.errors import ProtocolError
from shoal.tensors import DTYPES, TensorSpec

FORMAT: Final = "shoal-data/1"
MAX_SHARDS: Final = 10_000
MAX_FIELDS: Final = 256
MAX_MANIFEST_BYTES: Final = 3 << 19
MAX_WORD: Final = 200
SLICE_BYTES: Final = 256 << 10
"""A whole number of elements of any type."""
_CONTEXT: Final = b"shoal data v1\0"


class Slice(NamedTuple):
    """A part of one field of a shard."""

    dtype: str
    offset: int
    """In the shard's bytes."""
    size: int


@dataclass(frozen=True, slots=True)
class Shard:
    """A part of the data."""

    hash: str
    """SHA-256 of its bytes, 64 hexadecimal digits."""
    examples: int


@dataclass(frozen=True)
class Distribution:
    """See the module's text."""

    name: str
    """What the data are called."""
    population: str
    spec: Spec
    shards: tuple[Shard, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where it is larger than a manifest may be, or names what cannot be."""
        if not 1 <= len(self.shards) <= MAX_SHARDS:
            raise ValueError(f"Expected 1 to {MAX_SHARDS} shards, got {len(self.shards)}.")
        if not 1 <= len(self.spec) <= MAX_FIELDS:
            raise ValueError(f"Expected 1 to {MAX_FIELDS} fields, got {len(self.spec)}.")
        if max(len(self.name), len(self.population)) > MAX_WORD:
            raise ValueError(f"Expected names of at most {MAX_WORD} characters, got {self.name[:80]!r}.")
        for shard in self.shards:
            if len(shard.hash) != 64 or not set(shard.hash) <= set("0123456789abcdef"):
                raise ValueError(f"Expected a hash of 64 hexadecimal digits, got {shard.hash[:80]!r}.")
            if not isinstance(shard.examples, int) or shard.examples < 1:
                raise ValueError(f"Expected shards of at least one example, got {shard.examples!r}.")
        most = max(shard.examples for shard in self.shards)
        for name, (shape, dtype) in self.spec.items():
            TensorSpec(name=name, shape=(most, *shape), dtype=dtype)
        if not bytes_each(self.spec):
            raise ValueError("Expected examples of at least one byte.")

    @cached_property
    def data(self) -> bytes:
        """What is signed."""
        content = {
            "format": FORMAT, "name": self.name, "population": self.population,
            "spec": [[name, list(shape), dtype] for name, (shape, dtype) in self.spec.items()],
            "shards": [[shard.hash, shard.examples] for shard in self.shards],
        }  # fmt: skip
        return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @cached_property
    def root(self) -> bytes:
        """SHA-256 of the manifest."""
        return hashlib.sha256(self.data).digest()

    def id(self, number: int) -> str:
        """A shard's name."""
        return f"{self.root.hex()}/{number}"

    def size(self, number: int) -> int:
        """A shard's bytes."""
        return self.shards[number].examples * bytes_each(self.spec)

    @property
    def size_bytes(self) -> int:
        """Of all shards."""
        return sum(shard.examples for shard in self.shards) * bytes_each(self.spec)

    def sign(self, key: Ed25519PrivateKey) -> bytes:
        """The signature that `verified` asks for."""
        return key.sign(_CONTEXT + self.data)

    @classmethod
    def verified(cls, data: bytes, signature: bytes, key: bytes) -> Self:
        """The distribution that a manifest describes. Whether the key is to be trusted is another question.

        Raises:
            ProtocolError: the signature is not the key's, or what is signed is no manifest.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise ProtocolError(f"Expected a manifest of at most {MAX_MANIFEST_BYTES} bytes, got {len(data)}.")
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, _CONTEXT + data)
        except (InvalidSignature, ValueError) as error:
            raise ProtocolError("The manifest is not signed by the key that came with it.") from error
        try:
            made = cls._read(data)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProtocolError(f"The manifest cannot be read: {str(error)[:200]}.") from error
        if made.data != data:
            raise ProtocolError("The manifest is not in the form that it is signed in.")
        return made

    @classmethod
    def _read(cls, data: bytes) -> Self:
        content = json.loads(data)
        if content["format"] != FORMAT:
            raise ValueError(f"it has format {content['format']!r}, this shoal reads {FORMAT!r}")
        spec = {name: (tuple(shape), dtype) for name, shape, dtype in content["spec"]}
        shards = tuple(Shard(hash, examples) for hash, examples in content["shards"])
        return cls(content["name"], content["population"], spec, shards)


def slices(spec: Spec, examples: int) -> Iterator[Slice]:
    """How a shard of so many examples is cut, in order."""
    begin = 0
    for shape, dtype in spec.values():
        size = examples * prod(shape) * DTYPES[dtype].itemsize
        for at in range(0, size, SLICE_BYTES):
            yield Slice(dtype, begin + at, min(SLICE_BYTES, size - at))
        begin += size


def slices_from(spec: Spec, examples: int, offset: int) -> Iterator[Slice]:
    """Those from an offset on, which is where a slice begins, or the end. Raises ProtocolError elsewhere."""
    is_there = offset == examples * bytes_each(spec)
    for piece in slices(spec, examples):
        if piece.offset >= offset:
            if not is_there and piece.offset != offset:
                break
            is_there = True
            yield piece
    if not is_there:
        raise ProtocolError(f"Expected an offset at which a slice begins, got {offset}.")
