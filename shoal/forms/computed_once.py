"""An array that is computed once, however many operations read it.

XLA on a CPU makes one loop of an operation and of all that it reads, and so computes what several operations, or several elements of
one, read anew each time: pooling for each row of the next window, a sum of 25 terms for each element of a gradient. It takes
barriers out before it decides so. What it does not compute twice is a division, so the array is divided by ones of
which it does not know that they are; the code generator, which comes later, does, and nothing is divided.
"""

from typing import Any

from jax import lax

Array = Any


def computed_once(array: Array) -> Array:
    """The same array, to the bit, of any floating or whole type."""
    bits = lax.bitcast_convert_type(array, f"int{8 * array.dtype.itemsize}")
    return lax.div(array, ((bits | 1) & 1).astype(array.dtype))
