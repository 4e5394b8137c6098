"""Noise that cancels from step to step (DP-FTRL): what is learned is the sum of all steps, and that sum needs less of it.

Devices that take part when they can cannot be sampled. Instead the noise of a step is correlated with that of earlier ones, and all
steps are accounted as one Gaussian release: `Schedule` says how often and how far apart one device takes part, and that must be enforced.
Grid, clip norm and schedule stay the same over all steps of a stream.

A strategy is a lower triangular matrix C: steps release x + C^-1 z, which follows from C x + z, z independent. Its *sensitivity* is the
largest norm of C x where a device's parts have norm at most 1; z has standard deviation noise multiplier x sensitivity.

* `TreeNoise`: binary tree, each node with noise of its own, prefix sums from the best weights of the nodes that are there
  already. Memory: a model for each level. Integers only.
* `BltNoise`: C is Toeplitz, its coefficients a sum of few decaying powers. Memory: a model for each power. Less noise.

`fit_blt` takes below a second for 512 steps and 3 buffers, some ten for 10,000; keep what it found: it is part of the mechanism.

Guarantees:
    * What is released follows from a discrete Gaussian release of stated sensitivity, rounding included: for the tree exactly, for
      BLT by `Blt.stddev`, which counts what rounding and float64 in the buffers can do.
    * A state follows from the seed and the tags of its steps: after a crash the same noise is drawn again. A tag that is a digest of
      what a step adds up keeps its noise from any other sum. A seed serves one stream. (Draws of another width under the same seed are independent of these: two releases.)

References:
    * Kairouz, McMahan, Song et al. 2021, "Practical and Private (Deep) Learning without Sampling or Shuffling".
    * Honaker 2015, "Efficient Use of Differentially Private Binary Trees": `TreeNoise`, estimates from below.
    * McMahan, Xu, Zhang 2024, "A Hassle-free Algorithm for Strong Differential Privacy in Federated Learning Systems": `Blt`.
    * Kalinin, Lampert 2024, "Banded Square Root Matrix Factorization for Differentially Private Model Training", theorem 2:
      the sensitivity of decreasing Toeplitz coefficients; Fichtenberger, Henzinger, Upadhyay 2023: their square root.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import log, sqrt
from typing import Final

import numpy as np
from scipy.optimize import minimize
from scipy.signal import lfilter
from scipy.special import expit

from shoal import validate
from shoal.privacy.accounting import participations as most_participations
from shoal.privacy.noise import MAX_STDDEV, MIN_STDDEV, discrete_gaussian, seeded

_LARGEST: Final = 16.0
"""Standard deviations that no element of z reaches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How one device can take part."""

    steps: int
    """Of the whole training; the noise is for no more."""
    min_separation: int
    """A device that takes part in step s does so again in s + min_separation at the earliest; 1: in any."""
    participations: int
    """Of one device, at most."""

    def __post_init__(self) -> None:
        validate.whole(1, steps=self.steps, min_separation=self.min_separation, participations=self.participations)
        most = most_participations(self.steps, self.min_separation)
        if self.participations > most:
            raise ValueError(
                f"Expected at most {most} participations in {self.steps} steps that are {self.min_separation} apart, got "
                f"{self.participations}."
            )


def square_root(steps: int) -> np.ndarray:
    """The coefficients of the Toeplitz matrix whose square sums up: (steps,). A yardstick: its noise needs all steps' memory."""
    validate.whole(1, steps=steps)
    ratio = (2 * np.arange(1.0, steps) - 1) / (2 * np.arange(1.0, steps))
    return np.concatenate([[1.0], np.cumprod(ratio)])


def toeplitz_sensitivity(coefficients: np.ndarray, schedule: Schedule) -> float:
    """The sensitivity of a Toeplitz strategy, exact: the worst device comes at once and then as soon as it may.

    Args:
        coefficients: (steps,), the first column: not negative, not increasing.
        schedule: of as many steps.
    """
    if coefficients.shape != (schedule.steps,):
        raise ValueError(f"Expected {schedule.steps} coefficients, one a step, got shape {coefficients.shape}.")
    if not (np.all(np.diff(coefficients) <= 0) and coefficients[-1] >= 0):
        raise ValueError(
            "Expected coefficients that are not negative and do not increase: of others the worst case is not known."
        )
    total = np.zeros(schedule.steps)
    for start in range(0, schedule.participations * schedule.min_separation, schedule.min_separation):
        total[start:] += coefficients[: schedule.steps - start]
    return float(np.linalg.norm(total))


def toeplitz_errors(coefficients: np.ndarray) -> np.ndarray:
    """The standard deviation of each prefix sum's noise, with z of 1: (steps,). Its maximum is the last."""
    return np.asarray(np.sqrt(np.cumsum(lfilter([1.0], coefficients, np.ones(coefficients.size)) ** 2)))


@dataclass(frozen=True, kw_only=True)
class Blt:
    """A buffered linear Toeplitz strategy: coefficients 1, then sum over j of scales[j] decays[j]^(i - 1)."""

    scales: tuple[float, ...]
    """Above 0, together at most 1: so coefficients decrease."""
    decays: tuple[float, ...]
    """Between 0 and 1."""

    def __post_init__(self) -> None:
        validate.types(self)
        if not len(self.scales) == len(self.decays) >= 1:
            raise ValueError(f"Expected as many scales as decays, got {len(self.scales)} and {len(self.decays)}.")
        if min(self.scales) <= 0 or sum(self.scales) > 1 or not all(0 < decay < 1 for decay in self.decays):
            raise ValueError(
                f"Expected scales > 0 with a sum <= 1 and decays in (0, 1), got {self.scales}, {self.decays}."
            )

    def coefficients(self, steps: int) -> np.ndarray:
        """The first column of C: (steps,)."""
        powers = np.asarray(self.decays)[:, None] ** np.arange(steps - 1.0)
        return np.concatenate([[1.0], np.asarray(self.scales) @ powers])

    def inverse(self, steps: int) -> np.ndarray:
        """The first column of C^-1: (steps,). It is of the same form, and its decays are eigenvalues."""
        root = np.sqrt(self.scales)
        decays, vectors = np.linalg.eigh(np.diag(self.decays) - np.outer(root, root))
        powers = decays[:, None] ** np.arange(steps - 1)
        return np.concatenate([[1.0], -((root @ vectors) ** 2) @ powers])

    def errors(self, steps: int) -> np.ndarray:
        """As `toeplitz_errors`, but fast."""
        return np.asarray(np.sqrt(np.cumsum(np.cumsum(self.inverse(steps)) ** 2)))

    def sensitivity(self, schedule: Schedule) -> float:
        return toeplitz_sensitivity(self.coefficients(schedule.steps), schedule)

    def stddev(self, noise_multiplier: float, schedule: Schedule, *, l2: float, elements: int) -> float:
        """The standard deviation of z, in units of the grid, with which all steps are one release of this noise multiplier.

        With the past fixed, a device changes what z must be by C x, and by up to a unit for each element and step where what is
        subtracted rounds otherwise; float64 adds what its buffers can lose.

        Args:
            noise_multiplier: of the release.
            schedule: that is kept to.
            l2: largest norm of a device's integers in one step.
            elements: of the sum.
        """
        validate.positive(noise_multiplier=noise_multiplier, l2=l2)
        validate.whole(1, elements=elements)
        ages = [min(1 / (1 - decay), schedule.steps) for decay in self.decays]
        largest = _LARGEST * float(
            np.abs(self.inverse(schedule.steps)).sum()
        )  # of what a buffer adds up, by the stddev
        lost = largest * 2.0**-52 * sum(scale * age * (age + 2) for scale, age in zip(self.scales, ages, strict=True))
        rounding = noise_multiplier * sqrt(elements * schedule.steps)
        if 2 * rounding * lost >= 0.5:
            raise ValueError(
                f"Expected decays that float64 can hold for {elements} elements and {schedule.steps} steps, got {self.decays}."
            )
        return (noise_multiplier * self.sensitivity(schedule) * l2 + rounding) / (1 - 2 * rounding * lost)


@lru_cache(64)
def fit_blt(schedule: Schedule, *, buffers: int = 3) -> Blt:
    """The strategy with the least noise in the last prefix sum that the search finds (Nelder and Mead, from one start)."""
    validate.between(1, 6, buffers=buffers)

    def blt_of(point: np.ndarray) -> Blt:
        # Shares of a whole of which one is nobody's: scales add up to less than 1. Decays are 1 - rate.
        shares = np.exp(np.append(point[:buffers], 0.0) - max(point[:buffers].max(), 0.0))
        rates = np.clip(expit(point[buffers:]), 1e-6, 1 - 1e-6)
        scales = np.maximum(shares[:-1] / shares.sum(), 1e-9) * (1 - 1e-9 * buffers)
        return Blt(scales=tuple(scales.tolist()), decays=tuple((1 - rates).tolist()))

    def loss(point: np.ndarray) -> float:
        blt = blt_of(point)
        return log(blt.sensitivity(schedule) * blt.errors(schedule.steps)[-1])

    places = (np.arange(buffers) + 0.5) / buffers
    rates = np.float64(max(schedule.steps, 2)) ** -places
    point = np.concatenate([np.log(0.5 * rates**0.5 / buffers), np.log(rates / (1 - rates))])
    for _ in range(3):  # a simplex that has shrunk is spread again
        options = {"maxiter": 400 * buffers, "xatol": 1e-3, "fatol": 1e-6, "adaptive": True}
        point = minimize(loss, point, method="Nelder-Mead", options=options).x
    return blt_of(point)


@dataclass(frozen=True, kw_only=True)
class State:
    """What the next step's noise follows from."""

    step: int
    """The next one; the first is 0."""
    arrays: tuple[np.ndarray, ...]
    """BLT: the buffers, float64. Tree: the estimates of the whole nodes so far, the largest first, int64; one for each bit of `step`."""


@dataclass(frozen=True, kw_only=True)
class BltNoise:
    """The noise of step after step, int64 in units of the sum's grid: z - round(what C takes back of earlier steps' noise)."""

    blt: Blt
    stddev: float
    """Of z: see `Blt.stddev`."""
    elements: int
    seed: bytes = field(repr=False)
    """32 secret bytes, for this stream alone."""

    def __post_init__(self) -> None:
        _check_stream(self.stddev, self.elements, self.seed)

    def begin(self) -> State:
        return State(step=0, arrays=tuple(np.zeros(self.elements) for _ in self.blt.decays))

    def step(self, state: State, tag: bytes = b"") -> tuple[np.ndarray, State]:
        """The noise to add to this step's sum, (elements,), and the state after it. One multiplication at a time: the same bits anywhere.

        What is new in it follows from `tag`, too: with a digest of the sum another sum never has the same.
        """
        source = seeded(self.seed, f"blt/{state.step}/{self.stddev.hex()}/{self.elements}/".encode() + tag)
        taken = np.zeros(self.elements)
        for scale, buffer in zip(self.blt.scales, state.arrays, strict=True):
            taken += scale * buffer
        noise = discrete_gaussian(self.stddev, self.elements, source=source) - np.rint(taken).astype(np.int64)
        arrays = tuple(decay * buffer + noise for decay, buffer in zip(self.blt.decays, state.arrays, strict=True))
        return noise, State(step=state.step + 1, arrays=arrays)

    def at(self, step: int, tags: Sequence[bytes] = ()) -> State:
        """The state before a step, drawn again from the seed and the steps' tags: as long as all steps before it took."""
        return _replayed(self.begin(), self.step, step, tags)


@dataclass(frozen=True, kw_only=True)
class TreeNoise:
    """The noise of step after step, int64 in units of the sum's grid: the difference of two prefix sums' noise.

    A node over 2^h steps has noise of its own. The best estimate of its sum weighs its own with 2^h / (2^(h+1) - 1) and the rest goes to
    its two halves; rounded to the grid, it is the same function of what a release of all nodes would say.
    """

    stddev: float
    """Of a node: noise multiplier x `tree_sensitivity` x largest norm of a device's integers."""
    elements: int
    steps: int
    """Most that will be taken."""
    seed: bytes = field(repr=False)
    """32 secret bytes, for this stream alone."""

    def __post_init__(self) -> None:
        _check_stream(self.stddev, self.elements, self.seed)
        validate.whole(1, steps=self.steps)
        if self.stddev * self.steps > 2.0**52:
            raise ValueError(
                f"Expected stddev x steps <= 2^52, got {self.stddev:g} x {self.steps}. Take a coarser grid."
            )

    def begin(self) -> State:
        return State(step=0, arrays=())

    def step(self, state: State, tag: bytes = b"") -> tuple[np.ndarray, State]:
        """The noise to add to this step's sum, (elements,), and the state after it; `tag` as in `BltNoise.step`."""
        if state.step >= self.steps:
            raise ValueError(
                f"Expected at most {self.steps} steps, got step {state.step}: its noise would not be accounted for."
            )
        nodes, after = list(state.arrays), state.step + 1
        estimate, height = self._own(after, 0, tag), 0
        while after >> height & 1 == 0:
            height += 1
            own, halves = 1 << height, nodes.pop() + estimate
            weights = 2 * own - 1
            estimate = (own * self._own(after, height, tag) + (own - 1) * halves + weights // 2) // weights
        before, now = (
            np.sum(part, axis=0, dtype=np.int64) if part else 0 for part in (state.arrays, [*nodes, estimate])
        )
        return np.asarray(now - before), State(step=after, arrays=(*nodes, estimate))

    def _own(self, end: int, height: int, tag: bytes) -> np.ndarray:
        """The noise of the node over the 2^height steps before `end`."""
        source = seeded(self.seed, f"tree/{height}/{end}/{self.stddev.hex()}/{self.elements}/".encode() + tag)
        return discrete_gaussian(self.stddev, self.elements, source=source)

    def at(self, step: int, tags: Sequence[bytes] = ()) -> State:
        """The state before a step, drawn again from the seed and the steps' tags: as long as all steps before it took."""
        return _replayed(self.begin(), self.step, step, tags)


def tree_sensitivity(schedule: Schedule) -> float:
    """A bound on the norm of all nodes' sums of one device: on each level its parts are packed into as few nodes as they can be.

    It is reached where steps and min_separation are powers of two.
    """
    square = 0
    for height in range(schedule.steps.bit_length()):
        most = -(-(1 << height) // schedule.min_separation)  # of its parts in one node
        number = min(schedule.participations, (schedule.steps >> height) * most)
        square += number // most * most**2 + (number % most) ** 2
    return sqrt(square)


def tree_errors(steps: int) -> np.ndarray:
    """The standard deviation of each prefix sum's noise, with nodes' of 1: (steps,)."""
    heights = range(steps.bit_length())
    return np.array(
        [sqrt(sum(1 / (2 - 0.5**h) for h in heights if step >> h & 1)) for step in range(1, steps + 1)]
    )  # fmt: skip


def _check_stream(stddev: float, elements: int, seed: bytes) -> None:
    validate.between(MIN_STDDEV, MAX_STDDEV, stddev=stddev)
    validate.whole(1, elements=elements)
    if len(seed) != 32:
        raise ValueError(f"Expected a seed of 32 bytes, got {len(seed)}.")


def _replayed(
    state: State, step_fn: Callable[[State, bytes], tuple[np.ndarray, State]], step: int, tags: Sequence[bytes]
) -> State:
    validate.whole(0, step=step)
    while state.step < step:
        state = step_fn(state, tags[state.step] if tags else b"")[1]
    return state
