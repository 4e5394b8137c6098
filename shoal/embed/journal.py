"""An append-only file of records: each is there whole or not at all, and in order.

Record: 32 bytes of head (magic, sequence number, payload's length, checksum, each 8 bytes little-endian), the payload, and
zeros up to the next page. So no page is written twice: a device that counts writes a page sees each append once.

Guarantees:
    (1) When `append` returns, the record is on the device.
    (2) `replay` gives exactly the records that were appended, and perhaps one whose append did not return.
    (3) A damaged record before a whole one is an error, never skipped; at the end it is one that was being written.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, final

from shoal.embed import checksum
from shoal.embed.blockfile import PAGE
from shoal.errors import StoreError
from shoal.record.blobs import disk

_MAGIC: Final = 0x31_4C_4E_52_4A_4C_48_53
_HEAD: Final = struct.Struct("<QQQQ")


@final
class Journal:
    """One journal, open for appending. One writer."""

    def __init__(self, path: Path, *, sequence: int, end: int) -> None:
        """Goes on where `replay` ended: the number of records so far, and the byte after the last."""
        self.path, self._sequence, self._end = path, sequence, end
        with disk(path):
            self._fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
            if os.fstat(self._fd).st_size != end:  # what a kill left of a record
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)

    @classmethod
    def create(cls, path: Path) -> "Journal":
        """Makes an empty journal; its folder still has to be synced."""
        with disk(path), path.open("xb") as file:
            os.fsync(file.fileno())
        return cls(path, sequence=0, end=0)

    @property
    def size_bytes(self) -> int:
        return self._end

    def append(self, payload: bytes) -> int:
        """Adds a record, durably; returns the bytes written to the device.

        Raises:
            StoreUnavailable: the disk is full or fails; the journal is as before.
        """
        size = _padded(len(payload))
        data = bytearray(size)
        data[: _HEAD.size] = _HEAD.pack(_MAGIC, self._sequence, len(payload), _sum(payload, self._sequence))
        data[_HEAD.size : _HEAD.size + len(payload)] = payload
        try:
            with disk(self.path):
                _write(self._fd, memoryview(data), self._end)
                os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)
        except StoreError:
            with disk(self.path):
                os.ftruncate(self._fd, self._end)
            raise
        self._sequence, self._end = self._sequence + 1, self._end + size
        return size

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@final
class Replay:
    """The records of a journal file; when they have all been taken, `sequence` and `end` say where it goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self.sequence, self.end = path, 0, 0

    def __iter__(self) -> Iterator[bytes]:
        with disk(self._path), self._path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            while self.end < size:
                payload = _read(file.fileno(), self.end, size, self.sequence)
                if payload is None:
                    self._refuse_records_after(file.fileno(), size)
                    return
                self.end += _padded(len(payload))
                self.sequence += 1
                yield payload

    def _refuse_records_after(self, descriptor: int, size: int) -> None:
        for start in range(self.end + PAGE, size, PAGE):
            head = os.pread(descriptor, _HEAD.size, start)
            if len(head) == _HEAD.size and _HEAD.unpack(head)[0] == _MAGIC and _HEAD.unpack(head)[1] > self.sequence:
                raise StoreError(
                    f"Record {self.sequence} of {self._path}, at byte {self.end}, is damaged and others follow it. "
                    "Restore the store from a copy: updates would be lost in silence otherwise."
                )


def _read(descriptor: int, start: int, size: int, sequence: int) -> bytes | None:
    """The payload of the record at `start`, or None where none is whole."""
    head = os.pread(descriptor, _HEAD.size, start)
    if len(head) < _HEAD.size:
        return None
    magic, number, length, expected = _HEAD.unpack(head)
    if magic != _MAGIC or number != sequence or start + _padded(length) > size:
        return None
    payload = b""
    while len(payload) < length and (
        piece := os.pread(descriptor, length - len(payload), start + _HEAD.size + len(payload))
    ):
        payload += piece
    return payload if len(payload) == length and _sum(payload, sequence) == expected else None


def _padded(length: int) -> int:
    return -(-(_HEAD.size + length) // PAGE) * PAGE


def _sum(payload: bytes, sequence: int) -> int:
    return checksum.of_bytes(payload) ^ sequence


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        offset, data = offset + written, data[written:]
