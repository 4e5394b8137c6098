"""Three small nets with the optimizers that large ones of their kind take, for `pod_bytes`; nobody trains them.

An MLP with momentum, a decoder-only transformer with LAMB, and a residual convolutional net with batch norm and LARS. Sizes are such that biases
are not all multiples of the number of members: there is padding to count. Those that rules split can be cut along another dimension; one that
cannot would be kept whole (`shoal/pod/layout.py`), and neither its optimizer nor its sum would be any smaller.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

import shoal

WIDTH: Final = 252
VOCABULARY, LENGTH, DIM, HEADS, LAYERS = 1000, 32, 64, 4, 2
CHANNELS: Final = (16, 32, 64)
BATCH: Final = 64


@dataclass(frozen=True)
class Net:
    """A task, and how its tensors are split along `model`."""

    name: str
    task: shoal.Task
    rules: Mapping[str, str]


def _normal(key: jax.Array, *shape: int) -> jax.Array:
    made: jax.Array = jax.random.normal(key, shape) * (2.0 / prod(shape[:-1])) ** 0.5
    return made


def mlp() -> Net:
    """784 to 10 through two layers."""
    sizes = (784, WIDTH, WIDTH, 10)

    def init(key: jax.Array) -> Any:
        return {
            f"layer{n}": {"kernel": _normal(key, *pair), "bias": jnp.zeros(pair[1])}
            for n, pair in enumerate(pairwise(sizes))
        }

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        x = batch["image"]
        for n in range(len(sizes) - 1):
            x = x @ params[f"layer{n}"]["kernel"] + params[f"layer{n}"]["bias"][None]
            x = jax.nn.relu(x) if n < len(sizes) - 2 else x
        return optax.softmax_cross_entropy_with_integer_labels(x, batch["label"])

    task = shoal.Task(
        name="mlp", init=init, loss=loss, batch={"image": ((784,), "float32"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.1, momentum=0.9), batch_size=BATCH),
    )  # fmt: skip
    return Net("MLP, momentum", task, {"params/layer0/kernel": "-,model", "params/layer1/kernel": "model,-"})


def transformer() -> Net:
    """Two layers that look back, pre-norm, with LAMB."""

    def init(key: jax.Array) -> Any:
        layer = {
            "attend": {"in": _normal(key, DIM, 3 * DIM), "out": _normal(key, DIM, DIM)}, "scale1": jnp.ones(DIM), "scale2": jnp.ones(DIM),
            "up": {"kernel": _normal(key, DIM, 4 * DIM), "bias": jnp.zeros(4 * DIM)}, "down": {"kernel": _normal(key, 4 * DIM, DIM), "bias": jnp.zeros(DIM)},
        }  # fmt: skip
        words = _normal(key, VOCABULARY, DIM)
        return {
            "words": words, "places": jnp.zeros((LENGTH, DIM)), "bias": jnp.zeros(VOCABULARY), "temperature": jnp.ones(()),
            **{f"layer{n}": layer for n in range(LAYERS)},
        }  # fmt: skip

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        x = params["words"][batch["word"]] + params["places"][None]
        for n in range(LAYERS):
            x = _block(params[f"layer{n}"], x)
        scores = params["temperature"] * (x @ params["words"].T) + params["bias"][None, None]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, batch["next"]), axis=1)

    task = shoal.Task(
        name="transformer", init=init, loss=loss, batch={"word": ((LENGTH,), "int32"), "next": ((LENGTH,), "int32")},
        local=shoal.Local(optimizer=optax.lamb(1e-3, weight_decay=0.01), batch_size=BATCH),
    )  # fmt: skip
    rules = {"*/attend/in": "-,model", "*/attend/out": "model,-", "*/up/kernel": "-,model", "*/down/kernel": "model,-"}
    return Net("transformer, LAMB", task, rules)


def _block(layer: Any, x: Any) -> Any:
    y = _normed(x) * layer["scale1"][None, None]
    heads = (y @ layer["attend"]["in"]).reshape(*x.shape[:2], 3, HEADS, DIM // HEADS)
    query, given, value = (heads[:, :, n] for n in range(3))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, given) / (DIM // HEADS) ** 0.5
    seen = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, jnp.full_like(scores, -1e9)), axis=-1)
    x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape) @ layer["attend"]["out"]
    y = _normed(x) * layer["scale2"][None, None]
    y = jax.nn.gelu(y @ layer["up"]["kernel"] + layer["up"]["bias"][None, None])
    return x + y @ layer["down"]["kernel"] + layer["down"]["bias"][None, None]


def _normed(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def resnet() -> Net:
    """A first convolution and three residual blocks, batch norm, with LARS."""

    def init(key: jax.Array) -> Any:
        params: dict[str, Any] = {"first": _normal(key, 3, 3, 3, CHANNELS[0]), "out": {"kernel": _normal(key, CHANNELS[-1], 10), "bias": jnp.zeros(10)}}  # fmt: skip
        state = {}
        before = CHANNELS[0]
        for n, channels in enumerate(CHANNELS):
            params[f"block{n}"] = {
                "one": _normal(key, 3, 3, before, channels), "two": _normal(key, 3, 3, channels, channels), "around": _normal(key, 1, 1, before, channels),
                "scale": jnp.ones(channels), "shift": jnp.zeros(channels),
            }  # fmt: skip
            state[f"block{n}"] = {"mean": jnp.zeros(channels), "variance": jnp.ones(channels)}
            before = channels
        return shoal.Variables(params, state)

    def loss(params: Any, state: Any, batch: Any, key: Any) -> shoal.Loss:
        x = _convolved(batch["image"], params["first"], 1)
        after = {}
        for n in range(len(CHANNELS)):
            x, after[f"block{n}"] = _residual(params[f"block{n}"], state[f"block{n}"], x, 1 if n == 0 else 2)
        scores = jnp.mean(x, axis=(1, 2)) @ params["out"]["kernel"] + params["out"]["bias"][None]
        return shoal.Loss(optax.softmax_cross_entropy_with_integer_labels(scores, batch["label"]), after, {})

    task = shoal.Task(
        name="resnet", init=init, loss=loss, batch={"image": ((16, 16, 3), "float32"), "label": ((), "int32")}, heeds_mask=False,
        local=shoal.Local(optimizer=optax.lars(0.1, weight_decay=1e-4), batch_size=BATCH),
    )  # fmt: skip
    return Net("ResNet, LARS", task, {"*/block*/one": "-,-,-,model", "*/block*/two": "-,-,model,-"})


def _convolved(x: Any, kernel: Any, stride: int) -> Any:
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _residual(block: Any, state: Any, x: Any, stride: int) -> tuple[Any, Any]:
    y = jax.nn.relu(_convolved(x, block["one"], stride))
    mean, variance = jnp.mean(y, axis=(0, 1, 2)), jnp.var(y, axis=(0, 1, 2))
    y = (y - mean[None, None, None]) * jax.lax.rsqrt(variance + 1e-5)[None, None, None]
    y = y * block["scale"][None, None, None] + block["shift"][None, None, None]
    after = {
        "mean": 0.9 * state["mean"] + 0.1 * mean,
        "variance": 0.9 * state["variance"] + 0.1 * variance,
    }
    return jax.nn.relu(_convolved(y, block["two"], 1) + _convolved(x, block["around"], stride)), after


NETS: Final = (mlp, transformer, resnet)
