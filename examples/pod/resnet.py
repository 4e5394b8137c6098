"""ResNet-50 at a batch of 65,536: LARS, and batch norm over groups of members.

    shoal train examples/pod/resnet.py --data images.npz --epochs 10 --mesh data=8 --batch-norm-group 4

`make("full")` has the rates of the 28.3 s run on 4,096 chips (MLPerf v0.7, Google; Kumar et al. 2020): rate 24.699 after 31 epochs of warm-up,
momentum 0.951807, decay 1e-4, statistics over groups of 64 (`shoal.pod.batch_norm`; elsewhere than in a pod they are of the batch).

References: He et al. 2016, Deep residual learning (the stride is in the 3 x 3 convolution: version 1.5); You et al. 2017, Large batch training of
convolutional networks (LARS). Departures: 88 epochs in all, the rate going down as the square of what is left; no bias at the end.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import optax

import shoal
from shoal.pod.batch_norm import batch_moments


@dataclass(frozen=True)
class Sizes:
    side: int
    classes: int
    width: int
    blocks: tuple[int, ...]
    batch: int
    examples: int
    rate: float


_FULL: Final = Sizes(224, 1000, 64, (3, 4, 6, 3), 65_536, 1_281_167, 24.699)
SIZES: Final = {"small": Sizes(32, 10, 8, (1, 1), 32, 10_000, 2.0), "full": _FULL}


def make(size: Literal["small", "full"] = "small") -> shoal.Task:
    sizes = SIZES[size]
    return shoal.Task(
        name=f"resnet-{size}",
        init=lambda key: init(key, sizes),
        loss=lambda params, state, batch, key: loss(params, state, batch, sizes),
        batch={"image": ((sizes.side, sizes.side, 3), "float32"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optimizer(sizes), batch_size=sizes.batch),
    )


def optimizer(sizes: Sizes) -> optax.GradientTransformation:
    """LARS; of norms and biases neither decay nor trust ratio."""
    warm, left = (int(epochs * sizes.examples / sizes.batch) for epochs in (31, 57))
    down = optax.polynomial_schedule(sizes.rate, 1e-4, 2, left)
    rate = optax.join_schedules([optax.linear_schedule(0.0, sizes.rate, warm), down], [warm])
    return optax.lars(rate, 1e-4, weight_decay_mask=matrices, trust_ratio_mask=matrices, momentum=0.951807)


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def plan(sizes: Sizes) -> list[tuple[str, int, int, int]]:
    """Of each block its name, channels in and within, and stride."""
    made, before = [], sizes.width
    for stage, count in enumerate(sizes.blocks):
        for number in range(count):
            within = sizes.width << stage
            made.append((f"block{stage}_{number:02}", before, within, 2 if stage and not number else 1))
            before = 4 * within
    return made


def init(key: jax.Array, sizes: Sizes) -> shoal.Variables:
    keys = iter(jax.random.split(key, 2 + 4 * sum(sizes.blocks)))
    params: dict[str, Any] = {}
    state: dict[str, Any] = {}

    def convolution(name: str, side: int, rows: int, columns: int, scale: float = 1.0) -> None:
        kernel = jax.random.normal(next(keys), (side, side, rows, columns)) * (2 / (side * side * columns)) ** 0.5
        params[name] = {"kernel": kernel, "scale": jnp.full(columns, scale), "shift": jnp.zeros(columns)}
        state[name] = {"mean": jnp.zeros(columns), "variance": jnp.ones(columns)}

    convolution("stem", 7, 3, sizes.width)
    for name, before, within, stride in plan(sizes):
        convolution(f"{name}_a", 1, before, within)
        convolution(f"{name}_b", 3, within, within)
        convolution(f"{name}_c", 1, within, 4 * within, scale=0.0)  # at first a block is what goes round it
        if stride > 1 or before != 4 * within:
            convolution(f"{name}_round", 1, before, 4 * within)
    last = (4 * sizes.width << (len(sizes.blocks) - 1), sizes.classes)
    params["head"] = 0.01 * jax.random.normal(next(keys), last)
    return shoal.Variables(params, state)


def loss(params: Any, state: Any, batch: Any, sizes: Sizes) -> shoal.Loss:
    after: dict[str, Any] = {}

    def layer(name: str, x: jax.Array, stride: int = 1) -> jax.Array:
        own, places = params[name], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, own["kernel"], (stride, stride), "SAME", dimension_numbers=places)
        mean, variance = batch_moments(x, batch["mask"])
        fresh = jax.lax.stop_gradient({"mean": mean, "variance": variance})
        after[name] = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, state[name], fresh)
        factor = own["scale"] * jax.lax.rsqrt(variance + 1e-5)
        made: jax.Array = (x - mean[None, None, None]) * factor[None, None, None] + own["shift"][None, None, None]
        return made

    hidden = jax.nn.relu(layer("stem", batch["image"], 2))
    hidden = jax.lax.reduce_window(hidden, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for name, _, _, stride in plan(sizes):
        x = jax.nn.relu(layer(f"{name}_a", hidden))
        x = layer(f"{name}_c", jax.nn.relu(layer(f"{name}_b", x, stride)))
        hidden = jax.nn.relu(x + (layer(f"{name}_round", hidden, stride) if f"{name}_round" in params else hidden))
    scores = jnp.mean(hidden, axis=(1, 2)) @ params["head"]
    each = optax.softmax_cross_entropy(scores, optax.smooth_labels(jax.nn.one_hot(batch["label"], sizes.classes), 0.1))
    right = (jnp.argmax(scores, axis=-1) == batch["label"]).astype(jnp.float32)
    return shoal.Loss(each, after, {"accuracy": shoal.Sum(right, jnp.ones_like(right), (0.0, 1.0))})


task = make()
