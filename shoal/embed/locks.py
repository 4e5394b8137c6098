"""Who may have a store's folder open: one process that writes, or any number that read.

A lock of the operating system on `lock` in the folder (and on the folder): it goes when its process goes, however that ends.
"""

import os
from contextlib import suppress
from errno import EACCES, EPERM, EROFS
from pathlib import Path
from types import TracebackType
from typing import Self, final

from shoal.errors import StoreError
from shoal.record.blobs import disk

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@final
class FolderLock:
    """Held from when it is made until `close`.

    Where the file is missing and cannot be made (a copy on a read-only disk), readers lock the folder itself; therefore a writer
    locks both.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        """Raises StoreError where another process holds a lock that does not go with it."""
        if fcntl is None:
            raise StoreError("Expected Linux or macOS for an embedding store, got a system without file locks.")
        self._process, self._held = os.getpid(), list[int]()
        try:
            with disk(folder / "lock"):
                self._take(folder, write)
        except BaseException:
            self.close()
            raise

    def _take(self, folder: Path, write: bool) -> None:
        self._held.append(_file(folder / "lock", write=write))
        if write:
            self._held.append(os.open(folder, os.O_RDONLY))
        try:
            for descriptor in self._held:
                _lock(descriptor, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
        except BlockingIOError as error:
            who = "has it open" if write else "writes to it"
            raise StoreError(
                f"The embedding store {folder} cannot be opened: another process {who}. Close that one, or what "
                "this process has opened before."
            ) from error

    def close(self) -> None:
        for descriptor in self._held:
            if os.getpid() == self._process:  # a fork has the same lock, and would keep it as long as it lives
                with suppress(OSError):  # where nothing can be locked, nothing is
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)
        self._held = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _file(path: Path, *, write: bool) -> int:
    """A descriptor of the file, which is made where it is missing; of its folder, for a reader who may not make it."""
    if not write and path.exists():
        return os.open(path, os.O_RDONLY)
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if write or error.errno not in (EACCES, EPERM, EROFS):
            raise
        return os.open(path.parent, os.O_RDONLY)


def _lock(descriptor: int, kind: int) -> None:
    """Raises BlockingIOError where another process is in the way. Some file systems lock no folders: there the file has to do."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        if not os.path.isdir(descriptor):
            raise
