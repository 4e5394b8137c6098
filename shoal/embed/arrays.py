"""Arrays as callers hand them over, and one clear error where they are no such arrays."""

from typing import Any

import numpy as np


def array_of(given: Any, what: str) -> np.ndarray:
    """As an array. Raises ValueError for lists of several lengths."""
    try:
        return np.asarray(given)
    except ValueError as error:
        raise ValueError(f"Expected {what} to be an array, got lists of several lengths: {error}") from error


def integers_of(given: Any, what: str) -> np.ndarray:
    """As (n,) int64. Raises TypeError or ValueError for what are no integers in one dimension."""
    array = array_of(given, what)
    if array.dtype.kind not in "iu" and (array.size or array.dtype.kind == "O"):
        raise TypeError(
            f"Expected {what} to be integers, got {array.dtype}. Convert them, for example with .astype(int)."
        )
    if array.ndim != 1:
        raise ValueError(f"Expected {what} in one dimension, got shape {array.shape}. Flatten them.")
    if array.dtype == np.uint64 and array.size and array.max() > 2**63 - 1:
        raise ValueError(f"Expected {what} below 2**63, got {array.max()}.")
    return np.ascontiguousarray(array, np.int64)


def refuse_but_int64(**named: Any) -> None:
    """Raises TypeError or ValueError unless every value is an int64 array of one dimension."""
    for name, array in named.items():
        if not isinstance(array, np.ndarray):
            raise TypeError(
                f"Expected {name} to be an int64 array of one dimension, got {type(array).__name__}. Make it with "
                "np.array(…, np.int64)."
            )
        if array.ndim != 1 or array.dtype != np.int64:
            raise ValueError(f"Expected {name} to be int64 of one dimension, got {array.dtype}{list(array.shape)}.")
