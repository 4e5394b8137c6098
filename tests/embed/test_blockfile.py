"""Blocks past the page cache: what is written is read, with and without O_DIRECT, by either engine."""

import os
from errno import EINVAL
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.embed import blockfile, checksum
from shoal.embed.blockfile import BlockFile, aligned, block_bytes_for, runs
from shoal.embed.reads import DAMAGED, Lanes, has_aio
from shoal.errors import StoreError

NUM = 300


def filled(folder: Path, *, direct: bool = True) -> tuple[BlockFile, np.ndarray, np.ndarray]:
    file = BlockFile.create(folder / "t.blocks", 4096, NUM, direct=direct)
    data = np.random.default_rng(0).integers(0, 256, (NUM, 4096), dtype=np.uint8)
    file.write(np.arange(NUM), data)
    file.sync()
    return file, data, checksum.of_blocks(data.view(np.uint64), np.arange(NUM))


def test_checksum_is_xxh64() -> None:
    assert int(checksum.of_words(np.empty(0, np.uint64), np.uint64(0))) == 0xEF46DB3751D8E999
    assert int(checksum.of_words(np.arange(5, dtype=np.uint64), np.uint64(7))) == 0x48BCBD5867DE7D2A  # of xxhash 3.5


def test_buffers_begin_at_a_page() -> None:
    assert aligned(5000).ctypes.data % blockfile.PAGE == 0 and len(aligned(5000)) == 5000


def test_runs_join_neighbours() -> None:
    assert list(runs(np.array([3, 4, 5, 9, 11, 12]), 2)) == [(3, 2, 0), (5, 1, 2), (9, 1, 3), (11, 2, 4)]
    assert list(runs(np.empty(0, np.int64), 2)) == []


def test_a_row_that_is_longer_than_a_page_has_larger_blocks() -> None:
    assert [block_bytes_for(size) for size in (4, 4096, 4097, 20_000)] == [4096, 4096, 8192, 32768]


@pytest.mark.parametrize("engine", ["aio", "threads"])
@pytest.mark.parametrize("direct", [True, False])
def test_what_is_written_is_read(tmp_path: Path, engine: str, direct: bool) -> None:
    if engine == "aio" and not has_aio():
        pytest.skip("this system has no Linux AIO")
    file, data, sums = filled(tmp_path, direct=direct)
    lanes = Lanes(4096, engine=engine)
    lane = lanes.take(sums)
    blocks = np.random.default_rng(1).integers(0, NUM, 100)
    assert lane.read(file.fd, blocks, sums)
    np.testing.assert_array_equal(lane.queue.buffer[:100].view(np.uint8), data[blocks])
    np.testing.assert_array_equal(file.read(blocks), data[blocks])
    lanes.give_back(lane)
    lanes.close(sums)
    file.close()


@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_a_block_that_is_not_what_was_written_is_found(tmp_path: Path, engine: str) -> None:
    file, data, sums = filled(tmp_path)
    file.write(np.array([7]), data[[8]])  # in the wrong place: each block's number is in its checksum
    lanes = Lanes(4096, engine=engine)
    lane = lanes.take(sums)
    assert not lane.read(file.fd, np.array([6, 7, 8]), sums)
    assert lane.queue.status[:3].tolist() == [1, DAMAGED, 1]
    lanes.close(sums)
    file.close()


def test_a_file_system_without_o_direct_is_flagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(EINVAL, "Invalid argument")
        return real(path, flags, *rest, **named)

    monkeypatch.setattr(os, "open", refuse)
    file, data, _ = filled(tmp_path)
    assert not file.direct
    np.testing.assert_array_equal(file.read(np.array([5])), data[[5]])
    file.close()


def test_a_file_that_ends_too_soon_says_where(tmp_path: Path) -> None:
    file, _, _ = filled(tmp_path)
    os.truncate(file.path, 4096 * 10)
    with pytest.raises(StoreError, match=r"t\.blocks ends before block 12"):
        file.read(np.array([12]))
    file.close()


def test_block_size_must_be_whole_pages(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of 4096, got 1000"):
        BlockFile.create(tmp_path / "t", 1000, 1)
