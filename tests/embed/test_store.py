"""Lookups: right values whatever the codec, the cache, the layout and the number of threads; clear errors."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal.embed import Cache, EmbeddingStore, Layout, TableSpec, Trace
from shoal.embed.codec import DTYPES
from shoal.embed.simulate import replay
from shoal.embed.space import FREE
from shoal.embed.stored import stored_rows
from shoal.errors import StoreError
from tests.embed.builders import DIM, ROWS, flip, small_store, vectors


def replicated(vectors_per_block: int, copies: int = 200) -> Layout:
    """Rows in id order; the first `copies` rows again in blocks of their own."""
    home = np.arange(ROWS, dtype=np.int64)
    first = -(-ROWS // vectors_per_block) * vectors_per_block
    return Layout(home, vectors_per_block, np.arange(copies), first + np.arange(copies))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ["auto", "threads"])
def test_lookups_give_what_was_loaded(tmp_path: Path, dtype: Any, engine: str) -> None:
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, dtype=dtype, engine=engine) as store:
        bound = store._tables["items"].codec.error_bound(values)[:, None]
        for size in (1, 7, 500, 3000):
            ids = rng.integers(0, ROWS, size)
            assert np.all(np.abs(store.lookup("items", ids) - values[ids]) <= bound[ids])
        told = store.statistics().tables["items"]
        assert told.block_reads > 0 and told.hits > 0 and told.lookups == 3508


@pytest.mark.parametrize("policy", ["lru", "s3-fifo", "w-tinylfu"])
@pytest.mark.parametrize("admission", ["threshold", "duel"])
def test_every_cache_gives_right_values(tmp_path: Path, policy: str, admission: str) -> None:
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, spec={"policy": policy, "admission": admission}) as store:
        layout = Layout.at_random(ROWS, 32, seed=1)
        store.place("items", layout, offered=np.full(layout.num_blocks, 32))
        for _ in range(30):
            ids = rng.integers(0, ROWS, 60) ** 2 // ROWS
            np.testing.assert_array_equal(store.lookup("items", ids), values[ids])
        assert store.statistics().tables["items"].prefetched > 0


def test_block_reads_are_those_that_a_replay_foretells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    trace = Trace.of([rng.integers(0, ROWS, 40).tolist() for _ in range(100)], ROWS)
    layout = Layout.at_random(ROWS, 32, seed=3)
    with small_store(tmp_path) as store:
        offered = np.full(layout.num_blocks, 5)
        store.place("items", layout, offered=offered)
        foretold = replay(
            trace, layout, Cache("s3-fifo", store.statistics().tables["items"].cache_capacity, ROWS), offered
        )
        before = store.statistics().tables["items"].block_reads
        for query in range(len(trace)):
            store.lookup("items", np.unique(trace.ids[trace.indptr[query] : trace.indptr[query + 1]]))
        reads = store.statistics().tables["items"].block_reads - before
    # A replay takes a query's ids as they come, this test sorted: evictions differ a little.
    assert abs(reads - foretold.block_reads) <= 0.01 * foretold.block_reads


def test_duplicates_and_empty_requests(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        np.testing.assert_array_equal(store.lookup("items", [5, 5, 900, 5]), vectors()[[5, 5, 900, 5]])
        assert store.lookup("items", []).shape == (0, DIM)
        assert store.lookup("items", np.array([3], np.uint8)).shape == (1, DIM)


@pytest.mark.parametrize(
    ("ids", "error", "text"),
    [
        ([-1], ValueError, "from 0 to 1999, got -1 at place 0"),
        ([3, 2000], ValueError, "from 0 to 1999, got 2000 at place 1"),
        ([1.0], TypeError, "to be integers, got float64"),
        ([True], TypeError, "to be integers, got bool"),
        ([[1, 2]], ValueError, r"in one dimension, got shape \(1, 2\)"),
        (np.array([2**64 - 1], np.uint64), ValueError, "below 2\\*\\*63"),
    ],
)
def test_wrong_ids_are_refused(tmp_path: Path, ids: Any, error: type[Exception], text: str) -> None:
    with small_store(tmp_path) as store:
        with pytest.raises(error, match=text):
            store.lookup("items", ids)
        with pytest.raises(error):
            store.update("items", ids, vectors(2 if np.size(ids) > 1 else 1))
        with pytest.raises(ValueError, match="Expected a table of items, got 'users'"):
            store.lookup("users", [1])


def test_bags(tmp_path: Path) -> None:
    values = vectors()
    with small_store(tmp_path) as store:
        ids, offsets = [1, 2, 3, 4], [0, 0, 3, 4, 4]
        for mode, want in (("sum", np.sum), ("mean", np.mean), ("max", np.max)):
            made = store.lookup_bags("items", ids, offsets, mode)
            np.testing.assert_allclose(made[[1, 2]], [want(values[1:4], axis=0), values[4]], rtol=1e-6)
            assert not made[[0, 3, 4]].any()  # empty bags
        assert store.lookup_bags("items", [], []).shape == (0, DIM)
        assert not store.lookup_bags("items", [], [0, 0]).any()
        for wrong, text in (
            ([1], "rise from 0"),
            ([0, 3, 2], "rise from 0"),
            ([0, 5], "at most 4"),
            ([], "at least one"),
        ):
            with pytest.raises(ValueError, match=text):
                store.lookup_bags("items", ids, wrong)
        with pytest.raises(ValueError, match="mode to be one of max"):
            store.lookup_bags("items", ids, offsets, "median")


def test_tables_are_tiered_and_say_why(tmp_path: Path) -> None:
    tables = {
        "tiny": TableSpec(rows=100, dim=4),
        "kept": TableSpec(rows=300, dim=8, tier="dram"),
        "large": TableSpec(rows=5000, dim=16),
    }
    with EmbeddingStore.create(tmp_path, tables, dram="100KB") as store:
        told = store.statistics().tables
        assert (told["tiny"].tier, told["tiny"].reason) == ("dram", "its 1600 bytes are less than a 32nd of the memory")
        assert (told["kept"].tier, told["kept"].reason) == ("dram", "asked for")
        assert (told["large"].tier, told["large"].reason) == ("block", "larger than the memory that is left")
        assert sum(table.dram_bytes for table in told.values()) <= 100_000
        values = {name: vectors(table.rows, tables[name].dim) for name, table in told.items()}
        for name, array in values.items():
            assert not store.lookup(name, [0, 1]).any()  # never written
            store.load(name, array)
        store.update("kept", [7], values["tiny"][:1].repeat(2, axis=1))
        found = store.lookup_many({"tiny": [1, 99], "kept": [7], "large": [4999, 3]})
        np.testing.assert_array_equal(found["tiny"], values["tiny"][[1, 99]])
        np.testing.assert_array_equal(found["large"], values["large"][[4999, 3]])
    with EmbeddingStore.open(tmp_path) as store:
        np.testing.assert_array_equal(store.lookup("kept", [7])[0], found["kept"][0])


def test_a_table_in_memory_is_read_while_it_is_placed_anew(tmp_path: Path) -> None:
    with EmbeddingStore.create(tmp_path, {"a": TableSpec(rows=ROWS, dim=DIM, tier="dram")}, dram="1MB") as store:
        store.load("a", vectors())
        table = store._tables["a"]
        real, mirror = table.lock, table.mirror

        class Late:
            """A lock that one gets only when the writer has taken the mirror away."""

            def __enter__(self) -> None:
                real.acquire()
                table.mirror = None

            def __exit__(self, *of: object) -> None:
                real.release()

        table.lock = Late()  # type: ignore[assignment]
        np.testing.assert_array_equal(store.lookup("a", np.arange(ROWS)), vectors())
        table.lock, table.mirror = real, mirror


def test_memory_that_does_not_suffice_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="Expected dram to hold the tables of tier dram and the shadows, 1600 bytes, got 1000"
    ):
        EmbeddingStore.create(tmp_path, {"a": TableSpec(rows=100, dim=4, tier="dram")}, dram=1000)
    with pytest.raises(ValueError, match="dram as a size like 512MB"):
        EmbeddingStore.create(tmp_path, {"a": TableSpec(rows=100, dim=4)}, dram="lots")
    with pytest.raises(ValueError, match="table name"):
        EmbeddingStore.create(tmp_path, {"../a": TableSpec(rows=100, dim=4)})
    for options, error, text in (
        ({"threads": 0}, ValueError, "threads"),
        ({"engine": "uring"}, ValueError, "engine"),
        ({"engin": "aio"}, TypeError, "engin"),
        ({"read_only": True}, ValueError, "no read_only"),
    ):
        with pytest.raises(error, match=text):
            EmbeddingStore.create(tmp_path, {"a": TableSpec(rows=100, dim=4)}, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())  # and nothing is made


def test_pieces_make_a_table_and_must_be_as_many_as_its_rows(tmp_path: Path) -> None:
    values = vectors()
    with small_store(tmp_path) as store:
        store.load("items", (values[first : first + 333] * 2 for first in range(0, ROWS, 333)))
        np.testing.assert_array_equal(store.lookup("items", [0, 1500]), values[[0, 1500]] * 2)
        with pytest.raises(ValueError, match="Expected 2000 vectors for table 'items', got 10"):
            store.load("items", iter([values[:10]]))
        with pytest.raises(ValueError, match="Expected 2000 vectors for table 'items', got at least 2010"):
            store.load("items", [values, values[:10]])
        with pytest.raises(ValueError, match=r"arrays of numbers \(n, 32\), got float32\[2000, 5\]"):
            store.load("items", [values[:, :5]])
        with pytest.raises(ValueError, match=r"Expected vectors of shape \(2000, 32\)"):
            store.load("items", values[:10])
        np.testing.assert_array_equal(store.lookup("items", [0, 1500]), values[[0, 1500]] * 2)


def damage(store: EmbeddingStore, id: int) -> int:
    """Flips a bit of the block that holds a row; its number."""
    block = int(store.layout("items").block_of[id])
    flip(store._tables["items"].path, block * 4096 + 77)
    return block


def test_a_damaged_block_is_found_and_named(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        block = damage(store, 1000)
        with pytest.raises(
            StoreError, match=rf"Block {block} of .*items\.blocks is damaged .* row 1000 of table 'items'"
        ):
            store.lookup("items", [3, 1000])
        np.testing.assert_array_equal(store.lookup("items", [3, 100]), vectors()[[3, 100]])
        assert store.verify() == {"items": [block]}
        told = store.statistics().tables["items"]
        assert (told.damaged_blocks, told.rescued_rows) == (1, 0)


def test_a_damaged_block_is_served_from_a_copy_and_repaired(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        store.place("items", replicated(32))
        block = damage(store, 40)  # rows 32 to 63 have replicas
        for _ in range(3):
            np.testing.assert_array_equal(store.lookup("items", [40, 41]), vectors()[[40, 41]])
        store.lookup("items", np.arange(300, 700))
        np.testing.assert_array_equal(store.lookup("items", np.arange(30, 70)), vectors()[30:70])
        assert store.statistics().tables["items"].rescued_rows > 0
        assert store.verify() == {"items": [block]}
        assert store.verify(repair=True) == {"items": []} == store.verify()
    with EmbeddingStore.open(tmp_path) as store:
        np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS)), vectors())


def test_copies_in_a_block_that_was_repaired_are_gone(tmp_path: Path) -> None:
    rng, values = np.random.default_rng(0), vectors()
    with small_store(tmp_path, dram="9KB") as store:
        store.place("items", replicated(32))
        flip(tmp_path / "items.blocks", int(store._tables["items"].view.replica_slots[0]) // 32 * 4096 + 77)
        assert store.verify(repair=True) == {"items": []}
        for _ in range(4):  # the freed block is written again, with other rows
            ids = rng.choice(np.arange(400, ROWS), 300, replace=False)
            values[ids] = rng.normal(size=(300, DIM))
            store.update("items", ids, values[ids])
            store.compact()
            np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS)), values)
    with EmbeddingStore.open(tmp_path) as store:
        np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS)), values)


def test_what_another_thread_has_freed_meanwhile_is_not_repaired(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        table = store._tables["items"]
        block = damage(store, 40)
        store.update("items", np.arange(ROWS), vectors())
        store.compact()
        written = store.statistics().journal_bytes
        assert table.space.kind[block] == FREE and store._repair(table, block)
        assert store.statistics().journal_bytes == written and not table.space._retired


def test_replicas_save_reads(tmp_path: Path) -> None:
    layout = Layout.at_random(ROWS, 32, seed=0)
    chosen = np.arange(0, ROWS, 63)[:32]
    copies = Layout(layout.slot_of, 32, chosen, layout.num_blocks * 32 + np.arange(32))
    with small_store(tmp_path, dram="9KB") as store:  # the memory of hot rows leaves no cache
        store.place("items", copies)
        before = store.statistics().tables["items"].block_reads
        np.testing.assert_array_equal(store.lookup("items", chosen), vectors()[chosen])
        assert store.statistics().tables["items"].block_reads == before + 1
        store.update("items", chosen[:5], np.zeros((5, DIM)))  # these replicas are out of date now
        assert not store.lookup("items", chosen[:5]).any()
        np.testing.assert_array_equal(store.lookup("items", chosen[5:]), vectors()[chosen[5:]])


def test_many_readers_while_rows_change(tmp_path: Path) -> None:
    """Guarantee (5): no row is ever a mixture of two versions, nor older than when the lookup began."""
    versions = np.zeros(ROWS, np.int64)
    failures: list[str] = []
    done = threading.Event()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not done.is_set():
            ids = rng.integers(0, ROWS, 200)
            before = versions[ids].copy()
            rows = store.lookup("items", ids)
            if np.any(rows != rows[:, :1]) or np.any(rows[:, 0] < before):
                failures.append(f"{ids[np.any(rows != rows[:, :1], axis=1)]}")

    with small_store(tmp_path) as store:
        store.load("items", np.zeros((ROWS, DIM), np.float32))
        readers = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for reader in readers:
            reader.start()
        rng = np.random.default_rng(9)
        for version in range(1, 40):
            ids = rng.choice(ROWS, 150, replace=False)
            store.update("items", ids, np.full((150, DIM), version, np.float32))
            versions[ids] = version
            if version % 10 == 0:
                store.compact()
            if version == 25:
                store.place("items", Layout.at_random(ROWS, 32, seed=version))
        done.set()
        for reader in readers:
            reader.join()
        np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS))[:, 0], versions)
    assert not failures


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.lookup("items", [1])
    with pytest.raises(StoreError, match=r"There is an embedding store in .* already"):
        EmbeddingStore.create(tmp_path, {"a": TableSpec(rows=1, dim=1)})


def test_closing_waits_for_lookups_and_refuses_later_ones(tmp_path: Path) -> None:
    store = small_store(tmp_path)
    table = store._tables["items"]
    closing = threading.Thread(target=store.close)
    with table.reading():  # a lookup that has begun
        closing.start()
        while not table._is_closed:
            pass
        with pytest.raises(StoreError, match="is closed"):
            table.rows_of(np.array([1]))
        rows = stored_rows(table, np.arange(10))  # its file is still open
        assert closing.is_alive()
    closing.join()
    np.testing.assert_array_equal(table.codec.decode(rows), vectors()[:10])
    with pytest.raises(StoreError, match="is closed"):
        store.lookup("items", [1])
    store.close()  # again: nothing happens


def test_lookups_of_many_threads_end_well_when_the_store_closes(tmp_path: Path) -> None:
    store, right, wrong = small_store(tmp_path, dram="20KB"), vectors(), []
    are_busy = threading.Barrier(5)

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in itertools.count():
            if number == 20:
                are_busy.wait()
            ids = rng.integers(0, len(right), 64)
            try:
                found = store.lookup("items", ids)
            except StoreError as error:
                if "is closed" not in str(error):
                    wrong.append(str(error))
                return
            if not np.array_equal(found, right[ids]):
                wrong.append("other values")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    are_busy.wait()
    store.close()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_that_lost_their_manifest_are_not_written_over(tmp_path: Path) -> None:
    small_store(tmp_path).close()
    before = (tmp_path / "items.blocks").read_bytes()
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"items\.blocks is not empty, though there is no manifest\.json beside it"):
        small_store(tmp_path)
    assert (tmp_path / "items.blocks").read_bytes() == before


@pytest.mark.parametrize("dram", ["512", "1e3", "1e400MB", "0MB", True])
def test_memory_without_a_unit_is_refused(tmp_path: Path, dram: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected dram .* got"):
        EmbeddingStore.create(tmp_path / "store", {"a": TableSpec(rows=100, dim=4)}, dram=dram)
    assert not list(tmp_path.iterdir())


def test_values_beyond_float32_are_refused_without_a_warning(tmp_path: Path) -> None:
    with small_store(tmp_path) as store, pytest.raises(ValueError, match="got inf"):
        store.update("items", [1], np.full((1, DIM), 1e300))


def test_copies_are_told(tmp_path: Path) -> None:
    with small_store(tmp_path) as store:
        assert store.statistics().tables["items"].copies == 0
        store.place("items", replicated(32))
        assert store.statistics().tables["items"].copies == 200
        store.update("items", [3, 1000], np.ones((2, DIM)))
        assert store.statistics().tables["items"].copies == 199
