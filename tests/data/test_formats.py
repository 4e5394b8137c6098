import gzip
import io
import subprocess
import tarfile
import zipfile

import numpy as np
import pytest

from shoal.data import formats
from shoal.errors import DataError


def idx(array: np.ndarray, code: int) -> bytes:
    big = array.astype(array.dtype.newbyteorder(">"))
    return bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + big.tobytes()


def tar(files: dict[str, bytes], packing: str = "xz") -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=f"w:{packing}") as archive:
        folder = tarfile.TarInfo("./usr")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return raw.getvalue()


def ar(files: dict[str, bytes]) -> bytes:
    """An ar archive as dpkg writes it: 60-byte headers, content padded to an even offset."""
    raw = b"!<arch>\n"
    for name, content in files.items():
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    return raw


def deb(files: dict[str, bytes], packing: str = "xz") -> bytes:
    data = f"data.tar.{packing}".rstrip(".")
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": tar({"control": b"x"}), data: tar(files, packing)})


def wheel(files: dict[str, bytes]) -> bytes:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return raw.getvalue()


FILES = {"usr/share/a.gz": gzip.compress(b"first"), "usr/share/b": b"odd", "usr/share/c": b"other"}
WANTED = ("usr/share/b", "usr/share/a.gz")


@pytest.mark.parametrize("packing", ["xz", "gz", "bz2", ""])
def test_members_of_a_debian_package(tmp_path, packing):
    (tmp_path / "p.deb").write_bytes(deb(FILES, packing))
    members = formats.read_members(tmp_path / "p.deb", WANTED)
    assert members == {"b": b"odd", "a.gz": FILES["usr/share/a.gz"]}


def test_zstandard_is_left_to_dpkg(tmp_path, monkeypatch):
    (tmp_path / "p.deb").write_bytes(ar({"debian-binary": b"2.0\n", "data.tar.zst": b"packed"}))

    def run(command, **_):
        assert command == ["/bin/dpkg-deb", "--fsys-tarfile", tmp_path / "p.deb"]
        return subprocess.CompletedProcess(command, 0, stdout=tar(FILES, ""), stderr=b"")

    monkeypatch.setattr(formats.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(formats.subprocess, "run", run)
    assert formats.read_members(tmp_path / "p.deb", WANTED)["b"] == b"odd"
    monkeypatch.setattr(formats.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="needs dpkg-deb"):
        formats.read_members(tmp_path / "p.deb", WANTED)


def test_members_of_a_wheel_and_of_a_folder(tmp_path):
    (tmp_path / "p.whl").write_bytes(wheel(FILES))
    assert formats.read_members(tmp_path / "p.whl", WANTED)["b"] == b"odd"
    (tmp_path / "a.gz").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    assert formats.read_members(tmp_path, WANTED) == {"b": b"2", "a.gz": b"1"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.deb", b"no archive", "no ar archive"),
        ("p.deb", deb(FILES)[:400], "ends within the member|header at byte"),
        ("p.deb", b"!<arch>\n" + b"x" * 70, "header at byte 8 is broken"),
        ("p.deb", ar({"control.tar.xz": b""}), r"no data.tar in it"),
        ("p.deb", ar({"data.tar.xz": b"no tar"}), r"does not give b, a.gz"),
        ("p.deb", deb({"usr/share/b": b""}), r"usr/share/a.gz is not in it"),
        ("p.whl", b"no zip", "not a zip file"),
        ("p.whl", wheel({"usr/share/b": b""}), r"usr/share/a.gz"),
        ("p.whl", None, "No such file"),
    ],
)
def test_broken_packages_are_named(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        formats.read_members(tmp_path / name, WANTED)


@pytest.mark.parametrize(("dtype", "code"), [("u1", 8), ("i1", 9), ("i2", 11), ("i4", 12), ("f4", 13), ("f8", 14)])
def test_idx(dtype, code):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    read = formats.read_idx(idx(array, code))
    np.testing.assert_array_equal(read, array)
    assert read.dtype == array.dtype and read.flags.writeable


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "starts with"),
        (b"\x1f\x8b\x08\x00", "starts with"),
        (b"\0\0\x07\x01\0\0\0\x01x", "starts with"),
        (idx(np.zeros((2, 3), np.uint8), 8)[:-1], r"18 bytes for shape \(2, 3\), got 17"),
        (b"\0\0\x08\x03\0\0", "got 6"),
    ],
)
def test_broken_idx_is_refused(raw, says):
    with pytest.raises(DataError, match=says):
        formats.read_idx(raw)


def test_a_member_of_any_package_is_read_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_MOST_BYTES", 4)
    (tmp_path / "p.whl").write_bytes(wheel({"a": b"small", "b": b"odd"}))
    (tmp_path / "p.tgz").write_bytes(tar({"a": b"small", "b": b"odd"}, "gz"))
    (tmp_path / "folder").mkdir()
    for name, content in {"a": b"small", "b": b"odd"}.items():
        (tmp_path / "folder" / name).write_bytes(content)
    for name in ("p.whl", "p.tgz", "folder"):
        assert formats.read_members(tmp_path / name, ["b"]) == {"b": b"odd"}
        with pytest.raises(DataError, match=r"does not give a: a has 5 bytes, more than 4"):
            formats.read_members(tmp_path / name, ["a"])
