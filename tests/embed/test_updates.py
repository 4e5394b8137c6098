"""Updates, tidying, re-placement: values, space, wear, the write budget, a full disk."""

import os
from errno import ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.clock import ManualClock
from shoal.embed import EmbeddingStore, Layout, TableSpec, Trace, writer
from shoal.embed.budget import DAY_S, WriteBudget
from shoal.embed.journal import Journal
from shoal.embed.space import DELTA, HOME, Space
from shoal.embed.table import Table
from shoal.errors import StoreError, StoreUnavailable
from tests.embed.builders import DIM, ROWS, flip, small_store, vectors


def change(store: EmbeddingStore, values: np.ndarray, rng: np.random.Generator, count: int) -> None:
    """Updates random rows of the store and of the array that it should equal."""
    ids = rng.choice(ROWS, count, replace=False)
    values[ids] = rng.normal(size=(count, DIM))
    store.update("items", ids, values[ids])


def check(store: EmbeddingStore, values: np.ndarray) -> None:
    np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS)), values)


@pytest.mark.parametrize("tidy", [True, False])
def test_values_are_right_through_any_mixture_of_writing(tmp_path: Path, tidy: bool) -> None:
    rng, values, clock = np.random.default_rng(0), vectors(), ManualClock(1e9)
    with small_store(tmp_path, tidy=tidy, clock=clock, capacity="100MB") as store:
        store.place("items", _with_replicas())
        for number in range(40):
            change(store, values, rng, int(rng.integers(1, 400)))
            clock.advance(3600)
            if number % 13 == 5:
                store.compact(most_blocks=int(rng.integers(1, 60)))
            if number % 29 == 20:
                store.place("items", Layout.at_random(ROWS, 32, seed=number))
            if number % 10 == 0:
                check(store, values)
        store.compact()
        check(store, values)
    with EmbeddingStore.open(tmp_path, clock=clock) as store:
        check(store, values)
        change(store, values, rng, 10)
        check(store, values)
        assert store.verify() == {"items": []}


def _with_replicas() -> Layout:
    home = Layout.at_random(ROWS, 32, seed=4)
    return Layout(home.slot_of, 32, np.arange(300), home.num_blocks * 32 + np.arange(300))


def test_tidying_brings_rows_home(tmp_path: Path) -> None:
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, tidy=False) as store:
        for _ in range(6):
            change(store, values, rng, 400)
        assert store.statistics().tables["items"].delta_blocks > 20
        store.compact()
        told = store.statistics().tables["items"]
        assert told.delta_blocks == 0 and told.free_blocks >= told.num_blocks - -(-ROWS // told.slots_per_block)
        assert store.compact() == 0
        layout = store.layout("items")
        assert np.mean(np.abs(layout.slot_of % 32 - np.arange(ROWS) % 32)) == 0  # home, place by place
        check(store, values)


def test_rows_that_change_often_rest_in_memory(tmp_path: Path) -> None:
    values = vectors()
    with small_store(tmp_path, dram="200KB") as store:
        hot = np.arange(0, ROWS, 40)
        for version in range(6):
            values[hot] += np.float32(version)
            store.update("items", hot, values[hot])
        told = store.statistics().tables["items"]
        assert told.resident_rows >= len(hot) - 32
        before = told.block_reads
        np.testing.assert_array_equal(store.lookup("items", hot), values[hot])
        assert store.statistics().tables["items"].block_reads - before <= 1
    with EmbeddingStore.open(tmp_path) as store:
        check(store, values)


def test_an_update_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        for ids, rows, error, text in (
            (
                [1, 1],
                vectors(2),
                ValueError,
                "Expected each id of an update of table 'items' once, got 1 more than once",
            ),
            ([1, ROWS], vectors(2), ValueError, "from 0 to 1999, got 2000"),
            ([-3], vectors(1), ValueError, "got -3"),
            ([1], vectors(1, 5), ValueError, r"shape \(1, 32\) for table 'items', got \(1, 5\)"),
            ([1], np.ones((1, DIM), int), TypeError, "to be floats, got int64"),
            ([1], np.full((1, DIM), np.nan), ValueError, "finite"),
        ):
            with pytest.raises(error, match=text):
                store.update("items", ids, rows)
        store.update("items", [], vectors(0))
        check(store, vectors())
        assert store.statistics().journal_bytes == 0


@pytest.mark.parametrize("function", ["pwrite", "posix_fallocate", "fsync", "fdatasync"])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    if not hasattr(os, function):
        pytest.skip(f"os.{function} is not on this system")
    rng, values = np.random.default_rng(0), vectors()
    real, calls, fail_at = getattr(os, function), [0], [-1]

    def full(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == fail_at[0]:
            raise OSError(ENOSPC, "No space left on device")
        return real(*arguments)

    failures, clock = 0, ManualClock(1e9)
    with small_store(tmp_path, clock=clock) as store:
        monkeypatch.setattr(os, function, full)
        for number in range(1, 25):
            clock.advance(DAY_S)  # so tidying, which may meet a full disk too, has its budget
            calls[0], fail_at[0] = 0, 1 if function == "posix_fallocate" else 1 + number % 4
            before = values.copy()
            try:
                if number % 3 == 0:
                    store.place("items", Layout.at_random(ROWS, 32, seed=number))
                elif number % 7 == 0:
                    store.compact()
                else:
                    change(store, values, rng, 300)
            except StoreUnavailable as error:
                assert "No space left" in str(error) and "Nothing was lost" in str(error)
                values, failures = before, failures + 1
            fail_at[0] = -1
            check(store, values)
        assert failures >= 3
        change(store, values, rng, 300)
    with EmbeddingStore.open(tmp_path) as store:
        check(store, values)


def test_a_manifest_that_may_not_last_closes_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its name already: going on from the old one, or deleting what it names, would lose it."""
    store, real, calls = small_store(tmp_path), os.fsync, [0]

    def fail_fifth(descriptor: int) -> None:  # state, journal, manifest, folder, and the folder after the rename
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fail_fifth)
    with pytest.raises(StoreUnavailable):
        store.place("items", Layout.at_random(ROWS, 32, seed=1))
    with pytest.raises(StoreError, match="Open it again"):
        store.update("items", [1], vectors(1))
    store.close()
    with EmbeddingStore.open(tmp_path) as store:
        check(store, vectors())


@pytest.mark.parametrize("name", ["Journal.append", "apply", "commit_files", "Table.become"])
@pytest.mark.parametrize("is_late", [False, True])
def test_an_interrupted_write_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_late: bool
) -> None:
    """Ctrl-C where memory follows the disk: the store refuses to go on, and opens with the one or the other."""
    owner: Any = {"Journal.append": Journal, "Table.become": Table}.get(name, writer)
    attribute = name.split(".")[-1]
    real, values = getattr(owner, attribute), vectors()
    ids = np.arange(200)

    def interrupted(*arguments: Any, **named: Any) -> Any:
        if is_late:
            real(*arguments, **named)
        raise KeyboardInterrupt

    with small_store(tmp_path, tidy=False) as store:
        monkeypatch.setattr(owner, attribute, interrupted)
        with pytest.raises(KeyboardInterrupt):
            if owner is Journal or name == "apply":
                store.update("items", ids, np.zeros((200, DIM)))
            else:
                store.place("items", Layout.at_random(ROWS, 32, seed=1))
        monkeypatch.setattr(owner, attribute, real)
        with pytest.raises(StoreError, match="Open it again"):
            store.update("items", ids, values[ids])
        with pytest.raises(StoreError, match="Open it again"):
            store.lookup("items", ids)
    with EmbeddingStore.open(tmp_path) as store:
        if name == "apply" or (name == "Journal.append" and is_late):
            values[ids] = 0
        check(store, values)
        assert store.verify() == {"items": []}


def test_only_what_repays_its_write_is_moved(tmp_path: Path) -> None:
    layout = Layout.in_id_order(ROWS, 32)
    scattered = np.arange(0, ROWS, 60)[:32]  # asked for together, in 32 blocks
    order = np.concatenate([scattered, np.setdiff1d(np.arange(ROWS), scattered)])
    better = Layout.from_order(order, 32)
    misses = Trace.of([scattered.tolist()] * 10 + [[1, 2, 3]], ROWS)
    with small_store(tmp_path, dram="9KB", tidy=False) as store:
        store.place("items", layout)
        assert store.place("items", better, misses=misses, most_blocks=20) == 1
        check(store, vectors())
        before = store.statistics().tables["items"].block_reads
        store.lookup("items", scattered)
        assert store.statistics().tables["items"].block_reads == before + 1
        assert store.place("items", better, misses=misses, most_blocks=20) == 0
    with EmbeddingStore.open(tmp_path) as store:
        check(store, vectors())


def test_rows_that_move_keep_their_values_in_the_cache(tmp_path: Path) -> None:
    scattered = np.arange(0, ROWS, 60)[:32]
    better = Layout.from_order(np.concatenate([scattered, np.setdiff1d(np.arange(ROWS), scattered)]), 32)
    misses = Trace.of([scattered.tolist()] * 10, ROWS)
    with small_store(tmp_path, dram="200KB", tidy=False) as store:
        for _ in range(2):
            store.lookup("items", scattered)
        assert store.statistics().tables["items"].cached >= 32
        assert store.place("items", better, misses=misses, most_blocks=20) == 1
        check(store, vectors())


def test_blocks_that_moves_have_emptied_are_free(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        for seed in range(40):
            layout = Layout.at_random(ROWS, 32, seed=seed)
            misses = Trace.of([layout.ids_of()[block].tolist() for block in range(20)] * 2, ROWS)
            store.place("items", layout, misses=misses, most_blocks=20)
        table = store._tables["items"]
        held = (table.view.id_at.reshape(-1, 32) >= 0).any(axis=1)
        assert held[table.space.kind == HOME].all() and table.space.num_blocks < 350  # 860 if none were freed
        check(store, vectors())
    with EmbeddingStore.open(tmp_path) as store:
        check(store, vectors())


def test_one_damaged_block_does_not_stop_updates(tmp_path: Path) -> None:
    rng, values, clock = np.random.default_rng(0), vectors(), ManualClock(1e9)
    with small_store(tmp_path, clock=clock, writes_per_day=50.0) as store:
        block = int(store.layout("items").block_of[1000])
        flip(tmp_path / "items.blocks", block * 4096 + 77)
        others = np.setdiff1d(np.arange(ROWS), store._tables["items"].view.id_at[block * 32 : block * 32 + 32])
        for _ in range(20):
            clock.advance(3600)
            ids = rng.choice(np.append(others, 1000), 200, replace=False)
            values[ids] = rng.normal(size=(200, DIM))
            store.update("items", ids, values[ids])
        store.compact()
        np.testing.assert_array_equal(store.lookup("items", others), values[others])
        with pytest.raises(StoreError, match=f"Block {block} "):
            store.lookup("items", np.setdiff1d(np.arange(ROWS), others))
        store.update("items", np.arange(ROWS), values)  # what is lost is written again
        store.compact()
        check(store, values)
        assert store.verify() == {"items": []}


def test_the_budget_fills_with_time_and_has_a_limit() -> None:
    budget = WriteBudget(writes_per_day=2.0, capacity_bytes=1000, balance=0.0, now_s=0.0)
    assert budget.available(DAY_S / 8) == pytest.approx(250.0)
    budget.spend(400)
    assert budget.available(DAY_S / 8) == pytest.approx(-150.0)
    assert budget.available(DAY_S * 10) == pytest.approx(500.0)  # a quarter of a day


def test_a_first_load_is_not_taken_from_the_budget(tmp_path: Path) -> None:
    """A second one is, like any write; neither is forgotten when the store is opened again."""
    spec, size = TableSpec(rows=ROWS, dim=DIM, tier="block"), 63 * 4096
    clock = ManualClock(1e9)
    with EmbeddingStore.create(tmp_path, {"a": spec, "b": spec}, dram="80KB", clock=clock) as store:
        store.load("a", vectors())
        assert store.statistics().budget_bytes == 0 and store.statistics().written_bytes > size
        store.load("a", vectors())
        overdrawn = store.statistics().budget_bytes
        assert overdrawn < -size
        store.load("b", vectors())
        assert store.statistics().budget_bytes == overdrawn
    with EmbeddingStore.open(tmp_path, clock=clock) as store:
        assert store.statistics().budget_bytes == pytest.approx(overdrawn, abs=0.1 * size)


def test_a_refresh_soon_after_the_first_load_is_tidied_up(tmp_path: Path) -> None:
    """The account has what time has brought, as if the load had been none."""
    rng, values, clock = np.random.default_rng(0), vectors(), ManualClock(1e9)
    with small_store(tmp_path, clock=clock) as store:
        clock.advance(DAY_S / 4)
        before = store.statistics().written_bytes
        change(store, values, rng, 200)
        assert store.statistics().written_bytes - before > 2 * 200 * 128  # more than the rows: some went home at once
        check(store, values)


def test_an_update_stands_though_the_disk_is_full_for_tidying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, values = np.random.default_rng(0), vectors()

    def full(table: Table, most_blocks: int) -> None:
        raise StoreUnavailable("No space left")

    clock = ManualClock(1e9)
    with small_store(tmp_path, clock=clock) as store:
        clock.advance(DAY_S)
        monkeypatch.setattr(writer.deltas, "compact", full)
        change(store, values, rng, 10)
        assert store.statistics().postponed == 1
        monkeypatch.undo()
        change(store, values, rng, 100)
        assert store.statistics().postponed == 1
    with EmbeddingStore.open(tmp_path) as store:
        check(store, values)


def test_tidying_keeps_the_budget_and_wear_spreads(tmp_path: Path) -> None:
    """Guarantee (6): over ten days, what is written stays within the budget, also on the most-written 1 % of blocks."""
    rng, values, clock = np.random.default_rng(0), vectors(), ManualClock(1e9)
    capacity = 2_000_000
    days, refreshes, per_day = 10, 8, 1.0
    with small_store(tmp_path, clock=clock, capacity=capacity, writes_per_day=per_day) as store:
        start = store.statistics().written_bytes
        for _ in range(days * refreshes):
            clock.advance(DAY_S / refreshes)
            change(store, values, rng, 40)  # 2 % of rows each time
        told = store.statistics()
        written = told.written_bytes - start
        assert written <= per_day * capacity * days * 1.25 and told.budget_bytes > -0.1 * capacity
        wear = store._tables["items"].space.wear
        assert told.tables["items"].most_worn <= per_day * days * 1.5 + 2 and wear.sum() > 0
        check(store, values)


def test_a_block_that_is_being_read_is_not_free() -> None:
    space = Space(np.zeros(4, np.uint8), np.zeros(4, np.uint32))
    taken = space.take(2)
    space.use(taken, np.array([1, 1], np.uint8))
    reader = space.enter()
    space.retire(taken)
    later = space.enter()
    assert space.num_free == 2 and not set(space.take(2)) & set(taken)
    space.leave(reader)
    assert space.num_free == 2
    space.leave(later)


def test_a_replayed_store_knows_which_blocks_are_free(tmp_path: Path) -> None:
    """A block that one change retired and a later one wrote is in use, also when both are replayed."""
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, tidy=False) as store:
        for _ in range(8):
            change(store, values, rng, 300)
            store.compact()
        free = store.statistics().tables["items"].free_blocks
    with EmbeddingStore.open(tmp_path) as store:
        assert store.statistics().tables["items"].free_blocks == free
        for _ in range(8):
            change(store, values, rng, 300)
            check(store, values)


def test_a_long_journal_is_folded_into_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.embed.writer._JOURNAL_BYTES", 50_000)
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, tidy=False) as store:
        epoch = store.statistics().epoch
        for _ in range(40):
            change(store, values, rng, 100)
        assert store.statistics().epoch > epoch and len(list(tmp_path.glob("journal-*"))) == 1
    with EmbeddingStore.open(tmp_path) as store:
        check(store, values)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        with pytest.raises(ValueError, match="2000 rows, 32 a block"):
            store.place("items", Layout.in_id_order(ROWS, 16))
        with pytest.raises(ValueError, match="Expected misses"):
            store.place("items", Layout.in_id_order(ROWS, 32), most_blocks=3)
        for settings, text in (
            ({"policy": "fifo"}, "Expected policy to be one of lru"),
            ({"admission": "all"}, "Expected admission to be one of"),
            ({"cache_bytes": -1}, "Expected cache_bytes >= 0"),
            ({"rows": 5}, "Expected setting to be one of admission"),
            ({"offered": np.full(63, 33)}, "63 numbers from 0 to 32"),
            ({"offered": np.ones(3, int)}, r"got shape \(3,\)"),
        ):
            with pytest.raises(ValueError, match=text):
                store.place("items", Layout.in_id_order(ROWS, 32), **settings)  # type: ignore[arg-type]
    EmbeddingStore.open(tmp_path).close()  # nothing of it is in the manifest
    with pytest.raises(StoreError):
        EmbeddingStore.open(tmp_path / "nowhere")


def plain_homes(store: EmbeddingStore) -> list[int]:
    """The slot of each row in a HOME block that is no replica's, by looking at every slot."""
    table = store._tables["items"]
    homes = [-1] * ROWS
    for slot, id in enumerate(table.view.id_at.tolist()):
        if id >= 0 and table.space.kind[slot // 32] == HOME and slot not in table.view.replica_slots:
            assert homes[id] == -1
            homes[id] = slot
    return homes


def test_homes_are_found_wherever_rows_are(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    with small_store(tmp_path, writes_per_day=50.0) as store:
        table = store._tables["items"]
        order = rng.permutation(ROWS)
        blocks = np.concatenate(
            [np.append(order, np.full(-ROWS % 32, -1)).reshape(-1, 32), order[:320].reshape(10, 32)]
        )
        store.place("items", Layout.from_blocks(blocks, ROWS, homes=Layout.from_order(order, 32).block_of))
        for step in range(12):
            ids = rng.choice(ROWS, 150, replace=False)
            store.update("items", ids, rng.normal(size=(150, DIM)))
            if step == 6:
                store.compact(most_blocks=20)
            assert table.home_of(np.arange(ROWS)).tolist() == plain_homes(store)
        assert table.num_resident > 0 and (table.space.kind == DELTA).any()  # rows are in all kinds of places
        store.compact()
        homes = table.home_of(np.arange(ROWS))
        assert homes.tolist() == plain_homes(store) and (homes >= 0).all()
