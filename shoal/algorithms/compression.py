"""Compression in the loop: what a device reports, and what it is sent, are numbers that take few bytes.

    bfloat16  the nearest of 8 significant bits: 2 bytes an element
    int8      blocks of `codec.rounding.BLOCK` elements in 255 levels up to the block's largest, rounded up or down at random so
              that the mean is right (Alistarh et al. 2017, "QSGD"): 1 byte an element
    top_k     the largest elements of each tensor alone (Aji and Heafield 2017), with error feedback: what was left out is
              kept on the device and added to the next update (Seide et al. 2014; Karimireddy et al. 2019, "Error feedback
              fixes SignSGD", algorithm 2): 4 bytes for each element that is kept, a bit for each that there is

Compression wraps any local rule and is applied last. It takes every `delta/…` that the rule reports, after local training,
divided by steps or not as they are. A report is a tensor of float32 still; what it takes on the wire is the matter of `codec/packed.py`, which
finds the levels, halves and zeros again. The metric `update_bytes` says how much that is at most (mean over a cohort). A residual is kept when
the update is *counted*, so nothing is lost with a round that fails.

With share = 1 nothing is left out, and the updates have the bits of those that are not compressed.

`down` is what the server rounds each version to before members start from it (`codec/rounding.py`). Updates are differences to what was sent, and
are added to the line itself, which keeps every bit: no rounding adds up over versions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from shoal import validate
from shoal.algorithms.compose import applied
from shoal.codec.rounding import BLOCK, MAX_LEVEL, ROUNDINGS, Rounding
from shoal.local import LocalRule, Named, Report, metric_sums, public_words, seed_key, sgd_rule
from shoal.task import Task
from shoal.tensors import TensorSpec, total_bytes

KINDS: Final = ("float32", "bfloat16", "int8", "top_k")
RESIDUAL: Final = "residual/"
KEY: Final = "compression/key"
BYTES: Final = "update_bytes"


def compressed(
    task: Task,
    up: Literal["float32", "bfloat16", "int8", "top_k"] = "float32",
    *,
    down: Rounding = "float32",
    share: float | None = None,
) -> Task:
    """Updates and versions in fewer bytes.

    Args:
        task: any that trains; other algorithms are applied before.
        up: what updates are made of: `bfloat16`, `int8` (stochastic rounding), `top_k` (with error feedback), or `float32`, as they are.
        down: what versions are rounded to before they are sent: `bfloat16`, `int8`, or `float32`, as they are.
        share: for top_k alone: of the elements of each tensor that are sent, in (0, 1], at least one; 0.01 if not given. 1 sends all.

    Raises:
        ValueError: an unknown kind, a share out of range, nothing to do, or the task is compressed already.
    """
    validate.one_of(KINDS, up=up)
    validate.one_of(ROUNDINGS, down=down)
    if up != "top_k" and share is not None:
        raise ValueError(f"Expected share only with up='top_k', got share={share!r}: {up} sends every element.")
    if up == down == "float32":
        raise ValueError("Expected something to compress, got up='float32' and down='float32': name another of either.")
    share = 0.01 if share is None else share
    if not 0.0 < share <= 1.0:
        raise ValueError(f"Expected 0 < share <= 1, got share={share!r}.")
    arguments = {"up": up, "down": down} | ({"share": share} if up == "top_k" else {})
    made = applied(task, "compressed", arguments, down=down)
    if up == "float32":
        return made
    inner = task.rule or sgd_rule
    chosen = {"bfloat16": BFLOAT16, "int8": INT8}.get(up) or top_k(share)
    return made.replace(rule=lambda made: compressed_rule(inner(made), chosen))


@dataclass(frozen=True)
class Codec:
    """How one tensor is compressed."""

    apply: Callable[[Any, Any], Any]
    """(values float32, key) -> what comes out of the message, of the same shape."""
    size_bytes: Callable[[int], int]
    """Elements of a tensor -> bytes of its message."""
    feeds_back: bool
    """What is left out is kept for the next round."""


def _bfloat16(values: Any, key: Any) -> Any:
    return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)


BFLOAT16: Final = Codec(_bfloat16, lambda size: 2 * size, feeds_back=False)


def _int8(values: Any, key: Any) -> Any:
    flat = values.reshape(-1)
    length = min(flat.size, BLOCK)
    blocks = jnp.pad(flat, (0, -flat.size % max(length, 1))).reshape(-1, length) if length else flat[None]
    step = jnp.max(jnp.abs(blocks), axis=1, keepdims=True, initial=0.0) / MAX_LEVEL
    # Rounded up to 8 significant bits: a level times the step is exact then, and can be found again.
    bits = jax.lax.bitcast_convert_type(step, jnp.uint32)
    step = jax.lax.bitcast_convert_type((bits + jnp.uint32(0xFFFF)) & jnp.uint32(0xFFFF0000), jnp.float32)
    scaled = blocks / jnp.where(step > 0, step, jnp.ones_like(step))
    levels = jnp.floor(scaled + jax.random.uniform(key, blocks.shape, blocks.dtype))
    made = jnp.clip(levels, -MAX_LEVEL, MAX_LEVEL) * step
    return made.reshape(-1)[: flat.size].reshape(values.shape)


INT8: Final = Codec(_int8, lambda size: size + 4 * -(-size // BLOCK), feeds_back=False)


def top_k(share: float) -> Codec:
    """The largest `share` of a tensor's elements by magnitude; of those that are as large as the last all."""

    def kept(size: int) -> int:
        return min(size, max(1, ceil(share * size)))

    def apply(values: Any, key: Any) -> Any:
        if not values.size:
            return values
        magnitudes = jnp.abs(values)
        least = jnp.sort(magnitudes.reshape(-1))[values.size - kept(values.size)]
        return jnp.where(magnitudes >= least, values, jnp.zeros_like(values))

    return Codec(apply, lambda size: min(4 * kept(size) + size // 8, 4 * size), feeds_back=True)


def compressed_rule(inner: LocalRule, codec: Codec) -> LocalRule:
    """A local rule whose updates go through a codec."""
    deltas = {s.tensor.name.removeprefix("delta/"): s.tensor for s in inner.sums if s.tensor.name.startswith("delta/")}
    residuals = tuple(
        TensorSpec(name=RESIDUAL + name, shape=spec.shape, dtype="float32")
        for name, spec in sorted(deltas.items() if codec.feeds_back else ())
    )
    own_names = {spec.name for spec in residuals} | {KEY}
    size_bytes = sum(codec.size_bytes(spec.size_bytes // 4) for spec in deltas.values())

    def begin(broadcast: Named, device_state: Named) -> Named:
        own = {spec.name: device_state[spec.name] for spec in residuals}
        kept = {name: value for name, value in device_state.items() if name not in own}
        return _sorted({**inner.begin(broadcast, kept), **own, KEY: jnp.zeros((2,), jnp.uint32)})

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        own, theirs = _parted(carry, own_names)
        own[KEY] = jnp.where(jnp.any(mask), public_words(key), own[KEY])  # the same in every block of a round
        return _sorted({**inner.block(theirs, batches, mask, key), **own})

    def finish(carry: Named, broadcast: Named) -> Report:
        own, theirs = _parted(carry, own_names)
        report = inner.finish(theirs, broadcast)
        sent, left = dict[str, Any](), dict[str, Any]()
        for number, name in enumerate(sorted(deltas)):
            whole = report.sums["delta"][name]
            if codec.feeds_back:
                whole = whole + own[RESIDUAL + name]
            sent[name] = codec.apply(whole, jax.random.fold_in(seed_key(own[KEY]), number))
            if codec.feeds_back:
                left[RESIDUAL + name] = whole - sent[name]
        metrics = {f"{BYTES}/numerator": jnp.float32(size_bytes), f"{BYTES}/denominator": jnp.float32(1)}
        return Report(
            {**report.sums, "delta": sent}, report.weight, _sorted({**report.metrics, **metrics}),
            _sorted({**report.device_state, **left}),
        )  # fmt: skip

    return LocalRule(
        begin=begin,
        block=block,
        finish=finish,
        broadcast=inner.broadcast,
        device_state=tuple(sorted(inner.device_state + residuals, key=lambda spec: spec.name)),
        reached=inner.reached,
        hides_examples=inner.hides_examples,
        sums=(*inner.sums, *metric_sums({BYTES: (0.0, float(total_bytes(deltas.values())) + 64.0)}, 1)),
    )


def _parted(carry: Named, own: set[str]) -> tuple[Named, Named]:
    """What is the wrapper's, and what the rule's."""
    mine = {name: value for name, value in carry.items() if name in own}
    return mine, {name: value for name, value in carry.items() if name not in own}


def _sorted(values: Named) -> Named:
    return dict(sorted(values.items()))
