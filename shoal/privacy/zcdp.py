"""Zero-concentrated differential privacy: what a device needs to keep account of its own. No SciPy here; the rest is in `accounting.py`.

References:
    * Bun, Steinke 2016, "Concentrated Differential Privacy".
    * Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential Privacy", proposition 12.
"""

from math import exp, log, log1p, sqrt
from typing import Final

from shoal import validate

_GOLDEN: Final = (sqrt(5.0) - 1.0) / 2.0
_NARROW: Final = 1e-9
"""Width of the logarithm of the order at which the search ends; the bound is flat there."""


def gaussian_zcdp(noise_multiplier: float) -> float:
    """The rho of one release with Gaussian or discrete Gaussian noise. Those of several releases add up."""
    validate.positive(noise_multiplier=noise_multiplier)
    return 1 / (2 * noise_multiplier**2)


def epsilon_of_zcdp(rho: float, delta: float) -> float:
    """The least epsilon at delta of whatever is rho-zCDP, over all orders."""
    validate.not_negative(rho=rho)
    check_delta(delta)
    if rho == 0:
        return 0.0

    def at(log_order: float) -> float:
        order = 1 + exp(log_order)
        return order * rho + log1p(-1 / order) - log(delta * order) / (order - 1)

    middle = log(log(1 / delta) / rho) / 2  # the best order of the simpler rho + 2 sqrt(rho ln(1/delta))
    low, high = middle - 5, middle + 5
    while high - low > _NARROW:  # golden section: every order gives a bound, so the search errs on the safe side
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if at(left) <= at(right) else (left, high)
    return max(0.0, at((low + high) / 2))


def check_delta(delta: float) -> None:
    """Raises ValueError where it is none."""
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta < 1, got delta={delta!r}.")
