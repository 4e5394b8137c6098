"""Training rows of a store with the arithmetic in JAX; otherwise `sparse.py`, whose module text says how.

    >>> rows = JaxTables(store, {"items": RowWiseAdagrad(dim=32, learning_rate=0.05)})
    >>> @jax.jit
    ... def step(dense, rows, index, data):
    ...     def loss(dense, rows): ...                          # vectors of a batch: rows["items"][index["items"]]
    ...     return jax.value_and_grad(loss, (0, 1))(dense, rows)
    >>> for batch in rows.prefetched(loader, ids=lambda b: {"items": b["item"]}):
    ...     value, (dense_gradient, row_gradients) = step(dense, batch.rows, batch.index, batch.data)
    ...     rows.apply(batch, row_gradients)

Rows come padded to powers of two, so `step` compiles once for each size. JAX computes while the host reads: `step` returns
at once, and the next batch's rows are on their way already.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Generic, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.embed.sparse import Gathered, RowWiseAdagrad, RowWiseAdam, Rule, SparseTables, refuse_shapes
from shoal.embed.store import EmbeddingStore

__all__ = ["Gathered", "JaxTables", "RowWiseAdagrad", "RowWiseAdam"]

T = TypeVar("T")


@final
class JaxTables(Generic[T]):
    """Tables of a store that are trained by rows, in JAX. One thread trains."""

    def __init__(self, store: EmbeddingStore, rules: Mapping[str, Rule], *, flush_every: int = 1) -> None:
        """See `sparse.SparseTables`."""
        self._tables = SparseTables(store, rules, flush_every=flush_every)
        self._steps = {name: jax.jit(partial(_step, rule)) for name, rule in self._tables.rules.items()}

    def load(self, table: str, vectors: np.ndarray) -> None:
        """Gives a table its first vectors (rows, dim)."""
        self._tables.load(table, vectors)

    def gather(self, ids: Mapping[str, Any], data: T) -> Gathered[T]:
        """Reads the rows that a batch names: {table: ids of any shape}."""
        return self._tables.gather(ids, data)

    def prefetched(self, batches: Iterable[T], ids: Callable[[T], Mapping[str, Any]]) -> Iterator[Gathered[T]]:
        """The batches with their rows; those of the next are read while the caller works on one. Flushes at the end."""
        return self._tables.prefetched(batches, ids)

    def apply(self, batch: Gathered[Any], gradients: Mapping[str, jax.Array]) -> None:
        """Moves a batch's rows by gradients (U, dim) of `batch.rows`."""
        refuse_shapes(batch, gradients)
        moved = {name: self._steps[name](batch.stored[name], gradient) for name, gradient in gradients.items()}
        self._tables.keep(batch, moved)

    def flush(self) -> None:
        """Writes all that has changed, durably."""
        self._tables.flush()


def _step(rule: Rule, rows: jax.Array, gradients: jax.Array) -> Any:
    return rule.step(rows, gradients, jnp)
