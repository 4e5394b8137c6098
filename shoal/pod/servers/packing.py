"""The tensors of a transfer as one run of bytes, and back, without copying more than once."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np

from shoal.local import Named


@final
class Packing:
    """Of the tensors of one transfer."""

    def __init__(self, names: Sequence[str], like: Mapping[str, Any]) -> None:
        """
        Args:
            names: in this order.
            like: name -> tensor, or its shape.
        """
        self._entries = []
        offset = 0
        for name in names:
            dtype, shape = np.dtype(like[name].dtype), tuple(like[name].shape)
            size = dtype.itemsize * int(np.prod(shape))
            self._entries.append((name, dtype, shape, offset, size))
            offset += size
        self.size_bytes = offset

    def empty(self) -> np.ndarray:
        """(size_bytes,) uint8, to be filled; aligned so that JAX can take it as it is."""
        made = np.empty(self.size_bytes + 64, np.uint8)
        begin = -made.ctypes.data % 64
        return made[begin : begin + self.size_bytes]

    def packed(self, tensors: Mapping[str, Any]) -> np.ndarray:
        """(size_bytes,) uint8."""
        made = self.empty()
        for name, _, _, offset, size in self._entries:
            made[offset : offset + size] = np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8)
        return made

    def unpacked(self, data: np.ndarray) -> Named:
        """Views of the bytes, by name."""
        return {
            name: data[offset : offset + size].view(dtype).reshape(shape)
            for name, dtype, shape, offset, size in self._entries
        }
