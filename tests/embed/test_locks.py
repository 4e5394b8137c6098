"""Who may have a store open: one that writes, or several that read, also where nobody can make the lock's file."""

import os
from errno import ENOLCK, EROFS
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.embed import EmbeddingStore, locks
from shoal.errors import StoreError, StoreUnavailable
from tests.embed.builders import small_store, vectors


@pytest.fixture
def read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store without its file `lock`, where no file can be made."""
    small_store(tmp_path).close()
    (tmp_path / "lock").unlink()
    real = os.open

    def refusing(path: Any, flags: int, *others: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(EROFS, "Read-only file system")
        return real(path, flags, *others)

    monkeypatch.setattr(os, "open", refusing)
    return tmp_path


def test_a_copy_on_a_read_only_disk_without_its_lock_is_read(read_only_folder: Path) -> None:
    with (
        EmbeddingStore.open(read_only_folder, read_only=True) as store,
        EmbeddingStore.open(read_only_folder, read_only=True) as other,
    ):
        np.testing.assert_array_equal(store.lookup("items", [3]), vectors()[[3]])
        np.testing.assert_array_equal(other.lookup("items", [3]), vectors()[[3]])
    assert not (read_only_folder / "lock").exists()
    with pytest.raises(StoreUnavailable, match="Read-only file system"):
        EmbeddingStore.open(read_only_folder)


def test_a_reader_without_the_file_keeps_writers_out(read_only_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddingStore.open(read_only_folder, read_only=True):
        monkeypatch.undo()  # the writer may make files
        with pytest.raises(StoreError, match="another process has it open"):
            EmbeddingStore.open(read_only_folder)
    with EmbeddingStore.open(read_only_folder), pytest.raises(StoreError, match="another process writes to it"):
        EmbeddingStore.open(read_only_folder, read_only=True)


def test_where_folders_cannot_be_locked_the_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_store(tmp_path).close()
    real = locks.fcntl.flock

    def only_files(descriptor: int, kind: int) -> None:
        if os.path.isdir(descriptor) and not kind & locks.fcntl.LOCK_UN:
            raise OSError(ENOLCK, "No locks available")
        real(descriptor, kind)

    monkeypatch.setattr(locks.fcntl, "flock", only_files)
    with EmbeddingStore.open(tmp_path), pytest.raises(StoreError, match="another process has it open"):
        EmbeddingStore.open(tmp_path)


def test_a_disk_without_locks_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_store(tmp_path).close()

    def none(descriptor: int, kind: int) -> None:
        raise OSError(ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with pytest.raises(StoreUnavailable, match="No locks available"):
        EmbeddingStore.open(tmp_path)
