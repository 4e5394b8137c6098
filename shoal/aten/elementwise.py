"""ATen operations on each element alone, in JAX.

Where torch and JAX disagree about a gradient at a kink (`relu` at 0, `clamp` at its bounds) it is torch's. Functions whose
textbook form overflows in a branch that is not taken are JAX's own: a gradient would be NaN there.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from shoal.aten.table import Table

TABLE = Table()

for _name in (
    *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh", "exp", "exp2", "expm1", "floor"),
    *(
        "isfinite",
        "isinf",
        "isnan",
        "log",
        "log10",
        "log1p",
        "log2",
        "logical_not",
        "reciprocal",
        "sign",
        "sin",
        "sinh",
    ),
    *("sqrt", "square", "tan", "tanh", "trunc", "bitwise_not", "positive"),
):
    TABLE.add(f"{_name}.default", getattr(jnp, _name))
TABLE.add("neg.default", jnp.negative)
TABLE.add("round.default", jnp.round)
TABLE.add("rsqrt.default", jax.lax.rsqrt)
TABLE.add("sigmoid.default", jax.nn.sigmoid)
TABLE.add("erf.default", jax.lax.erf)
TABLE.add("erfc.default", jax.lax.erfc)
TABLE.add("erfinv.default", jax.lax.erf_inv)
TABLE.add("detach.default", jax.lax.stop_gradient)

for _name, _function in {
    **{name: getattr(jnp, name) for name in ("atan2", "fmod", "remainder", "maximum", "minimum", "hypot")},
    **{name: getattr(jnp, name) for name in ("logical_and", "logical_or", "logical_xor")},
    **{name: getattr(jnp, name) for name in ("bitwise_and", "bitwise_or", "bitwise_xor")},
    **{"mul": jnp.multiply, "eq": jnp.equal, "ne": jnp.not_equal, "lt": jnp.less, "le": jnp.less_equal},
    **{"gt": jnp.greater, "ge": jnp.greater_equal},
}.items():
    for _overload in ("default", "Tensor", "Scalar"):
        TABLE.add(f"{_name}.{_overload}", _function)


@TABLE.operation("add.Tensor", "add.Scalar")
def add(x: Any, y: Any, alpha: float = 1) -> Any:
    return jnp.add(x, y if alpha == 1 else jnp.multiply(y, alpha))


@TABLE.operation("sub.Tensor", "sub.Scalar")
def sub(x: Any, y: Any, alpha: float = 1) -> Any:
    return jnp.subtract(x, y if alpha == 1 else jnp.multiply(y, alpha))


@TABLE.operation("rsub.Tensor", "rsub.Scalar")
def rsub(x: Any, y: Any, alpha: float = 1) -> Any:
    return sub(y, x, alpha)


@TABLE.operation("div.Tensor", "div.Scalar", "div.Tensor_mode", "div.Scalar_mode")
def div(x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return jnp.floor_divide(x, y)
    made = jnp.true_divide(x, y)
    return made if rounding_mode is None else jnp.trunc(made)


@TABLE.operation("floor_divide.default", "floor_divide.Scalar")
def floor_divide(x: Any, y: Any) -> Any:
    return jnp.floor_divide(x, y)


@TABLE.operation("pow.Tensor_Tensor", "pow.Tensor_Scalar", "pow.Scalar")
def power(x: Any, y: Any) -> Any:
    if isinstance(y, float) and y.is_integer():
        y = int(y)  # an exact exponent has a gradient at 0 and below
    return jnp.power(x, y)


@TABLE.operation("relu.default")
def relu(x: Any) -> Any:
    return jax.nn.relu(x)


@TABLE.operation("clamp.default", "clamp.Tensor")
def clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    if low is not None:
        x = jnp.where(x < low, low, x)
    return x if high is None else jnp.where(x > high, high, x)


TABLE.add("clamp_min.default", clamp)
TABLE.add("clamp_min.Tensor", clamp)


@TABLE.operation("clamp_max.default", "clamp_max.Tensor")
def clamp_max(x: Any, high: Any) -> Any:
    return clamp(x, None, high)


@TABLE.operation("hardtanh.default")
def hardtanh(x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


@TABLE.operation("hardsigmoid.default")
def hardsigmoid(x: Any) -> Any:
    return hardtanh(x / 6 + 0.5, 0.0, 1.0)


@TABLE.operation("hardswish.default")
def hardswish(x: Any) -> Any:
    return x * hardsigmoid(x)


@TABLE.operation("leaky_relu.default")
def leaky_relu(x: Any, slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, x * slope)


@TABLE.operation("prelu.default", "_prelu_kernel.default")
def prelu(x: Any, weight: Any) -> Any:
    shape = (1, -1, *(1,) * (x.ndim - 2)) if x.ndim > 1 and weight.size > 1 else (-1,) if x.ndim else ()
    return jnp.where(x > 0, x, x * (weight if weight.ndim == x.ndim else weight.reshape(shape)))


@TABLE.operation("elu.default")
def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    below = jnp.where(x > 0, 0.0, x)  # of what is above 0 the exponential may overflow
    return jnp.where(x > 0, scale * x, scale * alpha * jnp.expm1(below * input_scale))


@TABLE.operation("celu.default")
def celu(x: Any, alpha: float = 1.0) -> Any:
    return elu(x, alpha, 1.0, 1.0 / alpha)


@TABLE.operation("selu.default")
def selu(x: Any) -> Any:
    return elu(x, 1.6732632423543772, 1.0507009873554805)


@TABLE.operation("gelu.default")
def gelu(x: Any, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@TABLE.operation("silu.default")
def silu(x: Any) -> Any:
    return jax.nn.silu(x)


@TABLE.operation("softplus.default")
def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)


@TABLE.operation("mish.default")
def mish(x: Any) -> Any:
    return x * jnp.tanh(jax.nn.softplus(x))


@TABLE.operation("log_sigmoid.default")
def log_sigmoid(x: Any) -> Any:
    return jax.nn.log_sigmoid(x)


@TABLE.operation("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def where(condition: Any, x: Any, y: Any) -> Any:
    return jnp.where(condition, x, y)


@TABLE.operation("masked_fill.Scalar", "masked_fill.Tensor")
def masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, value, x)


@TABLE.operation("lerp.Scalar", "lerp.Tensor")
def lerp(x: Any, y: Any, weight: Any) -> Any:
    return x + weight * (y - x)


@TABLE.operation("nan_to_num.default")
def nan_to_num(x: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Any:
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@TABLE.operation("round.decimals")
def round_decimals(x: Any, decimals: int = 0) -> Any:
    return jnp.round(x * 10.0**decimals) / 10.0**decimals


@TABLE.operation("linalg_vector_norm.default")
def vector_norm(x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
    axes = tuple(range(x.ndim)) if dim is None else tuple(dim)
    size = jnp.abs(x)
    if order == math.inf:
        return size.max(axis=axes, keepdims=keepdim)
    if order == -math.inf:
        return size.min(axis=axes, keepdims=keepdim)
    if order == 0:
        return jnp.sum((x != 0).astype(x.dtype), axis=axes, keepdims=keepdim)
    if order == 1:
        return size.sum(axis=axes, keepdims=keepdim)
    total = (jnp.square(x) if order == 2 else size**order).sum(axis=axes, keepdims=keepdim)
    safe = jnp.where(total == 0, 1.0, total)  # as torch has it, the gradient of a norm that is 0 is 0
    return jnp.where(total == 0, 0.0, jnp.sqrt(safe) if order == 2 else safe ** (1 / order))


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


for _name in ("alias", "clone", "contiguous", "lift_fresh_copy", "lift_fresh", "_to_copy", "to"):
    for _overload in ("default", "dtype", "dtype_layout", "device", "other"):
        TABLE.add(f"{_name}.{_overload}", _same)  # the type is that of torch's answer, see run.py
