"""The cache of loaded data sets: one `.npz` each, checked against a hash of what is in it.

The hash is over names, dtypes, shapes and values, not over the file, so that the same constant checks data
fresh from any source and data from the cache, whatever wrote it. Processes that load at once each write a
file of their own and rename it: the last one wins with equal content."""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shoal.data import npz
from shoal.errors import DataError


def cache_folder() -> Path:
    """Where data sets are kept: `$SHOAL_CACHE/data`, else `shoal/data` in the platform's cache folder."""
    if chosen := os.environ.get("SHOAL_CACHE"):
        return Path(chosen) / "data"
    if sys.platform == "win32":
        default = Path.home() / "AppData" / "Local"
        return Path(os.environ.get("LOCALAPPDATA") or default) / "shoal" / "cache" / "data"
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "shoal" / "data"


def content_hash(arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the sha256, in hexadecimal, of arrays by name; the order of the names does not count."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def load(path: Path, *, sha256: str) -> dict[str, np.ndarray]:
    """Reads a cached file.

    Raises:
        DataError: Missing, unreadable, or not the content expected.
    """
    arrays = npz.read(path)
    check(arrays, sha256=sha256, what=str(path))
    return arrays


def save(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a cached file, whole or not at all.

    Raises:
        DataError: The folder cannot be written.
    """
    make_folder(path.parent)
    npz.write(path, arrays)


def make_folder(folder: Path) -> None:
    """Makes a folder for the cache if it is missing; raises DataError when that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"Cannot make the cache folder {folder}: {error.strerror}. "
            "Pass cache= or set SHOAL_CACHE to a folder that can be written."
        ) from error


def check(arrays: Mapping[str, np.ndarray], *, sha256: str, what: str) -> None:
    """Raises DataError unless the arrays are those expected; '' expects nothing of them."""
    if not sha256:
        return
    found = content_hash(arrays)
    if found != sha256:
        raise DataError(f"{what} has other content than expected: sha256 {found}, expected {sha256}.")
