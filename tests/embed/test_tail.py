"""Late reads: a copy is asked within the account, a deadline is kept and said; the device models meet their points."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.embed import EmbeddingStore, Layout, Tail, reads
from shoal.embed.devices import DEVICES, replay_latency
from shoal.embed.tail import Latencies
from shoal.errors import StoreError
from tests.embed.builders import ROWS, small_store, vectors

needs_aio = pytest.mark.skipif(not reads.has_aio(), reason="this system has no Linux AIO")


def copied() -> Layout:
    """Every row twice: in order of id, and again in further blocks in a random order."""
    again = np.random.default_rng(0).permutation(ROWS)
    first = -(-ROWS // 32) * 32
    return Layout(np.arange(ROWS), 32, np.arange(ROWS), first + again)


def stuck(monkeypatch: pytest.MonkeyPatch, is_stuck: Callable[[int], bool]) -> list[int]:
    """Reads of some blocks never come. Returns the list of all blocks that were asked for."""
    asked: list[int] = []
    real = reads.submit

    def submit(queue: Any, fd: int, blocks: np.ndarray, first: int) -> int:
        asked.extend(blocks.tolist())
        for i, block in enumerate(blocks.tolist()):
            if is_stuck(block):
                queue.status[first + i], queue.block[first + i] = reads.WAITING, block
            else:
                real(queue, fd, blocks[i : i + 1], first + i)
        return len(blocks)

    monkeypatch.setattr(reads, "submit", submit)
    return asked


def hedging_store(folder: Path, **options: Any) -> EmbeddingStore:
    """No cache, every row twice, and latencies seen already: a read is late after 0.2 ms."""
    tail = Tail(hedge=True, quantile=0.95)
    store = small_store(folder, dram="9KB", tail=tail, **options)
    store.place("items", copied())
    for _ in range(400):
        tail.latencies.add(0.0002)
    tail.reads = 10_000
    return store


@needs_aio
def test_a_late_read_is_asked_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hedging_store(tmp_path) as store:
        home = int(store.layout("items").block_of[100])
        stuck(monkeypatch, lambda block: block == home)
        for ids in ([100], [100, 1500, 101, 7]):
            np.testing.assert_array_equal(store.lookup("items", ids), vectors()[ids])
        told = store.statistics().tables["items"]
        assert told.hedged_reads >= 2 and told.approximate == 0


@needs_aio
def test_a_late_read_of_many_is_asked_of_a_copy_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup that fills all its reads at once still has places for copies."""
    with hedging_store(tmp_path) as store:
        table = store._tables["items"]
        table.lanes = reads.Lanes(4096, depth=8)
        home = int(store.layout("items").block_of[100])
        stuck(monkeypatch, lambda block: block == home)
        ids = np.arange(100, 100 + 32 * 20, 32)  # one of each block; there is a place for the copy of one, the first
        np.testing.assert_array_equal(store.lookup("items", ids), vectors()[ids])
        assert store.statistics().tables["items"].hedged_reads >= 1


@needs_aio
def test_hedges_stay_within_the_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guarantee (1) of `tail.py`."""
    tail = Tail(hedge=True, most_extra=0.05)
    tail.reads = 100
    assert tail.may_hedge(5) and not tail.may_hedge(6)
    tail.spend(5)
    assert not tail.may_hedge(1)
    with pytest.raises(ValueError, match=r"0\.0 <= most_extra <= 0\.05"):
        Tail(most_extra=0.2)


@needs_aio
@pytest.mark.parametrize("shadow", [True, False])
def test_a_deadline_is_kept_flagged_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shadow: bool) -> None:
    """Guarantee (2) of `tail.py`: what is not flagged is exact."""
    dram = "90KB" if shadow else "9KB"
    with small_store(tmp_path, dram=dram, spec={"shadow": shadow}) as store:
        home = int(store.layout("items").block_of[100])
        stuck(monkeypatch, lambda block: block == home)
        begun = time.perf_counter()
        answer = store.lookup_within("items", [100, 1500, 101], deadline_s=0.02)
        assert 0.015 < time.perf_counter() - begun < 2
        assert answer.approximate.tolist() == [True, False, True]
        np.testing.assert_array_equal(answer.vectors[1], vectors()[1500])
        assert store.statistics().tables["items"].approximate == 2
        if shadow:  # int8: within its bound
            np.testing.assert_allclose(answer.vectors, vectors()[[100, 1500, 101]], atol=0.05)
        else:  # the mean of what came
            np.testing.assert_array_equal(answer.vectors[0], vectors()[1500])


@needs_aio
@pytest.mark.parametrize("shadow", [True, False])
def test_a_deadline_is_one_for_all_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shadow: bool) -> None:
    """Rows of rounds that were not read are flagged too, and nothing that was not read is in what stands in for them."""
    with small_store(tmp_path, dram="90KB" if shadow else "9KB", spec={"shadow": shadow}) as store:
        table = store._tables["items"]
        table.lanes = reads.Lanes(4096, depth=8)
        asked = stuck(monkeypatch, lambda block: False)
        table.tail.now_s = lambda: 1.0 if len(asked) >= 24 else 0.0
        answer = store.lookup_within("items", np.arange(1000), deadline_s=0.5)
        assert len(asked) == 24  # of 32: three rounds
        is_late = answer.approximate
        assert 1000 - 24 * 32 <= is_late.sum() <= 1000 - 16 * 32 and not is_late[: 16 * 32].any()
        assert store.statistics().tables["items"].approximate == is_late.sum()
        np.testing.assert_array_equal(answer.vectors[~is_late], vectors()[:1000][~is_late])
        stand_in = vectors()[:1000][is_late] if shadow else answer.vectors[~is_late].mean(axis=0, keepdims=True)
        late = answer.vectors[is_late]
        np.testing.assert_allclose(late, np.broadcast_to(stand_in, late.shape), atol=0.05 if shadow else 1e-6)


@needs_aio
def test_without_late_reads_a_deadline_changes_nothing(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        answer = store.lookup_within("items", np.arange(ROWS), deadline_s=60.0)
        assert not answer.approximate.any()
        np.testing.assert_array_equal(answer.vectors, vectors())


def test_a_deadline_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    with small_store(tmp_path, engine="threads") as store:
        with pytest.raises(StoreError, match="reads with threads"):
            store.lookup_within("items", [1], deadline_s=1.0)
        with pytest.raises(ValueError, match="deadline_s > 0"):
            store.lookup_within("items", [1], deadline_s=0.0)


def test_late_is_a_quantile_of_what_was_seen() -> None:
    seen = Latencies(0.95)
    for latency_s in np.random.default_rng(0).permutation(1000) / 1000:
        seen.add(float(latency_s))
    assert seen.limit_s == pytest.approx(0.95, abs=0.02)
    assert Latencies(0.95).limit_s == float("inf")


@pytest.mark.parametrize("name", DEVICES)
def test_a_model_meets_the_points_that_are_known(name: str) -> None:
    device = DEVICES[name]
    for point, q in zip(device.together, (0.5, 0.99, 0.99999), strict=True):
        assert device.draw(np.array([q]), together=True)[0] == pytest.approx(point * 1e-6, rel=1e-6)
    assert np.all(np.diff(device.draw(np.linspace(0, 0.9999, 500), together=False)) >= 0)


def test_more_reads_take_longer_and_hedges_shorten_the_tail() -> None:
    flash = DEVICES["flash"]
    few, many = (replay_latency(np.full(20_000, n), flash) for n in (5, 40))
    assert few.percentile(50) < many.percentile(50) and few.percentile(99) < many.percentile(99)
    hedged = replay_latency(np.full(20_000, 20), flash, copied=0.8)
    plain = replay_latency(np.full(20_000, 20), flash)
    assert hedged.percentile(99.9) < plain.percentile(99.9) and 0 < hedged.extra <= 0.05
    assert replay_latency(np.zeros(3, int), flash).seconds.tolist() == [0, 0, 0]
