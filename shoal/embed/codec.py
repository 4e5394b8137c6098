"""How a vector becomes bytes: float32, float16, or row-wise int8 with its own scale and offset.

A row is a whole number of 4-byte words, so the kernel moves words and knows no codec; decoding is one NumPy pass over
what a lookup gathered. float32 is the words themselves: no pass.

int8 row: `dim` bytes q, then scale and offset as float16; value = offset + scale * (q + 128). The error of a value is at
most half a step plus the rounding of the offset and of 255 scales to float16: `Codec.error_bound` adds them up.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from shoal import validate

Dtype = Literal["float32", "float16", "int8"]
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "float16", "int8")
_WORD: Final = 4
_LARGEST: Final = {"float32": float(np.finfo(np.float32).max), "float16": 65504.0, "int8": 32000.0}
"""Largest magnitude that each can hold; int8's scale and offset are float16."""


@dataclass(frozen=True)
class Codec:
    """The byte form of vectors of one dimension and type."""

    dim: int
    dtype: Dtype

    def __post_init__(self) -> None:
        validate.between(1, 1 << 16, dim=self.dim)
        validate.one_of(DTYPES, dtype=self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padded to whole words."""
        plain = {"float32": 4 * self.dim, "float16": 2 * self.dim, "int8": self.dim + 4}[self.dtype]
        return -(-plain // _WORD) * _WORD

    @property
    def words(self) -> int:
        """4-byte words of a row."""
        return self.row_bytes // _WORD

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors (n, dim), float -> rows (n, words) uint32.

        Raises:
            ValueError: a value is not finite, or too large for the type.
        """
        with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, and is refused
            vectors = np.ascontiguousarray(vectors, np.float32)
        self.refuse(vectors)
        if self.dtype == "float32":
            return vectors.view(np.uint32)
        rows = np.zeros((len(vectors), self.row_bytes), np.uint8)
        if self.dtype == "float16":
            rows[:, : 2 * self.dim] = vectors.astype(np.float16).view(np.uint8)
        else:
            self._quantise(vectors, rows)
        return rows.view(np.uint32)

    def refuse(self, vectors: np.ndarray) -> None:
        """Raises ValueError where a value is not finite, or too large for the type."""
        largest = np.abs(vectors).max(initial=0)
        if not largest <= _LARGEST[self.dtype]:  # this way round, NaN is refused too
            bad = int(np.flatnonzero(~(np.abs(vectors) <= _LARGEST[self.dtype]).all(axis=1))[0])
            raise ValueError(
                f"Expected finite values of at most {_LARGEST[self.dtype]:g} for {self.dtype}, got {float(largest)} "
                f"(first in vector {bad}). Clip or drop such vectors, or choose float32."
            )

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Rows (n, words) uint32 -> vectors (n, dim) float32."""
        if self.dtype == "float32":
            return rows.view(np.float32)
        data: np.ndarray = rows.view(np.uint8)
        if self.dtype == "float16":
            half: np.ndarray = np.ascontiguousarray(data[:, : 2 * self.dim]).view(np.float16)
            return np.asarray(half, np.float32)
        step, offset = np.ascontiguousarray(data[:, self.dim : self.dim + 4]).view(np.float16).astype(np.float32).T
        made: np.ndarray = data[:, : self.dim].view(np.int8).astype(np.float32)
        made += np.float32(128)
        made *= step[:, None]
        made += offset[:, None]
        return made

    def error_bound(self, vectors: np.ndarray) -> np.ndarray:
        """The largest error of any value of each vector after `encode` and `decode`: (n,) float32."""
        top = np.abs(vectors).max(axis=1)
        if self.dtype == "float32":
            return np.zeros(len(vectors), np.float32)
        if self.dtype == "float16":
            return np.asarray(np.maximum(top * np.float32(2**-11), np.float32(2**-25)))
        span = vectors.max(axis=1) - vectors.min(axis=1)
        # Half a step; the offset's rounding (relative 2^-11); a step's own rounding is seen by the quantiser.
        return np.asarray(span * np.float32(0.51 / 255) + (top + span) * np.float32(2**-10) + np.float32(2**-16))

    def _quantise(self, vectors: np.ndarray, rows: np.ndarray) -> None:
        low = vectors.min(axis=1, initial=np.inf)
        offset = low.astype(np.float16)
        # Rounded up, so that 255 steps reach the top from the rounded offset.
        exact = (vectors.max(axis=1, initial=-np.inf) - offset.astype(np.float32)) / np.float32(255)
        step = np.maximum(exact, 0).astype(np.float16)
        step = np.where(step.astype(np.float32) < exact, np.nextafter(step, np.float16(np.inf)), step)
        divisor = np.where(step == 0, np.float32(1), step.astype(np.float32))
        steps = np.rint((vectors - offset.astype(np.float32)[:, None]) / divisor[:, None])
        rows[:, : self.dim] = (np.clip(steps, 0, 255) - 128).astype(np.int8).view(np.uint8)
        rows[:, self.dim : self.dim + 4] = np.stack([step, offset], axis=1).view(np.uint8)
