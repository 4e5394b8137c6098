"""Who may have a store's folder open: one process that writes, or any number that read.

A lock of the operating system on `lock` in the folder: it goes when its process goes, however that ends.
"""

import os
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
    """Held from when it is made until `close`."""

    def __init__(self, folder: Path, *, write: bool) -> None:
        """Raises StoreError where another process holds a lock that does not go with it."""
        if fcntl is None:
            raise StoreError("Expected Linux or macOS for an embedding store, got a system without file locks.")
        path, self._process = folder / "lock", os.getpid()
        flags = os.O_RDWR | os.O_CREAT if write or not path.exists() else os.O_RDONLY
        with disk(path):
            self._fd = os.open(path, flags, 0o644)
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if write else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            who = "has it open" if write else "writes to it"
            raise StoreError(
                f"The embedding store {folder} cannot be opened: another process {who}. Close that one, or what "
                "this process has opened before."
            ) from error

    def close(self) -> None:
        if self._fd >= 0:
            if os.getpid() == self._process:  # a fork has the same lock, and would keep it as long as it lives
                fcntl.flock(self._fd, fcntl.LOCK_UN)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
