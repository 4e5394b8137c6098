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
from shoal.clip_norm import LOG_SCALE
from shoal.fixed import FixedPoint, SumSpec
from shoal.policy import Privacy
from shoal.privacy.clipping import update_noise_multiplier
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
        stddevs = noise_stddevs(self.privacy, sums.specs, sums.fixed, goal=self.divisor)
        names = [spec.tensor.name for spec in sums.specs]
        digest = hashlib.sha256(base.encode())
        for name in names:
            digest.update(np.ascontiguousarray(sums.totals[name]).data)
        made = sums.emptied()
        for name in names:
            total = sums.totals[name]
            source = seeded(self.secret, digest.digest() + name.encode())
            noise = discrete_gaussian(stddevs[name] / sums.fixed[name].unit, total.size, source=source)
            made.totals[name] = total + noise.reshape(total.shape)
        made.weight, made.members = self.divisor, sums.members
        return made


def noise_stddevs(
    privacy: Privacy, specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], *, goal: int
) -> dict[str, float]:
    """Name of a sum -> standard deviation of the noise on each of its elements, in their own units.

    The noise multiplier times the largest norm of one device's part: the clip norm, and what rounding to the grid can add to it. The step of an
    adaptive clip norm has noise of its own; that of the update is a little larger, so that both are one release of the noise multiplier.

    Args:
        privacy: of the task.
        specs, fixed: what is added up, and on what grid.
        goal: of the rounds.

    Raises:
        ValueError: there is a sum that is not clipped, or a grid that noise cannot be drawn on.
    """
    assert privacy.norm_bound is not None
    if bare := [spec.tensor.name for spec in specs if not spec.tensor.name.startswith(DELTA)]:
        raise ValueError(f"Expected updates of a model only where there is noise, got {bare[:3]}, which nothing clips.")
    clip, multiplier = privacy.adaptive_clip, privacy.noise_multiplier
    if clip is None:
        return _stddevs(specs, fixed, multiplier, privacy.norm_bound)
    of_bit = clip.bit_noise_multiplier(multiplier, goal=goal)
    bit = [spec for spec in specs if spec.tensor.name == DELTA + LOG_SCALE]
    update = [spec for spec in specs if spec not in bit]
    rest = update_noise_multiplier(multiplier, bit=of_bit)
    return _stddevs(update, fixed, rest, privacy.norm_bound) | _stddevs(bit, fixed, of_bit, clip.largest_step)


def _stddevs(
    specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], noise_multiplier: float, norm: float
) -> dict[str, float]:
    """For sums of which one device's part has that norm, all together."""
    rounding = sqrt(sum(prod(spec.tensor.shape) * fixed[spec.tensor.name].unit ** 2 for spec in specs)) / 2
    stddev = noise_multiplier * (norm + rounding)
    for spec in specs:
        name, unit = spec.tensor.name, fixed[spec.tensor.name].unit
        if not MIN_STDDEV <= stddev / unit <= MAX_STDDEV:
            raise ValueError(
                f"Expected noise of {MIN_STDDEV:g} to {MAX_STDDEV:g} units of a sum's grid, got {stddev / unit:g} for {name}: give the noise "
                "multiplier or the clip norm a usual size."
            )
    return {spec.tensor.name: stddev for spec in specs}
