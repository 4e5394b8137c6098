"""Batch statistics over groups of members, as Kumar et al. 2020 ("distributed batch normalization") have them: over more examples than a member
has, over fewer than all of a large batch has.

    with groups(members, 4):                     # the step, while it traces the loss
        ... mean, variance = batch_moments(x, batch["mask"]) ...

A model calls `batch_moments` wherever it runs. In a pod's step that asks for groups, the sums are of the group's real examples; in simulation, on a
fleet and on one device, of the batch's. Groups are consecutive members along the fast axis, so nothing of it crosses the slow one unless the
group is all members.

JAX keeps what it has traced of a function that is wrapped in `jax.jit`: inside one, a model would get the sums of where it was traced first. A
model that calls these functions leaves compilation to its caller.

Guarantees:
    * A masked example changes neither the mean nor the variance.
    * With a group of all members the statistics, and the gradient through them, are those of the whole batch on one device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from shoal.pod.collectives import Members

_GROUPS: ContextVar[tuple[Members, int] | None] = ContextVar("batch_norm_groups", default=None)


@contextmanager
def groups(members: Members, size: int) -> Iterator[None]:
    """What is traced inside adds statistics up over groups of members.

    Args:
        members: whose collectives are used; tracing is inside their `jax.shard_map`.
        size: of a group: divides the number of members along the fast axis, or is the number of all.

    Raises:
        ValueError: it is neither.
    """
    check_group(members, size)
    token = _GROUPS.set((members, size))
    try:
        yield
    finally:
        _GROUPS.reset(token)


def check_group(members: Members, size: int) -> None:
    """Raises ValueError unless members can be grouped so."""
    fast = members.mesh.sizes[members.axes[0]] if members.axes else 1
    allowed = sorted({number for number in range(1, fast + 1) if fast % number == 0} | {members.num})
    if size not in allowed:
        raise ValueError(
            f"Expected a batch norm group of {' | '.join(map(str, allowed))} members on the mesh {members.mesh}, got {size}."
        )


def group_sum(value: Any) -> Any:
    """The sum over this member's group; the value itself where there are no groups."""
    found = _GROUPS.get()
    if found is None or found[1] == 1:
        return value
    members, size = found
    if size == members.num:
        return members.total(value)
    axis = members.axes[0]
    fast = members.mesh.sizes[axis]
    if size == fast:
        return jax.lax.psum(value, axis)
    each = [list(range(first, first + size)) for first in range(0, fast, size)]
    return jax.lax.psum(value, axis, axis_index_groups=each)


def group_mean(value: Any, weight: Any = 1.0) -> Any:
    """The mean over this member's group; the value itself where there are no groups.

    Args:
        value: of any shape.
        weight: scalar, how much this member's value counts: its number of real examples. Of no weight at all it is 0.
    """
    if _GROUPS.get() is None:
        return value
    share = jnp.asarray(weight, value.dtype)
    total = group_sum(share)
    return group_sum(value * share) / jnp.where(total > 0, total, jnp.ones_like(total))


def batch_moments(x: Any, mask: Any) -> tuple[Any, Any]:
    """Mean and variance of each channel over the group's real examples and all their positions, float32; one collective.

    Args:
        x: (B, …, C).
        mask: (B,), True for real examples.

    Returns:
        (C,) and (C,); zeros where the group has no real example.
    """
    wide = x.astype(jnp.float32)
    real = mask.reshape(-1, *(1,) * (x.ndim - 1))
    kept = jnp.where(real, wide, jnp.zeros((), jnp.float32))
    places = tuple(range(x.ndim - 1))
    count = jnp.sum(mask, dtype=jnp.float32) * (x.size // (x.shape[0] * x.shape[-1]))
    sums = jnp.concatenate([jnp.sum(kept, places), jnp.sum(jnp.square(kept), places), count[None]])
    first, second, number = jnp.split(group_sum(sums), (x.shape[-1], 2 * x.shape[-1]))
    number = jnp.maximum(number, jnp.ones_like(number))
    mean = first / number
    return mean, jnp.maximum(second / number - jnp.square(mean), jnp.zeros_like(mean))
