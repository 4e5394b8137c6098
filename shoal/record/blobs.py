"""Bytes by hash in a folder: `blobs/ab/abcdef…`, one file a blob, named by its SHA-256.

Not a cache and not a database: nothing is ever changed or deleted here. A blob is written under another name in the
same folder, fsynced, renamed, and the folder fsynced; so a file under a hash's name is whole, whatever was killed when.

Cost: `put` of a new blob is two fsyncs (about 0.5 ms on an SSD), of one that exists a hash and a `stat`. `put_all` shares
the folders' fsyncs. `view` maps the file: no anonymous memory, pages come and go with the page cache.
"""

import hashlib
import mmap
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC
from pathlib import Path
from typing import Final, final

import numpy as np

from shoal.errors import StoreError, StoreUnavailable
from shoal.tensors import TensorSpec, sha256

_FULL: Final = (ENOSPC, EDQUOT, EFBIG)
_INCOMING: Final = "incoming-"
_STALE_S: Final = 3600.0
"""A file still under its first name, and unchanged for so long, was left by a process that died."""


def check_hash(hash: str) -> str:
    """Gives the hash back if it is one; so no name can leave the folder.

    Raises:
        ValueError: it is not 64 lower-case hexadecimal digits.
    """
    if len(hash) != 64 or set(hash) - set("0123456789abcdef"):
        raise ValueError(f"Expected the hash of a blob as 64 lower-case hexadecimal digits, got {hash[:80]!r}.")
    return hash


def missing(hash: str, where: object) -> StoreError:
    """The error for a blob that is not there."""
    return StoreError(f"Blob {hash} is not in {where}. Write it before the row that names it, or restore the folder.")


def check_piece(offset: int, size: int) -> None:
    """Raises ValueError unless a piece starts and ends at or after 0."""
    if offset < 0 or size < 0:
        raise ValueError(f"Expected a piece with offset >= 0 and size >= 0, got offset={offset} and size={size}.")


def check_size(size: int, spec: TensorSpec, hash: str) -> None:
    """Raises StoreError unless a blob of that size can be the tensor."""
    if size != spec.size_bytes:
        raise StoreError(
            f"Expected blob {hash} to have {spec.size_bytes} bytes for {spec.name} {spec.dtype}{list(spec.shape)}, got "
            f"{size}. Take the spec from the index that names the blob."
        )


def shaped(data: bytes | mmap.mmap, spec: TensorSpec) -> np.ndarray:
    """Bytes of the right size as the tensor that the spec says, read-only and without a copy."""
    array = np.frombuffer(data, dtype=spec.numpy_dtype).reshape(spec.shape)
    array.flags.writeable = False
    return array


@contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a path into a StoreError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            text = f"No space left to write {path}: {error.strerror}. Nothing was lost; free space and try again."
        else:
            text = f"Reading or writing {path} failed: {error.strerror}. Check the disk and the folder's permissions."
        raise StoreUnavailable(text) from error


@final
class FolderBlobs:
    """Blobs in a folder on a local disk. Safe for threads and for several processes."""

    def __init__(self, folder: Path, *, read_only: bool = False) -> None:
        """The folder is made when the first blob comes."""
        self._folder, self._read_only = folder, read_only

    def put(self, data: bytes) -> str:
        return self.put_all([data])[0]

    def put_all(self, pieces: Sequence[bytes]) -> list[str]:
        hashes = [sha256(piece) for piece in pieces]
        new = {hash: piece for hash, piece in zip(hashes, pieces, strict=True) if not self._is_whole(hash, len(piece))}
        if new:
            self._check_writable()
            with disk(self._folder):
                self._write(new)
        return hashes

    def writer(self) -> "FolderBlobWriter":
        self._check_writable()
        with disk(self._folder):
            make_folder(self._folder)
            return FolderBlobWriter(self._folder)

    def get(self, hash: str) -> bytes:
        path = self._path(hash)
        with disk(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                raise missing(hash, self._folder) from None
        if sha256(data) != hash:
            raise StoreError(
                f"Blob {path} is damaged: its {len(data)} bytes have another hash. Restore it from a copy."
            )
        return data

    def view(self, hash: str, spec: TensorSpec) -> np.ndarray:
        size = self.size(hash)
        check_size(size, spec, hash)
        if size == 0:  # an empty file cannot be mapped
            return shaped(b"", spec)
        path = self._path(hash)
        with disk(path), path.open("rb") as file:
            return shaped(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), spec)

    def read(self, hash: str, offset: int, size: int) -> bytes:
        check_piece(offset, size)
        path = self._path(hash)
        with disk(path):
            try:
                with path.open("rb", buffering=0) as file:
                    file.seek(offset)
                    return _read_all(file.fileno(), size)
            except FileNotFoundError:
                raise missing(hash, self._folder) from None

    def size(self, hash: str) -> int:
        path = self._path(hash)
        with disk(path):
            try:
                return path.stat().st_size
            except FileNotFoundError:
                raise missing(hash, self._folder) from None

    def has(self, hash: str) -> bool:
        return os.path.exists(self._name(hash))

    def forget(self, hash: str) -> None:
        self._check_writable()
        with disk(self._folder):
            self._path(hash).unlink(missing_ok=True)

    def sweep(self, *, now_s: float) -> int:
        """Deletes what writers that died have left (epoch seconds decide which is old); returns how many files."""
        if not self._folder.is_dir():
            return 0
        swept = 0
        with disk(self._folder):
            for path in self._folder.glob(f"{_INCOMING}*"):
                try:
                    if path.stat().st_mtime < now_s - _STALE_S:
                        path.unlink()
                        swept += 1
                except FileNotFoundError:
                    pass  # its writer, or another sweep, was faster
        return swept

    def _write(self, blobs: dict[str, bytes]) -> None:
        """All files first, each fsynced; then all renames; then each folder's fsync, once."""
        make_folder(self._folder)
        incoming: dict[str, Path] = {}
        try:
            for hash, data in blobs.items():
                incoming[hash] = _new_name(self._folder)
                with incoming[hash].open("xb", buffering=0) as file:
                    _write_all(file.fileno(), data)
                    os.fsync(file.fileno())
            _adopt(self._folder, incoming)
        except BaseException:
            for path in incoming.values():
                path.unlink(missing_ok=True)
            raise

    def _is_whole(self, hash: str, size: int) -> bool:
        try:
            return os.stat(self._name(hash)).st_size == size
        except OSError:
            return False

    def _check_writable(self) -> None:
        if self._read_only:
            raise StoreError(f"{self._folder} was opened for reading only. Open the store without read_only to write.")

    def _name(self, hash: str) -> str:
        check_hash(hash)
        return f"{self._folder}/{hash[:2]}/{hash}"

    def _path(self, hash: str) -> Path:
        return Path(self._name(hash))


@final
class FolderBlobWriter:
    """Writes one blob in pieces, hashing as it goes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._hash = folder, hashlib.sha256()
        self._path = _new_name(folder)
        self._file = self._path.open("xb", buffering=0)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._hash.update(data)
        try:
            with disk(self._path):
                _write_all(self._file.fileno(), data)
        except StoreError:
            self.discard()
            raise

    def finish(self) -> str:
        hash = self._hash.hexdigest()
        try:
            with disk(self._path):
                os.fsync(self._file.fileno())
                self._file.close()
                if not os.path.exists(self._folder / hash[:2] / hash):
                    _adopt(self._folder, {hash: self._path})
        finally:
            self.discard()
        return hash

    def discard(self) -> None:
        with disk(self._path):
            self._file.close()
            self._path.unlink(missing_ok=True)


def _adopt(folder: Path, incoming: dict[str, Path]) -> None:
    """Gives fsynced files their hashes as names, durably."""
    shards = {hash[:2] for hash in incoming}
    for shard in sorted(shards):
        make_folder(folder / shard)
    for hash, path in incoming.items():
        os.replace(path, folder / hash[:2] / hash)
    for shard in sorted(shards):
        sync_folder(folder / shard)


def _new_name(folder: Path) -> Path:
    return folder / f"{_INCOMING}{secrets.token_hex(8)}"


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, durably; does nothing where it exists."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    if os.name == "nt":  # Windows opens no folders; its journal orders the rename
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    rest = view.cast("B") if view.nbytes else b""  # a view with a size of 0 cannot be cast
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _read_all(descriptor: int, size: int) -> bytes:
    """`size` bytes from where the file stands, or what is left of it."""
    pieces: list[bytes] = []
    while size > 0 and (piece := os.read(descriptor, min(size, 1 << 24))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
