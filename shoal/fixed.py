"""Fixed point: sums of numbers that are exact, so that they are equal in any order, on any machine.

A contribution is ``round(weight * value * 2**-exponent)`` as an integer of `bits` bits; weight (and a discount for
age, a power of two's multiple or not) is already inside. Integers add exactly; the sum is read back by
``sum * 2**exponent``. What cannot be held is refused when a round is configured, never wrapped::

    log2(bound) + log2(max_weight) + log2(max_members) + fraction bits  <  bits - 1

Guarantees:
    * Order: the sum of any contributions is the same bits in every order and grouping.
    * Range: no sum of at most `max_members` contributions within the bounds overflows.
    * Error: for float32 values and whole weights up to 2**16 the weighted mean differs from the exact one by at most
      ``2**(exponent-1) * members / total weight``; float64 values and discounts add a relative 2**-53 of each product.

The arithmetic is float64 with round-half-even (IEEE 754), which NumPy and XLA do alike.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from math import ceil, frexp, isfinite
from typing import Any, Self

import numpy as np

from shoal import validate
from shoal.errors import UpdateRefused
from shoal.tensors import TensorSpec

MIN_EXPONENT, MAX_EXPONENT = -1000, 1000  # 2**exponent and 2**-exponent are then normal numbers
MAX_COUNT = 1 << 48
STEPS = "steps/taken"
"""Name of the sum of the members' steps, where updates are divided by them (FedNova): see `local.py`."""
CHUNK = 1 << 18  # elements: the float64 temporaries of one chunk stay in a core's cache


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """How one summed tensor is written as integers during one round."""

    bits: int
    """Width of the integers: 64 in clear mode, at most 32 in secure mode."""
    exponent: int
    """The unit is 2**exponent."""
    bound: float
    """Largest absolute value of one element, before the weight."""
    max_weight: int
    """Largest weight of one member."""
    max_members: int
    """Most contributions in one sum."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.one_of((8, 16, 32, 64), bits=self.bits)
        validate.between(MIN_EXPONENT, MAX_EXPONENT, exponent=self.exponent)
        validate.positive(bound=self.bound)
        validate.between(1, MAX_COUNT, max_weight=self.max_weight, max_members=self.max_members)
        if self.largest_sum >= 1 << (self.bits - 1):
            raise ValueError(
                f"Expected bound {self.bound:g} x weight {self.max_weight} x members {self.max_members} with unit "
                f"2^{self.exponent} to fit {self.bits} bits, the largest sum has {self.largest_sum.bit_length() + 1}. "
                "Raise the exponent, or lower one of them."
            )

    @property
    def largest_sum(self) -> int:
        """Magnitude of the largest sum, in units; exact, each contribution rounded up."""
        one = ceil(Fraction(self.bound) * self.max_weight / Fraction(2) ** self.exponent)
        # One unit in the last place more: weight x value is rounded to float64 before it is rounded to an integer.
        return (one + (one >> 52)) * self.max_members

    @property
    def unit(self) -> float:
        return 2.0**self.exponent

    @classmethod
    @lru_cache(4096)  # asked in every round, for every tensor
    def finest(cls, *, bits: int, bound: float, max_weight: int, max_members: int) -> Self:
        """The smallest unit that holds the largest sum."""
        validate.positive(bound=bound)
        validate.between(1, MAX_COUNT, max_weight=max_weight, max_members=max_members)
        whole = frexp(bound)[1] + (max_weight - 1).bit_length() + (max_members - 1).bit_length()

        at = partial(cls, bits=bits, bound=bound, max_weight=max_weight, max_members=max_members)
        try:
            return at(exponent=whole - (bits - 1))
        except ValueError:  # rounding up reaches the next power of two
            return at(exponent=whole - (bits - 2))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises ValueError, KeyError or TypeError for anything that `to_json` would not have written."""
        return cls(**data)

    def to_json(self) -> dict[str, Any]:
        return {
            "bits": self.bits, "exponent": self.exponent, "bound": self.bound, "max_weight": self.max_weight,
            "max_members": self.max_members,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class SumSpec:
    """One tensor that members report and the server only ever sees summed."""

    tensor: TensorSpec
    """Name, shape and element type, for example `delta/params/dense/kernel` float32."""
    bound: float
    """Largest absolute value of one element."""
    weighted: bool
    """Whether a member's contribution is multiplied by its weight. The mean of a weighted `delta/…` is given to the server's
    rule; the sum of one that is not is added to its tensor."""
    rotated: int = 0
    """Elements of the blocks that an update is rotated in (`codec/linear.py`), which is undone when its sum is committed; 0: it is not."""
    one_of: int = 1
    """Of so many elements of the tensor one is sent, another for each version."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(bound=self.bound)
        for name, value in (("rotated", self.rotated), ("one_of", self.one_of)):
            if value < (name == "one_of") or value & (value - 1):
                raise ValueError(f"Expected {name} of {self.tensor.name} to be a power of two, got {value}.")

    def fixed(self, *, bits: int, max_weight: int, max_members: int) -> FixedPoint:
        """The finest fixed point for a round of at most `max_members`."""
        weight = max_weight if self.weighted else 1
        return FixedPoint.finest(bits=bits, bound=self.bound, max_weight=weight, max_members=max_members)

    def to_json(self) -> dict[str, Any]:
        made = {"tensor": self.tensor.to_json(), "bound": self.bound, "weighted": self.weighted}
        made |= {"rotated": self.rotated} if self.rotated else {}
        return made | ({"one_of": self.one_of} if self.one_of > 1 else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        return cls(**{**data, "tensor": TensorSpec.from_json(data["tensor"])})


def fixed_points(sums: Iterable[SumSpec], *, bits: int, max_weight: int, max_members: int) -> Mapping[str, FixedPoint]:
    """Name of a sum -> its finest fixed point. Raises ValueError where a sum of that many members would not fit."""
    return {spec.tensor.name: spec.fixed(bits=bits, max_weight=max_weight, max_members=max_members) for spec in sums}


def refuse_bad_values(values: np.ndarray, fixed: FixedPoint, *, name: str) -> None:
    """Raises UpdateRefused if an element is not finite or is above the bound, or a number of steps below 1."""
    flat = values.reshape(-1)
    if name == STEPS and not np.all(flat >= 1):
        raise UpdateRefused(f"Expected {name} >= 1, got {flat[:1]}: no step, no update.", reason="out of bounds")
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float64, copy=False)
        largest = float(np.max(np.abs(part), initial=0.0))
        if not isfinite(largest):
            raise UpdateRefused(f"{name} holds NaN or infinity.", reason="not finite")
        if largest > fixed.bound:
            raise UpdateRefused(
                f"Expected |{name}| <= {fixed.bound:g}, got {largest:g}. The bound is a setting of the task.",
                reason="out of bounds",
            )


def refuse_bad_weight(weight: int, max_weight: int) -> None:
    """Raises UpdateRefused unless 1 <= weight <= max_weight."""
    if not 1 <= weight <= max_weight:
        raise UpdateRefused(f"Expected 1 <= weight <= {max_weight}, got {weight}.", reason="bad weight")


def add(total: np.ndarray, values: np.ndarray, fixed: FixedPoint, *, weight: float) -> None:
    """Adds one checked contribution to `total` in place.

    Args:
        total: int64, any shape, C order; the running sum.
        values: the same number of elements, any float or integer type.
        weight: examples times discount; 1 for an unweighted sum.
    """
    if total.dtype != np.int64 or not total.flags.c_contiguous:
        raise ValueError(f"Expected total to be int64 in C order, got {total.dtype}; a copy would be added to in vain.")
    validate.between(0, fixed.max_weight, weight=weight)
    flat_total, flat = total.reshape(-1), values.reshape(-1)
    scale = weight * 2.0**-fixed.exponent
    buffer = np.empty(min(CHUNK, max(flat.size, 1)), np.float64)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        scaled = np.multiply(part, scale, out=buffer[: part.size], dtype=np.float64, casting="unsafe")
        np.rint(scaled, out=scaled)
        flat_total[start : start + CHUNK] += scaled.astype(np.int64)


def read(total: np.ndarray, fixed: FixedPoint, *, divisor: float = 1.0) -> np.ndarray:
    """The float64 value of a sum, divided by `divisor` (the total weight, for a mean)."""
    return np.asarray(total.astype(np.float64) * fixed.unit / divisor)
