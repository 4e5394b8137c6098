"""ATen operations of layers, in JAX: convolution, pooling, normalisation, attention, resizing.

Shape legend: B = batch, C = channels, the rest are spatial dimensions, as torch orders them.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shoal.aten.reductions import max_dim
from shoal.aten.table import Step, Table

TABLE, WITH_STEP = Table(), Table()
"""Of the second the functions take a `Step` first."""


def _each(value: Any, count: int) -> tuple[int, ...]:
    """One number for each spatial dimension: torch takes one for all."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


@TABLE.operation("convolution.default")
def convolution(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int
) -> Any:  # fmt: skip
    n = weight.ndim - 2
    if x.ndim == n + 1:
        return convolution(x[None], weight, bias, stride, padding, dilation, transposed, output_padding, groups)[0]
    stride, padding, dilation = _each(stride, n), _each(padding, n), _each(dilation, n)
    pads, spread = [(p, p) for p in padding], (1,) * n
    if transposed:  # the gradient of a convolution: inputs spread apart, the kernel turned round
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        pads = [(r - p, r - p + o) for r, p, o in zip(reach, padding, _each(output_padding, n), strict=True)]
        stride, spread = (1,) * n, stride
        weight = jnp.flip(weight, tuple(range(2, weight.ndim)))
        weight = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:]).swapaxes(1, 2)
        weight = weight.reshape(-1, *weight.shape[2:])
    space = "DHW"[3 - n :]
    made = jax.lax.conv_general_dilated(
        x, weight, stride, pads, lhs_dilation=spread, rhs_dilation=dilation,
        dimension_numbers=(f"NC{space}", f"OI{space}", f"NC{space}"), feature_group_count=groups,
    )  # fmt: skip
    return made if bias is None else made + bias.reshape(-1, *(1,) * n)


@TABLE.operation("conv1d.default", "conv2d.default", "conv3d.default")
def conv(
    x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Any:
    return convolution(x, weight, bias, stride, padding, dilation, False, 0, groups)


def _windows(
    x: Any, n: int, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]], tuple[int, ...]]:
    """Kernel, stride, padding and dilation of each spatial dimension; the padding reaches as far as the last window."""
    kernel, padding, dilation = _each(kernel, n), _each(padding, n), _each(dilation, n)
    stride = kernel if stride in (None, [], ()) else _each(stride, n)
    pads = []
    for size, k, s, p, d in zip(x.shape[-n:], kernel, stride, padding, dilation, strict=True):
        reach = d * (k - 1) + 1
        over = size + 2 * p - reach
        windows = -(-over // s) + 1 if ceil else over // s + 1
        if ceil and (windows - 1) * s >= size + p:  # a window must start in the input or in its left padding
            windows -= 1
        pads.append((p, max(p, (windows - 1) * s + reach - size - p) if ceil else p))
    return kernel, stride, pads, dilation


def _reduce(
    x: Any, n: int, start: Any, function: Any, kernel: Any, stride: Any, pads: Sequence[Any], dilation: Any
) -> Any:
    ahead = (1,) * (x.ndim - n)
    pads = [(0, 0)] * (x.ndim - n) + list(pads)
    return jax.lax.reduce_window(x, start, function, ahead + kernel, ahead + stride, pads, None, ahead + dilation)


def _max_pool(
    x: Any, n: int, kernel: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil: bool = False
) -> Any:
    low = np.asarray(-np.inf if jnp.issubdtype(x.dtype, jnp.floating) else np.iinfo(x.dtype).min, x.dtype)[()]
    kernel, stride, pads, dilation = _windows(x, n, kernel, stride, padding, dilation, ceil)
    if set(dilation) == {1}:
        return _reduce(x, n, low, jax.lax.max, kernel, stride, pads, dilation)
    # JAX has no gradient of a dilated maximum, so each place of the window is a slice.
    ahead = x.ndim - n
    x = jnp.pad(x, [(0, 0)] * ahead + pads, constant_values=low)
    outs = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[ahead:], kernel, stride, dilation, strict=True)
    ]
    parts = []
    for place in itertools.product(*(range(k) for k in kernel)):
        starts = [i * d for i, d in zip(place, dilation, strict=True)]
        slices = [slice(a, a + s * (out - 1) + 1, s) for a, s, out in zip(starts, stride, outs, strict=True)]
        parts.append(x[(..., *slices)])
    return max_dim(jnp.stack(parts), 0)[0]


def _adaptive_max_pool(x: Any, n: int, output: Any) -> tuple[Any, None]:
    sizes = [x.shape[i - n] if out is None else out for i, out in enumerate(_each(output, n))]
    if any(size % out for size, out in zip(x.shape[-n:], sizes, strict=True)):
        raise NotImplementedError(f"adaptive max pooling of {x.shape[-n:]} to {sizes}, which does not divide it")
    return _max_pool(x, n, [size // out for size, out in zip(x.shape[-n:], sizes, strict=True)]), None


def _avg_pool(
    x: Any, n: int, kernel: Any, stride: Any = None, padding: Any = 0, ceil: bool = False, count_padding: bool = True,
    divisor: int | None = None,
) -> Any:  # fmt: skip
    kernel, stride, pads, dilation = _windows(x, n, kernel, stride, padding, 1, ceil)
    zero = np.zeros((), x.dtype)[()]
    total = _reduce(x, n, zero, jax.lax.add, kernel, stride, pads, dilation)
    if divisor is not None:
        return total / divisor
    # What ceil_mode adds at the end is never counted; the padding that was asked for is, unless told otherwise.
    asked = _each(padding, n)
    ones = np.ones(tuple(size + (2 * p if count_padding else 0) for size, p in zip(x.shape[-n:], asked, strict=True)))
    left = [
        (0 if count_padding else low, high - (p if count_padding else 0))
        for (low, high), p in zip(pads, asked, strict=True)
    ]
    counts = _reduce(jnp.asarray(ones, x.dtype), n, zero, jax.lax.add, kernel, stride, left, dilation)
    return total / counts.reshape((1,) * (x.ndim - n) + counts.shape)


def _matrix_each(x: Any, n: int, matrices: Sequence[np.ndarray]) -> Any:
    """Multiplies each spatial dimension by a matrix (out, in)."""
    for axis, matrix in zip(range(x.ndim - n, x.ndim), matrices, strict=True):
        x = jnp.moveaxis(jnp.matmul(jnp.moveaxis(x, axis, -1), jnp.asarray(matrix.T, x.dtype)), -1, axis)
    return x


def _adaptive_avg_pool(x: Any, n: int, output: Any) -> Any:
    """Each output is the mean of its share of the inputs, from floor(i * in / out) to ceil((i + 1) * in / out)."""
    sizes = [x.shape[i - n] if out is None else out for i, out in enumerate(_each(output, n))]
    matrices = []
    for size, out in zip(x.shape[-n:], sizes, strict=True):
        matrix = np.zeros((out, size), np.float32)
        for i in range(out):
            first, last = i * size // out, -(-(i + 1) * size // out)
            matrix[i, first:last] = 1 / (last - first)
        matrices.append(matrix)
    return x.mean(tuple(range(-n, 0)), keepdims=True) if set(sizes) == {1} else _matrix_each(x, n, matrices)


def _pools(n: int) -> None:
    def plain(x: Any, *options: Any) -> Any:
        return _max_pool(x, n, *options)

    def with_places(x: Any, *options: Any) -> tuple[Any, None]:
        return _max_pool(x, n, *options), None

    def average(x: Any, *options: Any) -> Any:
        return _avg_pool(x, n, *options)

    def adaptive(x: Any, output: Any) -> Any:
        return _adaptive_avg_pool(x, n, output)

    def adaptive_max(x: Any, output: Any) -> tuple[Any, None]:
        return _adaptive_max_pool(x, n, output)

    TABLE.add(f"adaptive_max_pool{n}d.default", adaptive_max)
    TABLE.add(f"max_pool{n}d.default", plain)
    TABLE.add(f"max_pool{n}d_with_indices.default", with_places)
    TABLE.add(f"avg_pool{n}d.default", average)
    for name in (f"adaptive_avg_pool{n}d", f"_adaptive_avg_pool{n}d"):
        TABLE.add(f"{name}.default", adaptive)


for _n in (1, 2, 3):
    _pools(_n)


@TABLE.operation("upsample_nearest1d.vec", "upsample_nearest2d.vec", "upsample_nearest3d.vec")
def upsample_nearest(x: Any, output: Any, factors: Any) -> Any:
    n = x.ndim - 2
    for i in range(n):
        size = x.shape[2 + i]
        out = output[i] if output is not None else int(size * factors[i])
        ratio = size / out if output is not None or factors is None else 1 / factors[i]
        x = jnp.take(x, np.minimum((np.arange(out) * ratio).astype(np.int32), size - 1), axis=2 + i)
    return x


@TABLE.operation("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec")
def upsample_linear(x: Any, output: Any, align_corners: bool, factors: Any) -> Any:
    n, matrices = x.ndim - 2, []
    for i in range(n):
        size = x.shape[2 + i]
        out = output[i] if output is not None else int(size * factors[i])
        if align_corners:
            at = np.arange(out) * ((size - 1) / (out - 1) if out > 1 else 0.0)
        else:
            ratio = size / out if output is not None or factors is None else 1 / factors[i]
            at = np.maximum((np.arange(out) + 0.5) * ratio - 0.5, 0.0)
        low = np.minimum(at.astype(int), size - 1)
        matrix = np.zeros((out, size), np.float32)
        matrix[np.arange(out), low] += 1 - (at - low)
        matrix[np.arange(out), np.minimum(low + 1, size - 1)] += at - low
        matrices.append(matrix)
    return _matrix_each(x, n, matrices)


def _normalised(x: Any, axes: tuple[int, ...], eps: float) -> Any:
    away = x - x.mean(axis=axes, keepdims=True)
    return away * jax.lax.rsqrt(jnp.square(away).mean(axis=axes, keepdims=True) + eps)


def _affine(x: Any, weight: Any, bias: Any, ahead: int) -> Any:
    """Weight and bias of the dimension after `ahead`."""
    shape = (1,) * ahead + (-1,) + (1,) * (x.ndim - ahead - 1)
    x = x if weight is None else x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


@TABLE.operation("layer_norm.default")
def layer_norm(x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
    made = _normalised(x, tuple(range(x.ndim - len(shape), x.ndim)), eps)
    made = made if weight is None else made * weight
    return made if bias is None else made + bias


@TABLE.operation("rms_norm.default")
def rms_norm(x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    least = float(jnp.finfo(x.dtype).eps) if eps is None else eps  # type: ignore[no-untyped-call]
    made = x * jax.lax.rsqrt(jnp.square(x).mean(axis=axes, keepdims=True) + least)
    return made if weight is None else made * weight


@TABLE.operation("group_norm.default")
def group_norm(x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True) -> Any:
    apart = x.reshape(x.shape[0], groups, -1)
    return _affine(_normalised(apart, (2,), eps).reshape(x.shape), weight, bias, 1)


@TABLE.operation("instance_norm.default")
def instance_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float, eps: float, cudnn: bool
) -> Any:
    if mean is not None:
        raise NotImplementedError("instance norm with track_running_stats=True")
    return _affine(_normalised(x, tuple(range(2, x.ndim)), eps), weight, bias, 1)


@TABLE.operation("_native_batch_norm_legit_no_training.default")
def batch_norm_fixed(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[Any, None, None]:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    made = (x - mean.reshape(shape)) * jax.lax.rsqrt(var.reshape(shape) + eps)
    return _affine(made, weight, bias, 1), None, None


@WITH_STEP.operation("_native_batch_norm_legit_functional.default")
def batch_norm(
    step: Step, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, ...]:
    """Statistics of the real examples alone; running ones as torch keeps them, with the unbiased variance."""
    if not training:
        return (*batch_norm_fixed(x, weight, bias, mean, var, momentum, eps), mean, var)
    made, batch_mean, batch_var, count = _batch_normalised(step, x, eps)
    unbiased = batch_var * (count / jnp.maximum(count - 1, 1))
    new_mean = (1 - momentum) * mean + momentum * batch_mean
    new_var = (1 - momentum) * var + momentum * unbiased
    return _affine(made, weight, bias, 1), None, None, new_mean, new_var


@WITH_STEP.operation("_native_batch_norm_legit.no_stats")
def batch_norm_without_state(
    step: Step, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> tuple[Any, None, None]:
    return _affine(_batch_normalised(step, x, eps)[0], weight, bias, 1), None, None


def _batch_normalised(step: Step, x: Any, eps: float) -> tuple[Any, Any, Any, Any]:
    """Normalised x, mean (C,), variance (C,), and over how many values they were taken."""
    shape, axes = (1, -1) + (1,) * (x.ndim - 2), (0, *range(2, x.ndim))
    real = jnp.ones(x.shape[0], x.dtype) if step.mask is None else step.mask.astype(x.dtype)
    share = real.reshape(-1, *(1,) * (x.ndim - 1))
    count = jnp.maximum(real.sum(), 1) * math.prod(x.shape[2:])
    mean = (x * share).sum(axis=axes) / count
    away = x - mean.reshape(shape)
    var = (jnp.square(away) * share).sum(axis=axes) / count
    return away * jax.lax.rsqrt(var.reshape(shape) + eps), mean, var, count


@WITH_STEP.operation("dropout.default")
def dropout(step: Step, x: Any, p: float, train: bool | None = True) -> Any:
    if not train or p == 0:
        return x
    kept = jax.random.bernoulli(next(step.keys), 1 - p, x.shape)
    return jnp.where(kept, x / max(1 - p, 1e-30), 0.0)


@WITH_STEP.operation("native_dropout.default")
def native_dropout(step: Step, x: Any, p: float, train: bool | None = True) -> tuple[Any, None]:
    return dropout(step, x, p, train), None


@WITH_STEP.operation("scaled_dot_product_attention.default")
def attention(
    step: Step, query: Any, key: Any, value: Any, mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    if enable_gqa:
        key, value = (jnp.repeat(one, query.shape[-3] // one.shape[-3], axis=-3) for one in (key, value))
    scores = jnp.matmul(query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale), jnp.swapaxes(key, -1, -2))
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], jnp.bool_))
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == jnp.bool_ else scores + mask
    return jnp.matmul(dropout(step, jax.nn.softmax(scores, axis=-1), dropout_p), value)


@WITH_STEP.operation("rand.default")
def rand(step: Step, size: Any, dtype: Any = None) -> Any:
    return jax.random.uniform(next(step.keys), tuple(size))


@WITH_STEP.operation("randn.default")
def randn(step: Step, size: Any, dtype: Any = None) -> Any:
    return jax.random.normal(next(step.keys), tuple(size))


@WITH_STEP.operation("rand_like.default")
def rand_like(step: Step, x: Any, dtype: Any = None) -> Any:
    return jax.random.uniform(next(step.keys), x.shape)


@WITH_STEP.operation("randn_like.default")
def randn_like(step: Step, x: Any, dtype: Any = None) -> Any:
    return jax.random.normal(next(step.keys), x.shape)


@WITH_STEP.operation("bernoulli.p")
def bernoulli(step: Step, x: Any, p: float = 0.5) -> Any:
    return jax.random.bernoulli(next(step.keys), p, x.shape)


@WITH_STEP.operation("bernoulli.default")
def bernoulli_of(step: Step, x: Any) -> Any:
    return jax.random.bernoulli(next(step.keys), x)
