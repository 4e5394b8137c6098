"""Central differential privacy: discrete Gaussian noise on a round's sum before anything is made of it.

Each device's part is clipped by its own signed program and rounded to the grid of the sum; the noise is integers of that grid, so that nothing
of floating point is left to look at. What the mean is over is public: the round's goal, not the devices that came.

`Noised` draws a round's noise from a secret, the version and the sum itself: made again after a crash it is the same, and another sum never
has it. `correlated_noise.py` is the same with noise that cancels from version to version. `NoisedByDevices` is for sums that have their noise
from the devices.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
from shoal.privacy.device_noise import DeviceNoise
from shoal.privacy.neighbours import Graph
from shoal.privacy.noise import MAX_STDDEV, MIN_STDDEV, discrete_gaussian, seeded, skellam
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
        purpose, noise = purpose_of(base, sums), {}
        for name, total in sums.totals.items():
            source = seeded(self.secret, purpose + name.encode())
            noise[name] = discrete_gaussian(stddevs[name] / sums.fixed[name].unit, total.size, source=source)
        return with_noise(sums, noise, divisor=self.divisor)


@dataclass(frozen=True)
class NoisedByDevices:
    """An aggregator of sums that devices have added their noise to. In a simulation nobody has: there it is added here."""

    inner: Aggregator
    divisor: int
    """What the mean is over."""
    simulated: DeviceNoise | None = None
    """What the members of a simulation would have added."""
    group: Callable[[int], Graph] | None = None
    """Members of a simulated sum -> the groups that they would have been in, all of one size."""
    secret: bytes = field(default=b"", repr=False)
    """32 bytes that it follows from."""

    @property
    def needs(self) -> str:
        return "sum"

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        made = with_noise(sums, self._noise(sums, model.root), divisor=self.divisor)
        return self.inner.commit(made, model, server_state, blobs)

    def _noise(self, sums: Accumulator, base: str) -> Mapping[str, np.ndarray]:
        if self.simulated is None or self.group is None:
            return {}
        variance, purpose = sums.members * self.simulated.share(self.group(sums.members)), purpose_of(base, sums)
        return {
            name: skellam(variance, total.size, source=seeded(self.secret, purpose + name.encode()))
            for name, total in sums.totals.items()
        }


def purpose_of(base: str, sums: Accumulator) -> bytes:
    """What noise that follows from the version and the sum is for, 32 bytes."""
    digest = hashlib.sha256(base.encode())
    for total in sums.totals.values():
        digest.update(np.ascontiguousarray(total).data)
    return digest.digest()


def with_noise(sums: Accumulator, noise: Mapping[str, np.ndarray], *, divisor: int) -> Accumulator:
    """Another sum: with the noise, (elements,) int64 for tensors in units of their grid, and as if of `divisor` updates."""
    made = sums.emptied()
    for name, total in sums.totals.items():
        made.totals[name] = total + noise[name].reshape(total.shape) if name in noise else total
    made.weight, made.members = divisor, sums.members
    return made


def noise_stddevs(
    privacy: Privacy, specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], *, goal: int
) -> dict[str, float]:
    """Name of a sum -> standard deviation of the noise on each of its elements, in their own units.

    The noise multiplier times the largest norm of one device's part. The step of an adaptive clip norm has noise of its own; that of the update is a
    little larger, so that both are one release of the noise multiplier.

    Args:
        privacy: of the task.
        specs, fixed: what is added up, and on what grid.
        goal: of the rounds.

    Raises:
        ValueError: there is a sum that is not clipped, or a grid that noise cannot be drawn on.
    """
    clip, multiplier = privacy.adaptive_clip, privacy.noise_multiplier
    if clip is None:
        return _stddevs(specs, fixed, multiplier * largest_part(privacy, specs, fixed))
    of_bit = clip.bit_noise_multiplier(multiplier, goal=goal)
    bit = [spec for spec in specs if spec.tensor.name == DELTA + LOG_SCALE]
    update = [spec for spec in specs if spec not in bit]
    rest = update_noise_multiplier(multiplier, bit=of_bit)
    of_update = rest * largest_part(privacy, update, fixed)
    return _stddevs(update, fixed, of_update) | _stddevs(
        bit, fixed, of_bit * (clip.largest_step + _rounding(bit, fixed))
    )


def largest_part(privacy: Privacy, specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint]) -> float:
    """The largest norm of one device's part in these sums: what its update is clipped to, and what rounding to the grid can add to it.

    Raises:
        ValueError: there is a sum that is not clipped.
    """
    assert privacy.norm_bound is not None
    if bare := [spec.tensor.name for spec in specs if not spec.tensor.name.startswith(DELTA)]:
        raise ValueError(f"Expected updates of a model only where there is noise, got {bare[:3]}, which nothing clips.")
    return privacy.norm_bound + _rounding(specs, fixed)


def _rounding(specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint]) -> float:
    return sqrt(sum(prod(spec.tensor.shape) * fixed[spec.tensor.name].unit ** 2 for spec in specs)) / 2


def _stddevs(specs: Sequence[SumSpec], fixed: Mapping[str, FixedPoint], stddev: float) -> dict[str, float]:
    check_grid(stddev, {spec.tensor.name: fixed[spec.tensor.name] for spec in specs})
    return {spec.tensor.name: stddev for spec in specs}


def check_grid(stddev: float, fixed: Mapping[str, FixedPoint]) -> None:
    """Raises ValueError: noise of that standard deviation cannot be drawn on one of the grids."""
    for name, point in fixed.items():
        if not MIN_STDDEV <= stddev / point.unit <= MAX_STDDEV:
            raise ValueError(
                f"Expected noise of {MIN_STDDEV:g} to {MAX_STDDEV:g} units of a sum's grid, got {stddev / point.unit:g} for {name}: give the "
                "noise multiplier or the clip norm a usual size."
            )
