"""What a device has spent: updates of which it has revealed shares, and which it never offers again (docs/trust.md).

An update is known by what makes its numbers (`plan.secure.update_of`), as training again gives the same ones; not by any number of the server's. It is written down before the shares leave the device.
"""

import os
from pathlib import Path
from typing import Final

from shoal.errors import StoreError

_BYTES: Final = 32


class SpentUpdates:
    """See the module's text. Not for several processes at once."""

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: its file; None: in memory, so that a device that starts again has forgotten.

        Raises:
            StoreError: the file cannot be read.
        """
        self._path = path
        self._all: set[bytes] = set()
        if path is None or not path.exists():
            return
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StoreError(f"What this device has spent cannot be read from {path}: {error}") from error
        whole = len(data) // _BYTES * _BYTES  # what was being written when the device fell was not revealed
        self._all = {data[at : at + _BYTES] for at in range(0, whole, _BYTES)}
        if whole != len(data):
            os.truncate(path, whole)

    def __contains__(self, update: bytes) -> bool:
        return update in self._all

    def add(self, update: bytes) -> None:
        """Writes it down for good. Raises StoreError: it could not be; nothing may be revealed then."""
        if self._path is not None:
            try:
                append_for_good(self._path, update)
            except OSError as error:
                raise StoreError(f"What this device has spent cannot be written to {self._path}: {error}") from error
        self._all.add(update)


def append_for_good(path: Path, data: bytes) -> None:
    """Appends to a file, on disk when it returns; not at all where it fails. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("ab") as file:
        begun = file.tell()
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, begun)  # else what follows would stand askew
            raise
    if is_new:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
