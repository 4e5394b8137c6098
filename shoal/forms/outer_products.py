"""Matrix products over very few rows as sums of outer products, which XLA fuses with what is done to the result.

The gradient of a dense layer's kernel is such a product: a batch of ten rows gives a kernel of a million. As a product of its own
XLA on a CPU writes it to memory and reads it again for the step of the optimizer; as a sum of ten outer products it is never there:
the kernel is read and written once. Takes programs that no derivative is taken of any more.
"""

import functools
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Primitive
from jax.interpreters import batching, mlir

from shoal.forms import replaced
from shoal.forms.computed_once import computed_once

P = ParamSpec("P")
R = TypeVar("R")
Array = Any

MOST_ROWS: Final = 16
"""Rows up to which the sum costs less than the passes over memory that it saves."""
LEAST_RESULT: Final = 1 << 14
"""Elements of a result that is worth it."""

outer_products_p: Final = Primitive("shoal_outer_products")
"""Takes what `lax.dot_general_p` takes and gives what it gives."""


def fused_outer_products(fn: Callable[P, R]) -> Callable[P, R]:
    """The same function with its products over few rows computed as sums of outer products, where that is faster."""
    return replaced.function(fn, _equation)


def _equation(equation: JaxprEqn) -> JaxprEqn | None:
    if equation.primitive is not lax.dot_general_p or not _supported(
        *equation.invars, *equation.outvars, params=equation.params
    ):
        return None
    made: JaxprEqn = equation.replace(primitive=outer_products_p, params=equation.params | {"out_sharding": None})
    return made


def _supported(lhs: Any, rhs: Any, result: Any, *, params: dict[str, Any]) -> bool:
    if jax.default_backend() != "cpu" or not replaced.is_whole(params["out_sharding"]):
        return False
    (contracted, other), (batch, _) = params["dimension_numbers"]
    if batch or tuple(contracted) != (0,) or tuple(other) != (0,):  # the gradient of a kernel contracts the examples
        return False
    rows = [lhs.aval.shape[dim] for dim in contracted]
    plain = lhs.aval.dtype == rhs.aval.dtype == jnp.float32 and params["preferred_element_type"] in (None, jnp.float32)
    return plain and len(rows) == 1 and 1 <= rows[0] <= MOST_ROWS and result.aval.size >= LEAST_RESULT


def _sum(lhs: Array, rhs: Array, **params: Any) -> Array:
    ((row,), (other_row,)), (batch, other_batch) = params["dimension_numbers"]
    lhs, rhs = computed_once(lhs), computed_once(rhs)
    lhs, rhs = _in_front(lhs, row, batch), _in_front(rhs, other_row, other_batch)
    count = len(batch)
    free, other_free = lhs.ndim - 1 - count, rhs.ndim - 1 - count
    lhs = lhs.reshape(*lhs.shape, *(1,) * other_free)
    rhs = rhs.reshape(*rhs.shape[: 1 + count], *(1,) * free, *rhs.shape[1 + count :])
    return functools.reduce(jnp.add, (lhs[k] * rhs[k] for k in range(len(lhs))))


def _in_front(array: Array, row: int, batch: Any) -> Array:
    """(rows, *batch dims, *free dims)"""
    free = [dim for dim in range(array.ndim) if dim != row and dim not in batch]
    return array.transpose(row, *batch, *free)


def _batch(operands: Any, dims: Any, **params: Any) -> tuple[Array, int]:
    size = next(value.shape[dim] for value, dim in zip(operands, dims, strict=True) if dim is not None)
    lhs, rhs = (
        jnp.broadcast_to(value, (size, *value.shape)) if dim is None else jnp.moveaxis(value, dim, 0)
        for value, dim in zip(operands, dims, strict=True)
    )
    contracted, batch = params["dimension_numbers"]
    shifted = tuple(tuple(dim + 1 for dim in each) for each in contracted)
    leading = tuple((0, *(dim + 1 for dim in each)) for each in batch)
    return outer_products_p.bind(lhs, rhs, **params | {"dimension_numbers": (shifted, leading)}), 0


outer_products_p.def_impl(lax.dot_general_p.bind)
outer_products_p.def_abstract_eval(lambda lhs, rhs, **params: lax.dot_general_p.abstract_eval(lhs, rhs, **params)[0])
batching.primitive_batchers[outer_products_p] = _batch
mlir.register_lowering(outer_products_p, mlir.lower_fun(_sum, multiple_results=False))
