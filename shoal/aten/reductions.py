"""ATen operations that sum up, order or multiply matrices, in JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from shoal.aten.elementwise import vector_norm
from shoal.aten.table import Table

TABLE = Table()
Dims = Any
"""None, one number, or a list of them; an empty list means all."""


def axes_of(dim: Dims, ndim: int) -> tuple[int, ...]:
    """The dimensions that are meant, none of them negative."""
    chosen = range(ndim) if dim is None or dim == [] or dim == () else [dim] if isinstance(dim, int) else dim
    return tuple(axis % max(ndim, 1) for axis in chosen) if ndim else ()


@TABLE.operation("sum.default", "sum.dim_IntList")
def sum_(x: Any, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.sum(x, axis=axes_of(dim, x.ndim), keepdims=keepdim, dtype=dtype)


@TABLE.operation("mean.default", "mean.dim")
def mean(x: Any, dim: Dims = None, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.mean(x, axis=axes_of(dim, x.ndim), keepdims=keepdim, dtype=dtype)


@TABLE.operation("prod.default")
def prod(x: Any, dtype: Any = None) -> Any:
    return jnp.prod(x, dtype=dtype)


@TABLE.operation("prod.dim_int")
def prod_dim(x: Any, dim: int, keepdim: bool = False, dtype: Any = None) -> Any:
    return jnp.prod(x, axis=dim, keepdims=keepdim, dtype=dtype)


@TABLE.operation("var.correction")
def var(x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Any:
    axes = axes_of(dim, x.ndim)
    away = jnp.square(x - x.mean(axis=axes, keepdims=True))
    count = x.size // max(1, jnp.sum(away, axis=axes).size)
    return away.sum(axis=axes, keepdims=keepdim) / max(0, count - (1 if correction is None else correction))


@TABLE.operation("var.dim")
def var_dim(x: Any, dim: Dims = None, unbiased: bool = True, keepdim: bool = False) -> Any:
    return var(x, dim, int(unbiased), keepdim)


@TABLE.operation("std.correction")
def std(x: Any, dim: Dims = None, correction: float | None = None, keepdim: bool = False) -> Any:
    return jnp.sqrt(var(x, dim, correction, keepdim))


@TABLE.operation("amax.default")
def amax(x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return jnp.max(x, axis=axes_of(dim, x.ndim), keepdims=keepdim)


@TABLE.operation("amin.default")
def amin(x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return jnp.min(x, axis=axes_of(dim, x.ndim), keepdims=keepdim)


TABLE.add("max.default", jnp.max)
TABLE.add("min.default", jnp.min)


def _taken(x: Any, places: Any, dim: int, keepdim: bool) -> tuple[Any, Any]:
    """The gradient goes to the place that was taken, as in torch; JAX's own max divides it among equals."""
    values = jnp.take_along_axis(x, places, axis=dim)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


@TABLE.operation("max.dim")
def max_dim(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _taken(x, jnp.argmax(x, axis=dim, keepdims=True), dim, keepdim)


@TABLE.operation("min.dim")
def min_dim(x: Any, dim: int, keepdim: bool = False) -> tuple[Any, Any]:
    return _taken(x, jnp.argmin(x, axis=dim, keepdims=True), dim, keepdim)


@TABLE.operation("argmax.default")
def argmax(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return jnp.argmax(x, axis=dim, keepdims=keepdim)


@TABLE.operation("argmin.default")
def argmin(x: Any, dim: int | None = None, keepdim: bool = False) -> Any:
    return jnp.argmin(x, axis=dim, keepdims=keepdim)


@TABLE.operation("any.default", "any.dim", "any.dims")
def any_(x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return jnp.any(x != 0, axis=axes_of(dim, x.ndim), keepdims=keepdim)


@TABLE.operation("all.default", "all.dim", "all.dims")
def all_(x: Any, dim: Dims = None, keepdim: bool = False) -> Any:
    return jnp.all(x != 0, axis=axes_of(dim, x.ndim), keepdims=keepdim)


@TABLE.operation("logsumexp.default")
def logsumexp(x: Any, dim: Dims, keepdim: bool = False) -> Any:
    return jax.nn.logsumexp(x, axis=axes_of(dim, x.ndim), keepdims=keepdim)


@TABLE.operation("_softmax.default", "softmax.int")
def softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    return jax.nn.softmax(x if dtype in (None, False, True) else x.astype(dtype), axis=dim)


@TABLE.operation("_log_softmax.default", "log_softmax.int")
def log_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    return jax.nn.log_softmax(x if dtype in (None, False, True) else x.astype(dtype), axis=dim)


@TABLE.operation("cumsum.default")
def cumsum(x: Any, dim: int, dtype: Any = None) -> Any:
    return jnp.cumsum(x, axis=dim, dtype=dtype) if x.ndim else x


@TABLE.operation("cumprod.default")
def cumprod(x: Any, dim: int, dtype: Any = None) -> Any:
    return jnp.cumprod(x, axis=dim, dtype=dtype) if x.ndim else x


@TABLE.operation("sort.default")
def sort(x: Any, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    return _taken(x, jnp.argsort(x, axis=dim, descending=descending, stable=True), dim, True)


@TABLE.operation("sort.stable")
def sort_stable(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> tuple[Any, Any]:
    return sort(x, dim, descending)


@TABLE.operation("topk.default")
def topk(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Any, Any]:
    places = jnp.argsort(x, axis=dim, descending=largest, stable=True)
    return _taken(x, jax.lax.slice_in_dim(places, 0, k, axis=dim % x.ndim), dim, True)


TABLE.add("mm.default", jnp.matmul)
TABLE.add("bmm.default", jnp.matmul)
TABLE.add("mv.default", jnp.matmul)
TABLE.add("dot.default", jnp.matmul)
TABLE.add("matmul.default", jnp.matmul)


@TABLE.operation("linear.default")
def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    made = jnp.matmul(x, weight.T)
    return made if bias is None else made + bias


@TABLE.operation("addmm.default", "addmv.default", "baddbmm.default")
def addmm(bias: Any, x: Any, y: Any, beta: float = 1, alpha: float = 1) -> Any:
    made = jnp.matmul(x, y)
    made = made if alpha == 1 else made * alpha
    return made + (bias if beta == 1 else bias * beta)


@TABLE.operation("einsum.default")
def einsum(equation: str, operands: Any, path: Any = None) -> Any:
    return jnp.einsum(equation, *operands)


@TABLE.operation("bilinear.default")
def bilinear(x: Any, y: Any, weight: Any, bias: Any = None) -> Any:
    made = jnp.einsum("...i,oij,...j->...o", x, weight, y)
    return made if bias is None else made + bias


@TABLE.operation("_cdist_forward.default", "cdist.default")
def cdist(x: Any, y: Any, p: float = 2.0, mode: int | None = None) -> Any:
    return vector_norm(x[..., :, None, :] - y[..., None, :, :], p, [-1])
