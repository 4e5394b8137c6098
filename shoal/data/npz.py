"""One `.npz` file: written whole or not at all, read without pickle, or only looked at.

The format is that of `np.savez`, with fixed dates, so that equal arrays make equal files. Not here: what the
arrays mean (`disk.py`, `cache.py`). Nothing is forced to the platter: these files can be made again.
"""

import os
import secrets
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shoal.data.store import Layout
from shoal.errors import DataError

_UNREADABLE = (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays, uncompressed, to a temporary file beside `path` and renames it: readers see old or new.

    Raises:
        DataError: The file cannot be written.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name, array in arrays.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asanyarray(array), allow_pickle=False)
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"Cannot write {path}: {_why(error)}. Choose a folder that can be written, with room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, np.ndarray]:
    """Reads every array.

    Raises:
        DataError: The file is missing, broken, no `.npz`, or holds Python objects.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {_field(name): _read_member(archive, name) for name in archive.namelist()}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def layout(path: Path) -> Layout:
    """Reads only the shapes and dtypes (a fraction of a millisecond a file); raises as `read` does."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {_field(name): _read_header(archive, name) for name in archive.namelist()}
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _read_member(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        array: np.ndarray = np.lib.format.read_array(member, allow_pickle=False)
        return array


def _read_header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with archive.open(name) as member:
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(member)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(member)
        else:  # version 3 is for records with names that are not ASCII
            raise ValueError(f"{name} has the .npy version {version}, expected 1.0 or 2.0")
        return shape, dtype


def _field(name: str) -> str:
    if not name.endswith(".npy"):
        raise ValueError(f"{name} is no array")
    return name.removesuffix(".npy")


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        f"Cannot read {path}: {_why(error)}. Expected an .npz file of plain arrays, as np.savez writes it "
        "(no Python objects). Write it again."
    )


def _why(error: Exception) -> str:
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error).rstrip(".")
