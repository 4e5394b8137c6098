"""Central differential privacy: discrete Gaussian noise on a round's sum before anything is made of it.

Each device's part is clipped by its own signed program and rounded to the grid of the sum; the noise is integers of that grid, so that nothing
of floating point is left to look at. What the mean is over is public: the round's goal, not the devices that came.

The noise follows from a secret, the version and the sum itself: made again after a crash it is the same, and another sum never has it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Final

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import Aggregator
from shoal.fixed import FixedPoint, SumSpec
from shoal.policy import Privacy
from shoal.privacy.noise import MAX_STDDEV, MIN_STDDEV, discrete_gaussian, seeded
from shoal.record.store import Blobs
from shoal.tensors import Index

DELTA: Final = "delta/"


@dataclass(frozen=True)
class Noised:
    """An aggregator that sees sums with noise only."""

    inner: Aggregator
    privacy: Privacy
    divisor: int
    """What the mean is over."""
    secret: bytes = field(repr=False)
    """32 bytes; as secret as the noise."""

    @property
    def needs(self) -> str:
        return "sum"

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        return self.inner.commit(self.noised(sums, model.root), model, server_state, blobs)

    def noised(self, sums: Accumulator, base: str) -> Accumulator:
        """Another sum: with noise, and as if of `divisor` updates.

        Args:
            sums: of a round; not changed.
            base: root of the version that it changes.
        """
        stddev = noise_stddev(self.privacy, sums.specs, sums.fixed)
        names = [spec.tensor.name for spec in sums.specs]
        digest = hashlib.sha256(base.encode())
        for name in names:
            digest.update(np.ascontiguousarray(sums.totals[name]).data)
        made = sums.emptied()
        for name in names:
            total = sums.totals[name]
            source = seeded(self.secret, digest.digest() + name.encode())
            noise = discrete_gaussian(stddev / sums.fixed[name].unit, total.size, source=source)
            made.totals[name] = total + noise.reshape(total.shape)
        made.weight, made.members = self.divisor, sums.members
        return made


def noise_stddev(privacy: Privacy, specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint]) -> float:
    """Standard deviation of the noise on each element, in the elements' own units.

    The noise multiplier times the largest norm of one device's part: the clip norm, and what rounding to the grid can add to it.

    Raises:
        ValueError: there is a sum that is not clipped, or a grid that noise cannot be drawn on.
    """
    assert privacy.norm_bound is not None
    if bare := [spec.tensor.name for spec in specs if not spec.tensor.name.startswith(DELTA)]:
        raise ValueError(f"Expected updates of a model only where there is noise, got {bare[:3]}, which nothing clips.")
    rounding = sqrt(sum(prod(spec.tensor.shape) * fixed[spec.tensor.name].unit ** 2 for spec in specs)) / 2
    stddev = privacy.noise_multiplier * (privacy.norm_bound + rounding)
    for spec in specs:
        name, unit = spec.tensor.name, fixed[spec.tensor.name].unit
        if not MIN_STDDEV <= stddev / unit <= MAX_STDDEV:
            raise ValueError(
                f"Expected noise of {MIN_STDDEV:g} to {MAX_STDDEV:g} units of a sum's grid, got {stddev / unit:g} for {name}: give the noise "
                "multiplier or the clip norm a usual size."
            )
    return stddev
