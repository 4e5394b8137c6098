"""Convolutions that are fast in loops and with other weights for each member: a transformation of a user's function.

`faster_convolutions(fn)` computes what `fn` computes, to rounding. Convolutions in it, also those inside `jit`, `scan`, `cond`,
`remat` and functions with derivatives of their own, are bound to a primitive of ours that takes the same operands; its derivatives
and its batching give itself again, so gradients of any order and `vmap` stay fast in whatever order they are taken. How it
is computed is decided where the program is lowered, for the platform it is lowered for: `convolution_forms`. Max pooling is
replaced likewise on a CPU: `max_pooling`.

What is left as it is: convolutions of complex or whole numbers, with a sharded result or without elements, and those in the
derivative rules (not the functions) of `custom_jvp` and `custom_vjp`.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive, mapped_aval, unmapped_aval
from jax.interpreters import ad, batching, mlir

from shoal.forms import convolution_forms, max_pooling, replaced

P = ParamSpec("P")
R = TypeVar("R")
Array = Any

convolution_p: Final = Primitive("shoal_convolution")
"""Takes what `lax.conv_general_dilated_p` takes; with `members`, both operands and the result have a leading dim of members."""


def faster_convolutions(fn: Callable[P, R], *, platform: str | None = None) -> Callable[P, R]:
    """The same function with its convolutions and max pooling computed in forms that are fast in loops and under `vmap`.

    Args:
        fn: any function of pytrees of arrays to a pytree of arrays, such as a task's loss or a whole training program.
        platform: what it is lowered for; None: what JAX computes on here.

    Returns:
        A function of the same arguments and results. It traces `fn` on each call: call it inside `jit`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> fn = lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME").sum()
        >>> float(faster_convolutions(fn)(jnp.ones((1, 1, 2, 2)), jnp.ones((1, 1, 1, 1))))
        4.0
    """

    return replaced.function(fn, functools.partial(_replacement, platform or jax.default_backend()))


def _replacement(platform: str, equation: JaxprEqn) -> JaxprEqn | None:
    params = equation.params
    operands: list[Any] = [variable.aval for variable in equation.invars]
    made: JaxprEqn | None = None
    if equation.primitive is lax.conv_general_dilated_p and _supported(*operands, params=params):
        made = equation.replace(primitive=convolution_p, params=params | {"members": False, "out_sharding": None})
    elif (
        platform == "cpu"
        and equation.primitive is lax.reduce_window_max_p
        and max_pooling.supported(*operands, params=params)
    ):
        made = equation.replace(primitive=max_pooling.max_pool_p)
    return made


def _supported(x: Any, w: Any, *, params: dict[str, Any]) -> bool:
    floating = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype == w.dtype
    return floating and replaced.is_whole(params["out_sharding"]) and x.ndim > 2 and x.size > 0 and w.size > 0


def _plain(x: Array, w: Array, *, members: bool, **params: Any) -> Array:
    """Op by op, outside of any compiled program."""
    one = functools.partial(lax.conv_general_dilated_p.bind, **params)
    return jax.vmap(one)(x, w) if members else one(x, w)


def _abstract(x: Any, w: Any, *, members: bool, **params: Any) -> Any:
    if not members:
        return lax.conv_general_dilated_p.abstract_eval(x, w, **params)[0]
    size = x.shape[0]
    one = lax.conv_general_dilated_p.abstract_eval(mapped_aval(size, 0, x), mapped_aval(size, 0, w), **params)[0]
    return unmapped_aval(size, 0, one)


def _transposed(operand: int, cotangent: Array, *operands: Any, members: bool, **params: Any) -> Array:
    """The cotangent of x (operand 0) or w (1): by XLA's rule another convolution, which is replaced in turn."""
    unknown, other = operands[operand].aval, operands[1 - operand]
    if members:
        unknown = mapped_aval(unknown.shape[0], 0, unknown)
    rule = ad.get_primitive_transpose(lax.conv_general_dilated_p)

    def one(cotangent: Array, other: Array) -> Array:
        pair = (ad.UndefinedPrimal(unknown), other) if operand == 0 else (other, ad.UndefinedPrimal(unknown))
        return rule(cotangent, *pair, **params)[operand]

    faster = faster_convolutions(one)
    return (jax.vmap(faster) if members else faster)(cotangent, other)


def _batch(operands: Any, dims: Any, *, members: bool, **params: Any) -> tuple[Array, int]:
    """Members stay in front where both operands differ; else they join the examples, or the output channels."""
    (x, w), (x_dim, w_dim) = operands, dims
    bind = functools.partial(convolution_p.bind, members=members, **params)
    lhs, rhs, out = params["dimension_numbers"]
    if w_dim is None and params["batch_group_count"] == 1:
        size = x.shape[x_dim]
        return _split(bind(_joined(x, x_dim, lhs[0] + members), w), out[0] + members, size), out[0] + members
    if x_dim is None and params["batch_group_count"] == params["feature_group_count"] == 1:
        size = w.shape[w_dim]
        return _split(bind(x, _joined(w, w_dim, rhs[0] + members)), out[1] + members, size), out[1] + members
    size = x.shape[x_dim] if x_dim is not None else w.shape[w_dim]
    x, w = (
        jnp.broadcast_to(value, (size, *value.shape)) if dim is None else jnp.moveaxis(value, dim, 0)
        for value, dim in ((x, x_dim), (w, w_dim))
    )
    if not members:
        return convolution_p.bind(x, w, members=True, **params), 0
    return _split(bind(_joined(x, 0, 0), _joined(w, 0, 0)), 0, size), 0


def _joined(array: Array, dim: int, into: int) -> Array:
    """With a dim merged into another, counted without it, as its slower part."""
    moved = jnp.moveaxis(array, dim, into)
    return moved.reshape(*moved.shape[:into], -1, *moved.shape[into + 2 :])


def _split(array: Array, dim: int, size: int) -> Array:
    return array.reshape(*array.shape[:dim], size, -1, *array.shape[dim + 1 :])


convolution_p.def_impl(_plain)
convolution_p.def_abstract_eval(_abstract)
ad.defbilinear(convolution_p, functools.partial(_transposed, 0), functools.partial(_transposed, 1))
batching.primitive_batchers[convolution_p] = _batch
mlir.register_lowering(convolution_p, mlir.lower_fun(convolution_forms.elsewhere, multiple_results=False))
mlir.register_lowering(convolution_p, mlir.lower_fun(convolution_forms.on_cpu, multiple_results=False), platform="cpu")
