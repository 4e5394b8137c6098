"""An update scaled down to a norm, and what a device says of that norm, in its program.

Guarantees, for any float32 that come in (what is not finite stays so, and is refused where updates are added up):
    * Norm: what `clip_update` returns has an L2 norm of at most `bound`, whatever the scale.
    * Step: what `log_scale_step` returns is at most `AdaptiveClip.largest_step`, whatever the scale.
Both are held by `tests/plan/test_clipping.py`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shoal.clip_norm import AdaptiveClip


def clip_update(
    delta: Mapping[str, Any], bound: float, *, scale: Any = None, on_grid: bool = False
) -> tuple[dict[str, Any], Any]:
    """The tensors with an L2 norm of at most `bound` together, and whether they were longer, a bool scalar.

    Args:
        delta: by name, float32.
        bound: of what is returned.
        scale: float32 scalar above 0: clipped to `bound * scale`, then divided by `scale`. None: 1.
        on_grid: the tensors are levels times steps of few bits: scaled down by a factor of few bits, at most 1 in 128 too far, they are so still.
    """
    # Divided by the largest element first, as squares of float32 overflow; by its power of two before, as its inverse may, too.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(values), initial=0.0) for values in delta.values()]))
    shrink = jnp.where(largest > 2.0**60, 2.0**-70, 1.0).astype(jnp.float32)
    unit = jnp.maximum(largest * shrink, 2.0**-126)
    relative = {name: values * shrink / unit for name, values in delta.items()}
    length = jnp.sqrt(sum(jnp.sum(jnp.square(values)) for values in relative.values()))
    # A little less than the norm allows, so that float32, which rounds sums and the norm itself, does not go above it.
    most = bound * (1 - 2.0**-16)
    is_over = unit / shrink * length > (most if scale is None else most * scale)
    factor = most / jnp.where(is_over, length, 1.0)
    within = delta if scale is None else {name: values / scale for name, values in delta.items()}
    if on_grid:
        relative, factor = dict(delta), _few_bits(factor / unit * shrink)
        within = delta if scale is None else {name: values * _few_bits(1 / scale) for name, values in delta.items()}
    return {name: jnp.where(is_over, relative[name] * factor, within[name]) for name in delta}, is_over


def _few_bits(values: Any) -> Any:
    """Float32 rounded toward zero to 8 significant bits."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def log_scale_step(clip: AdaptiveClip, log_scale: Any, is_over: Any) -> Any:
    """What a device adds to `LOG_SCALE`, a float32 scalar: -learning_rate × (1 if it was within the bound, else 0 - quantile), held to the range.

    It is never more than `largest_step`: also where noise has carried the scale out of its range, whence all bring it back.
    """
    low, high = clip.log_range
    up, down = clip.learning_rate * clip.quantile, clip.learning_rate * (1.0 - clip.quantile)
    step = jnp.where(is_over, jnp.float32(up), jnp.float32(-down))
    return jnp.clip(jnp.clip(step, low - log_scale, high - log_scale), -clip.largest_step, clip.largest_step)
