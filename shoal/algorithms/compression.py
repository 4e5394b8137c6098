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
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, frexp, prod
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np

from shoal import validate
from shoal.algorithms.compose import applied
from shoal.codec.chance import uniform
from shoal.codec.linear import SPREAD, VERSION, block_length, chosen, rotate, rotated_size, seed_of, seed_of_version
from shoal.codec.rounding import BLOCK, MAX_LEVEL, ROUNDINGS, Rounding
from shoal.fixed import SumSpec
from shoal.local import LocalRule, Named, Report, metric_sums, public_words, seed_key, sgd_rule
from shoal.task import Task
from shoal.tensors import TensorSpec

KINDS: Final = ("float32", "bfloat16", "int8", "top_k", "random_k")
SHARES: Final = {"top_k": 0.01, "random_k": 1 / 64}
"""What is sent of a tensor, where nobody says."""
LEAST_SHARE: Final = 2.0**-12
SMALL: Final = 16
"""A tensor of fewer elements goes through no linear map."""
RESIDUAL: Final = "residual/"
KEY: Final = "compression/key"
BYTES: Final = "update_bytes"


def compressed(
    task: Task,
    up: Literal["float32", "bfloat16", "int8", "top_k", "random_k"] = "float32",
    *,
    down: Rounding = "float32",
    share: float | None = None,
    rotate: bool = False,
) -> Task:
    """Updates and versions in fewer bytes.

    Args:
        task: any that trains; other algorithms are applied before.
        up: what updates are made of: `bfloat16`, `int8` (stochastic rounding), `top_k` (with error feedback), `random_k`, or `float32`, as they
            are. Secure groups know `float32` and `random_k`.
        down: what versions are rounded to before they are sent: `bfloat16`, `int8`, or `float32`, as they are.
        share: for top_k and random_k: of the elements of each tensor that are sent, in (0, 1], at least one; 1/64 for random_k if not given, 0.01
            for top_k. 1 sends all. For random_k a power of two.
        rotate: updates are rotated by chance before they are rounded, so that no element is much larger than the others: finer levels for
            `int8`, and for the integers of secure groups. Wants a `Privacy(clip_norm=…)` to be of use to these.

    Raises:
        ValueError: an unknown kind, a share out of range, nothing to do, or the task is compressed already.
    """
    validate.one_of(KINDS, up=up)
    validate.one_of(ROUNDINGS, down=down)
    if up not in SHARES and share is not None:
        raise ValueError(
            f"Expected share only with up='top_k' or 'random_k', got share={share!r}: {up} sends every element."
        )
    if up in SHARES and rotate:
        raise ValueError(
            f"Expected rotate=False with up={up!r}: a rotation makes all elements alike, and no few of them stand for it."
        )
    if up == down == "float32" and not rotate:
        raise ValueError("Expected something to compress, got up='float32' and down='float32': name another of either.")
    share = SHARES.get(up, 1.0) if share is None else share
    if not 0.0 < share <= 1.0:
        raise ValueError(f"Expected 0 < share <= 1, got share={share!r}.")
    if up == "random_k" and (frexp(share)[0] != 0.5 or share < LEAST_SHARE):
        raise ValueError(
            f"Expected a share of 1, 1/2, 1/4, … 1/{1 / LEAST_SHARE:.0f} with up='random_k', got share={share!r}."
        )
    arguments = (
        {"up": up, "down": down} | ({"share": share} if up in SHARES else {}) | ({"rotate": True} if rotate else {})
    )
    _check(task, up)
    made = applied(task, "compressed", arguments, down=down)
    if up == "float32" and not rotate:
        return made
    inner, codec = task.rule or sgd_rule, {"bfloat16": BFLOAT16, "int8": INT8, "top_k": top_k(share)}.get(up, FLOAT32)
    linear = partial(_one_of, one_of=round(1 / share)) if up == "random_k" else _rotated if rotate else None

    def rule(final: Task) -> LocalRule:
        _check(final, up)  # what it is by now: settings may have changed since
        return compressed_rule(inner(final), codec, linear=linear, is_clipped=final.privacy.clip_norm is not None)

    return made.replace(rule=rule)


def _check(task: Task, up: str) -> None:
    """Raises ValueError where updates cannot be made of that in the task's rounds."""
    if task.privacy.secure is not None and up in ("bfloat16", "int8", "top_k"):
        raise ValueError(
            f"Expected up='float32' or 'random_k' with Privacy(secure=…), got {up!r}: members of a group send integers of the group's bits under masks, "
            "all elements of them, or those that all members have in common. Choose fewer bits, Secure(bits=16), with rotate=True."
        )
    if up == "random_k" and task.rounds.max_staleness:
        raise ValueError(
            f"Expected a policy whose late updates are discarded with up='random_k', got late={task.rounds.late.kind!r}: members of another version "
            "send other elements."
        )
    if up == "random_k" and task.privacy.correlated is not None:
        raise ValueError(
            "Expected no Privacy(correlated=…) with up='random_k': its noise would take back in other elements what it added in these."
        )


@dataclass(frozen=True)
class Codec:
    """How one tensor is compressed."""

    apply: Callable[[Any, Any], Any]
    """(values float32, key) -> what comes out of the message, of the same shape."""
    size_bytes: Callable[[int], int]
    """Elements of a tensor -> bytes of its message."""
    feeds_back: bool
    """What is left out is kept for the next round."""


FLOAT32: Final = Codec(lambda values, key: values, lambda size: 4 * size, feeds_back=False)


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
    # 16 random bits for an element: right in the mean to 2^-17 of a level.
    chance = uniform(blocks.size, jax.random.key_data(key), jnp).reshape(blocks.shape)
    levels = jnp.floor(scaled + chance)
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
        magnitudes = jax.lax.bitcast_convert_type(jnp.abs(values), jnp.uint32)  # in the order of the numbers

        def with_bit(place: Any, least: Any) -> Any:
            tried = least | (jnp.uint32(1) << (30 - place).astype(jnp.uint32))
            return jnp.where(jnp.sum(magnitudes >= tried, dtype=jnp.int32) >= kept(values.size), tried, least)

        # The kept-largest magnitude, bit for bit from the highest: a tenth of a sort's time.
        least = jax.lax.fori_loop(0, 31, with_bit, jnp.uint32(0))
        return jnp.where(magnitudes >= least, values, jnp.zeros_like(values))

    return Codec(apply, lambda size: min(4 * kept(size) + size // 8, 4 * size), feeds_back=True)


def _rotated(spec: SumSpec) -> SumSpec:
    size = prod(spec.tensor.shape)
    if size < SMALL:
        return spec
    block = block_length(size)
    tensor = replace(spec.tensor, shape=(rotated_size(size, block),), kind="dense", table="")
    # Of elements within a bound the root mean square is, too.
    return replace(spec, tensor=tensor, rotated=block, bound=float(np.float32(SPREAD * spec.bound)))


def _one_of(spec: SumSpec, *, one_of: int) -> SumSpec:
    size = prod(spec.tensor.shape)
    # A sum that is not weighted is of what members hold: in their mean an element that is not sent would be missing for good.
    if size < SMALL or one_of == 1 or not spec.weighted:
        return spec
    tensor = replace(spec.tensor, shape=(-(-size // one_of),), kind="dense", table="")
    return replace(spec, tensor=tensor, one_of=one_of, bound=one_of * spec.bound)


def through(spec: SumSpec, values: Any, bound: float | None, version: Any) -> Any:
    """An update's tensor through the linear map of its sum.

    Args:
        spec: of the sum.
        values: the tensor.
        bound: of its elements; one beyond it makes an update that is refused, as without a map. None: it will be clipped.
        version: `codec.linear.VERSION`, where elements are drawn.
    """
    name, flat = spec.tensor.name.removeprefix("delta/"), values.reshape(-1)
    if spec.rotated:
        turned = rotate(flat, spec.rotated, seed=seed_of(name), xp=jnp)
        if bound is None:
            return turned
        held = jnp.clip(turned, -spec.bound, spec.bound)
        return jnp.where(jnp.any(jnp.abs(flat) > bound), jnp.float32(jnp.nan), held)
    if spec.one_of > 1:
        places = chosen(flat.size, spec.one_of, seed=seed_of_version(version, name, jnp), xp=jnp)
        return spec.one_of * jnp.take(flat, places, mode="fill", fill_value=0.0)
    return values


def compressed_rule(
    inner: LocalRule, codec: Codec, *, linear: Callable[[SumSpec], SumSpec] | None = None, is_clipped: bool = False
) -> LocalRule:
    """A local rule whose updates go through a linear map, where there is one, and a codec; `is_clipped`: and are clipped then."""
    sums = tuple(
        linear(spec) if linear is not None and spec.tensor.name.startswith("delta/") else spec for spec in inner.sums
    )
    specs = {s.tensor.name.removeprefix("delta/"): s for s in sums if s.tensor.name.startswith("delta/")}
    bounds = {spec.tensor.name.removeprefix("delta/"): spec.bound for spec in inner.sums}
    deltas = {name: spec.tensor for name, spec in specs.items()}
    is_told = any(spec.name == VERSION for spec in inner.broadcast)
    is_drawn = any(spec.one_of > 1 for spec in sums) and not is_told
    drawn = [TensorSpec(name=VERSION, shape=(1,), dtype="uint32")] if is_drawn else []
    residuals = tuple(
        TensorSpec(name=RESIDUAL + name, shape=spec.shape, dtype="float32")
        for name, spec in sorted(deltas.items() if codec.feeds_back else ())
    )
    own_names = {spec.name for spec in residuals} | {KEY}
    size_bytes = sum(codec.size_bytes(spec.size_bytes // 4) for spec in deltas.values())

    def begin(broadcast: Named, device_state: Named) -> Named:
        broadcast = {name: value for name, value in broadcast.items() if is_told or name != VERSION}
        own = {spec.name: device_state[spec.name] for spec in residuals}
        kept = {name: value for name, value in device_state.items() if name not in own}
        return _sorted({**inner.begin(broadcast, kept), **own, KEY: jnp.zeros((2,), jnp.uint32)})

    def block(carry: Named, batches: Named, mask: Any, key: Any) -> Named:
        own, theirs = _parted(carry, own_names)
        own[KEY] = jnp.where(jnp.any(mask), public_words(key), own[KEY])  # the same in every block of a round
        return _sorted({**inner.block(theirs, batches, mask, key), **own})

    def finish(carry: Named, broadcast: Named) -> Report:
        own, theirs = _parted(carry, own_names)
        version = broadcast.get(VERSION)
        report = inner.finish(theirs, {name: value for name, value in broadcast.items() if is_told or name != VERSION})
        sent, left = dict[str, Any](), dict[str, Any]()
        for number, name in enumerate(sorted(deltas)):
            bound = None if is_clipped else bounds[name]
            whole = through(specs[name], report.sums["delta"][name], bound, version)
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
        broadcast=tuple(sorted((*inner.broadcast, *drawn), key=lambda spec: spec.name)),
        device_state=tuple(sorted(inner.device_state + residuals, key=lambda spec: spec.name)),
        reached=inner.reached,
        hides_examples=inner.hides_examples,
        on_grid=codec in (INT8, BFLOAT16),
        sums=(*sums, *metric_sums({BYTES: (0.0, float(max(size_bytes, 1)))}, 1)),
    )


def _parted(carry: Named, own: set[str]) -> tuple[Named, Named]:
    """What is the wrapper's, and what the rule's."""
    mine = {name: value for name, value in carry.items() if name in own}
    return mine, {name: value for name, value in carry.items() if name not in own}


def _sorted(values: Named) -> Named:
    return dict(sorted(values.items()))
