"""Files that only grow: what is added is on the disk whole, or not at all."""

import os
from pathlib import Path


def append_for_good(path: Path, data: bytes) -> None:
    """Adds to the end of a file, which is made where it is missing; on the disk when it returns, not at all where it fails.

    Raises:
        OSError: it could not be.
    """
    is_new = not path.exists()
    # Without a buffer: closing the file would write what is left in one, after the rest was taken back.
    with path.open("ab", buffering=0) as file:
        begun, left = file.tell(), memoryview(data)
        try:
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, begun)  # else what follows would stand askew
            raise
    if is_new:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
