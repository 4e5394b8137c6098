"""Convolutions by a 3 x 3 window in 16 multiplications instead of 36.

F(2 x 2, 3 x 3) of Lavin and Gray 2016, "Fast algorithms for convolutional neural networks", section 4.1: the input is cut into
overlapping tiles of 4 x 4 with 2 x 2 outputs each,

    outputs = A^T [ (B^T input B) x (G window G^T) ] A

where x is element by element over the 16 places and a sum over channels, so 16 matrix products for all tiles at once. Sums of few
terms with factors of 1 and 1/2 come before and after: in float32 the result differs from the plain sum by about 1e-6 of the
largest element. Departure: where the input is infinite the outputs of its whole tile are not numbers.
A few examples go together, so that what is between the products stays in the processor's cache.

Shape legend: N = examples, C = input channels, O = output channels, T = tiles, P = 16 places of a tile.
"""

from collections.abc import Sequence
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any

TILE: Final = 4
MANY_CHANNELS: Final = 16
"""On both sides: from there the transformations cost less than the multiplications that they save."""
MANY_TILES: Final = 144
"""Of an example: with fewer, each product reads the whole window for too few rows."""
AT_ONCE: Final = 2
"""Examples."""


def is_faster(outputs: Sequence[int], channels: int, output_channels: int) -> bool:
    """Whether it pays for so many outputs a side: images of about 24 x 24 and more, sixteen channels and more."""
    tiles = -(-outputs[0] // 2) * -(-outputs[1] // 2)
    return min(channels, output_channels) >= MANY_CHANNELS and tiles >= MANY_TILES


_BT: Final = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32)
_G: Final = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32)
_AT: Final = np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32)


def convolution(x_NSC: Array, w_KCO: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """x (N, H, W, C) by a window (3, 3, C, O), strides of one: (N, H', W', O)."""
    w_PCO = jnp.stack([made for row in _both(_G, w_KCO) for made in row])
    made = lax.map(lambda x: _few(x, w_PCO, padding), _in_parts(x_NSC))
    return made.reshape(len(x_NSC), *made.shape[2:])


def kernel_gradient(x_NSC: Array, g_NSO: Array, padding: Sequence[tuple[int, int]]) -> Array:
    """The gradient of the window (3, 3, C, O) for one of the result, g (N, H', W', O).

    The transpose of the above in the window: G^T [ sum over tiles of (B^T input B) x (A g A^T) ] G.
    """
    tiles = [-(-size // 2) for size in g_NSO.shape[1:3]]

    def add(total_PCO: Array, few: tuple[Array, Array]) -> tuple[Array, None]:
        x, g = few
        x_PTC = _of_tiles(x, _BT, [low for low, _ in padding], tiles).reshape(TILE * TILE, -1, x.shape[-1])
        g_PTO = _of_tiles(g, _AT.T, (0, 0), tiles).reshape(TILE * TILE, -1, g.shape[-1])
        return total_PCO + lax.dot_general(x_PTC, g_PTO, (((1,), (1,)), ((0,), (0,)))), None

    shape = (TILE * TILE, x_NSC.shape[-1], g_NSO.shape[-1])
    made, _ = lax.scan(add, jnp.zeros(shape, x_NSC.dtype), (_in_parts(x_NSC), _in_parts(g_NSO)))
    return jnp.stack([jnp.stack(row) for row in _both(_G.T, made.reshape(TILE, TILE, *shape[1:]))])


def _in_parts(array_N: Array) -> Array:
    """With the examples as (parts, those that go together)."""
    count = len(array_N)
    together = next(few for few in range(min(AT_ONCE, count), 0, -1) if not count % few)
    return array_N.reshape(count // together, together, *array_N.shape[1:])


def _few(x_NSC: Array, w_PCO: Array, padding: Sequence[tuple[int, int]]) -> Array:
    examples, *_, channels = x_NSC.shape
    outputs = w_PCO.shape[-1]
    sizes = [size + low + high - 2 for size, (low, high) in zip(x_NSC.shape[1:3], padding, strict=True)]
    high, wide = tiles = [-(-size // 2) for size in sizes]
    x_PTC = _of_tiles(x_NSC, _BT, [low for low, _ in padding], tiles).reshape(TILE * TILE, -1, channels)
    y_PTO = lax.dot_general(x_PTC, w_PCO, (((2,), (1,)), ((0,), (0,))))
    rows = _both(_AT, y_PTO.reshape(TILE, TILE, examples, high, wide, outputs))
    y = jnp.stack([jnp.stack(row, 3) for row in rows], 2).reshape(examples, 2 * high, 2 * wide, outputs)
    return y[:, : sizes[0], : sizes[1]]


def _of_tiles(x_NSC: Array, matrix: np.ndarray, starts: Sequence[int], tiles: Sequence[int]) -> Array:
    """Tiles that begin every two places, `starts` before the first, transformed on both sides: (4, 4, N, *tiles, C)."""
    side = matrix.shape[1]
    pads = [
        (low, 2 * (count - 1) + side - low - size, 0)
        for low, count, size in zip(starts, tiles, x_NSC.shape[1:3], strict=True)
    ]
    x = lax.pad(x_NSC, jnp.zeros((), x_NSC.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    high, wide = (2 * count - 1 for count in tiles)
    examples, *_, channels = x.shape
    places = [
        [lax.slice(x, (0, i, j, 0), (examples, i + high, j + wide, channels), (1, 2, 2, 1)) for j in range(side)]
        for i in range(side)
    ]
    return jnp.stack([jnp.stack(row) for row in _both(matrix, places)])


def _both(matrix: np.ndarray, places: Any) -> list[list[Array]]:
    """matrix @ places @ matrix^T over the two leading dims, as sums that XLA fuses."""
    across = range(matrix.shape[1])
    rows = [[_sum(row, [places[i][j] for i in across]) for j in across] for row in matrix]
    return [[_sum(column, row) for column in matrix] for row in rows]


def _sum(factors: np.ndarray, terms: Sequence[Array]) -> Array:
    """sum of factor x term."""
    made = None
    for factor, term in zip(factors, terms, strict=True):
        if factor:
            scaled = term if factor == 1 else -term if factor == -1 else float(factor) * term
            made = scaled if made is None else made + scaled
    return made
