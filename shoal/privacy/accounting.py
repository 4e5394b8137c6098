"""What noise is worth: from a mechanism to epsilon at delta, and back.

A *release* is a sum in which one device's part has L2 norm at most 1, plus Gaussian noise of standard deviation `noise_multiplier`.
Neighbours differ in one device, whose part is there or is zero. What devices are divided by is public.

Each release has a curve of Rényi divergences; curves of releases add up, chosen adaptively or not; the sum gives epsilon at the
best order. Discrete Gaussian noise on a grid has the curve of the Gaussian (Canonne, Kamath and Steinke 2020, theorem 14), but
not its exact delta: for it `gaussian_delta` and `pld_epsilon` are what the Gaussian would have.

References:
    * Mironov, Talwar, Zhang 2019, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", section 3.3.
    * Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", proposition 12.
    * Balle, Wang 2018, "Improving the Gaussian Mechanism for Differential Privacy", theorem 8.
    * Bun, Steinke 2016, "Concentrated Differential Privacy".
    * Agarwal, Kairouz, Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning", theorem 3.5.
"""

from collections.abc import Callable
from math import ceil, exp, expm1, isfinite, log, log1p, pi, sqrt
from typing import Final

import numpy as np
from scipy.special import gammaln, log_ndtr, logsumexp

from shoal import validate
from shoal.errors import MissingExtra
from shoal.privacy.zcdp import check_delta
from shoal.privacy.zcdp import epsilon_of_zcdp as epsilon_of_zcdp
from shoal.privacy.zcdp import gaussian_zcdp as gaussian_zcdp

ORDERS: Final = np.concatenate([1 + np.arange(1, 100) / 10, np.arange(11.0, 64), [128.0, 256.0, 512.0, 1024.0]])
"""Orders of Rényi divergence at which a curve is kept; those of `dp-accounting`."""


def gaussian_rdp(noise_multiplier: float, orders: np.ndarray = ORDERS) -> np.ndarray:
    """The curve of one release in which every device takes part. (orders,) float64."""
    validate.positive(noise_multiplier=noise_multiplier)
    return np.asarray(orders / (2 * noise_multiplier**2))


def sampled_gaussian_rdp(sampling: float, noise_multiplier: float, orders: np.ndarray = ORDERS) -> np.ndarray:
    """The curve of one release in which each device takes part with probability `sampling`, by itself and unseen (Poisson).

    Only where who takes part is drawn by one who is trusted: a fleet's devices come when they can, and nothing is claimed for them.
    """
    validate.between(0, 1, sampling=sampling)
    validate.positive(noise_multiplier=noise_multiplier)
    if sampling in (0, 1):
        return np.asarray(sampling * gaussian_rdp(noise_multiplier, orders))
    rounded = (
        np.ceil(orders) if noise_multiplier < 0.1 else orders
    )  # a narrow integrand needs many points; curves only rise
    moments = [_log_moment(sampling, noise_multiplier, float(order)) for order in rounded]
    return np.asarray(np.maximum(moments, 0) / (rounded - 1))


def skellam_rdp(variance: float, *, l2: float, l1: float, orders: np.ndarray = ORDERS) -> np.ndarray:
    """The curve of an integer sum with Skellam noise of this variance, in units of the grid.

    Args:
        variance: of the noise on one element that is sure to be there: see `noise.share_variance`.
        l2: largest L2 norm of one device's integers.
        l1: their largest L1 norm: see `clipping.l1_bound`.
        orders: the bound holds for whole ones; for others that of the next whole one is given, which is larger.
    """
    validate.positive(variance=variance)
    validate.not_negative(l2=l2, l1=l1)
    whole = np.maximum(np.ceil(orders), 2)
    small = ((2 * whole - 1) * l2**2 + 6 * l1) / (4 * variance**2)
    return np.asarray(whole * l2**2 / (2 * variance) + np.minimum(small, 3 * l1 / (2 * variance)))


def epsilon_of_rdp(rdp: np.ndarray, delta: float, orders: np.ndarray = ORDERS) -> float:
    """The least epsilon that a curve promises at delta: of several releases give the sum of their curves."""
    check_delta(delta)
    bounds = rdp + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    # Total variation is at most sqrt(1 - exp(-KL)), and KL at most the divergence of any order.
    hidden = bool(np.any(delta**2 + np.expm1(-rdp) > 0))
    return 0.0 if hidden else max(0.0, float(np.min(bounds)))


def delta_of_rdp(rdp: np.ndarray, epsilon: float, orders: np.ndarray = ORDERS) -> float:
    """The least delta that a curve promises at epsilon."""
    validate.not_negative(epsilon=epsilon)
    bounds = (orders - 1) * (rdp - epsilon + np.log1p(-1 / orders)) - np.log(orders)
    total_variation = sqrt(-expm1(-float(np.min(rdp))))
    return min(total_variation, exp(min(0.0, float(np.min(bounds)))))


def gaussian_delta(epsilon: float, noise_multiplier: float) -> float:
    """The exact delta of one release with Gaussian noise. Of T releases with multiplier z: that of one with z / sqrt(T)."""
    validate.not_negative(epsilon=epsilon)
    validate.positive(noise_multiplier=noise_multiplier)
    half, shift = 1 / (2 * noise_multiplier), epsilon * noise_multiplier
    first, second = float(log_ndtr(half - shift)), epsilon + float(log_ndtr(-half - shift))
    return exp(first) * -expm1(min(0.0, second - first))


def gaussian_epsilon(delta: float, noise_multiplier: float) -> float:
    """The exact epsilon at delta of one release with Gaussian noise."""
    check_delta(delta)
    if gaussian_delta(0.0, noise_multiplier) <= delta:
        return 0.0
    return _smallest(lambda epsilon: gaussian_delta(epsilon, noise_multiplier) <= delta, start=1.0)


def participations(rounds: int, min_separation: int) -> int:
    """How often a device can take part in so many rounds, if after one it sits out until `min_separation` rounds later (1: in all)."""
    validate.whole(0, rounds=rounds)
    validate.whole(1, min_separation=min_separation)
    return -(-rounds // min_separation)


def calibrate(
    epsilon: float, delta: float, *, releases: int = 1, rdp: Callable[[float], np.ndarray] = gaussian_rdp
) -> float:
    """The smallest noise multiplier with which so many releases keep to epsilon at delta; larger by at most one in 10^6.

    Args:
        epsilon: above 0.
        delta: in (0, 1); well below one in the number of devices.
        releases: that one device takes part in, at most.
        rdp: the curve of one release by its noise multiplier, at `ORDERS`.
    """
    validate.positive(epsilon=epsilon)
    validate.whole(1, releases=releases)
    return _smallest(lambda noise: epsilon_of_rdp(releases * rdp(noise), delta) <= epsilon, start=1.0)


def pld_epsilon(noise_multiplier: float, delta: float, *, releases: int = 1, sampling: float = 1.0) -> float:
    """Epsilon at delta by privacy loss distributions: nearly exact for the Gaussian, sampled or not. Needs `shoal[privacy]`."""
    check_delta(delta)
    validate.positive(noise_multiplier=noise_multiplier)
    try:
        from dp_accounting import dp_event, pld
    except ImportError as error:
        raise MissingExtra("dp-accounting", extra="privacy", why="Accounting by privacy loss distributions") from error
    release = dp_event.PoissonSampledDpEvent(sampling, dp_event.GaussianDpEvent(noise_multiplier))
    accountant = pld.PLDAccountant(value_discretization_interval=1e-3).compose(release, releases)
    return float(accountant.get_epsilon(delta))


def _smallest(is_enough: Callable[[float], bool], *, start: float) -> float:
    """The least value from which on `is_enough` holds, to 10^-6 of it and never below. It fails at 0 and holds far out."""
    low, high = 0.0, start
    while not is_enough(high):
        low, high = high, 2 * high
        if not isfinite(high):
            raise ValueError("Expected something that enough noise makes private: no noise is enough.")
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _log_moment(q: float, sigma: float, order: float) -> float:
    """Log of the order-th moment of the likelihood ratio, A(order) of Mironov et al. 2019."""
    if order == ceil(order):
        i = np.arange(order + 1)
        powers = i * log(q) + (order - i) * log1p(-q)
        return float(logsumexp(_log_binomial(order, i) + powers + (i**2 - i) / (2 * sigma**2)))
    # The expectation by the trapezoid rule, whose error for what is analytic within pi sigma^2 of the line is below e^-70.
    step = min(sigma / 16, sigma**2 / 4)
    z = np.arange(-12 * sigma, order + 12 * sigma, step)
    ratio = np.logaddexp(log1p(-q), log(q) + (2 * z - 1) / (2 * sigma**2))
    density = log(step / sigma / sqrt(2 * pi)) - z**2 / (2 * sigma**2)
    return float(logsumexp(density + order * ratio))


def _log_binomial(order: float, i: np.ndarray) -> np.ndarray:
    """Log of the magnitude of the generalised binomial coefficient."""
    return np.asarray(gammaln(order + 1) - gammaln(i + 1) - gammaln(order - i + 1))
