"""What devices are sent of a version: its model, rounded as the task says (`Task.down`), under hashes and a root of its own.

Nothing of it is stored: what is read of a rounded tensor is read of the record's and rounded on its way. Which tensors: those of the model
that rounds change, if they are float32; what a device fetches once (frozen leaves) and what a local rule adds to the model go as they are.
"""

import hashlib
from typing import Final

import numpy as np

from shoal.codec.rounding import BLOCK, rounded
from shoal.fixed import CHUNK
from shoal.plan.manifest import Manifest
from shoal.record.store import Blobs
from shoal.tensors import Entry, Index

KEPT: Final = 256
"""Versions whose rounded tensors can be read."""
_UNIT: Final = 4 * BLOCK


class SentBlobs:
    """The record's blobs, and the rounded tensors of versions that were asked for. For threads."""

    def __init__(self, blobs: Blobs, manifest: Manifest) -> None:
        self._blobs, self._rounding = blobs, manifest.server.down
        self._names = frozenset(manifest.rounded)
        self._sent: dict[str, Index] = {}
        self._sources: dict[str, str] = {}

    def index(self, model: Index) -> Index:
        """What devices are sent of that version. Reads and rounds it whole, the first time."""
        if not self._names:
            return model
        if model.root not in self._sent:
            made = Index(tuple(self._entry(entry) if entry.spec.name in self._names else entry for entry in model))
            self._sources |= {now.hash: was.hash for was, now in zip(model, made, strict=True) if now != was}
            self._sent[model.root] = made
            while len(self._sent) > KEPT:
                self._sent.pop(next(iter(self._sent)))
            needed = {entry.hash for index in self._sent.values() for entry in index}
            self._sources = {hash: source for hash, source in self._sources.items() if hash in needed}
        return self._sent[model.root]

    def _entry(self, entry: Entry) -> Entry:
        hasher = hashlib.sha256()
        for start in range(0, entry.spec.size_bytes, 4 * CHUNK):
            hasher.update(self._rounded(entry.hash, start, 4 * CHUNK))
        return Entry(entry.spec, hasher.hexdigest())

    def get(self, hash: str) -> bytes:
        source = self._sources.get(hash)
        return self._blobs.get(hash) if source is None else self._rounded(source, 0, self._blobs.size(source))

    def read(self, hash: str, offset: int, size: int) -> bytes:
        source = self._sources.get(hash)
        return self._blobs.read(hash, offset, size) if source is None else self._rounded(source, offset, size)

    def size(self, hash: str) -> int:
        return self._blobs.size(self._sources.get(hash, hash))

    def _rounded(self, source: str, offset: int, size: int) -> bytes:
        start = offset // _UNIT * _UNIT
        data = self._blobs.read(source, start, -(-(offset + size - start) // _UNIT) * _UNIT)
        return rounded(np.frombuffer(data, "<f4"), self._rounding).tobytes()[offset - start : offset - start + size]
