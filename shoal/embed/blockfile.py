"""A file of equal blocks, read and written past the page cache, and buffers that such reads need.

Not a table: a block is bytes with a number. O_DIRECT is asked for and the file flagged `direct` if the system grants
it; elsewhere (some file systems, macOS, Windows) the page cache is in the way and `direct` is False: everything works,
reads and their times mean less. Checksums live with the owner, as a sidecar (`manifest.py`).

Writes are whole runs of blocks, unbuffered; they are durable after `sync`.
"""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EINVAL, ENOTSUP
from pathlib import Path
from typing import Final, final

import numpy as np

from shoal.errors import StoreError
from shoal.record.blobs import disk

PAGE: Final = 4096
"""Alignment of buffers, offsets and sizes that every device takes."""
_RUN_BYTES: Final = 1 << 20
"""Longest single write."""


def aligned(num_bytes: int) -> np.ndarray:
    """A zeroed buffer (num_bytes,) uint8 that begins at a page."""
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), np.uint8)[:num_bytes]


@final
class BlockFile:
    """Blocks 0..num_blocks-1 of `block_bytes` each, which is a multiple of `PAGE`. One writer, many readers."""

    def __init__(self, path: Path, block_bytes: int, *, read_only: bool = False, direct: bool = True) -> None:
        """Opens a file, which must exist.

        Args:
            direct: False reads through the page cache even where O_DIRECT could be had.
        """
        self.path, self.block_bytes = path, block_bytes
        flags = os.O_RDONLY if read_only else os.O_RDWR
        with disk(path):
            self.fd, self.direct = _open(path, flags, direct=direct)
        self._bounce = aligned(_RUN_BYTES // block_bytes * block_bytes or block_bytes)

    @classmethod
    def create(cls, path: Path, block_bytes: int, num_blocks: int, *, direct: bool = True) -> "BlockFile":
        """Makes a file of zeroed blocks whose space is allocated: a later write into it finds room."""
        if block_bytes % PAGE or block_bytes < PAGE:
            raise ValueError(f"Expected block_bytes to be a multiple of {PAGE}, got {block_bytes}.")
        with disk(path), path.open("xb") as file:
            _allocate(file.fileno(), 0, num_blocks * block_bytes)
            os.fsync(file.fileno())
        return cls(path, block_bytes, direct=direct)

    @property
    def num_blocks(self) -> int:
        with disk(self.path):
            return os.fstat(self.fd).st_size // self.block_bytes

    def grow(self, num_blocks: int) -> None:
        """Makes the file at least so long; raises StoreUnavailable, with nothing changed, where the disk is full."""
        have = self.num_blocks
        if num_blocks > have:
            with disk(self.path):
                _allocate(self.fd, have * self.block_bytes, (num_blocks - have) * self.block_bytes)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Blocks (n, block_bytes) uint8, one after another: for checks and rewrites, not for lookups."""
        made = aligned(len(numbers) * self.block_bytes).reshape(len(numbers), self.block_bytes)
        with disk(self.path):
            for start, count, place in runs(numbers, _RUN_BYTES // self.block_bytes):
                self._read_run(int(start), made[place : place + count])
        return made

    def _read_run(self, start: int, into: np.ndarray) -> None:
        flat, done = into.reshape(-1).data, 0
        while done < len(flat):
            got = os.preadv(self.fd, [flat[done:]], start * self.block_bytes + done)
            if not got:
                raise StoreError(
                    f"{self.path} ends before block {start + done // self.block_bytes}. Restore it from a copy."
                )
            done += got

    def write(self, numbers: np.ndarray, blocks: np.ndarray) -> None:
        """Writes blocks (n, block_bytes) uint8 to their numbers, neighbours together; durable after `sync`."""
        most = len(self._bounce) // self.block_bytes
        with disk(self.path):
            for start, count, place in runs(numbers, most):
                data = self._bounce[: count * self.block_bytes]
                data[:] = blocks[place : place + count].reshape(-1)
                self._write_run(start * self.block_bytes, data.data)

    def _write_run(self, offset: int, data: memoryview) -> None:
        while len(data):
            written = os.pwrite(self.fd, data, offset)
            offset, data = offset + written, data[written:]

    def sync(self) -> None:
        """Returns when all that was written is on the device."""
        with disk(self.path):
            os.fdatasync(self.fd) if hasattr(os, "fdatasync") else os.fsync(self.fd)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def runs(numbers: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers: (first number, how many, place of the first), each at most `most` long."""
    if not len(numbers):
        return
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    for first, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(numbers)], strict=True):
        for place in range(first, end, most):
            yield int(numbers[place]), min(most, end - place), place


def _open(path: Path, flags: int, *, direct: bool) -> tuple[int, bool]:
    """The descriptor, and whether it goes past the page cache."""
    wanted = getattr(os, "O_DIRECT", 0) if direct else 0
    if wanted:
        with _refused_here():
            descriptor = os.open(path, flags | wanted)
            if _reads_direct(descriptor):
                return descriptor, True
            os.close(descriptor)
    return os.open(path, flags | getattr(os, "O_BINARY", 0)), False


@contextmanager
def _refused_here() -> Iterator[None]:
    """What a file system without O_DIRECT answers is no error."""
    try:
        yield
    except OSError as error:
        if error.errno not in (EINVAL, ENOTSUP):
            raise


def _reads_direct(descriptor: int) -> bool:
    """Some systems take the flag and refuse the read."""
    try:
        os.preadv(descriptor, [aligned(PAGE).data], 0)
    except OSError as error:
        if error.errno in (EINVAL, ENOTSUP):
            return False
        raise
    return True


def _allocate(descriptor: int, offset: int, size: int) -> None:
    if size <= 0:
        return
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, offset, size)
    else:
        os.ftruncate(descriptor, offset + size)


def block_bytes_for(row_bytes: int) -> int:
    """The smallest block, 4 KiB times a power of two, that holds a row."""
    size = PAGE
    while size < row_bytes:
        size *= 2
    return size
