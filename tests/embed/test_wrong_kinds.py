"""Arguments of the wrong kind are refused in one clear error, before anything is done."""

import subprocess
import sys
from pathlib import Path

import pytest

from shoal.embed import EmbeddingStore, TableSpec

WRONG = """
import sys
import numpy as np
from shoal.embed import EmbeddingStore, Layout, TableSpec, Tail, Trace
from shoal.embed.jax import JaxTables
from shoal.embed.sparse import RowWiseAdagrad, SparseTables
from tests.embed.builders import small_store

store, rule = small_store(sys.argv[1]), RowWiseAdagrad(dim=31, learning_rate=0.1)
tables = JaxTables(store, {"items": rule})
batch = tables.gather({"items": [1]}, None)
trace, layout = Trace.of([[1, 2]] * 20, 2000), Layout.in_id_order(2000, 32)
for wrong in (
    lambda: EmbeddingStore.open(5),
    lambda: EmbeddingStore.open(sys.argv[1], threads=2.5),
    lambda: EmbeddingStore.open(sys.argv[1], read_only="yes"),
    lambda: EmbeddingStore.create(sys.argv[1] + "/new", ["items"]),
    lambda: EmbeddingStore.create(sys.argv[1] + "/new", {"a": TableSpec(rows=3, dim=2)}, writes_per_day=float("inf")),
    lambda: store.lookup(["items"], [1]),
    lambda: store.lookup("items", [[1], [2, 3]]),
    lambda: store.lookup_bags("items", [1], "a"),
    lambda: store.lookup_bags("items", [1], [0], ["sum"]),
    lambda: store.lookup_many([1]),
    lambda: store.update("items", [1, 2], [[1.0], [1.0, 2.0]]),
    lambda: store.load("items", 5),
    lambda: store.load("items", np.zeros((2000, 32)), Layout.in_id_order(2000, 16)),
    lambda: store.place("items", [1, 2]),
    lambda: store.place("items", layout, most_blocks=0, misses=trace),
    lambda: store.place("items", layout, most_blocks=2, misses=Trace.of([[2000]], 2001)),
    lambda: store.retrain([[1, 2]]),
    lambda: store.retrain({"items": [[1, 2]]}),
    lambda: store.retrain(trace, policies="lru"),
    lambda: store.retrain(trace, effort="most"),
    lambda: store.retrain(trace, most_blocks=3, space=0.2),
    lambda: store.retrain(trace, most_blocks=3, effort="high"),
    lambda: store.retrain(trace, progress="yes"),
    lambda: store.rebalance(least_gain="a"),
    lambda: store.rebalance(least_gain=np.ones(2)),
    lambda: store.verify(repair=1),
    lambda: Trace.of([1, 2], 3),
    lambda: Trace.of([[1.5]], 3),
    lambda: Trace([0, 1], [1], 3),
    lambda: Layout.from_order("abc", 4),
    lambda: Tail(hedge="yes"),
    lambda: JaxTables("store", {"items": rule}),
    lambda: SparseTables(store, {"items": 0.1}),
    lambda: tables.load("users", np.zeros((2000, 31))),
    lambda: tables.gather([1], None),
    lambda: tables.gather({"users": [1]}, None),
    lambda: tables.prefetched([1], {"items": [1]}),
    lambda: tables.apply({"items": 1}, {}),
    lambda: tables.apply(batch, {"users": 1}),
):
    try:
        wrong()
    except Exception as error:
        print(f"{type(error).__name__}: {error}")
    else:
        print("nothing")
assert store.statistics().written_bytes == small_store(sys.argv[1] + "/twin").statistics().written_bytes
"""
SAID = """
TypeError: Expected path to be a path, got path=5.
ValueError: Expected threads to be a whole number of at least 1, got threads=2.5.
TypeError: Expected read_only to be True or False, got read_only='yes'.
TypeError: Expected tables to be a mapping of names to TableSpecs, got tables=['items'].
ValueError: Expected a finite writes_per_day, got inf. For no limit, give a large number such as 1e6.
ValueError: Expected a table of items, got ['items'].
ValueError: Expected ids of table 'items' to be an array, got lists of several lengths
TypeError: Expected offsets to be integers, got <U1. Convert them, for example with .astype(int).
ValueError: Expected mode to be one of max | mean | sum, got mode=['sum'].
TypeError: Expected ids to be a mapping of tables to ids, such as {'items': [3, 1]}, got ids=[1].
ValueError: Expected vectors of table 'items' to be an array, got lists of several lengths
TypeError: Expected vectors to be an array (rows, dim), or pieces of it one after another, got vectors=5.
ValueError: Expected a layout of 2000 rows, 32 a block, for table 'items', got 2000 rows, 16 a block.
TypeError: Expected layout to be a shoal.embed.Layout, such as Layout.from_order(order, vectors_per_block), got layout=[1, 2].
ValueError: Expected most_blocks to be a whole number of at least 1, got most_blocks=0.
DataError: Expected a trace of table 'items' with ids below 2000, got 2000.
TypeError: Expected trace to be a shoal.embed.Trace of the only table, or {table: trace}, got trace=[[1, 2]].
TypeError: Expected a shoal.embed.Trace of table 'items', got list. Make one with Trace.of([[3, 1], [4]], num_rows=2000)
TypeError: Expected policies to be some of lru, s3-fifo, w-tinylfu, in a list, got policies='lru'.
ValueError: Expected effort to be one of high | normal, got effort='most'.
ValueError: Expected no space and no effort with most_blocks, got space=0.2 and effort='normal'
ValueError: Expected no space and no effort with most_blocks, got space=0.0 and effort='high'
TypeError: Expected progress to be True (a bar), False, or a function of a Progress, got progress='yes'.
ValueError: Expected 0 <= least_gain <= 1, got least_gain='a'.
ValueError: Expected 0 <= least_gain <= 1, got least_gain=array([1., 1.]).
TypeError: Expected repair to be True or False, got repair=1.
TypeError: Expected queries to be lists of ids, such as [[3, 1], [4]]
TypeError: Expected ids to be integers, got float64.
TypeError: Expected indptr to be an int64 array of one dimension, got list. Make it with np.array(…, np.int64).
TypeError: Expected order to be integers, got <U3.
TypeError: Expected hedge to be True or False, got hedge='yes'.
TypeError: Expected store to be a shoal.embed.EmbeddingStore, got store='store'.
TypeError: Expected rule to be a rule for table 'items', such as RowWiseAdagrad(…), got rule=0.1.
ValueError: Expected a table of items, which have a rule, got 'users'.
TypeError: Expected ids to be a mapping of tables to ids of any shape, got ids=[1].
ValueError: Expected a table of items, which have a rule, got 'users'.
TypeError: Expected ids to be a function of a batch that gives {table: ids}, got ids={'items': [1]}.
TypeError: Expected batch to be what gather or prefetched gave, got batch={'items': 1}.
ValueError: Expected gradients of the batch's tables, items, got 'users'.
"""


def test_what_is_of_the_wrong_kind_is_said_in_our_words(tmp_path: Path) -> None:
    """In a process of its own: here every call is checked by its annotations already."""
    told = subprocess.run(
        [sys.executable, "-c", WRONG, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = SAID.strip().splitlines()
    assert len(told) == len(expected)
    for got, wanted in zip(told, expected, strict=True):
        assert got.startswith(wanted)


def test_names_of_tables_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    spec = TableSpec(rows=10, dim=4)
    with pytest.raises(
        ValueError, match=r"names of tables that differ in more than case, got 'A' and 'a'.* Rename one"
    ):
        EmbeddingStore.create(tmp_path / "store", {"A": spec, "a": spec})
    assert not list(tmp_path.iterdir())
