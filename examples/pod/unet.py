"""U-Net: of each point of an image whether it belongs; images split in space, for those that are too large for one accelerator.

    shoal train examples/pod/unet.py --data images.npz --epochs 10 --mesh data=2,space=4 --input image=space --input label=space

`INPUTS` splits rows of the image along an axis `space`: the compiler finds out which rows a convolution needs from its neighbours and moves those
(Kumar et al. 2020, spatial partitioning; Xu et al. 2021, GSPMD). The model says nothing of it. `make("full")` has the sizes of the paper.

Reference: Ronneberger et al. 2015, U-Net. Departures: borders are padded, so that what comes out is as large as what went in; on the way up points are repeated
and mixed by a 1 x 1 convolution; after each convolution groups of channels are normed (Wu and He, 2018), which needs no batch.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import optax

import shoal

INPUTS: Final = {"image": "space", "label": "space"}


@dataclass(frozen=True)
class Sizes:
    side: int
    width: int
    levels: int
    batch: int


SIZES: Final = {"small": Sizes(32, 8, 2, 8), "full": Sizes(512, 64, 4, 64)}


def make(size: Literal["small", "full"] = "small") -> shoal.Task:
    sizes = SIZES[size]
    return shoal.Task(
        name=f"unet-{size}",
        init=lambda key: init(key, sizes),
        loss=lambda params, state, batch, key: loss(params, state, batch, sizes),
        batch={"image": ((sizes.side, sizes.side, 1), "float32"), "label": ((sizes.side, sizes.side), "float32")},
        local=shoal.Local(optimizer=optax.adam(1e-3), batch_size=sizes.batch),
    )


def init(key: jax.Array, sizes: Sizes) -> Any:
    keys = iter(jax.random.split(key, 5 * sizes.levels + 3))

    def convolution(side: int, rows: int, columns: int) -> Any:
        kernel = jax.random.normal(next(keys), (side, side, rows, columns)) * (2 / (side * side * rows)) ** 0.5
        return {"kernel": kernel, "scale": jnp.ones(columns), "shift": jnp.zeros(columns)}

    params: dict[str, Any] = {}
    for level in range(sizes.levels + 1):
        wide = sizes.width << level
        params[f"down{level}_a"] = convolution(3, wide // 2 if level else 1, wide)
        params[f"down{level}_b"] = convolution(3, wide, wide)
    for level in range(sizes.levels):
        wide = sizes.width << level
        params[f"up{level}"] = convolution(1, 2 * wide, wide)
        params[f"up{level}_a"] = convolution(3, 2 * wide, wide)
        params[f"up{level}_b"] = convolution(3, wide, wide)
    params["head"] = convolution(1, sizes.width, 1)
    return params


def loss(params: Any, state: Any, batch: Any, sizes: Sizes) -> shoal.Loss:
    """Of each image the mean over its points."""

    def convolved(name: str, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def layer(name: str, x: jax.Array) -> jax.Array:
        x = normed(convolved(name, x), 4)
        return jax.nn.relu(x * params[name]["scale"][None, None, None] + params[name]["shift"][None, None, None])

    hidden, seen = batch["image"], []
    for level in range(sizes.levels + 1):
        hidden = layer(f"down{level}_b", layer(f"down{level}_a", hidden))
        if level < sizes.levels:
            seen.append(hidden)
            hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    for level in reversed(range(sizes.levels)):
        larger = jnp.repeat(jnp.repeat(hidden, 2, axis=1), 2, axis=2)
        hidden = jnp.concatenate([seen[level], layer(f"up{level}", larger)], axis=3)
        hidden = layer(f"up{level}_b", layer(f"up{level}_a", hidden))
    odds = convolved("head", hidden)[..., 0] + params["head"]["shift"][0]
    each = optax.sigmoid_binary_cross_entropy(odds, batch["label"])
    both = jnp.sum(jax.nn.sigmoid(odds) * batch["label"], axis=(1, 2))
    either = jnp.sum(jax.nn.sigmoid(odds) + batch["label"], axis=(1, 2))
    dice = shoal.Sum(2 * both / jnp.maximum(either, 1e-6), jnp.ones_like(both), (0.0, 1.0))
    return shoal.Loss(jnp.mean(each, axis=(1, 2)), state, {"dice": dice})


def normed(x: jax.Array, groups: int) -> jax.Array:
    """Each group of channels of each image with mean 0 and variance 1."""
    parts = x.reshape(*x.shape[:3], groups, -1)
    mean = jnp.mean(parts, axis=(1, 2, 4), keepdims=True)
    apart = parts - mean
    return (apart * jax.lax.rsqrt(jnp.mean(jnp.square(apart), axis=(1, 2, 4), keepdims=True) + 1e-5)).reshape(x.shape)


task = make()
