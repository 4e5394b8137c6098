"""What telemetry tells of a device's day: a fixed vector of small counts, told once a day, whatever happened. Pure.

A day is a day of UTC. Its vector has the same entries on every device and every day (`ENTRIES`), each with a bound; what is
above it counts as the bound. A device to which nothing happened tells a vector of zeros. Each entry has a unit, in which its noise is measured: where
much happens the unit is the bound, where little does it is less, so that the noise is, and costs more.

Nobody sees a vector: it is split (`split_sums.py`), and only the sum over many devices is opened, with noise. A device tells when
its slot of the day has come. The slot follows from a secret of the device and the day alone: it is uniform, and has nothing to do
with what the device does.

Guarantees:
    * Distance: the vectors of any two days are at most `DISTANCE` apart in L2 norm, in each entry's unit.
    * Sums with discrete Gaussian noise of `noise` units on each entry are `rho(noise)`-zCDP (Canonne, Kamath and Steinke 2020, theorem
      14). Neighbours differ in what one device told of one day; that it told is public.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Final

import numpy as np

from shoal import validate
from shoal.privacy.masks import derive
from shoal.tensors import sha256

DAY_S: Final = 86_400.0
HOURS: Final = 24
NOISE: Final = 27.0
"""Standard deviation of an entry's noise, in its units: epsilon of a device's day is 1.1 at delta 1e-6."""

TRAIN_S: Final = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)
"""Lower ends of the bins of seconds spent training in a day; less is in no bin."""
UP_BYTES: Final = (1.0, 64.0 * 2**10, 2.0**20, 16.0 * 2**20, 256.0 * 2**20)
"""Lower ends of the bins of bytes of updates sent in a day; none is in no bin."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One number of the vector."""

    name: str
    bound: int
    """Largest value of one device's day."""
    unit: int
    """What its noise is measured in."""


def _bins(name: str, ends: tuple[float, ...]) -> tuple[Entry, ...]:
    return tuple(Entry(f"{name}/{low:g}", 1, 1) for low in ends)


COUNTS: Final = {"sessions": (8, 8), "trained": (8, 8), "interrupted": (4, 2), "refused": (4, 2), "broken": (4, 2)}
"""Counts of a day, the most of each that is told, and its unit: times it checked in or waited again, updates counted, updates that were stopped, updates
refused, streams that broke."""
HISTOGRAMS: Final = {"train_s": TRAIN_S, "up_bytes": UP_BYTES}
"""Quantities of a day, told as the bin they are in."""
ENTRIES: Final = (
    *(Entry(f"hour/{hour:02}", 1, 1) for hour in range(HOURS)),
    *(Entry(name, most, unit) for name, (most, unit) in COUNTS.items()),
    *(entry for name, ends in HISTOGRAMS.items() for entry in _bins(name, ends)),
)
"""All that is told; `hour/07`: it was there for work between 7 and 8 UTC."""
BOUNDS: Final = np.array([entry.bound for entry in ENTRIES], np.int64)
UNITS: Final = np.array([entry.unit for entry in ENTRIES], np.int64)
SCHEMA: Final = bytes.fromhex(sha256(repr([(e.name, e.bound, e.unit) for e in ENTRIES]).encode()))[:8]
"""Names the form: who has another takes no part in its sums."""
DISTANCE: Final = sqrt(HOURS + sum((most / unit) ** 2 for most, unit in COUNTS.values()) + 2 * len(HISTOGRAMS))
"""Every hour and every count from nothing to its bound, and of each histogram one bin for another."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Day:
    """What a device noted of one day of its own."""

    hours: frozenset[int] = frozenset()
    """UTC hours in which it was there, 0 to 23."""
    amounts: Mapping[str, float] | None = None
    """Counts and quantities by the names of `COUNTS` and `HISTOGRAMS`; those that are missing are 0."""

    def vector(self) -> np.ndarray:
        """What is told of it, (entries,) uint32 within `BOUNDS`."""
        amounts = self.amounts or {}
        counts = [min(most, max(0, int(amounts.get(name, 0)))) for name, (most, _) in COUNTS.items()]
        bins = [bin for name, ends in HISTOGRAMS.items() for bin in _one_hot(float(amounts.get(name, 0)), ends)]
        return np.array([*(int(hour in self.hours) for hour in range(HOURS)), *counts, *bins], np.uint32)


def _one_hot(value: float, ends: tuple[float, ...]) -> list[int]:
    place = bisect_right(ends, value) - 1
    return [int(place == number) for number in range(len(ends))]


def slot_s(secret: bytes, day: int) -> float:
    """When within a day a device tells, seconds in [0, 86400): uniform for whoever does not know its 32 secret bytes."""
    drawn = int.from_bytes(
        derive(secret, b"shoal/telemetry/slot:" + day.to_bytes(8, "little", signed=True))[:8], "little"
    )
    return DAY_S * (drawn >> 11) / 2.0**53


def rho(noise: float, *, reports: int = 1) -> float:
    """The zCDP of a device's days, so many of them.

    Args:
        noise: standard deviation of an entry's noise, in its units.
        reports: days that are told of.
    """
    validate.positive(noise=noise)
    validate.whole(1, reports=reports)
    return reports * DISTANCE**2 / (2.0 * noise**2)


@dataclass(frozen=True, slots=True)
class Total:
    """An entry's sum over devices and days."""

    name: str
    value: int
    """Unbiased; it may be below zero."""
    error: float
    """Standard deviation of its noise, which is known exactly."""


def totals(sums: np.ndarray, *, variance: float) -> tuple[Total, ...]:
    """Sums with their errors.

    Args:
        sums: (entries,) integers: with noise, over any number of days.
        variance: of that noise in all, in units, squared: the sum over what was opened of `noise`^2.
    """
    error = sqrt(variance)
    return tuple(Total(entry.name, int(value), error * entry.unit) for entry, value in zip(ENTRIES, sums, strict=True))
