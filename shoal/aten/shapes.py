"""ATen operations that move elements: views, slices, joins, lookups, and tensors made from nothing."""

from typing import Any

import jax
import jax.numpy as jnp

from shoal.aten.table import Table

TABLE = Table()


@TABLE.operation("view.default", "reshape.default", "_unsafe_view.default", "_reshape_copy.default")
def view(x: Any, shape: Any) -> Any:
    return x.reshape(tuple(shape))


@TABLE.operation("view_as.default", "reshape_as.default")
def view_as(x: Any, other: Any) -> Any:
    return x.reshape(other.shape)


@TABLE.operation("flatten.using_ints")
def flatten(x: Any, start: int = 0, end: int = -1) -> Any:
    if x.ndim == 0:
        return x.reshape(1)
    start, end = start % x.ndim, end % x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@TABLE.operation("unflatten.int")
def unflatten(x: Any, dim: int, sizes: Any) -> Any:
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@TABLE.operation("permute.default")
def permute(x: Any, dims: Any) -> Any:
    return jnp.transpose(x, tuple(dim % x.ndim for dim in dims))


@TABLE.operation("transpose.int")
def transpose(x: Any, one: int, two: int) -> Any:
    return jnp.swapaxes(x, one, two) if x.ndim else x


@TABLE.operation("t.default", "numpy_T.default")
def t(x: Any) -> Any:
    return x.T


@TABLE.operation("movedim.int", "movedim.intlist")
def movedim(x: Any, source: Any, destination: Any) -> Any:
    return jnp.moveaxis(x, source, destination)


@TABLE.operation("squeeze.default")
def squeeze_all(x: Any) -> Any:
    return jnp.squeeze(x)


@TABLE.operation("squeeze.dim", "squeeze.dims")
def squeeze(x: Any, dims: Any) -> Any:
    chosen = [dims] if isinstance(dims, int) else list(dims)
    return jnp.squeeze(x, tuple(dim % x.ndim for dim in chosen if x.ndim and x.shape[dim] == 1))


@TABLE.operation("unsqueeze.default")
def unsqueeze(x: Any, dim: int) -> Any:
    return jnp.expand_dims(x, dim)


@TABLE.operation("expand.default")
def expand(x: Any, sizes: Any, implicit: bool = False) -> Any:
    new = len(sizes) - x.ndim
    return jnp.broadcast_to(x, tuple(x.shape[i - new] if size == -1 else size for i, size in enumerate(sizes)))


@TABLE.operation("expand_as.default")
def expand_as(x: Any, other: Any) -> Any:
    return jnp.broadcast_to(x, other.shape)


@TABLE.operation("copy.default")
def copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    return jnp.broadcast_to(source, x.shape)


@TABLE.operation("repeat.default")
def repeat(x: Any, times: Any) -> Any:
    return jnp.tile(x, tuple(times))


@TABLE.operation("repeat_interleave.self_int")
def repeat_interleave(x: Any, repeats: int, dim: int | None = None, output_size: int | None = None) -> Any:
    return jnp.repeat(x, repeats, axis=dim)


@TABLE.operation("flip.default")
def flip(x: Any, dims: Any) -> Any:
    return jnp.flip(x, tuple(dims))


@TABLE.operation("roll.default")
def roll(x: Any, shifts: Any, dims: Any = ()) -> Any:
    return jnp.roll(x, tuple(shifts), tuple(dims)) if dims else jnp.roll(x, shifts[0])


@TABLE.operation("cat.default")
def cat(parts: Any, dim: int = 0) -> Any:
    return jnp.concatenate([part for part in parts if part.shape != (0,)], axis=dim)


@TABLE.operation("stack.default")
def stack(parts: Any, dim: int = 0) -> Any:
    return jnp.stack(parts, axis=dim)


@TABLE.operation("split.Tensor")
def split(x: Any, size: int, dim: int = 0) -> list[Any]:
    return [jax.lax.slice_in_dim(x, i, min(i + size, x.shape[dim]), axis=dim) for i in range(0, x.shape[dim], size)]


@TABLE.operation("split_with_sizes.default", "split.sizes")
def split_with_sizes(x: Any, sizes: Any, dim: int = 0) -> list[Any]:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [jax.lax.slice_in_dim(x, a, a + n, axis=dim) for a, n in zip(starts, sizes, strict=True)]


@TABLE.operation("chunk.default")
def chunk(x: Any, chunks: int, dim: int = 0) -> list[Any]:
    return split(x, -(-x.shape[dim] // chunks), dim)


@TABLE.operation("unbind.int")
def unbind(x: Any, dim: int = 0) -> list[Any]:
    return [jax.lax.index_in_dim(x, i, dim, keepdims=False) for i in range(x.shape[dim])]


def _part(x: Any, dim: int, start: int | None, end: int | None, step: int) -> tuple[slice, ...]:
    return (*(slice(None),) * (dim % x.ndim), slice(start, end, step))


@TABLE.operation("slice.Tensor")
def slice_(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return x[_part(x, dim, start, end, step)]


@TABLE.operation("slice_scatter.default")
def slice_scatter(
    x: Any, source: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Any:
    return x.at[_part(x, dim, start, end, step)].set(source)


@TABLE.operation("unfold.default")
def unfold(x: Any, dim: int, size: int, step: int) -> Any:
    starts = range(0, x.shape[dim] - size + 1, step)
    return jnp.stack([jnp.moveaxis(narrow(x, dim % x.ndim, at, size), dim, -1) for at in starts], axis=dim % x.ndim)


@TABLE.operation("narrow.default")
def narrow(x: Any, dim: int, start: int, length: int) -> Any:
    return jax.lax.slice_in_dim(x, start, start + length, axis=dim)


@TABLE.operation("select.int")
def select(x: Any, dim: int, index: int) -> Any:
    return jax.lax.index_in_dim(x, index, dim, keepdims=False)


@TABLE.operation("select_scatter.default")
def select_scatter(x: Any, source: Any, dim: int, index: int) -> Any:
    return x.at[(*(slice(None),) * (dim % x.ndim), index)].set(source)


@TABLE.operation("diagonal.default")
def diagonal(x: Any, offset: int = 0, one: int = 0, two: int = 1) -> Any:
    return jnp.diagonal(x, offset, one, two)


@TABLE.operation("tril.default")
def tril(x: Any, diagonal: int = 0) -> Any:
    return jnp.tril(x, diagonal)


@TABLE.operation("triu.default")
def triu(x: Any, diagonal: int = 0) -> Any:
    return jnp.triu(x, diagonal)


@TABLE.operation("constant_pad_nd.default")
def constant_pad(x: Any, padding: Any, value: float = 0.0) -> Any:
    pairs = list(zip(padding[::2], padding[1::2], strict=True))  # the last dimension comes first
    config = [(0, 0, 0)] * (x.ndim - len(pairs)) + [(low, high, 0) for low, high in reversed(pairs)]
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), config)


def _positions(dim: int, index: Any) -> tuple[Any, ...]:
    """For an index over one dimension, the positions over all."""
    own = jnp.meshgrid(*(jnp.arange(size) for size in index.shape), indexing="ij")
    return tuple(index if axis == dim % index.ndim else value for axis, value in enumerate(own))


@TABLE.operation("gather.default")
def gather(x: Any, dim: int, index: Any, sparse_grad: bool = False) -> Any:
    return x[_positions(dim, index)] if x.ndim else x


@TABLE.operation("scatter.src", "scatter.value")
def scatter(x: Any, dim: int, index: Any, source: Any) -> Any:
    return x.at[_positions(dim, index)].set(_cut(source, index))


@TABLE.operation("scatter_add.default")
def scatter_add(x: Any, dim: int, index: Any, source: Any) -> Any:
    return x.at[_positions(dim, index)].add(_cut(source, index))


def _cut(source: Any, index: Any) -> Any:
    return source[tuple(slice(size) for size in index.shape)] if jnp.ndim(source) else source


@TABLE.operation("index.Tensor")
def index(x: Any, indices: Any) -> Any:
    return x[tuple(slice(None) if one is None else one for one in indices)]


@TABLE.operation("index_put.default")
def index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    place = x.at[tuple(slice(None) if one is None else one for one in indices)]
    return place.add(values) if accumulate else place.set(values)


@TABLE.operation("index_select.default")
def index_select(x: Any, dim: int, chosen: Any) -> Any:
    return jnp.take(x, chosen, axis=dim)


@TABLE.operation("embedding.default")
def embedding(
    weight: Any, ids: Any, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> Any:
    if scale_grad_by_freq:
        raise NotImplementedError("an embedding with scale_grad_by_freq=True")
    if padding_idx >= 0:  # the row of the padding does not learn
        weight = weight.at[padding_idx].set(jax.lax.stop_gradient(weight[padding_idx]))
    return jnp.take(weight, ids, axis=0)


@TABLE.operation("full.default")
def full(size: Any, value: Any, dtype: Any = None) -> Any:
    return jnp.full(tuple(size), value, dtype)


@TABLE.operation("full_like.default")
def full_like(x: Any, value: Any, dtype: Any = None) -> Any:
    return jnp.full_like(x, value, dtype=dtype)


@TABLE.operation("zeros.default", "empty.memory_format", "empty_permuted.default")
def zeros(size: Any, *_: Any, dtype: Any = None) -> Any:
    return jnp.zeros(tuple(size), dtype)


@TABLE.operation("zeros_like.default", "empty_like.default")
def zeros_like(x: Any, dtype: Any = None) -> Any:
    return jnp.zeros_like(x, dtype=dtype)


@TABLE.operation("ones.default")
def ones(size: Any, dtype: Any = None) -> Any:
    return jnp.ones(tuple(size), dtype)


@TABLE.operation("ones_like.default")
def ones_like(x: Any, dtype: Any = None) -> Any:
    return jnp.ones_like(x, dtype=dtype)


@TABLE.operation("new_zeros.default", "new_empty.default")
def new_zeros(x: Any, size: Any, dtype: Any = None) -> Any:
    return jnp.zeros(tuple(size), dtype or x.dtype)


@TABLE.operation("new_ones.default")
def new_ones(x: Any, size: Any, dtype: Any = None) -> Any:
    return jnp.ones(tuple(size), dtype or x.dtype)


@TABLE.operation("new_full.default")
def new_full(x: Any, size: Any, value: Any, dtype: Any = None) -> Any:
    return jnp.full(tuple(size), value, dtype or x.dtype)


@TABLE.operation("fill.Scalar", "fill.Tensor")
def fill(x: Any, value: Any) -> Any:
    return jnp.broadcast_to(jnp.asarray(value, x.dtype), x.shape)


@TABLE.operation("scalar_tensor.default")
def scalar_tensor(value: Any, dtype: Any = None) -> Any:
    return jnp.asarray(value, dtype)


@TABLE.operation("arange.default")
def arange(end: float, dtype: Any = None) -> Any:
    return jnp.arange(end, dtype=dtype)


@TABLE.operation("arange.start", "arange.start_step")
def arange_start(start: float, end: float, step: float = 1, dtype: Any = None) -> Any:
    return jnp.arange(start, end, step, dtype=dtype)


@TABLE.operation("eye.default", "eye.m")
def eye(n: int, m: int | None = None, dtype: Any = None) -> Any:
    return jnp.eye(n, m, dtype=dtype)


@TABLE.operation("linspace.default")
def linspace(start: float, end: float, steps: int, dtype: Any = None) -> Any:
    return jnp.linspace(start, end, steps, dtype=dtype)
