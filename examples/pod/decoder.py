"""A decoder-only language model: words in, the next word out; AdamW, or LoRA on a model that is frozen.

    shoal train examples/pod/decoder.py:task --data words.npz --epochs 1 --mesh data=8
    shoal train examples/pod/decoder.py:adapters --data words.npz --epochs 1 --mesh data=8          # learns adapters of rank 4 of attention alone

`make("full")` has the sizes of GPT-2 small: 12 layers, 768 wide, 1,024 words in a row. `Trainer(task, mesh="data=4,model=2", rules=RULES)` splits it: attention by heads
and the wide layer by columns, so that each pair of matrices needs one sum (Shoeybi et al. 2019, Megatron-LM).

Words are one dimension, B T, wherever they do not look at one another: products of two matrices are faster than of three-dimensional
arrays on a CPU, and the same elsewhere.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal

RULES: Final = {
    "params/layer*/qkv": "-,model",
    "params/layer*/out": "model,-",
    "params/layer*/up": "-,model",
    "params/layer*/down": "model,-",
}


@dataclass(frozen=True)
class Sizes:
    vocabulary: int
    row: int
    dim: int
    layers: int
    heads: int
    batch: int


SIZES: Final = {"small": Sizes(256, 32, 64, 2, 4, 16), "full": Sizes(50_257, 1024, 768, 12, 12, 512)}


def make(size: Literal["small", "full"] = "small", *, lora: int = 0) -> shoal.Task:
    """With `lora` adapters of that rank beside attention's matrices, which alone are learned then; 0: all is."""
    sizes = SIZES[size]
    row = ((sizes.row,), "int32")
    leaves = {"params/layer*/out": f"lora({lora})", "params/layer*/qkv": f"lora({lora})", "*": "frozen"} if lora else {}
    return shoal.Task(
        name=f"decoder-{size}" + (f"-lora{lora}" if lora else ""),
        init=lambda key: init(key, sizes),
        loss=lambda params, state, batch, key: losses(params, batch, sizes),
        batch={"word": row, "label": row},
        local=shoal.Local(optimizer=optimizer(), batch_size=sizes.batch),
        leaves=leaves,
    )


def optimizer() -> optax.GradientTransformation:
    """AdamW after Brown et al. 2020: the norm of a gradient is at most 1, and only matrices decay."""

    def matrices(params: Any) -> Any:
        return jax.tree.map(lambda p: p.ndim > 1, params)

    rate = optax.warmup_cosine_decay_schedule(0.0, 6e-4, 500, 20_000, 6e-5)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=matrices))


def init(key: jax.Array, sizes: Sizes) -> Any:
    """Matrices of deviation 0.02, those that add to the stream smaller by the root of their number (GPT-2)."""
    dim, keys = sizes.dim, iter(jax.random.split(key, 2 + 4 * sizes.layers))

    def matrix(*shape: int, scale: float = 0.02) -> jax.Array:
        return scale * jax.random.normal(next(keys), shape)

    small = 0.02 * (2 * sizes.layers) ** -0.5
    made: dict[str, Any] = {
        "embed": matrix(sizes.vocabulary, dim),
        "place": matrix(sizes.row, dim),
        "norm": jnp.ones(dim),
    }
    for layer in range(sizes.layers):
        made[f"layer{layer}"] = {
            "norm1": jnp.ones(dim), "qkv": matrix(dim, 3 * dim), "out": matrix(dim, dim, scale=small),
            "norm2": jnp.ones(dim), "up": matrix(dim, 4 * dim), "down": matrix(4 * dim, dim, scale=small),
        }  # fmt: skip
    return made


def losses(params: Any, batch: Any, sizes: Sizes) -> jax.Array:
    """(B,): the mean of each row over its words."""
    rows = batch["word"].shape[0]
    hidden = params["embed"][batch["word"].reshape(-1)] + jnp.tile(params["place"], (rows, 1))
    for layer in (params[f"layer{number}"] for number in range(sizes.layers)):
        hidden = hidden + attended(normed(hidden, layer["norm1"]) @ layer["qkv"], sizes) @ layer["out"]
        hidden = hidden + jax.nn.gelu(normed(hidden, layer["norm2"]) @ layer["up"]) @ layer["down"]
    scores = normed(hidden, params["norm"]) @ params["embed"].T
    each = optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"].reshape(-1))
    return jnp.mean(each.reshape(rows, -1), axis=1)


def normed(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * scale[None]


def attended(qkv: jax.Array, sizes: Sizes) -> jax.Array:
    """(B T, 3 D), head by head -> (B T, D): each word sees itself and those before it."""
    row, head = sizes.row, sizes.dim // sizes.heads
    parts = qkv.reshape(-1, row, sizes.heads, 3, head).transpose(3, 0, 2, 1, 4)
    scores = jnp.einsum("bhtd,bhsd->bhts", parts[0], parts[1]) * head**-0.5
    seen = jnp.where(np.tri(row, dtype=bool)[None, None], scores, -1e30)
    found = jnp.einsum("bhts,bhsd->bhtd", jax.nn.softmax(seen, axis=-1), parts[2])
    return found.transpose(0, 2, 1, 3).reshape(-1, sizes.dim)


task = make()
adapters = make(lora=4)
