"""Convolutions of few channels: several neighbouring columns of the result at once.

Patches of a window of 5 x 5 over 3 channels give a product with 75 x 6 weights, of which a processor's vectors are mostly empty,
and gather runs of 15 numbers. What T columns beside each other see is one patch (K, K + T - 1, C); with the weights
repeated at T places, zero elsewhere, the product is one with (K * (K + T - 1) * C, T * O): wider, of longer runs and
T / 2 times fewer of them, for (K + T - 1) / K times the multiplications. The gradient of the weights is the other product of the same
patches, of which the T places are added up.

Shape legend: N = examples, H, W = rows and columns, C = input channels, K = window, O = output channels, T = columns together.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
from jax import lax

from shoal.forms.computed_once import computed_once

Array = Any

MOST_WEIGHTS: Final = 128
"""Of a place in the window, C * O: with more the product is wide enough as it is."""
LARGEST_WINDOW: Final = 8
SMALLEST_RESULT: Final = 8


def tile(channels: int, outputs: int, window: Sequence[int], result: Sequence[int]) -> int:
    """Columns together where that is faster than other forms, measured for windows of 3 and 5; 0 where it is not.

    Args:
        channels, outputs: C and O.
        window, result: (rows, columns).
    """
    fits = window[1] > 1 and max(window) <= LARGEST_WINDOW and min(result) >= SMALLEST_RESULT
    if not fits or channels * outputs > MOST_WEIGHTS or outputs > 32:
        return 0
    return 4 if outputs <= 8 and window[1] > 3 else 2


def tile_of_gradient(channels: int, outputs: int, window: Sequence[int], result: Sequence[int]) -> int:
    """The same for the gradient of the weights: XLA's own form is good where outputs are a multiple of a vector."""
    return tile(channels, outputs, window, result) if channels < 8 and outputs % 16 else 0


def convolution(x_NHWC: Array, w_KKCO: Array, tile: int, precision: Any) -> Array:
    """The convolution without padding, strides or dilation: (N, H', W', O).

    Args:
        x_NHWC: padded already.
        w_KKCO: the window.
        tile: columns together, T.
        precision: of the product, as in `lax.dot_general`.
    """
    rows, columns, _, outputs = w_KKCO.shape
    num_examples, num_columns = len(x_NHWC), x_NHWC.shape[2] - columns + 1
    patches = _patches(x_NHWC, rows, columns, tile)
    places = jnp.stack([jnp.pad(w_KKCO, ((0, 0), (at, tile - 1 - at), (0, 0), (0, 0))) for at in range(tile)], 3)
    made = lax.dot_general(
        patches, places.reshape(patches.shape[-1], tile * outputs), (((3,), (0,)), ((), ())), precision=precision
    )
    return made.reshape(num_examples, made.shape[1], -1, outputs)[:, :, :num_columns]


def kernel_gradient(x_NHWC: Array, g_NHWO: Array, tile: int, precision: Any) -> Array:
    """The sum over examples and positions of what a window sees times the result's gradient there: (K, K, C, O)."""
    _, height, width, channels = x_NHWC.shape
    _, num_rows, num_columns, outputs = g_NHWO.shape
    rows, columns = height - num_rows + 1, width - num_columns + 1
    patches = _patches(x_NHWC, rows, columns, tile)
    whole = jnp.pad(g_NHWO, ((0, 0), (0, 0), (0, -num_columns % tile), (0, 0)))
    made = lax.dot_general(
        patches.reshape(-1, patches.shape[-1]), whole.reshape(-1, tile * outputs), (((0,), (0,)), ((), ())), precision=precision
    ).reshape(rows, columns + tile - 1, channels, tile, outputs)  # fmt: skip
    total = made[:, :columns, :, 0]
    for at in range(1, tile):
        total = total + made[:, at : at + columns, :, at]
    return total


def _patches(x_NHWC: Array, rows: int, columns: int, tile: int) -> Array:
    """What each tile of columns sees: (N, H', tiles, rows * (columns + tile - 1) * C)."""
    num_examples, height, width, channels = x_NHWC.shape
    tiles, span = -(-(width - columns + 1) // tile), columns + tile - 1
    starts = range(0, span, tile)
    x = jnp.pad(x_NHWC, ((0, 0), (0, 0), (0, max(0, starts[-1] + tiles * tile - width)), (0, 0)))
    pieces = [
        x[:, :, at : at + tiles * tile].reshape(num_examples, height, tiles, -1)[..., : min(tile, span - at) * channels]
        for at in starts
    ]
    row = computed_once(jnp.concatenate(pieces, -1))  # once, not for each row of the window
    return jnp.concatenate([row[:, at : at + height - rows + 1] for at in range(rows)], -1)
