"""DLRM on a mesh: large embedding tables split by rows along an axis, small ones whole on every device.

    Trainer(task, mesh="data=2,model=4", rules=RULES)

`make("full")` has the tables of the Criteo data as MLPerf cuts them (at most 40 million rows, 128 wide): the thirteen largest are split, as in
Google's v0.7 run (Kumar et al. 2020), by `RULES`; the others lie in one table, each at an offset of its own, so that one gather reads them all.
Tables that are larger than all accelerators together belong on disk: `examples/dlrm.py` and `shoal.embed`.

Reference: Naumov et al. 2019, Deep learning recommendation model (DLRM), arXiv 1906.00091.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal

RULES: Final = {"params/large/*": "model,-"}


@dataclass(frozen=True)
class Sizes:
    rows: tuple[int, ...]
    """Of each table."""
    large: int
    """From so many rows on a table is split."""
    dim: int
    numbers: int
    below: tuple[int, ...]
    above: tuple[int, ...]
    batch: int

    @property
    def split(self) -> list[int]:
        return [field for field, rows in enumerate(self.rows) if rows >= self.large]

    @property
    def together(self) -> list[int]:
        return [field for field, rows in enumerate(self.rows) if rows < self.large]


_CRITEO: Final = (
    40_000_000, 39_060, 17_295, 7_424, 20_265, 3, 7_122, 1_543, 63, 40_000_000, 3_067_956, 405_282, 10, 2_209, 11_938, 155, 4, 976, 14,
    40_000_000, 40_000_000, 40_000_000, 590_152, 12_973, 108, 36,
)  # fmt: skip
SIZES: Final = {
    "small": Sizes((1024, 10, 512, 7, 40), 100, 8, 4, (16, 8), (16,), 64),
    "full": Sizes(_CRITEO, 11_000, 128, 13, (512, 256, 128), (1024, 1024, 512, 256), 65_536),
}


def make(size: Literal["small", "full"] = "small") -> shoal.Task:
    sizes = SIZES[size]
    return shoal.Task(
        name=f"dlrm-{size}",
        init=lambda key: init(key, sizes),
        loss=lambda params, state, batch, key: optax.sigmoid_binary_cross_entropy(odds(params, batch, sizes), batch["click"]),
        batch={"number": ((sizes.numbers,), "float32"), "id": ((len(sizes.rows),), "int32"), "click": ((), "float32")},
        local=shoal.Local(optimizer=optax.sgd(0.1 if size == "small" else 24.0), batch_size=sizes.batch),
    )  # fmt: skip


def init(key: jax.Array, sizes: Sizes) -> Any:
    """Tables uniform within 1/sqrt(rows), as the reference has them; a split one is filled up to a multiple of 64 rows."""
    tables, below, above = jax.random.split(key, 3)

    def table(field: int, rows: int) -> jax.Array:
        bound = sizes.rows[field] ** -0.5
        return jax.random.uniform(jax.random.fold_in(tables, field), (rows, sizes.dim), minval=-bound, maxval=bound)

    fields = len(sizes.split) + len(sizes.together) + 1
    met = fields * (fields - 1) // 2 + sizes.dim
    return {
        "large": {f"table{field:02}": table(field, -(-sizes.rows[field] // 64) * 64) for field in sizes.split},
        "small": jnp.concatenate([table(field, sizes.rows[field]) for field in sizes.together]),
        "below": layers(below, (sizes.numbers, *sizes.below)),
        "above": layers(above, (met, *sizes.above, 1)),
    }


def layers(key: jax.Array, widths: tuple[int, ...]) -> Any:
    keys = jax.random.split(key, len(widths))
    return {
        f"layer{n}": {"kernel": jax.random.normal(keys[n], pair) * (2 / sum(pair)) ** 0.5, "bias": jnp.zeros(pair[1])}
        for n, pair in enumerate(pairwise(widths))
    }


def odds(params: Any, batch: Any, sizes: Sizes) -> jax.Array:
    """Logarithm of the odds of a click, (B,)."""
    starts = [0, *accumulate(sizes.rows[field] for field in sizes.together)][:-1]
    ids = batch["id"][:, np.asarray(sizes.together)] + np.asarray(starts, np.int32)[None]
    apart = [params["large"][f"table{field:02}"][batch["id"][:, field]] for field in sizes.split]
    dense = jax.nn.relu(through(params["below"], batch["number"]))
    vectors = jnp.concatenate([dense[:, None], jnp.stack(apart, axis=1), params["small"][ids]], axis=1)  # (B, F, dim)
    dots = jnp.einsum("bfd,bgd->bfg", vectors, vectors)
    first, second = np.triu_indices(vectors.shape[1], 1)
    return through(params["above"], jnp.concatenate([dense, dots[:, first, second]], axis=1))[:, 0]


def through(params: Any, x: jax.Array) -> jax.Array:
    for number in range(len(params)):
        x = jax.nn.relu(x) if number else x
        x = x @ params[f"layer{number}"]["kernel"] + params[f"layer{number}"]["bias"][None]
    return x


task = make()
