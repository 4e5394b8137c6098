"""Models of drives: how long a query takes whose block reads are known, on a drive that is not at hand. A model, not a measurement.

A drive answers up to 16 reads at once. The latency of one is drawn from a distribution through three known points (mean, 99 % and
99.999 %), straight in between where the axes are log(latency) and log(1 - q); the mean stands for the median. One read
alone takes the numbers of queue depth 1, several those of depth 16. A query's reads start together; it ends with
the last of them.

References: AnandTech's review of the Intel Optane SSD DC P4800X, 2017 (4 KB random reads; as collected in shoal's reference on
embedding stores, section 1.2); Dean and Barroso, 2013, The tail at scale, CACM 56(2) (hedged requests).
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal import validate

LANES: Final = 16
"""Reads that a drive answers at once."""
_QUANTILES: Final = np.log10(np.array([1.0, 0.5, 0.01, 0.00001, 0.0000001]))


@dataclass(frozen=True)
class Device:
    """A drive by its review: (mean, p99, p99.999) in microseconds."""

    name: str
    alone: tuple[float, float, float]
    """At queue depth 1."""
    together: tuple[float, float, float]
    """At queue depth 16."""

    def draw(self, uniform: np.ndarray, *, together: bool) -> np.ndarray:
        """Latencies in seconds for uniform numbers in [0, 1)."""
        mean, high, highest = self.together if together else self.alone
        points = np.log(np.array([0.8 * mean, mean, high, highest, 1.5 * highest]) * 1e-6)
        left = np.log10(np.maximum(1 - uniform, 1e-7))
        return np.asarray(np.exp(np.interp(left, _QUANTILES[::-1], points[::-1])))


DEVICES: Final = {
    device.name: device
    for device in (
        Device("optane", (8.9, 10.0, 37.0), (25.5, 41.0, 81.0)),
        Device("flash", (77.9, 96.0, 2768.0), (93.9, 163.0, 2320.0)),
        Device("flash-read", (107.7, 117.0, 306.0), (116.2, 205.0, 1560.0)),
    )
}
"""`optane`: Intel P4800X 375 GB. `flash`: Intel P3700 800 GB. `flash-read`: Micron 9100 2.4 TB."""


@dataclass(frozen=True)
class Replayed:
    """What a model says of a number of queries."""

    seconds: np.ndarray
    """(queries,) latency of each; 0 where nothing was read."""
    extra: float
    """Hedged reads over all others."""

    def percentile(self, q: float) -> float:
        """Seconds."""
        return float(np.percentile(self.seconds, q))


def replay_latency(
    reads: np.ndarray,
    device: Device,
    *,
    seed: int = 0,
    copied: float = 0.0,
    quantile: float = 0.97,
    most_extra: float = 0.05,
) -> Replayed:
    """The latency of queries that read so many blocks each.

    Args:
        reads: (queries,) block reads of each query.
        copied: share of block reads whose rows have a copy elsewhere: these are hedged. 0 is no hedging.
        quantile: of a read's latency, after which a copy is asked.
        most_extra: hedged reads over all others, at most.
    """
    validate.between(0, 1, copied=copied)
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum(reads)])
    query = np.repeat(np.arange(len(reads)), reads)
    together = (reads > 1)[query]
    uniform, again, has_copy = rng.random((3, len(query)))
    first = np.where(together, device.draw(uniform, together=True), device.draw(uniform, together=False))
    hedged = (uniform > quantile) & (has_copy < copied)
    hedged &= np.cumsum(hedged) <= most_extra * (1 + np.arange(len(query)))
    limit = np.where(together, *(device.draw(np.array([quantile]), together=many) for many in (True, False)))
    second = limit + device.draw(again, together=True)
    took = np.where(hedged, np.minimum(first, second), first)
    # A query with more reads than lanes goes in waves: read i waits for read i - 16 of the same query.
    place = np.arange(len(query)) - starts[query]
    for wave in range(1, int(place.max(initial=0)) // LANES + 1):
        late = np.flatnonzero(place // LANES == wave)
        took[late] += took[late - LANES]
    seconds = np.zeros(len(reads))
    np.maximum.at(seconds, query, took)
    return Replayed(seconds, float(hedged.sum() / max(1, len(query))))
