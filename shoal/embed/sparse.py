"""Training rows of a store: a batch takes the rows that it names, and gives back their gradients. NumPy only.

A trained row is its vector and then its optimizer's state, so one read brings both: a table with dim 32 under row-wise
Adagrad is a table of dim 33 in the store (`stored_dim`). `jax.py` has the same with arithmetic in JAX.

    >>> rows = SparseTables(store, {"items": RowWiseAdagrad(dim=32, learning_rate=0.05)})
    >>> for batch in rows.prefetched(loader, ids=lambda b: {"items": b["item"]}):
    ...     loss, gradients = step(batch.rows["items"][batch.index["items"]], batch.data)   # gradients: like batch.rows
    ...     rows.apply(batch, {"items": gradients})

While a batch is computed on, the rows of the next are read; what the first changed of them is put right when it is applied,
so a run equals one without prefetch, bit for bit. In a PyTorch program `loader` is the DataLoader (whose workers must not hold
the store: it is read here, in the main process), `torch.from_numpy` takes `batch.rows` without a copy, and `.grad.numpy()` of
it goes to `apply`.

Changed rows go to the store every `flush_every` batches, in one update a table; until then they are in memory only, and a kill
loses them: choose what a checkpoint of the rest of the model can bear.

References: Duchi, Hazan and Singer, 2011, Adagrad, JMLR 12; Kingma and Ba, 2015, Adam, arXiv 1412.6980; the row-wise forms keep
one second moment a row, as in Naumov et al., 2019, DLRM, arXiv 1906.00091, and FBGEMM. As there, rows that a batch does not
name do not move, and Adam's correction counts a row's own steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar, final, runtime_checkable

import numpy as np

from shoal import validate
from shoal.embed.arrays import array_of
from shoal.embed.codec import Codec
from shoal.embed.spec import ids_of
from shoal.embed.store import EmbeddingStore

T = TypeVar("T")
FEWEST: Final = 8
"""Rows of a batch are padded to a power of two of at least this, so that compiled steps see few shapes."""


@runtime_checkable
class Rule(Protocol):
    """How a row moves."""

    @property
    def dim(self) -> int:
        """Values of the vector."""
        ...

    @property
    def stored_dim(self) -> int:
        """Values of the vector and of its optimizer's state: the table's dim in the store."""
        ...

    def step(self, rows: Any, gradients: Any, numpy: Any) -> Any:
        """Rows (n, stored_dim) and gradients (n, dim) -> rows. `numpy` is NumPy or jax.numpy."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad:
    """One sum of mean squared gradients a row."""

    dim: int
    learning_rate: float
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        validate.whole(1, dim=self.dim)
        validate.positive(learning_rate=self.learning_rate, epsilon=self.epsilon)

    @property
    def stored_dim(self) -> int:
        return self.dim + 1

    def step(self, rows: Any, gradients: Any, numpy: Any) -> Any:
        total = rows[:, self.dim :] + (gradients * gradients).mean(axis=1, keepdims=True)
        vectors = rows[:, : self.dim] - self.learning_rate * gradients / (numpy.sqrt(total) + self.epsilon)
        return numpy.concatenate([vectors, total], axis=1)


@final
@dataclass(frozen=True, kw_only=True)
class RowWiseAdam:
    """A first moment for each value, one second moment and one count of steps a row."""

    dim: int
    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        validate.whole(1, dim=self.dim)
        validate.positive(learning_rate=self.learning_rate, epsilon=self.epsilon)
        validate.between(0, 1, b1=self.b1, b2=self.b2)

    @property
    def stored_dim(self) -> int:
        return 2 * self.dim + 2

    def step(self, rows: Any, gradients: Any, numpy: Any) -> Any:
        vectors, first = rows[:, : self.dim], rows[:, self.dim : 2 * self.dim]
        second, count = rows[:, -2:-1], rows[:, -1:] + 1.0
        first = self.b1 * first + (1 - self.b1) * gradients
        second = self.b2 * second + (1 - self.b2) * (gradients * gradients).mean(axis=1, keepdims=True)
        scale = numpy.sqrt(second / (1 - self.b2**count)) + self.epsilon
        vectors = vectors - self.learning_rate * (first / (1 - self.b1**count)) / scale
        return numpy.concatenate([vectors, first, second, count], axis=1)


@dataclass(frozen=True, eq=False)
class Gathered(Generic[T]):
    """A batch's rows. U = rows of a table, padded."""

    data: T
    """What the loader gave."""
    ids: dict[str, np.ndarray]
    """Table -> (n,) int64: the rows that the batch names, each once, rising; n <= U."""
    index: dict[str, np.ndarray]
    """Table -> for each id that was asked for (any shape), int32: its place in `rows`."""
    stored: dict[str, np.ndarray]
    """Table -> (U, stored_dim) float32: rows with their optimizer's state; zeros from n on."""
    dims: dict[str, int]

    @property
    def rows(self) -> dict[str, np.ndarray]:
        """Table -> (U, dim) float32: the vectors."""
        return {name: np.ascontiguousarray(stored[:, : self.dims[name]]) for name, stored in self.stored.items()}


@final
class SparseTables:
    """Tables of a store that are trained by rows. One thread trains."""

    def __init__(self, store: EmbeddingStore, rules: Mapping[str, Rule], *, flush_every: int = 1) -> None:
        """Raises TypeError for what is no store or rule, ValueError where a table's dim is not what its rule keeps a row."""
        validate.of_kind(EmbeddingStore, "a shoal.embed.EmbeddingStore", store=store)
        validate.of_kind(Mapping, "a mapping of tables to rules, such as {'items': RowWiseAdagrad(…)}", rules=rules)
        validate.whole(1, flush_every=flush_every)
        for name, rule in rules.items():
            if name not in store.tables:
                raise ValueError(f"Expected a table of {', '.join(store.tables)}, got {name!r}.")
            validate.of_kind(Rule, f"a rule for table {name!r}, such as RowWiseAdagrad(…)", rule=rule)
            if store.tables[name].dim != rule.stored_dim:
                raise ValueError(
                    f"Expected table {name!r} to have dim {rule.stored_dim}, {rule.dim} values and the state of "
                    f"{type(rule).__name__}, got {store.tables[name].dim}. Make it with TableSpec(dim=rule.stored_dim)."
                )
        self._store, self.rules, self._flush_every = store, dict(rules), flush_every
        self._pending: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Changed and not yet in the store."""
        self._written: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        """Written since the batch before was handed out: the one being read may have missed it."""
        self._applied = self._ahead = 0
        """Batches applied; loops that read ahead."""
        self._codecs = {name: Codec(store.tables[name].dim, store.tables[name].dtype) for name in rules}

    def load(self, table: str, vectors: np.ndarray) -> None:
        """Gives a table its first vectors (rows, dim), with the optimizer's state at zero."""
        self._refuse_others([table])
        rule, given = self.rules[table], array_of(vectors, f"vectors of table {table!r}")
        if given.ndim != 2 or given.shape[1] != rule.dim or given.dtype.kind not in "fiu":
            raise ValueError(
                f"Expected vectors of table {table!r} to be numbers of shape (rows, {rule.dim}), got {given.dtype}{list(given.shape)}."
            )
        self._store.load(table, np.pad(given.astype(np.float32), ((0, 0), (0, rule.stored_dim - rule.dim))))

    def _refuse_others(self, tables: Iterable[Any]) -> None:
        """Raises ValueError for tables that are not trained here."""
        for name in tables:
            if not isinstance(name, str) or name not in self.rules:
                raise ValueError(f"Expected a table of {', '.join(self.rules)}, which have a rule, got {name!r}.")

    def gather(self, ids: Mapping[str, Any], data: T) -> Gathered[T]:
        """Reads the rows that a batch names: {table: ids of any shape}."""
        return self._put_right(self._read(ids, data))

    def _read(self, ids: Mapping[str, Any], data: T) -> Gathered[T]:
        validate.of_kind(Mapping, "a mapping of tables to ids of any shape", ids=ids)
        self._refuse_others(ids)
        unique: dict[str, np.ndarray] = {}
        index: dict[str, np.ndarray] = {}
        for name, wanted in ids.items():
            array = array_of(wanted, f"ids of table {name!r}")
            unique[name], places = np.unique(ids_of(array.reshape(-1), name), return_inverse=True)
            index[name] = places.reshape(array.shape).astype(np.int32)
        stored = {name: padded(rows) for name, rows in self._store.lookup_many(unique).items()}
        dims = {name: self.rules[name].dim for name in unique}
        return Gathered(data, unique, index, stored, dims)

    def prefetched(self, batches: Iterable[T], ids: Callable[[T], Mapping[str, Any]]) -> Iterator[Gathered[T]]:
        """The batches with their rows; those of the next are read while the caller works on one.

        Flushes at the end; whoever leaves the loop before calls `flush`.
        """
        validate.of_kind(Iterable, "batches, one after another", batches=batches)
        validate.of_kind(Callable, "a function of a batch that gives {table: ids}", ids=ids)  # type: ignore[arg-type]
        return self._prefetched(batches, ids)

    def _prefetched(self, batches: Iterable[T], ids: Callable[[T], Mapping[str, Any]]) -> Iterator[Gathered[T]]:
        self._ahead += 1
        try:
            with ThreadPoolExecutor(1, "shoal-prefetch") as pool:
                waiting = None
                for batch in batches:
                    coming = pool.submit(self._read, ids(batch), batch)
                    if waiting is not None:
                        yield self._hand_out(waiting.result())
                    waiting = coming
                if waiting is not None:
                    yield self._hand_out(waiting.result())
        finally:
            self._ahead -= 1
            self._written = {}
        self.flush()

    def _hand_out(self, gathered: Gathered[T]) -> Gathered[T]:
        """What changed since the batch was read is put right; the next one's read began after all that was written."""
        self._put_right(gathered)
        self._written = {}
        return gathered

    def _put_right(self, gathered: Gathered[T]) -> Gathered[T]:
        for changed in (self._written, self._pending):
            for name, (ids, rows) in changed.items():
                if name in gathered.ids:
                    _patch(gathered.stored[name], gathered.ids[name], ids, rows)
        return gathered

    def apply(self, batch: Gathered[Any], gradients: Mapping[str, Any]) -> None:
        """Moves a batch's rows: gradients (U, dim) of `batch.rows`, which are sums over the places that named a row.

        Raises:
            ValueError: gradients have another shape, or a row would not be finite; no row has moved.
        """
        refuse_shapes(batch, gradients)
        self.keep(batch, {name: self._moved(name, batch.stored[name], some) for name, some in gradients.items()})

    def _moved(self, name: str, stored: np.ndarray, gradient: Any) -> np.ndarray:
        made: np.ndarray = self.rules[name].step(stored, np.asarray(gradient, np.float32), np)
        return made.astype(np.float32)

    def keep(self, batch: Gathered[Any], moved: Mapping[str, Any]) -> None:
        """A batch's rows as they are from now on, (U, stored_dim); they go to the store with the next flush, or now if it is time.

        Raises ValueError where the store could not take a row; then none is kept.
        """
        rows = {name: np.asarray(some)[: len(batch.ids[name])] for name, some in moved.items()}
        for name, some in rows.items():
            try:
                self._codecs[name].refuse(some)
            except ValueError as error:
                raise ValueError(
                    f"Expected gradients that leave rows of {name!r} finite. {error} No row of this batch has moved."
                ) from error
        for name, some in rows.items():
            self._pending[name] = _merged(self._pending.get(name), batch.ids[name], some)
        self._applied += 1
        if self._applied % self._flush_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes all that has changed, durably."""
        for name, (ids, rows) in self._pending.items():
            self._store.update(name, ids, rows)
            if self._ahead:
                self._written[name] = _merged(self._written.get(name), ids, rows)
        self._pending = {}


def refuse_shapes(batch: Gathered[Any], gradients: Mapping[str, Any]) -> None:
    """Raises TypeError or ValueError unless each gradient is (U, dim), as the rows are."""
    validate.of_kind(Gathered, "what gather or prefetched gave", batch=batch)
    validate.of_kind(Mapping, "a mapping of tables to gradients (U, dim) of batch.rows", gradients=gradients)
    if others := [name for name in gradients if name not in batch.stored]:
        raise ValueError(f"Expected gradients of the batch's tables, {', '.join(batch.stored)}, got {others[0]!r}.")
    for name, gradient in gradients.items():
        expected = len(batch.stored[name]), batch.dims[name]
        got = gradient.shape if hasattr(gradient, "shape") else array_of(gradient, f"gradients of {name!r}").shape
        if got != expected:
            raise ValueError(
                f"Expected gradients of {name!r} of shape {expected}, got {got}. Take them with respect to batch.rows."
            )


def _merged(
    old: tuple[np.ndarray, np.ndarray] | None, ids: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows by rising id; the newer of two counts."""
    if old is not None:
        kept = ~np.isin(old[0], ids)
        ids, rows = np.concatenate([old[0][kept], ids]), np.concatenate([old[1][kept], rows])
    order = np.argsort(ids)
    return ids[order], rows[order]


def padded(rows: np.ndarray) -> np.ndarray:
    """Rows (n, dim) and zeros, up to a power of two."""
    size = max(FEWEST, 1 << max(0, len(rows) - 1).bit_length())
    made = np.zeros((size, rows.shape[1]), np.float32)
    made[: len(rows)] = rows
    return made


def _patch(stored: np.ndarray, ids: np.ndarray, changed: np.ndarray, rows: np.ndarray) -> None:
    """Gives rows that changed after they were read their new values. Both ids rise."""
    if len(changed) and len(ids):
        at = np.minimum(np.searchsorted(changed, ids), len(changed) - 1)
        both = np.flatnonzero(changed[at] == ids)
        stored[both] = rows[at[both]]
