"""Integer noise on the grid of a sum: the discrete Gaussian, and the Skellam distribution.

Floating point leaks (Mironov 2012); so noise is integers, in units of the sum's grid. Both laws are symmetric and fall
away from zero, and one sampler serves both: rejection from layers. The magnitude is `layer * t + rest` with t a power of two of
at most a quarter of the standard deviation::

    layer   from a table of thresholds of 128 bits, in proportion to P(layer * t)
    rest    t's bits, uniform
    accept  with probability P(layer * t + rest) / P(layer * t)       (about nine in ten; t = 1: always)

Decisions are made in words of 64 bits and float64. Where these cannot tell (about once in 2^45 draws) the decision is made again with
64 more random bits in decimals of 60 digits: so speed costs no exactness.

Guarantees:
    * Distance: each element's distribution is within 2^-100 (discrete Gaussian) and 2^-80 (Skellam) of the law, in total variation,
      if the source's bytes are uniform. All elements of 2^30 and all of 2^10 steps: 2^-40, which is part of delta.
    * A source that follows from a seed gives the same integers on any machine, though the last bit of `exp` differs between them: what it
      could change is decided in decimals, and from bytes that are apart.

Not claimed: that the time taken hides the noise.

References:
    * Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy": the law and why; the sampler differs.
    * Karney 2016, "Sampling exactly from the normal distribution": layers.
    * Agarwal, Kairouz, Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning".
"""

import os
from bisect import bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cached_property, lru_cache, partial
from itertools import accumulate, repeat
from math import ceil, floor, log2, sqrt
from typing import Final

import numpy as np

from shoal import validate

Source = Callable[[int], bytes]
"""So many random bytes: `os.urandom` in production; `seeded` where noise must be had again."""

MAX_STDDEV: Final = 2.0**40
"""Units of the grid. A sum with 64 bits has room for it; steps in the float64 arithmetic stay whole."""
MIN_STDDEV: Final = 0.25
_CHUNK: Final = 1 << 16
"""Draws at a time and of a source: their arrays stay in a core's cache."""
_GUIDE: Final = 12
_DIGITS: Final = 60
_REACH: Final = 13.5
"""Standard deviations in the table: beyond are less than 2^-125 of a Gaussian."""
_LARGE: Final = 2.0**20
"""Variance from which on the Skellam law is worked out by Debye's expansion, whose first term left out is below 2^-80."""
_DOUBT: Final = 2.0**-47
"""Above the error of a probability in float64, with the 53 bits that it is compared to."""


@dataclass(frozen=True)
class _Law:
    """What the sampler needs of a law P(x) = P(-x)."""

    layer: int
    """t, a power of two."""
    thresholds: tuple[int, ...]
    """2^128 P(layer <= j), ascending."""
    fall: Callable[[np.ndarray, np.ndarray], np.ndarray]
    """(start, rest) -> log P(start) - log P(start + rest), float64, error below 2^-49."""
    fall_exactly: Callable[[int, int], Decimal]

    @cached_property
    def high(self) -> np.ndarray:
        """The thresholds' first 64 bits, but for the last; uint64."""
        return np.array([threshold >> 64 for threshold in self.thresholds[:-1]], np.uint64)

    @cached_property
    def guide(self) -> np.ndarray:
        """The layer by the first bits of a word, (2^_GUIDE,) int64; -1: a threshold has these bits, too."""
        first = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(64 - _GUIDE)
        layers = np.searchsorted(self.high, first, side="right")
        layers[(self.high >> np.uint64(64 - _GUIDE)).astype(np.int64)] = -1
        return layers


def seeded(seed: bytes, purpose: bytes) -> Source:
    """A source that follows from 32 secret bytes and what it is for: AES-256-CTR under a key of its own (HKDF)."""
    # Loaded where noise is drawn: a device that only reads how much of it a plan promises is small.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    from shoal.privacy.masks import derive

    if len(seed) != 32:
        raise ValueError(f"Expected a seed of 32 bytes, got {len(seed)}.")
    stream = Cipher(algorithms.AES(derive(seed, b"shoal/noise:" + purpose)), modes.CTR(bytes(16))).encryptor()
    return lambda size: stream.update(bytes(size))


def discrete_gaussian(stddev: float, size: int, *, source: Source) -> np.ndarray:
    """Integers with P(x) in proportion to exp(-x^2 / (2 stddev^2)).

    Args:
        stddev: units of the grid, 0.25 to 2^40.
        size: how many.
        source: of random bytes, about 30 an integer.

    Returns:
        (size,) int64. From a stddev of 2 on, theirs is `stddev` to 15 digits; below it is smaller.
    """
    validate.between(MIN_STDDEV, MAX_STDDEV, stddev=stddev)
    return _draw(_gaussian_law(float(stddev)), size, source)


def skellam(variance: float, size: int, *, source: Source) -> np.ndarray:
    """Integers distributed as the difference of two Poisson numbers of mean variance / 2; sums of such are such.

    Args:
        variance: units of the grid, squared; from 2^-10 to 2^80.
        size: how many.
        source: of random bytes, about 30 an integer.

    Returns:
        (size,) int64.
    """
    validate.between(2.0**-10, MAX_STDDEV**2, variance=variance)
    return _draw(_skellam_law(float(variance)), size, source)


def share_variance(variance: float, *, members: int, dropouts: int) -> float:
    """What each of `members` adds, so that when as many as `dropouts` (or colluders) are missing the rest is at least `variance`.

    If all report, the sum has members / (members - dropouts) times as much. For `skellam`, which is closed under sums.
    """
    validate.positive(variance=variance)
    validate.whole(1, members=members)
    validate.whole(0, dropouts=dropouts)
    if dropouts >= members:
        raise ValueError(f"Expected fewer dropouts than members, got {dropouts} of {members}: nobody would add noise.")
    share = variance / (members - dropouts)
    return share if share * (members - dropouts) >= variance else float(np.nextafter(share, np.inf))


def _draw(law: _Law, size: int, source: Source) -> np.ndarray:
    validate.whole(0, size=size)
    out = np.empty(size, np.int64)
    pieces = [out[start : start + _CHUNK] for start in range(0, size, _CHUNK)]
    sources = [seeded(source(32), b"piece") for _ in pieces]  # each its own, so that they are drawn side by side
    if len(pieces) < 2:
        for piece, own in zip(pieces, sources, strict=True):
            _fill(piece, law, own)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            list(threads.map(_fill, pieces, repeat(law), sources))
    return out


def _fill(out: np.ndarray, law: _Law, source: Source) -> None:
    filled = 0
    while filled < out.size:
        drawn = _accepted(law, (out.size - filled) * 5 // 4 + 16, source)[: out.size - filled]
        out[filled : filled + drawn.size] = drawn
        filled += drawn.size


def _accepted(law: _Law, count: int, source: Source) -> np.ndarray:
    """Of `count` proposals those that are accepted, with their signs."""
    words = np.frombuffer(source(24 * count), "<u8").reshape(3, count)
    more = seeded(source(32), b"more bits")
    start = _layers(law, words[0], more)
    start *= law.layer
    rest = (words[1] & np.uint64(law.layer - 1)).astype(np.int64)
    magnitude = start + rest
    is_negative = words[1].view(np.int64) < 0
    keep = (magnitude != 0) | ~is_negative  # one zero, not two
    if law.layer > 1:
        gap = np.exp(-law.fall(start.astype(np.float64), rest.astype(np.float64)))
        gap -= (words[2] >> np.uint64(11)).astype(np.float64) * 2.0**-53
        accept = gap > 0
        for at in np.flatnonzero(np.abs(gap, out=gap) < _DOUBT):
            accept[at] = _accept_exactly(law, int(start[at]), int(rest[at]), _longer(words[2, at], more))
        keep &= accept
    np.negative(magnitude, out=magnitude, where=is_negative)
    return np.asarray(magnitude[keep])


def _layers(law: _Law, words: np.ndarray, more: Source) -> np.ndarray:
    """The layer that each word falls into, (words,) int64."""
    layer = law.guide[(words >> np.uint64(64 - _GUIDE)).view(np.int64)]
    near = np.flatnonzero(layer < 0)
    found = np.searchsorted(law.high, words[near], side="right")
    layer[near] = found
    for at in near[law.high[np.maximum(found, 1) - 1] == words[near]] if near.size else ():
        layer[at] = bisect_right(law.thresholds, _longer(words[at], more))
    return np.asarray(layer)


def _accept_exactly(law: _Law, start: int, rest: int, uniform: int) -> bool:
    with localcontext(prec=_DIGITS):
        return uniform < (-law.fall_exactly(start, rest)).exp() * (1 << 128)


def _longer(word: np.uint64, source: Source) -> int:
    """128 bits, of which the first 64 are known."""
    return int(word) << 64 | int.from_bytes(source(8), "little")


def _thresholds(weights: list[Decimal]) -> tuple[int, ...]:
    """2^128 times the sums of the first weights over that of all, down to weights of 2^-126 of the first."""
    sums = list(accumulate(weight for weight in weights if weight * (1 << 126) > weights[0]))
    return (*(int(part / sums[-1] * (1 << 128)) for part in sums[:-1]), 1 << 128)


def _layer_of(stddev: float) -> int:
    return 1 << max(0, floor(log2(stddev / 4)))


@lru_cache(64)
def _gaussian_law(stddev: float) -> _Law:
    step, scale = _layer_of(stddev), 0.5 / stddev**2

    def fall(start: np.ndarray, rest: np.ndarray) -> np.ndarray:
        return np.asarray(rest * (2 * start + rest) * scale)

    def fall_exactly(start: int, rest: int) -> Decimal:
        return Decimal(rest * (2 * start + rest)) / (2 * Decimal(stddev) ** 2)

    with localcontext(prec=_DIGITS):
        layers = range(ceil(_REACH * max(stddev, 1) / step))
        thresholds = _thresholds([(-fall_exactly(0, layer * step)).exp() for layer in layers])
    return _Law(step, thresholds, fall, fall_exactly)


@lru_cache(64)
def _skellam_law(variance: float) -> _Law:
    with localcontext(prec=_DIGITS):
        if variance < _LARGE:
            return _Law(1, _thresholds(_bessel(variance)), np.multiply, lambda start, rest: Decimal(0))
        step, zero = _layer_of(sqrt(variance)), _log_debye(0, variance)
        layers = range(ceil(_REACH * sqrt(variance) / step))
        thresholds = _thresholds([(_log_debye(layer * step, variance) - zero).exp() for layer in layers])

    def fall_exactly(start: int, rest: int) -> Decimal:
        return _log_debye(start, variance) - _log_debye(start + rest, variance)

    return _Law(step, thresholds, partial(_debye_fall, variance), fall_exactly)


def _bessel(variance: float) -> list[Decimal]:
    """In proportion to I_x(variance) for x = 0, 1, …, by Miller's backward recurrence."""
    below, here = Decimal(0), Decimal(1)
    falling = []
    for x in range(60 + ceil(16 * sqrt(variance)), 0, -1):
        falling.append(here)
        below, here = here, below + 2 * x / Decimal(variance) * here
    return [here, *reversed(falling)]


def _log_debye(x: int, variance: float) -> Decimal:
    """Log of I_x(variance), but for a constant: Debye's expansion (DLMF 10.41.3) with three terms of its series."""
    mean = Decimal(variance)
    y = x / mean
    root = (1 + y * y).sqrt()
    p = y * y / (1 + y * y)
    r = mean * root
    u1 = (3 - 5 * p) / 24
    u2 = (81 - 462 * p + 385 * p**2) / 1152
    u3 = (30375 - 369603 * p + 765765 * p**2 - 425425 * p**3) / 414720
    series = 1 + u1 / r + u2 / r**2 + u3 / r**3
    return mean * (root - 1) - x * (y + root).ln() - root.ln() / 2 + series.ln()


def _debye_fall(variance: float, start: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """The fall of `_log_debye`: its first term is at most 4; the others are small and their series short, as x/variance < 2^-6."""
    end, inverse = start + rest, 1 / variance
    a, b = (start * inverse) ** 2, (end * inverse) ** 2
    arc = (a * a - b * b) / 24 + (b**3 - a**3) / 80 - (b**4 - a**4) * (5 / 896)
    flatter = (np.log1p(b) - np.log1p(a)) / 4 + inverse * (_first(a) - _first(b))
    return np.asarray(rest * (start + end) * (0.5 * inverse) + variance * arc + flatter)


def _first(square: np.ndarray) -> np.ndarray:
    return np.asarray((3 - 5 * square / (1 + square)) / (24 * np.sqrt(1 + square)))
