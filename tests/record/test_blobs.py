"""Blobs: what is put is there, whole, under its hash, and nothing else is."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import StoreError
from shoal.record import Blobs, FolderBlobs, MemoryBlobs, put_tensors, view_tensors
from shoal.tensors import DTYPES, Index, TensorSpec, sha256, to_bytes

ABSENT = sha256(b"never written")


@pytest.fixture(params=["folder", "memory"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Blobs]:
    yield FolderBlobs(tmp_path / "deep" / "blobs") if request.param == "folder" else MemoryBlobs()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_put_is_there(blobs: Blobs) -> None:
    assert not blobs.has(ABSENT)
    hashes = blobs.put_all([b"one", b"", b"one"])
    assert list(hashes) == [sha256(b"one"), sha256(b""), sha256(b"one")]
    assert blobs.put(b"one") == hashes[0] and blobs.get(hashes[0]) == b"one" and blobs.has(hashes[0])
    assert (blobs.size(hashes[0]), blobs.size(hashes[1]), blobs.get(hashes[1])) == (3, 0, b"")


def test_a_writer_makes_one_blob(blobs: Blobs) -> None:
    writer = blobs.writer()
    for piece in (b"ab", bytearray(b"c"), memoryview(b"xdy")[1:2], memoryview(b"")):
        writer.write(piece)
    assert not blobs.has(sha256(b"abcd"))
    assert writer.finish() == sha256(b"abcd") and blobs.get(sha256(b"abcd")) == b"abcd"
    writer.discard()
    assert blobs.has(sha256(b"abcd"))


def test_a_discarded_writer_leaves_nothing(blobs: Blobs) -> None:
    writer = blobs.writer()
    writer.write(b"half")
    writer.discard()
    assert not blobs.has(sha256(b"half"))


def test_pieces(blobs: Blobs) -> None:
    hash = blobs.put(bytes(range(10)))
    assert blobs.read(hash, 2, 3) == bytes([2, 3, 4])
    assert blobs.read(hash, 8, 5) == bytes([8, 9])
    assert blobs.read(hash, 20, 5) == b""
    with pytest.raises(ValueError, match="offset >= 0"):
        blobs.read(hash, -1, 5)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_view_is_the_tensor_read_only(blobs: Blobs, dtype: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(DTYPES[dtype])
    view = blobs.view(blobs.put(to_bytes(array)), TensorSpec.of("w", array))
    np.testing.assert_array_equal(view, array)
    assert view.dtype == array.dtype and not view.flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_views_of_any_shape(blobs: Blobs, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, np.float32)
    view = blobs.view(blobs.put(to_bytes(array)), TensorSpec.of("w", array))
    assert view.shape == shape and not view.flags.writeable


def test_a_view_of_the_wrong_size_is_refused(blobs: Blobs) -> None:
    with pytest.raises(StoreError, match=r"to have 8 bytes for w float32\[2\], got 3"):
        blobs.view(blobs.put(b"123"), TensorSpec(name="w", shape=(2,), dtype="float32"))


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    spec = TensorSpec(name="w", shape=(2,), dtype="float32")
    for call in (blobs.get, blobs.size, lambda hash: blobs.view(hash, spec), lambda hash: blobs.read(hash, 0, 1)):
        with pytest.raises(StoreError, match=f"Blob {ABSENT} is not in"):
            call(ABSENT)


@settings(max_examples=30)
@given(name=st.one_of(st.text(max_size=70), st.just("../" * 20 + "etcd"), st.just("A" * 64)))
def test_a_name_that_is_no_hash_reaches_no_file(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    for blobs in (FolderBlobs(tmp_path_factory.getbasetemp()), MemoryBlobs()):
        for call in (blobs.get, blobs.has, blobs.size):
            with pytest.raises(ValueError, match="64 lower-case hexadecimal digits"):
                call(name)


def test_tensors_go_in_and_out(blobs: Blobs) -> None:
    tensors = {"b": np.zeros((), np.int64), "a": np.ones((2, 2), np.float32), "again": np.ones((2, 2), np.float32)}
    index = put_tensors(blobs, tensors)
    assert index == Index.of(tensors)
    got = view_tensors(blobs, index)
    assert list(got) == list(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(got[name], array)


def test_a_folder_holds_a_file_for_each_hash_and_nothing_else(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    hash = blobs.put(b"one")
    blobs.writer().discard()
    (written := blobs.writer()).write(b"one")
    written.finish()
    assert files(tmp_path) == [f"{hash[:2]}/{hash}"]


def test_putting_again_does_not_write_again(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    hash = blobs.put(b"one")
    before = (tmp_path / hash[:2] / hash).stat()
    blobs.put(b"one")
    after = (tmp_path / hash[:2] / hash).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def test_a_damaged_blob_is_refused(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    hash = blobs.put(b"one")
    (tmp_path / hash[:2] / hash).write_bytes(b"two")
    with pytest.raises(StoreError, match="is damaged"):
        blobs.get(hash)


def test_a_truncated_blob_is_written_again(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    hash = blobs.put(b"one")
    (tmp_path / hash[:2] / hash).write_bytes(b"")
    assert blobs.put(b"one") == hash and blobs.get(hash) == b"one"


def test_a_view_takes_no_anonymous_memory(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    array = np.zeros(1 << 20, np.float32)
    view = blobs.view(blobs.put(to_bytes(array)), TensorSpec.of("w", array))
    path = next(tmp_path.glob("*/*"))
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
    assert view.base is not None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    blobs = FolderBlobs(tmp_path)
    blobs.put(b"kept")

    def full(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    writer = blobs.writer()
    writer.write(b"in pieces")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match=r"No space left to write .* free space and try again"):
            blobs.put_all([b"one", b"two"])
        with pytest.raises(StoreError, match="No space left"):
            writer.finish()
    assert files(tmp_path) == [f"{sha256(b'kept')[:2]}/{sha256(b'kept')}"]
    assert blobs.get(blobs.put(b"one")) == b"one"


def test_what_died_writers_left_is_swept_when_old(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path)
    assert FolderBlobs(tmp_path / "none").sweep(now_s=0.0) == 0
    blobs.put(b"kept")
    left = blobs.writer()
    left.write(b"x")
    (name,) = tmp_path.glob("incoming-*")
    written_s = name.stat().st_mtime
    assert blobs.sweep(now_s=written_s + 60) == 0
    assert blobs.sweep(now_s=written_s + 7200) == 1
    assert len(files(tmp_path)) == 1
    left.discard()


def test_read_only_blobs_are_not_written(tmp_path: Path) -> None:
    hash = FolderBlobs(tmp_path).put(b"one")
    blobs = FolderBlobs(tmp_path, read_only=True)
    assert blobs.get(hash) == b"one" and blobs.put(b"one") == hash
    with pytest.raises(StoreError, match="for reading only"):
        blobs.put(b"two")
    with pytest.raises(StoreError, match="for reading only"):
        blobs.writer()
