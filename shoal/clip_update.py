"""An update scaled down to a norm, in a device's program."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp


def clip_update(delta: Mapping[str, Any], bound: float) -> tuple[dict[str, Any], Any]:
    """The tensors with an L2 norm of at most `bound` together, and whether they were longer, a bool scalar.

    Certain for any float32: what is not finite stays so, and is refused where updates are added up.
    """
    # Divided by the largest element first, as squares of float32 overflow; by its power of two before, as its inverse may, too.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(values), initial=0.0) for values in delta.values()]))
    shrink = jnp.where(largest > 2.0**60, 2.0**-70, 1.0).astype(jnp.float32)
    unit = jnp.maximum(largest * shrink, 2.0**-126)
    relative = {name: values * shrink / unit for name, values in delta.items()}
    length = jnp.sqrt(sum(jnp.sum(jnp.square(values)) for values in relative.values()))
    # A little less than the norm allows, so that float32, which rounds sums and the norm itself, does not go above it.
    most = bound * (1 - 2.0**-16)
    is_over = unit / shrink * length > most
    scale = most / jnp.where(is_over, length, 1.0)
    return {name: jnp.where(is_over, relative[name] * scale, values) for name, values in delta.items()}, is_over
