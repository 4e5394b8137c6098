"""An update as the vector of a secure group, and a group's sum as what an `Accumulator` merges.

Each summed tensor is a segment: its elements in fixed point, as `fixed.add` rounds them, in two's complement of as many bits as the largest
sum needs. The member's weight is one more segment. So the sum modulo 2^bits is the sum, to the bit that which a clear group has.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod

import numpy as np

from shoal.clip_norm import LOG_SCALE
from shoal.errors import ProtocolError, UpdateRefused
from shoal.fixed import FixedPoint, SumSpec, add, refuse_bad_values, refuse_bad_weight
from shoal.privacy.device_noise import REACH
from shoal.privacy.packing import MAX_BITS
from shoal.privacy.secure_terms import Segment
from shoal.tensors import check


class VectorLayout:
    """How the sums of a round stand in a vector."""

    def __init__(
        self, sums: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], *, max_weight: int, max_members: int
    ) -> None:
        """
        Args:
            sums: of the manifest, in its order.
            fixed: name -> fixed point of this round.
            max_weight: of one member.
            max_members: of one sum.

        Raises:
            ValueError: a sum needs more than 32 bits.
        """
        self.specs, self.fixed, self._max_weight = tuple(sums), fixed, max_weight
        names = [spec.tensor.name for spec in self.specs]
        bits = {name: _signed_bits(fixed[name].largest_sum) for name in names}
        if too_wide := [f"{name} ({width} bits)" for name, width in bits.items() if width > MAX_BITS]:
            raise ValueError(
                f"Expected sums of at most {MAX_BITS} bits in a secure group, got {', '.join(too_wide)}. Lower the sum's bits in the "
                "task's privacy, its bound, the largest weight or the members of a round."
            )
        of_weight = _signed_bits(max_weight * max_members)
        self.segments = (
            *(Segment(size=prod(spec.tensor.shape), bits=bits[spec.tensor.name]) for spec in self.specs),
            Segment(size=1, bits=of_weight),
        )

    def vector(self, update: Mapping[str, np.ndarray], *, weight: int) -> np.ndarray:
        """A member's vector, (size,) uint32, each element below its segment's 2^bits.

        Raises:
            UpdateRefused: it is not finite, out of bounds, of a wrong shape, or has a wrong weight.
        """
        try:
            check(update, (spec.tensor for spec in self.specs), what="the update")
        except ValueError as error:
            raise UpdateRefused(str(error), reason="wrong tensors") from error
        refuse_bad_weight(weight, self._max_weight)
        parts = []
        for spec, segment in zip(self.specs, self.segments, strict=False):
            name = spec.tensor.name
            values = np.ascontiguousarray(update[name]).reshape(-1)
            refuse_bad_values(values, self.fixed[name], name=name)
            contribution = np.zeros(values.size, np.int64)
            add(contribution, values, self.fixed[name], weight=weight if spec.weighted else 1)
            parts.append(_low_bits(contribution, segment.bits))
        return np.concatenate([*parts, _low_bits(np.array([weight]), self.segments[-1].bits)])

    def with_noise(self, vector: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """The vector with noise, (elements of all sums,) int64, on its sums; the weight has none."""
        parts, at = [], 0
        for segment in self.segments[:-1]:
            end = at + segment.size
            parts.append(_low_bits(vector[at:end].astype(np.int64) + noise[at:end], segment.bits))
            at = end
        return np.concatenate([*parts, vector[at:]])

    def totals(self, vector: np.ndarray) -> tuple[Iterator[tuple[str, int, np.ndarray]], int]:
        """Pieces of a group's sum as `Accumulator.merge` takes them, (tensor, 0, int64 totals), and its weight.

        Args:
            vector: (size,) uint32, as an opened group gives it.
        """
        ends = np.cumsum([segment.size for segment in self.segments])
        parts = np.split(vector, ends[:-1])
        whole = [_signed(part, segment.bits) for part, segment in zip(parts, self.segments, strict=True)]
        pieces = ((spec.tensor.name, 0, part) for spec, part in zip(self.specs, whole, strict=False))
        return pieces, int(whole[-1][0])

    def refuse_absurd(
        self,
        pieces: Iterable[tuple[str, int, np.ndarray]],
        *,
        weight: int,
        members: int,
        norm_bound: float | None,
        noise_stddev: float = 0.0,
    ) -> None:
        """Looks whether so many honest members can have such a sum: their weights, each element, the norm of all `delta/` (but for the
        step of an adaptive clip norm, which has a bound of its own). Of noise, of that standard deviation, they may have had up to
        `REACH` times as much in an element, and in the norm.

        Raises:
            ProtocolError: they cannot. Nobody can say who was not honest.
        """
        if not members <= weight <= members * self._max_weight:
            raise ProtocolError(f"The weights of {members} members add up to {weight}.")
        square = slack = 0.0
        weighted = {spec.tensor.name: spec.weighted for spec in self.specs}
        for name, _, totals in pieces:
            fixed, times = self.fixed[name], weight if weighted[name] else members
            largest = float(np.max(np.abs(totals), initial=0)) * fixed.unit
            if largest > fixed.bound * times + members * fixed.unit + REACH * noise_stddev:
                raise ProtocolError(f"{members} members add up to {largest:g} in {name}, each at most {fixed.bound:g}.")
            if name.startswith("delta/") and name != f"delta/{LOG_SCALE}":
                square += float(np.sum(np.square(totals * fixed.unit)))
                slack += totals.size * (members * fixed.unit + 2 * noise_stddev) ** 2 + (REACH * noise_stddev) ** 2
        if norm_bound is not None and square**0.5 > norm_bound * weight + slack**0.5:
            raise ProtocolError(
                f"The updates of {members} members with weights of {weight} together, each clipped to {norm_bound:g}, add up to a norm "
                f"of {square**0.5:g}."
            )


def _signed_bits(largest: int) -> int:
    """Bits of two's complement for magnitudes up to `largest`."""
    return largest.bit_length() + 1


def _low_bits(values: np.ndarray, bits: int) -> np.ndarray:
    return (values & ((1 << bits) - 1)).astype(np.uint32)


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    """Two's complement of `bits` bits as int64."""
    whole = values.astype(np.int64)
    return np.where(whole >> (bits - 1) & 1, whole - (1 << bits), whole)
