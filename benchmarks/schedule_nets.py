"""Nets whose transfers want to be ordered differently, for `schedule`: 2 to 5 MB each, and a tenth to a quarter of a second on a core forwards.

A chain of equal convolutions, whose bytes and computation are spread evenly over 19 layers: the net of the arithmetic limits. A chain like VGG, whose bytes are where its
computation is not; one with residuals like ResNet, one with branches like Inception, and a language model whose table of words, used first, is most of it.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
import optax

import shoal

SIDE: Final = 16
CLASSES: Final = 10
BATCH: Final = {"chain": 256, "vgg": 192, "resnet": 96, "inception": 96, "language model": 96}
WORDS, ROW, DIM, LAYERS, HEADS = 3072, 32, 128, 4, 4


def normal(key: jax.Array, *shape: int) -> jax.Array:
    fan = 1
    for size in shape[:-1]:
        fan *= size
    made: jax.Array = jax.random.normal(key, shape) * (2.0 / fan) ** 0.5
    return made


def tensors(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    return {
        name: normal(jax.random.fold_in(key, number), *shape) for number, (name, shape) in enumerate(shapes.items())
    }


def convolved(x: Any, kernel: Any) -> Any:
    return jax.nn.relu(
        jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    )


def halved(x: Any) -> Any:
    """Means of 2 x 2."""
    return jnp.mean(x.reshape(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3]), axis=(2, 4))


LINKS, CHANNELS = 19, 64


def chain_shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"first": (1, 1, 3, CHANNELS)}
    return made | {f"conv{n:02d}": (3, 3, CHANNELS, CHANNELS) for n in range(LINKS)} | {"out": (CHANNELS, CLASSES)}


def chain(params: Any, x: Any) -> Any:
    x = halved(convolved(x, params["first"]))
    for n in range(LINKS):
        x = convolved(x, params[f"conv{n:02d}"])
    return jnp.mean(x, axis=(1, 2)) @ params["out"]


VGG: Final = (32, 32, 48, 48, 64, 64, 64, 80, 80, 80, 96, 96, 96)
"""Channels after each convolution."""
VGG_HALVED: Final = (1, 6)


def vgg_shapes() -> dict[str, tuple[int, ...]]:
    pairs = zip((3, *VGG), VGG, strict=False)
    made: dict[str, tuple[int, ...]] = {f"conv{n:02d}": (3, 3, *pair) for n, pair in enumerate(pairs)}
    return made | {"dense0": (16 * VGG[-1], 384), "dense1": (384, 128), "out": (128, CLASSES)}


def vgg(params: Any, x: Any) -> Any:
    for n in range(len(VGG)):
        x = convolved(x, params[f"conv{n:02d}"])
        x = halved(x) if n in VGG_HALVED else x
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["dense0"])
    return jax.nn.relu(x @ params["dense1"]) @ params["out"]


RESNET: Final = (
    (32, 32),
    (32, 48),
    (48, 48),
    (48, 48),
    (48, 64),
    (64, 64),
    (64, 64),
    (64, 80),
    (80, 80),
    (80, 80),
    (80, 96),
)
"""Channels before and after each block."""
RESNET_HALVED: Final = (1, 5)


def resnet_shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"first": (3, 3, 3, 32)}
    for n, (before, after) in enumerate(RESNET):
        made |= {f"block{n}/one": (3, 3, before, after), f"block{n}/two": (3, 3, after, after)}
        if before != after:
            made[f"block{n}/around"] = (1, 1, before, after)
    return made | {"out": (RESNET[-1][-1], CLASSES)}


def resnet(params: Any, x: Any) -> Any:
    x = convolved(x, params["first"])
    for n in range(len(RESNET)):
        y = convolved(convolved(x, params[f"block{n}/one"]), params[f"block{n}/two"])
        x = (convolved(x, params[f"block{n}/around"]) if f"block{n}/around" in params else x) + y
        x = halved(x) if n in RESNET_HALVED else x
    return jnp.mean(x, axis=(1, 2)) @ params["out"]


INCEPTION: Final = ((32, 24), (96, 32), (128, 40))
"""Channels before each module, and a quarter of those after it."""


def inception_shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"first": (3, 3, 3, 32)}
    for n, (before, part) in enumerate(INCEPTION):
        made |= {
            f"module{n}/a": (1, 1, before, part),
            f"module{n}/b1": (1, 1, before, 2 * part),
            f"module{n}/b2": (3, 3, 2 * part, part),
        }
        made |= {
            f"module{n}/c1": (1, 1, before, part),
            f"module{n}/c2": (5, 5, part, part),
            f"module{n}/d": (3, 3, before, part),
        }
    return made | {"dense": (16 * 160, 48), "out": (48, CLASSES)}


def inception(params: Any, x: Any) -> Any:
    x = convolved(x, params["first"])
    for n in range(len(INCEPTION)):
        one = convolved(x, params[f"module{n}/a"])
        two = convolved(convolved(x, params[f"module{n}/b1"]), params[f"module{n}/b2"])
        three = convolved(convolved(x, params[f"module{n}/c1"]), params[f"module{n}/c2"])
        x = jnp.concatenate([one, two, three, convolved(x, params[f"module{n}/d"])], axis=-1)
        x = halved(x) if n < 2 else x
    return jax.nn.relu(x.reshape(x.shape[0], -1) @ params["dense"]) @ params["out"]


def language_shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {"words": (WORDS, DIM), "places": (ROW, DIM)}
    for n in range(LAYERS):
        made |= {
            f"layer{n}/in": (DIM, 3 * DIM),
            f"layer{n}/out": (DIM, DIM),
            f"layer{n}/up": (DIM, 4 * DIM),
            f"layer{n}/down": (4 * DIM, DIM),
        }
    return made | {"out": (DIM, 512)}


def language(params: Any, words: Any) -> Any:
    size = words.shape[0]
    x = params["words"][words.reshape(-1)] + jnp.tile(params["places"], (size, 1))
    for n in range(LAYERS):
        heads = (scaled(x) @ params[f"layer{n}/in"]).reshape(size, ROW, 3, HEADS, DIM // HEADS)
        query, key, value = (heads[:, :, part] for part in range(3))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (DIM // HEADS) ** -0.5
        weights = jax.nn.softmax(scores, axis=-1)
        x = x + jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape) @ params[f"layer{n}/out"]
        x = x + jax.nn.gelu(scaled(x) @ params[f"layer{n}/up"]) @ params[f"layer{n}/down"]
    return scaled(x) @ params["out"]


def scaled(x: Any) -> Any:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


NETS: Final[dict[str, tuple[Any, Any]]] = {
    "chain": (chain_shapes, chain),
    "vgg": (vgg_shapes, vgg),
    "resnet": (resnet_shapes, resnet),
    "inception": (inception_shapes, inception),
    "language model": (language_shapes, language),
}
CHAINS: Final = ("chain", "vgg", "resnet")


def task_of(net: str) -> shoal.Task:
    """Its evaluation is the loss: a way forward alone."""
    shapes, apply = NETS[net]
    is_text = net == "language model"

    def losses(params: Any, batch: Any) -> Any:
        scores, labels = apply(params, batch["x"]), batch["y"].reshape(-1)
        each = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        return jnp.mean(each.reshape(batch["x"].shape[0], -1), axis=1)

    fields = {"x": ((ROW,), "int32"), "y": ((ROW,), "int32")} if is_text else {"x": ((SIDE, SIDE, 3), "float32"), "y": ((), "int32")}  # fmt: skip
    return shoal.Task(
        name=net.replace(" ", "-"), init=lambda key: tensors(key, shapes()), loss=lambda params, state, batch, key: losses(params, batch), batch=fields,
        evaluate=lambda params, state, batch: {"loss": shoal.Sum(losses(params, batch), jnp.ones(batch["y"].shape[0]), (0.0, 1e3))},
        local=shoal.Local(optimizer=optax.sgd(0.01, momentum=0.9), batch_size=BATCH[net]),
    )  # fmt: skip
