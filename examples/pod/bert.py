"""BERT: words that were hidden are found again, from both sides; LAMB at a batch of 8,192.

    shoal train examples/pod/bert.py --data words.npz --epochs 1 --mesh slow=2,data=4 --sums bfloat16

`make("base")` is BERT-base for one accelerator, `make("full")` BERT-large with the rates of the 23.6 s run on 4,096 chips (MLPerf v0.7, Google; Kumar et al. 2020): rate 0.00288293, both betas
0.88, decay 0.0166629, warm-up of 287 steps that began 76 steps before the first, 560 steps in all. A batch says which words to find:
`place` (P,) in the row and `answer` (P,), -1 where a row has fewer. What hides them (15 % of words, 80 % as a mask) is data's business.

References: Devlin et al. 2019, BERT; You et al. 2020, Large batch optimization for deep learning: training BERT in 76 minutes (LAMB, algorithm 2).
Departures: the norm is before each part, not after it; no second sentence.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import optax

import shoal


@dataclass(frozen=True)
class Sizes:
    vocabulary: int
    row: int
    found: int
    """Most words of a row that are to be found."""
    dim: int
    layers: int
    heads: int
    batch: int


SIZES: Final = {
    "small": Sizes(256, 32, 5, 64, 2, 4, 16),
    "base": Sizes(30_522, 128, 20, 768, 12, 12, 256),
    "full": Sizes(30_522, 512, 76, 1024, 24, 16, 8192),
}
RATE, WARM, BEFORE, STEPS = 0.00288293, 287, 76, 560


def make(size: Literal["small", "base", "full"] = "small") -> shoal.Task:
    sizes = SIZES[size]
    some = ((sizes.found,), "int32")
    return shoal.Task(
        name=f"bert-{size}",
        init=lambda key: init(key, sizes),
        loss=lambda params, state, batch, key: loss(params, state, batch, sizes),
        batch={"word": ((sizes.row,), "int32"), "place": some, "answer": some},
        local=shoal.Local(optimizer=optimizer(), batch_size=sizes.batch),
    )


def rate(step: Any) -> Any:
    """Of the paper: a line up that begins before the first step, and from there a line down to nothing at the last."""
    now = jnp.asarray(step, jnp.float32)
    up = (now + BEFORE) / WARM
    return RATE * jnp.clip(jnp.minimum(up, 1.0 - now / STEPS), 0.0, 1.0)


def optimizer() -> optax.GradientTransformation:
    """LAMB; vectors (norms, biases) do not decay."""
    return optax.lamb(
        rate, b1=0.88, b2=0.88, eps=1e-6, weight_decay=0.0166629,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )  # fmt: skip


def init(key: jax.Array, sizes: Sizes) -> Any:
    dim, keys = sizes.dim, iter(jax.random.split(key, 3 + 4 * sizes.layers))

    def matrix(*shape: int) -> jax.Array:
        return 0.02 * jax.random.truncated_normal(next(keys), -2.0, 2.0, shape)

    made: dict[str, Any] = {
        "embed": matrix(sizes.vocabulary, dim), "place": matrix(sizes.row, dim), "norm": jnp.ones(dim),
        "head": matrix(dim, dim), "head_norm": jnp.ones(dim), "frequency": jnp.zeros(sizes.vocabulary),
    }  # fmt: skip
    for layer in range(sizes.layers):
        made[f"layer{layer}"] = {
            "norm1": jnp.ones(dim), "qkv": matrix(dim, 3 * dim), "out": matrix(dim, dim),
            "norm2": jnp.ones(dim), "up": matrix(dim, 4 * dim), "down": matrix(4 * dim, dim),
        }  # fmt: skip
    return made


def loss(params: Any, state: Any, batch: Any, sizes: Sizes) -> shoal.Loss:
    """Of each row the mean over its hidden words."""
    rows = batch["word"].shape[0]
    hidden = params["embed"][batch["word"].reshape(-1)] + jnp.tile(params["place"], (rows, 1))
    for layer in (params[f"layer{number}"] for number in range(sizes.layers)):
        hidden = hidden + attended(normed(hidden, layer["norm1"]) @ layer["qkv"], sizes) @ layer["out"]
        hidden = hidden + jax.nn.gelu(normed(hidden, layer["norm2"]) @ layer["up"]) @ layer["down"]
    at = (jnp.arange(rows, dtype=jnp.int32)[:, None] * sizes.row + batch["place"]).reshape(-1)
    picked = jax.nn.gelu(normed(hidden[at], params["norm"]) @ params["head"])
    scores = normed(picked, params["head_norm"]) @ params["embed"].T + params["frequency"][None]
    answer = batch["answer"].reshape(-1)
    is_asked = (answer >= 0).astype(jnp.float32).reshape(rows, -1)
    each = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.maximum(answer, 0)).reshape(rows, -1)
    right = (jnp.argmax(scores, axis=-1) == answer).astype(jnp.float32).reshape(rows, -1)
    number = jnp.maximum(is_asked.sum(axis=1), 1.0)
    found = shoal.Sum((right * is_asked).sum(axis=1) / sizes.found, is_asked.sum(axis=1) / sizes.found, (0.0, 1.0))
    return shoal.Loss((each * is_asked).sum(axis=1) / number, state, {"found": found})


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None]


def attended(qkv: jax.Array, sizes: Sizes) -> jax.Array:
    """(B T, 3 D) -> (B T, D): each word sees its whole row."""
    parts = qkv.reshape(-1, sizes.row, 3, sizes.heads, sizes.dim // sizes.heads).transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum("bhtd,bhsd->bhts", parts[0], parts[1]) * parts.shape[-1] ** -0.5
    found = jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(scores, axis=-1), parts[2])
    return found.transpose(0, 2, 1, 3).reshape(-1, sizes.dim)


task = make()
