"""One process writes a folder at a time, a run's or a device's: a lock on it that ends with the process, however it ends."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from shoal.errors import StoreError

FILE_NAME: Final = "writer.lock"
HOST_HINT: Final = " (A host that its Edges have started again tells in the folder's host.log how it goes.)"
TRIES: Final = 10
"""One who only looks whether the lock is held has it for an instant: a writer does not give up at once."""
PAUSE_S: Final = 0.02


@contextmanager
def only_writer(folder: Path, *, what: str = "run", hint: str = HOST_HINT) -> Iterator[None]:
    """Holds the folder's lock while the block runs.

    Args:
        folder: whose.
        what: is in it, for the error.
        hint: what else to say where another process holds it.

    Raises:
        StoreError: another process holds it, or there is no such folder.
    """
    if not folder.is_dir():
        raise StoreError(f"Expected a run folder, got {folder}, which does not exist. `shoal runs list` shows runs.")
    path = folder / FILE_NAME
    with path.open("a+", encoding="ascii") as file:
        try:
            _lock_soon(file.fileno())
        except OSError as error:
            file.seek(0)
            who = file.read().strip() or "unknown"
            raise StoreError(
                f"The {what} in {folder} is being written by another process (number {who}). End it first, or use another "
                f"folder.{hint}"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def was_left(folder: Path) -> bool:
    """Whether the folder had a writer that has it no more: it ended, or died. Changes nothing."""
    try:
        with (folder / FILE_NAME).open("r", encoding="ascii") as file:
            _lock(file.fileno(), shared=True)  # given back when the file is closed
    except OSError:  # there is no such file, or it is held
        return False
    return True


def lock_file(descriptor: int) -> None:
    """Holds an open file's lock until it is closed. Raises OSError where another process holds it."""
    _lock_soon(descriptor)


def _lock_soon(descriptor: int) -> None:
    for tries_left in reversed(range(TRIES)):
        try:
            return _lock(descriptor)
        except OSError:
            if not tries_left:
                raise
            time.sleep(PAUSE_S)


def _lock(descriptor: int, *, shared: bool = False) -> None:
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
