"""A multilayer perceptron on flat images: the smallest thing that a pod trains.

    shoal train examples/pod/mlp.py --data name:fashion-mnist --epochs 3 --mesh data=8
    shoal simulate examples/pod/mlp.py --data name:fashion-mnist --users 100 --rounds 10

`make("full")` is 16 times as wide.
"""

from itertools import pairwise
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import shoal

CLASSES = 10


def make(size: Literal["small", "full"] = "small") -> shoal.Task:
    """Layers of 784, width, width and 10, by Adam."""
    width = {"small": 128, "full": 2048}[size]
    return shoal.Task(
        name=f"mlp-{size}",
        init=lambda key: init(key, (784, width, width, CLASSES)),
        loss=loss,
        predict=lambda params, state, batch: scores(params, batch),
        evaluate=lambda params, state, batch: {"accuracy": right(scores(params, batch), batch)},
        batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.adam(1e-3), batch_size={"small": 64, "full": 1024}[size]),
        about=shoal.About(purpose="Tell images apart.", data="Any 28 x 28 images of ten kinds.", licence="Apache-2.0.", limits="It sees no neighbours."),
    )  # fmt: skip


def init(key: jax.Array, widths: tuple[int, ...]) -> Any:
    keys = jax.random.split(key, len(widths) - 1)
    return {
        f"layer{n}": {"kernel": jax.random.normal(keys[n], (rows, columns)) * rows**-0.5, "bias": jnp.zeros(columns)}
        for n, (rows, columns) in enumerate(pairwise(widths))
    }


def scores(params: Any, batch: Any) -> jax.Array:
    """(B, CLASSES)."""
    image = batch["image"].astype(jnp.float32) / 255
    hidden: jax.Array = image.reshape(image.shape[0], -1)
    for number in range(len(params)):
        layer = params[f"layer{number}"]
        hidden = jax.nn.relu(hidden) if number else hidden
        hidden = hidden @ layer["kernel"] + layer["bias"][None]
    return hidden


def loss(params: Any, state: Any, batch: Any, key: jax.Array) -> shoal.Loss:
    made = scores(params, batch)
    each = optax.softmax_cross_entropy_with_integer_labels(made, batch["label"])
    return shoal.Loss(each, state, {"accuracy": right(made, batch)})


def right(made: jax.Array, batch: Any) -> shoal.Sum:
    found = (jnp.argmax(made, axis=-1) == batch["label"]).astype(jnp.float32)
    return shoal.Sum(found, jnp.ones_like(found), (0.0, 1.0))


task = make()
