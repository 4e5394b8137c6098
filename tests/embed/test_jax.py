"""Training by rows: JAX and NumPy agree with each other and with plain arrays, with prefetch and without."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import dlrm
from shoal.embed import EmbeddingStore, TableSpec
from shoal.embed.jax import JaxTables
from shoal.embed.sparse import RowWiseAdagrad, RowWiseAdam, Rule, SparseTables

ROWS, DIM, BATCH = 300, 4, 16
RULES: dict[str, Rule] = {
    "adagrad": RowWiseAdagrad(dim=DIM, learning_rate=0.1),
    "adam": RowWiseAdam(dim=DIM, learning_rate=0.01),
}


def batches(count: int = 14) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    return iter([rng.integers(0, ROWS, (BATCH, 2)) // rng.integers(1, 8) for _ in range(count)])


def target(ids: np.ndarray) -> np.ndarray:
    return np.sin(ids.sum(axis=1)).astype(np.float32)


@jax.jit
def gradient_of(rows: Any, index: Any, wanted: Any) -> Any:
    """Of the squared error of the sum of a batch's vectors."""
    return jax.grad(lambda rows: jnp.mean((rows[index].sum(axis=(1, 2)) - wanted) ** 2))(rows)


@cache
def reference(name: str) -> np.ndarray:
    """Plain arrays, no store."""
    rule = RULES[name]
    rows = np.zeros((ROWS, rule.stored_dim), np.float32)
    rows[:, :DIM] = first()
    for ids in batches():
        gradient = np.asarray(gradient_of(jnp.asarray(rows[:, :DIM]), jnp.asarray(ids), jnp.asarray(target(ids))))
        named = np.unique(ids)
        rows[named] = rule.step(rows[named], gradient[named], np)
    return rows[:, :DIM]


def first() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, DIM)).astype(np.float32)


def open_tables(folder: Path, rule: Rule) -> EmbeddingStore:
    spec = TableSpec(rows=ROWS, dim=rule.stored_dim, tier="block")
    return EmbeddingStore.create(folder, {"items": spec}, dram="8KB")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("flush_every", [1, 4])
@pytest.mark.parametrize("kind", [JaxTables, SparseTables])
def test_training_in_the_store_is_training_in_memory(tmp_path: Path, name: str, flush_every: int, kind: Any) -> None:
    rule = RULES[name]
    with open_tables(tmp_path, rule) as store:
        tables = kind(store, {"items": rule}, flush_every=flush_every)
        tables.load("items", first())
        for batch in tables.prefetched(batches(), ids=lambda ids: {"items": ids}):
            made = gradient_of(jnp.asarray(batch.rows["items"]), batch.index["items"], target(batch.data))
            tables.apply(batch, {"items": made})
    with EmbeddingStore.open(tmp_path) as store:  # the last flush is durable
        found = store.lookup("items", np.arange(ROWS))[:, :DIM]
    np.testing.assert_allclose(found, reference(name), rtol=2e-4, atol=1e-5)


def test_prefetch_changes_no_bit(tmp_path: Path) -> None:
    rule, made = RULES["adam"], []
    for way in ("ahead", "in turn"):
        with open_tables(tmp_path / way, rule) as store:
            tables = SparseTables(store, {"items": rule}, flush_every=3)
            tables.load("items", first())
            ahead = tables.prefetched(batches(), ids=lambda ids: {"items": ids})
            for batch in ahead if way == "ahead" else (tables.gather({"items": ids}, ids) for ids in batches()):
                tables.apply(batch, {"items": batch.rows["items"] - np.float32(1)})
            tables.flush()
            made.append(store.lookup("items", np.arange(ROWS)))
    np.testing.assert_array_equal(*made)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    rule = RULES["adagrad"]
    with open_tables(tmp_path, rule) as store:
        with pytest.raises(
            ValueError, match="Expected table 'items' to have dim 10, 4 values and the state of RowWiseAdam, got 5"
        ):
            SparseTables(store, {"items": RULES["adam"]})
        with pytest.raises(ValueError, match="Expected a table of items, got 'users'"):
            SparseTables(store, {"users": rule})
        tables = SparseTables(store, {"items": rule})
        batch = tables.gather({"items": [1, 2]}, None)
        with pytest.raises(ValueError, match=r"Expected gradients of 'items' of shape \(8, 4\), got \(2, 4\)"):
            tables.apply(batch, {"items": np.zeros((2, 4))})


@pytest.mark.slow
def test_dlrm_in_the_store_is_as_good_as_in_memory(tmp_path: Path) -> None:
    data = dlrm.made_up(1500)
    in_store = dlrm.run(data, "store", tmp_path / "store", epochs=1, dram="24KB", flush_every=5)
    in_memory = dlrm.run(data, "memory", tmp_path / "none", epochs=1)
    assert in_store["block reads"] > 0
    assert in_store["auc"] == pytest.approx(in_memory["auc"], abs=1e-3)
    assert in_store["log_loss"] == pytest.approx(in_memory["log_loss"], abs=1e-3)


@pytest.mark.parametrize("kind", [JaxTables, SparseTables])
def test_a_step_that_leaves_no_finite_row_moves_none(tmp_path: Path, kind: Any) -> None:
    rule = RULES["adagrad"]
    with open_tables(tmp_path, rule) as store:
        tables = kind(store, {"items": rule}, flush_every=2)
        tables.load("items", first())
        batch = tables.gather({"items": [1, 2]}, None)
        bad = np.zeros((8, DIM), np.float32)
        bad[1] = np.nan
        with pytest.raises(ValueError, match="Expected gradients that leave rows of 'items' finite"):
            tables.apply(batch, {"items": jnp.asarray(bad)})
        with pytest.raises(ValueError, match=r"Expected gradients of 'items' of shape \(8, 4\), got \(1, 4\)"):
            tables.apply(batch, {"items": jnp.ones((1, DIM))})
        tables.flush()
        np.testing.assert_array_equal(store.lookup("items", np.arange(ROWS))[:, :DIM], first())
        tables.apply(tables.gather({"items": [1]}, None), {"items": jnp.ones((8, DIM))})  # and training goes on
        tables.flush()
        assert (store.lookup("items", [1])[:, :DIM] != first()[1]).all()


def test_what_is_in_the_store_is_not_kept_in_memory_too(tmp_path: Path) -> None:
    rule = RULES["adagrad"]
    with open_tables(tmp_path, rule) as store:
        tables = SparseTables(store, {"items": rule})
        for ids in batches():
            batch = tables.gather({"items": ids}, ids)
            tables.apply(batch, {"items": np.ones_like(batch.rows["items"])})
        assert not tables._written and not tables._pending
        for batch in tables.prefetched(batches(), ids=lambda ids: {"items": ids}):
            tables.apply(batch, {"items": np.ones_like(batch.rows["items"])})
        store.update("items", [1], np.zeros((1, rule.stored_dim)))
        assert not tables.gather({"items": [1]}, None).rows["items"].any()
