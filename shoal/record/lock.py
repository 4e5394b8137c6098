"""One process writes a run at a time: a lock on the run folder that ends with the process, however it ends."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shoal.errors import StoreError

FILE_NAME: Final = "writer.lock"


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the run folder's lock while the block runs.

    Raises:
        StoreError: another process holds it, or there is no such folder.
    """
    if not folder.is_dir():
        raise StoreError(f"Expected a run folder, got {folder}, which does not exist. `shoal runs list` shows runs.")
    path = folder / FILE_NAME
    with path.open("a+", encoding="ascii") as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise StoreError(
                f"The run in {folder} is being written by another process (number {who}). End it first, or use another folder."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
