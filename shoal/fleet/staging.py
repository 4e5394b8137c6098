"""Where an update waits until it is whole and checked: in memory while small, else in an unlinked, encrypted file.

Slices come in order for each tensor. As they come they are hashed and their values are looked at, so that a large
update is read only once more: to be added. The spool file has no name, and its key (AES-256-CTR) lives only in this
process: nothing of a single update can be read from a disk after it.

Guarantees:
    * Memory: an update above `Limits.memory_bytes` holds only buffers of one slice. All of them together are no more than
      `most_updates`.
    * An update is `complete` only if every tensor has its length, its hash, and finite values within the bounds, and
      the root over the hashes is the one reported.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import IO, Final

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from shoal.errors import ProtocolError, StoreError, UpdateRefused
from shoal.fixed import CHUNK, FixedPoint, refuse_bad_values
from shoal.fleet.process import allowed_files
from shoal.fleet.streams import MAX_SESSIONS
from shoal.tensors import Entry, Index, TensorSpec, total_bytes

FILES: Final = 100
"""Spooled updates for which there is a file at any rate: half of those that connections leave to the rest of the process."""
_BLOCK = 16  # AES-CTR can start at any multiple of its block


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What staged updates may take."""

    memory_bytes: int = 1 << 20
    """Largest update that is held in memory; a larger one is spooled."""
    updates: int = 10_000
    """Most updates held at once."""
    bytes_in_memory: int = 2 << 30
    """Most that updates in memory take together."""
    bytes_in_files: int = 64 << 30
    """Most that spooled updates take together."""
    files: int | None = None
    """Most spooled updates, each an open file; None: as many as connections leave."""


def most_updates(specs: tuple[TensorSpec, ...], limits: Limits) -> int:
    """How many updates with these tensors may be held at once, by number, bytes and open files; at least one."""
    size = _layout(specs)[1]
    if total_bytes(specs) <= limits.memory_bytes:
        return max(1, min(limits.updates, limits.bytes_in_memory // max(1, size)))
    files = max(FILES, allowed_files() - MAX_SESSIONS - 2 * FILES) if limits.files is None else limits.files
    return max(1, min(limits.updates, limits.bytes_in_files // max(1, size), files))


@dataclass(slots=True)
class _Part:
    spec: TensorSpec
    start: int
    """Where the tensor begins in the update."""
    received: int = 0
    hasher: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    carry: bytes = b""
    """Bytes of an element that a slice broke off."""


class StagedUpdate:
    """One update on its way in. Not thread-safe; the Edge holds a lock for each."""

    def __init__(self, specs: tuple[TensorSpec, ...], fixed: Mapping[str, FixedPoint], limits: Limits) -> None:
        """
        Args:
            specs: its tensors.
            fixed: of those whose values are looked at.
            limits: of what is held.
        """
        starts, size = _layout(specs)
        self._parts = {spec.name: _Part(spec, start) for spec, start in zip(specs, starts, strict=True)}
        self._fixed = fixed
        self._store = _Memory(size) if total_bytes(specs) <= limits.memory_bytes else _spool(size)
        self.refusal: UpdateRefused | None = None
        """Why its values may not be counted, as soon as that is seen."""

    @property
    def received(self) -> dict[str, int]:
        """Bytes of each tensor that are here: where a broken push goes on."""
        return {name: part.received for name, part in self._parts.items()}

    @property
    def missing(self) -> list[str]:
        """Tensors that are not whole."""
        return [name for name, part in self._parts.items() if part.received < part.spec.size_bytes]

    def dtype(self, name: str) -> str:
        """Of the elements of a tensor. Raises ProtocolError for one that is unknown."""
        return self._part(name).spec.dtype

    def _part(self, name: str) -> _Part:
        part = self._parts.get(name)
        if part is None:
            raise ProtocolError(f"Expected a tensor of the update, got {name[:80]!r}.")
        return part

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Takes one slice; of one that begins before what is here, only what is new.

        Raises:
            ProtocolError: an unknown tensor, a slice that leaves a gap, or more bytes than the tensor has.
            StoreError: the disk is full; what came before is still there.
        """
        part = self._part(name)
        if offset > part.received:
            raise ProtocolError(f"Expected {name} to go on at byte {part.received}, got a slice at {offset}.")
        if offset + len(data) > part.spec.size_bytes:
            raise ProtocolError(
                f"Expected {part.spec.size_bytes} bytes of {name} {part.spec.dtype}{list(part.spec.shape)}, "
                f"got a slice up to {offset + len(data)}."
            )
        new = data[part.received - offset :]
        try:
            self._store.write(part.start + part.received, new)
        except OSError as error:
            raise StoreError(f"An update cannot be spooled: {error}") from error
        part.hasher.update(new)
        part.received += len(new)
        self._look_at(part, new)

    def _look_at(self, part: _Part, data: bytes) -> None:
        if self.refusal is not None or part.spec.name not in self._fixed:
            return
        whole = part.carry + data if part.carry else data
        size = part.spec.numpy_dtype.itemsize
        end = len(whole) // size * size
        part.carry = whole[end:]
        try:
            values = np.frombuffer(whole, part.spec.numpy_dtype, count=end // size)
            refuse_bad_values(values, self._fixed[part.spec.name], name=part.spec.name)
        except UpdateRefused as refusal:
            self.refusal = refusal

    def check(self, root: str) -> None:
        """Raises UpdateRefused unless the update is whole, within bounds, and has that root."""
        if self.missing:
            raise UpdateRefused(f"Not whole: {', '.join(self.missing[:3])}.", reason="incomplete")
        entries = [Entry(p.spec, p.hasher.hexdigest()) for p in self._parts.values()]
        if (actual := Index(tuple(entries)).root) != root:
            raise UpdateRefused(f"Expected root {root[:12]!r}…, the tensors have {actual[:12]}….", reason="wrong hash")
        if self.refusal is not None:
            raise self.refusal

    def pieces(self) -> Iterator[tuple[str, int, np.ndarray]]:
        """(tensor, first element, values (n,)) in pieces of `fixed.CHUNK` elements."""
        for name, part in self._parts.items():
            size = part.spec.numpy_dtype.itemsize
            for first in range(0, part.spec.size_bytes // size, CHUNK):
                num_bytes = min(CHUNK * size, part.spec.size_bytes - first * size)
                data = self._store.read(part.start + first * size, num_bytes)
                yield name, first, np.frombuffer(data, part.spec.numpy_dtype)

    def close(self) -> None:
        """Forgets the update."""
        self._store.close()


def _layout(specs: tuple[TensorSpec, ...]) -> tuple[list[int], int]:
    """Where each tensor begins in the update, and where the last one ends."""
    ends = list(accumulate(-(-spec.size_bytes // _BLOCK) * _BLOCK for spec in specs))
    return [0, *ends][: len(specs)], ends[-1] if ends else 0


class _Memory:
    def __init__(self, size: int) -> None:
        self._data = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        self._data[offset : offset + len(data)] = data

    def read(self, offset: int, size: int) -> bytes:
        return bytes(memoryview(self._data)[offset : offset + size])

    def close(self) -> None:
        self._data = bytearray()


def _spool(size: int) -> "_Spool":
    try:
        return _Spool(size)
    except OSError as error:
        raise StoreError(f"An update cannot be spooled: {error}") from error


class _Spool:
    """An unlinked file under a key that only this object has."""

    def __init__(self, size: int) -> None:
        self._key = os.urandom(32)
        # Unbuffered: a write that fails says so at once.
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="shoal-", buffering=0)  # noqa: SIM115 (closed by close)
        os.truncate(self._file.fileno(), size)

    def write(self, offset: int, data: bytes) -> None:
        self._file.seek(offset)
        encrypted = memoryview(self._crypt(offset, data))
        while encrypted:
            encrypted = encrypted[self._file.write(encrypted) :]

    def read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise StoreError(f"Expected {size} bytes of a spooled update at {offset}, got {len(data)}.")
        return self._crypt(offset, data)

    def _crypt(self, offset: int, data: bytes) -> bytes:
        # CTR mode is its own inverse. Every byte of the file is written once, so no piece of the key stream is used twice.
        skip = offset % _BLOCK
        cipher = Cipher(algorithms.AES(self._key), modes.CTR((offset // _BLOCK).to_bytes(16, "big"))).encryptor()
        return cipher.update(b"\0" * skip + data)[skip:]

    def close(self) -> None:
        self._file.close()
        self._key = b""
