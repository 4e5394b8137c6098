"""How one convolution is computed so that it is fast inside a loop, and with other weights for each member.

XLA on a CPU computes a convolution by a blocked matrix product, at 60 to 80 % of the processor's peak, if examples come first
and channels last (`b01f_01io->b01f`). Any other order it brings into this one only outside loops: inside `scan` or
`fori_loop` it falls back to plain loops, up to 60 times slower, and the gradients of a convolution are in other orders. So
`on_cpu` brings each convolution into this order by transposes of its own, which cost a few per cent. Better still, or what remains slow:

* Windows of 3 x 3 on large images with channels enough: `winograd.py`, half to three quarters of the time.
* Few channels: `column_tiles.py`, two to eight times as fast; with many outputs, patches and one matrix product.
* Few output channels of a gradient: the product first, then its shifted sum.
* Three and more spatial dims: the leading ones are folded into the channels until two remain.
* Groups and members: one convolution after another, in a loop; each is large enough.
* Depthwise (one channel a group): products of shifted views, which XLA fuses; there is nothing to block.

On an accelerator (`elsewhere`) a convolution is left alone; one with other weights for each member, for which XLA has only
the slow grouped convolution, becomes patches and one batched matrix product, where the patches stay small.

Shape legend: M = members, N = examples, C = input channels, O = output channels, S = spatial dims, K = window dims.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import jax
import jax.numpy as jnp
from jax import lax

from shoal.forms import column_tiles, winograd
from shoal.forms.computed_once import computed_once

Array = Any

_LETTERS: Final = "0123456789"
_MOST_PATCHES: Final = 64
"""Slices that a convolution by patches may take; one with more is left to XLA."""
_MOST_PATCH_BYTES: Final = 1 << 30
_FEW_CHANNELS: Final = 4
"""Input channels up to which patches cost less than XLA's gathering of them."""


@dataclass(frozen=True)
class Window:
    """The window of a convolution: one entry a spatial dim, as in `lax.conv_general_dilated`."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]

    @classmethod
    def of(cls, params: dict[str, Any]) -> Self:
        """That of the parameters of `lax.conv_general_dilated_p`."""
        return cls(params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"])

    def tail(self) -> "Window":
        """Without the first dim."""
        return Window(self.strides[1:], self.padding[1:], self.lhs_dilation[1:], self.rhs_dilation[1:])

    def views(self, x_NSC: Array, sizes_K: Sequence[int]) -> list[Array]:
        """For each window position, in row-major order, the view of x (N, *S, C) that it meets: (N, *S', C)."""
        x = self.padded(x_NSC)
        counts = self.outputs(x_NSC.shape[1:-1], sizes_K)
        return [
            _slice(x, [k * d for k, d in zip(at, self.rhs_dilation, strict=True)], counts, self.strides)
            for at in itertools.product(*map(range, sizes_K))
        ]

    def outputs(self, sizes_S: Sequence[int], sizes_K: Sequence[int]) -> tuple[int, ...]:
        """Sizes of the result's spatial dims."""
        made = []
        for size, window, stride, (low, high), dilation, spread in zip(
            sizes_S, sizes_K, self.strides, self.padding, self.lhs_dilation, self.rhs_dilation, strict=True
        ):
            reach = (size - 1) * dilation + 1 + low + high - ((window - 1) * spread + 1)
            made.append(max(0, reach // stride + 1))
        return tuple(made)

    def receptive(self, x_NSC: Array, sizes_K: Sequence[int]) -> list[Array]:
        """For each output position, in row-major order, what its window sees of x (N, *S, C): (N, *K, C)."""
        x = self.padded(x_NSC)
        return [
            _slice(x, [o * s for o, s in zip(at, self.strides, strict=True)], sizes_K, self.rhs_dilation)
            for at in itertools.product(*map(range, self.outputs(x_NSC.shape[1:-1], sizes_K)))
        ]

    def padded(self, x_NSC: Array) -> Array:
        spatial = [(low, high, d - 1) for (low, high), d in zip(self.padding, self.lhs_dilation, strict=True)]
        return lax.pad(x_NSC, jnp.zeros((), x_NSC.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def on_cpu(x: Array, w: Array, *, members: bool, **params: Any) -> Array:
    """A convolution as XLA:CPU computes it fast. Arguments as of `lax.conv_general_dilated_p`; with `members`, one each."""
    one = _in_order(_grouped, params)
    return lax.map(lambda pair: one(*pair), (x, w)) if members else one(x, w)


def elsewhere(x: Array, w: Array, *, members: bool, **params: Any) -> Array:
    """A convolution on an accelerator: XLA's own, but for members with other weights each."""
    if not members:
        return lax.conv_general_dilated_p.bind(x, w, **params)
    patched = params["feature_group_count"] == params["batch_group_count"] == 1 and _few_patches(x, w, params)
    one = _in_order(_by_patches, params) if patched else _original(params)
    return jax.vmap(one)(x, w)


def _original(params: dict[str, Any]) -> Callable[[Array, Array], Array]:
    return lambda x, w: lax.conv_general_dilated_p.bind(x, w, **params)


def _in_order(form: Callable[..., Array], params: dict[str, Any]) -> Callable[[Array, Array], Array]:
    """A form that takes x (N, *S, C) and w (*K, C, O) and gives (N, *S', O), for operands in the order of `params`."""
    (n, c, *s), (o, i, *k), out = params["dimension_numbers"]
    back = sorted(range(len(out)), key=lambda dim: [out[0], *out[2:], out[1]][dim])

    def run(x: Array, w: Array) -> Array:
        return form(x.transpose(n, *s, c), w.transpose(*k, i, o), Window.of(params), params).transpose(back)

    return run


def _grouped(x_NSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array:
    features, batches = params["feature_group_count"], params["batch_group_count"]
    if features == batches == 1:
        return _single(x_NSC, w_KCO, window, params)
    if features > 1 and w_KCO.shape[-2] == 1:
        return _depthwise(x_NSC, w_KCO, window, params)
    if 1 < batches == x_NSC.shape[0]:
        return _depthwise_kernel(x_NSC, w_KCO, window, params)
    groups = features * batches
    xs = _split(x_NSC, 0 if batches > 1 else x_NSC.ndim - 1, groups)
    ws = _split(w_KCO, w_KCO.ndim - 1, groups)
    made = lax.map(lambda pair: _single(pair[0], pair[1], window, params), (xs, ws))
    return jnp.moveaxis(made, 0, -2).reshape(*made.shape[1:-1], groups * made.shape[-1])


def _split(array: Array, dim: int, groups: int) -> Array:
    """A dim as (groups, rest), the groups in front."""
    shape = array.shape
    return jnp.moveaxis(array.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :]), dim, 0)


def _single(x_NSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array:
    """One group: leading spatial dims folded into examples and channels until XLA's fast form takes the rest."""
    dims = w_KCO.ndim - 2
    if dims <= 2:
        if (faster := _of_two_dims(x_NSC, w_KCO, window, params)) is not None:
            return faster
        x_NSC, window = _cut(x_NSC, window)
        spatial = _LETTERS[:dims]
        return lax.conv_general_dilated(
            x_NSC, w_KCO, window.strides, window.padding, window.lhs_dilation, window.rhs_dilation,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            precision=params["precision"], preferred_element_type=params["preferred_element_type"],
        )  # fmt: skip
    examples, size, *rest, channels = x_NSC.shape
    taps = w_KCO.shape[0]
    first = Window(window.strides[:1], window.padding[:1], window.lhs_dilation[:1], window.rhs_dilation[:1])
    flat = x_NSC.reshape(examples, size, -1)
    (count,) = first.outputs((size,), (taps,))
    if taps <= count:
        folded = jnp.stack(first.views(flat, (taps,)), 2)
    else:
        folded = jnp.stack(first.receptive(flat, (taps,)), 1)
    x = jnp.moveaxis(folded.reshape(examples * count, taps, *rest, channels), 1, -2)
    w = jnp.moveaxis(w_KCO, 0, -3)
    made = _single(
        x.reshape(examples * count, *rest, taps * channels),
        w.reshape(*w.shape[:-3], taps * channels, w.shape[-1]),
        window.tail(),
        params,
    )
    return made.reshape(examples, count, *made.shape[1:])


def _of_two_dims(x_NSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array | None:
    """A form that is faster than XLA's own; None where there is none."""
    *sizes, channels, outputs = w_KCO.shape
    counts = window.outputs(x_NSC.shape[1:-1], sizes)
    plain = (
        len(sizes) == 2
        and math.prod(counts) > 0
        and len(x_NSC) > 0
        and x_NSC.dtype == jnp.float32
        and params["preferred_element_type"] in (None, jnp.float32)
    )
    if not plain or set(window.strides + window.lhs_dilation + window.rhs_dilation) != {1}:
        return None
    if tuple(sizes) == (3, 3) and winograd.is_faster(counts, channels, outputs):
        return winograd.convolution(x_NSC, w_KCO, window.padding)
    if counts == (3, 3) and winograd.is_faster(sizes, len(x_NSC), outputs):
        x, g = x_NSC.transpose(3, 1, 2, 0), w_KCO.transpose(2, 0, 1, 3)
        return winograd.kernel_gradient(x, g, window.padding).transpose(2, 0, 1, 3)
    is_full = all(pad == (size - 1,) * 2 for pad, size in zip(window.padding, sizes, strict=True))
    if is_full and outputs <= 2 * _FEW_CHANNELS and math.prod(sizes) <= _MOST_PATCHES:
        return _spread(x_NSC, w_KCO, params)
    if tile := column_tiles.tile(channels, outputs, sizes, counts):
        return column_tiles.convolution(window.padded(x_NSC), w_KCO, tile, params["precision"])
    if tile := column_tiles.tile_of_gradient(len(x_NSC), outputs, counts, sizes):
        x, g = window.padded(x_NSC).transpose(3, 1, 2, 0), w_KCO.transpose(2, 0, 1, 3)
        return column_tiles.kernel_gradient(x, g, tile, params["precision"]).transpose(2, 0, 1, 3)
    num_patches = len(x_NSC) * math.prod(sizes)
    is_small = num_patches * math.prod(counts) * channels * 4 <= _MOST_PATCH_BYTES
    if 1 < channels <= _FEW_CHANNELS and math.prod(sizes) <= _MOST_PATCHES and is_small:
        return _by_patches(x_NSC, w_KCO, window, params)
    return None


def _spread(x_NSC: Array, w_KCO: Array, params: dict[str, Any]) -> Array:
    """What each input adds to the outputs around it, then the sum: padding on all sides as wide as the window reaches."""
    *sizes, channels, outputs = w_KCO.shape
    made = lax.dot_general(
        x_NSC.reshape(-1, channels), w_KCO, (((1,), (w_KCO.ndim - 2,)), ((), ())),
        precision=params["precision"], preferred_element_type=params["preferred_element_type"],
    ).reshape(*x_NSC.shape[:-1], *sizes, outputs)  # fmt: skip
    zero, total = jnp.zeros((), made.dtype), None
    for at in itertools.product(*map(range, sizes)):
        pads = [(size - 1 - k, k, 0) for k, size in zip(at, sizes, strict=True)]
        part = lax.pad(made[(..., *at, slice(None))], zero, [(0, 0, 0), *pads, (0, 0, 0)])
        total = part if total is None else total + part
    # Else pooling's gradient would have the sum computed for each place of its windows.
    return computed_once(total)


def _cut(x_NSC: Array, window: Window) -> tuple[Array, Window]:
    """Negative padding by slicing: XLA 0.10 reads beyond the operand where one side is negative and the other positive."""
    cuts = [
        (min(low, 0), min(high, 0)) if dilation == 1 else (0, 0)
        for (low, high), dilation in zip(window.padding, window.lhs_dilation, strict=True)
    ]
    if not any(itertools.chain(*cuts)):
        return x_NSC, window
    rest = [(low - a, high - b) for (low, high), (a, b) in zip(window.padding, cuts, strict=True)]
    made = lax.pad(x_NSC, jnp.zeros((), x_NSC.dtype), [(0, 0, 0), *((a, b, 0) for a, b in cuts), (0, 0, 0)])
    return made, replace(window, padding=tuple(rest))


def _depthwise(x_NSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array:
    """One input channel a group: a sum of products of shifted views."""
    *sizes, _, outputs = w_KCO.shape
    groups = x_NSC.shape[-1]
    taps = w_KCO.reshape(-1, *(1,) * (x_NSC.ndim - 1), groups, outputs // groups)
    made = sum(_wide(view)[..., None] * _wide(tap) for view, tap in zip(window.views(x_NSC, sizes), taps, strict=True))
    return made.reshape(*made.shape[:-2], outputs).astype(_result_type(x_NSC, params))


def _depthwise_kernel(x_GSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array:
    """One example a batch group, as in the gradient of a depthwise kernel: for each output position a sum over the window."""
    *sizes, _, outputs = w_KCO.shape
    groups = x_GSC.shape[0]
    w = _wide(jnp.moveaxis(w_KCO.reshape(-1, groups, outputs // groups), 1, 0))
    made = jnp.stack(
        [
            jnp.sum(_wide(view.reshape(groups, -1))[..., None] * w, 1)
            for view in window.receptive(x_GSC, sizes)
        ]
    )  # fmt: skip
    spatial = window.outputs(x_GSC.shape[1:-1], sizes)
    return made.reshape(1, *spatial, outputs).astype(_result_type(x_GSC, params))


def _by_patches(x_NSC: Array, w_KCO: Array, window: Window, params: dict[str, Any]) -> Array:
    """Patches and one matrix product; the patches are taken by window or by output position, whichever are fewer."""
    *sizes, channels, outputs = w_KCO.shape
    counts = window.outputs(x_NSC.shape[1:-1], sizes)
    if math.prod(sizes) <= math.prod(counts):
        patches = jnp.stack(window.views(x_NSC, sizes), -2).reshape(len(x_NSC), -1, math.prod(sizes) * channels)
    else:
        patches = jnp.stack(window.receptive(x_NSC, sizes), 1).reshape(len(x_NSC), -1, math.prod(sizes) * channels)
    made = lax.dot_general(
        patches, w_KCO.reshape(-1, outputs), (((2,), (0,)), ((), ())),
        precision=params["precision"], preferred_element_type=params["preferred_element_type"],
    )  # fmt: skip
    return made.reshape(len(x_NSC), *counts, outputs)


def _few_patches(x_M: Array, w_M: Array, params: dict[str, Any]) -> bool:
    (n, c, *s), (_, _, *k), _ = params["dimension_numbers"]
    _, *x_sizes = x_M.shape
    _, *w_sizes = w_M.shape
    sizes: list[int] = [w_sizes[dim] for dim in k]
    window, positions = math.prod(sizes), math.prod(Window.of(params).outputs([x_sizes[dim] for dim in s], sizes))
    size_bytes: int = len(x_M) * x_sizes[n] * positions * window * x_sizes[c] * x_M.dtype.itemsize
    return min(window, positions) <= _MOST_PATCHES and size_bytes <= _MOST_PATCH_BYTES


def _slice(x_NSC: Array, starts: Sequence[int], counts: Sequence[int], strides: Sequence[int]) -> Array:
    """`counts` elements of each spatial dim, `strides` apart."""
    ends = [at + (count - 1) * stride + 1 for at, count, stride in zip(starts, counts, strides, strict=True)]
    return lax.slice(
        x_NSC, (0, *starts, 0), (x_NSC.shape[0], *ends, x_NSC.shape[-1]), (1, *strides, 1)
    )  # fmt: skip


def _wide(array: Array) -> Array:
    """In the precision in which XLA adds up products: float32 for the types below it."""
    return array if array.dtype == jnp.float64 else array.astype(jnp.float32)


def _result_type(x: Array, params: dict[str, Any]) -> Any:
    return params["preferred_element_type"] or x.dtype
