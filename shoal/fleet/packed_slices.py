"""Slices of blobs as an Edge sends them: packed once, however many devices ask.

A slice of one version's tensor is the same for all of them; those of the latest versions are kept. Where a device names a tensor that it holds
of a version before, it is sent the difference, if that is shorter for the tensor's first slice.
"""

import asyncio
import logging
from collections import OrderedDict
from typing import Final, Protocol, runtime_checkable

from shoal.codec.packed import pack
from shoal.errors import StoreError

log = logging.getLogger("shoal.edge")

SLICE_BYTES: Final = 256 << 10
"""Of a slice, before it is packed."""
KEPT_CHOICES: Final = 10_000
KEPT_BYTES: Final = 256 << 20
"""Of packed slices."""


@runtime_checkable
class Readable(Protocol):
    """Bytes by hash, of the record or beside it."""

    def get(self, hash: str) -> bytes: ...
    def read(self, hash: str, offset: int, size: int) -> bytes: ...
    def size(self, hash: str) -> int: ...


_Key = tuple[str, str, str, int, int]
"""Hash, type of its elements, hash of the base or nothing, offset, size."""


class PackedSlices:
    """See the module's text. All methods belong to one event loop; the work is done in threads."""

    def __init__(self, blobs: Readable, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._blobs, self._kept_bytes = blobs, kept_bytes
        self._made: OrderedDict[_Key, bytes] = OrderedDict()
        self._made_bytes = 0
        self._shorter: dict[tuple[str, str], bool] = {}
        self._making: dict[_Key, asyncio.Task[bytes]] = {}

    async def get(self, hash: str, dtype: str, offset: int, size: int, *, base: str = "") -> tuple[bytes, bool]:
        """A packed slice, and whether it is a difference to the base. Raises StoreError: the blob cannot be read."""
        if base:
            try:
                if await self._is_shorter(hash, dtype, base, size if not offset else SLICE_BYTES):
                    return await self._get((hash, dtype, base, offset, size)), True
            except StoreError as error:  # that version is forgotten
                log.debug("no difference to %s: %s", base, error)
                self._shorter[hash, base] = False
        return await self._get((hash, dtype, "", offset, size)), False

    async def _is_shorter(self, hash: str, dtype: str, base: str, size: int) -> bool:
        if (hash, base) not in self._shorter:
            delta = await self._get((hash, dtype, base, 0, size))
            whole = await self._get((hash, dtype, "", 0, size))
            if len(self._shorter) >= KEPT_CHOICES:
                self._shorter.clear()
            self._shorter[hash, base] = len(delta) < len(whole)
        return self._shorter[hash, base]

    async def _get(self, key: _Key) -> bytes:
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        task = self._making.get(key)
        if task is None:
            task = self._making[key] = asyncio.create_task(self._make(key))
            task.add_done_callback(
                lambda made: made.cancelled() or made.exception()
            )  # heard, also where nobody waits any more
        return await asyncio.shield(task)

    async def _make(self, key: _Key) -> bytes:
        try:
            data = await asyncio.to_thread(self._pack, key)
        finally:
            del self._making[key]
        self._made[key] = data
        self._made_bytes += len(data)
        while self._made_bytes > self._kept_bytes:
            self._made_bytes -= len(self._made.popitem(last=False)[1])
        return data

    def _pack(self, key: _Key) -> bytes:
        hash, dtype, base, offset, size = key
        piece = self._blobs.read(hash, offset, size)
        return pack(piece, dtype, self._blobs.read(base, offset, size) if base else None)
