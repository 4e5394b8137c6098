"""Manifest, states and journal: whole or an error that names the file."""

import os
from pathlib import Path

import numpy as np
import pytest

from shoal.embed import EmbeddingStore
from shoal.embed.journal import Journal, Replay
from shoal.embed.manifest import Manifest
from shoal.errors import StoreError
from tests.embed.builders import flip, small_store, vectors


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    small_store(tmp_path).close()
    manifest = Manifest.read(tmp_path)
    assert manifest.tables[0].name == "items" and manifest.epoch == 2
    assert manifest.write(tmp_path) == (tmp_path / "manifest.json").stat().st_size
    assert Manifest.read(tmp_path) == manifest


def test_a_folder_without_a_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="There is no embedding store in"):
        EmbeddingStore.open(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("byte", [1, 40, 300])
def test_every_flipped_bit_of_a_manifest_is_found(tmp_path: Path, byte: int) -> None:
    small_store(tmp_path).close()
    flip(tmp_path / "manifest.json", byte, bit=1)
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        EmbeddingStore.open(tmp_path)


def test_a_flipped_bit_of_a_state_is_found(tmp_path: Path) -> None:
    small_store(tmp_path).close()
    state = next(tmp_path.glob("*.state"))
    flip(state, 5000)
    with pytest.raises(StoreError, match=rf"{state.name} is damaged"):
        EmbeddingStore.open(tmp_path)


def test_a_missing_state_names_the_file(tmp_path: Path) -> None:
    small_store(tmp_path).close()
    next(tmp_path.glob("*.state")).unlink()
    with pytest.raises(StoreError, match=r"items-2\.state"):
        EmbeddingStore.open(tmp_path)


def journal_of(folder: Path, payloads: list[bytes]) -> Path:
    journal = Journal.create(folder / "j.log")
    assert sum(journal.append(payload) for payload in payloads) == journal.size_bytes
    journal.close()
    return folder / "j.log"


PAYLOADS = [b"a", b"b" * 5000, b"", b"d" * 4064]


def test_records_come_back_in_order(tmp_path: Path) -> None:
    replay = Replay(journal_of(tmp_path, PAYLOADS))
    assert list(replay) == PAYLOADS and replay.sequence == 4


@pytest.mark.parametrize("cut", [1, 4095, 4096, 5000])
def test_a_torn_last_record_is_left_out_and_written_over(tmp_path: Path, cut: int) -> None:
    path = journal_of(tmp_path, [*PAYLOADS, b"last" * 2000])
    os.truncate(path, path.stat().st_size - cut)
    replay = Replay(path)
    assert list(replay) == PAYLOADS
    journal = Journal(path, sequence=replay.sequence, end=replay.end)
    journal.append(b"anew")
    journal.close()
    assert list(Replay(path)) == [*PAYLOADS, b"anew"]


def test_a_damaged_record_before_others_is_an_error(tmp_path: Path) -> None:
    path = journal_of(tmp_path, PAYLOADS)
    flip(path, 4096 + 200)
    with pytest.raises(StoreError, match=r"Record 1 of .*j\.log, at byte 4096, is damaged and others follow"):
        list(Replay(path))


def test_a_store_with_a_damaged_journal_does_not_open(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        for seed in range(3):
            store.update("items", np.arange(50), vectors(50, seed=seed))
    flip(next(tmp_path.glob("journal-*")), 300)
    with pytest.raises(StoreError, match="Record 0 of"):
        EmbeddingStore.open(tmp_path)


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    small_store(tmp_path).close()
    for name in ("items-9.state", "journal-9.log", "manifest.json.new"):
        (tmp_path / name).write_bytes(b"half")
    EmbeddingStore.open(tmp_path).close()
    assert not list(tmp_path.glob("*9*")) and not (tmp_path / "manifest.json.new").exists()


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with small_store(tmp_path), pytest.raises(StoreError, match="another process has it open"):
        EmbeddingStore.open(tmp_path)
    with EmbeddingStore.open(tmp_path, read_only=True), EmbeddingStore.open(tmp_path, read_only=True) as reader:
        with pytest.raises(StoreError, match="opened for reading only"):
            reader.update("items", [1], vectors(1))
        with pytest.raises(StoreError, match="another process has it open"):
            EmbeddingStore.open(tmp_path)
