"""Compression in the loop: what a device reports is what would come out of a small message.

    int8    each tensor in 255 levels up to its largest element, rounded up or down at random so that the mean is right
            (Alistarh et al. 2017, "QSGD"): 1 byte an element
    top_k   the largest elements of each tensor alone (Aji and Heafield 2017), with error feedback: what was left out is
            kept on the device and added to the next update (Seide et al. 2014; Karimireddy et al. 2019, "Error feedback
            fixes SignSGD", algorithm 2): 8 bytes for each element that is kept

Compression wraps any local rule and is applied last. It takes every `delta/…` that the rule reports, after local training,
divided by steps or not as they are. The report stays a dense tensor: what the message would take is the metric
`update_bytes` (mean over a cohort), the wire's own codec is another matter. A residual is kept when the update is *counted*,
so nothing is lost with a round that fails.

With share = 1 nothing is left out, and the updates have the bits of those that are not compressed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp

from shoal import validate
from shoal.algorithms.compose import applied
from shoal.local import LocalRule, Named, Report, metric_sums, public_words, seed_key, sgd_rule
from shoal.task import Task
from shoal.tensors import TensorSpec, total_bytes

LEVELS: Final = 127
RESIDUAL: Final = "residual/"
KEY: Final = "compression/key"
BYTES: Final = "update_bytes"


def compressed(task: Task, kind: Literal["int8", "top_k"], *, share: float | None = None) -> Task:
    """Updates as they come out of a compressed message.

    Args:
        task: any that trains; other algorithms are applied before.
        kind: `int8` (stochastic rounding) or `top_k` (with error feedback).
        share: for top_k alone: of the elements of each tensor that are sent, in (0, 1], at least one; 0.01 if not given. 1 sends all.

    Raises:
        ValueError: an unknown kind, a share out of range, or the task's updates are compressed already.
    """
    validate.one_of(("int8", "top_k"), kind=kind)
    if kind == "int8" and share is not None:
        raise ValueError(f"Expected share only with kind='top_k', got share={share!r}: int8 sends every element.")
    share = 0.01 if share is None else share
    if not 0.0 < share <= 1.0:
        raise ValueError(f"Expected 0 < share <= 1, got share={share!r}.")
    inner = task.rule or sgd_rule
    chosen = INT8 if kind == "int8" else top_k(share)
    arguments = {"kind": kind} if kind == "int8" else {"kind": kind, "share": share}
    return applied(task, "compressed", arguments, rule=lambda made: compressed_rule(inner(made), chosen))


@dataclass(frozen=True)
class Codec:
    """How one tensor is compressed."""

    apply: Callable[[Any, Any], Any]
    """(values float32, key) -> what comes out of the message, of the same shape."""
    size_bytes: Callable[[int], int]
    """Elements of a tensor -> bytes of its message."""
    feeds_back: bool
    """What is left out is kept for the next round."""


def _int8(values: Any, key: Any) -> Any:
    step = jnp.max(jnp.abs(values), initial=0.0) / LEVELS
    scaled = values / jnp.where(step > 0, step, jnp.ones_like(step))
    levels = jnp.floor(scaled + jax.random.uniform(key, values.shape, values.dtype))
    return jnp.clip(levels, -LEVELS, LEVELS) * step


INT8: Final = Codec(_int8, lambda size: size + 4, feeds_back=False)


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

    return Codec(apply, lambda size: min(8 * kept(size), 4 * size), feeds_back=True)


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
