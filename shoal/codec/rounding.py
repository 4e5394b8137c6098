"""Numbers that take fewer bytes: float32 rounded to those that bfloat16 or 255 levels have. NumPy; what devices round is in their programs.

    bfloat16    the nearest of 8 significant bits, halves to even: half the bytes
    int8        blocks of `BLOCK` elements, each in whole multiples, up to 127, of the block's step: a quarter of the bytes

A step has 8 significant bits (it is a bfloat16, rounded up), so that a product with a level is exact: the levels can be found again.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np

Rounding = Literal["float32", "bfloat16", "int8"]
"""What a float32 is rounded to; `float32`: it is not."""
ROUNDINGS: Final[tuple[Rounding, ...]] = ("float32", "bfloat16", "int8")
BLOCK: Final = 1 << 12
"""Elements that share a step."""
MAX_LEVEL: Final = 127

_Array = np.ndarray[Any, np.dtype[Any]]


def rounded(values: _Array, rounding: Rounding) -> _Array:
    """The nearest numbers, of the same type and shape. What is not finite stays so; other types than float32 stay as they are.

    A tensor may be rounded in pieces that begin at multiples of `BLOCK` elements.
    """
    if values.dtype != np.float32:
        return values
    return _ROUND[rounding](values)


def _bfloat16(values: _Array) -> _Array:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _int8(values: _Array) -> _Array:
    flat = values.reshape(-1)
    made = np.empty_like(flat)
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        step = step_of(np.max(np.abs(block)))
        # Plus zero, as a level of zero has no sign.
        made[start : start + BLOCK] = np.rint(block / step) * step + np.float32(0) if 0 < step < np.inf else block
    return made.reshape(values.shape)


def step_of(largest: np.float32) -> np.float32:
    """The step of a block: its largest magnitude over `MAX_LEVEL`, rounded up to 8 significant bits."""
    step = np.float32(largest / np.float32(MAX_LEVEL))
    bits = (int(step.view(np.uint32)) + 0xFFFF) & 0xFFFF0000
    return np.uint32(bits).view(np.float32)


_ROUND: Final[Mapping[Rounding, Callable[[_Array], _Array]]] = {
    "float32": lambda values: values, "bfloat16": _bfloat16, "int8": _int8,
}  # fmt: skip
