"""Max pooling as the largest of shifted views, which XLA fuses.

XLA on a CPU computes `reduce_window` element by element and its gradient, `select_and_scatter_add`, by a scatter. Here the
forward pass is a maximum of views and the gradient goes where the first largest element of each window was, as there.

Departure: where a window holds a NaN the result is NaN as there, and no element of that window gets a gradient.
"""

import itertools
import math
from typing import Any, Final

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from shoal.forms.computed_once import computed_once

Array = Any

MOST_POSITIONS: Final = 32
"""Positions of a window up to which the views pay; `supported` refuses more."""

max_pool_p: Final = Primitive("shoal_max_pool")
"""Takes what `lax.reduce_window_max_p` takes and gives what it gives."""


def supported(x: Any, *, params: dict[str, Any]) -> bool:
    """Whether a `reduce_window_max` pays as views on a CPU: a small window of floating numbers, nothing dilated."""
    positions = math.prod(params["window_dimensions"])
    plain = set(params["base_dilation"]) | set(params["window_dilation"]) == {1}
    return plain and 1 < positions <= MOST_POSITIONS and jnp.issubdtype(x.dtype, jnp.floating) and x.size > 0


def _views(x: Array, fill: float, params: dict[str, Any]) -> list[Array]:
    """For each window position the elements of x that stand there, shaped like the result."""
    sizes, strides, padding = params["window_dimensions"], params["window_strides"], params["padding"]
    padded = lax.pad(x, jnp.array(fill, x.dtype), [(low, high, 0) for low, high in padding])
    counts = [(size - window) // stride + 1 for size, window, stride in zip(padded.shape, sizes, strides, strict=True)]
    return [
        lax.slice(padded, at, [a + (c - 1) * s + 1 for a, c, s in zip(at, counts, strides, strict=True)], strides)
        for at in itertools.product(*map(range, sizes))
    ]


def _forward(x: Array, **params: Any) -> Array:
    first, *others = _views(x, -math.inf, params)
    for view in others:
        first = jnp.maximum(first, view)
    return computed_once(first)  # else whatever reads it would compute it anew, for each time it is read


def _tangent(tangent: Array, x: Array, **params: Any) -> Array:
    """The tangent of each window's first largest element."""
    views = _views(x, -math.inf, params)
    largest = max_pool_p.bind(x, **params)
    position = jnp.full(largest.shape, len(views), jnp.int32)
    for at in reversed(range(len(views))):
        position = jnp.where(views[at] == largest, jnp.int32(at), position)
    position = computed_once(position)  # likewise: each element of the gradient reads it
    if params["window_dimensions"] == params["window_strides"]:
        return _of_blocks(tangent, position, params)
    made = jnp.zeros(largest.shape, tangent.dtype)
    for at, view in enumerate(_views(tangent, 0.0, params)):
        made = made + jnp.where(position == at, view, jnp.zeros_like(view))
    return made


def _of_blocks(tangent: Array, position: Array, params: dict[str, Any]) -> Array:
    """The element at `position` of each window, where windows do not overlap: the gradient is one pass without padding."""
    window = params["window_dimensions"]
    cut = [
        (low, count * size - low - whole, 0)
        for whole, (low, _), count, size in zip(tangent.shape, params["padding"], position.shape, window, strict=True)
    ]
    pairs = tuple(itertools.chain(*zip(position.shape, window, strict=True)))
    blocks = lax.pad(tangent, jnp.zeros((), tangent.dtype), cut).reshape(pairs)
    places = jnp.arange(math.prod(window), dtype=jnp.int32).reshape(*itertools.chain(*((1, size) for size in window)))
    chosen = position.reshape(*itertools.chain(*((count, 1) for count in position.shape))) == places
    return jnp.sum(jnp.where(chosen, blocks, jnp.zeros_like(blocks)), tuple(range(1, blocks.ndim, 2)))


def _batch(arguments: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    (x,), (dim,) = arguments, dims
    wider = {name: ((0, 0) if name == "padding" else 1, *value) for name, value in params.items()}
    return max_pool_p.bind(jnp.moveaxis(x, dim, 0), **wider), 0


max_pool_p.def_impl(_forward)
max_pool_p.def_abstract_eval(lambda x, **params: lax.reduce_window_max_p.abstract_eval(x, **params)[0])
ad.defjvp(max_pool_p, _tangent)
batching.primitive_batchers[max_pool_p] = _batch
mlir.register_lowering(max_pool_p, mlir.lower_fun(_forward, multiple_results=False))
