"""What one device can change in a sum: its update's norm, clipped, and still bounded once it is integers.

A task's own clipping is in its programs, on the device (`local.py`); this is the same where tensors are put on the grid of a sum,
with what rounding does to the norm; and what a bit beside an update costs.

References:
    * McMahan et al. 2018, "Learning Differentially Private Recurrent Language Models": flat clipping and by layer.
    * Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism", proposition 22: conditional rounding.
    * Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning with Adaptive Clipping", algorithm 1.
"""

from collections.abc import Mapping
from math import inf, isfinite, nextafter, sqrt
from typing import Final

import numpy as np

from shoal import validate
from shoal.clip_norm import check_clip_norm, groups_of
from shoal.errors import UpdateRefused
from shoal.fixed import CHUNK
from shoal.privacy.noise import Source
from shoal.tensors import Tensors

_MARGIN: Final = 2.0**-20
"""Clipped norms stay below their bound by this share, so that rounding in float32 cannot pass it."""
_MAX_TRIES: Final = 100
"""Of roundings, of which each succeeds with a chance of at least 0.39."""


def l2_norm(tensors: Mapping[str, np.ndarray]) -> float:
    """Of all tensors as one vector, in float64. Raises UpdateRefused if it is not finite."""
    square = 0.0
    with np.errstate(over="ignore"):
        for values in tensors.values():
            flat = values.reshape(-1)
            for start in range(0, flat.size, CHUNK):
                square += float(np.sum(np.square(flat[start : start + CHUNK], dtype=np.float64)))
    if not isfinite(square):
        raise UpdateRefused(
            f"Expected a finite norm, got tensors whose squares add up to {square}.", reason="not finite"
        )
    return sqrt(square)


def clip(tensors: Mapping[str, np.ndarray], bounds: Mapping[str, float]) -> tuple[Tensors, dict[str, float]]:
    """The tensors with the norm of each group at most its bound.

    Args:
        tensors: by name, floats.
        bounds: pattern of names -> bound; a tensor is of the first pattern that it matches. `{"*": 1.0}` is flat clipping.

    Returns:
        The tensors in their order, float32 or float64, and the norm that each group had.

    Raises:
        ValueError: a tensor matches no pattern, so that it would not be bounded; or a pattern is the first match of none.
        UpdateRefused: a value is not finite.
    """
    check_clip_norm(bounds)
    groups = groups_of(tensors, bounds)
    norms = [l2_norm({name: tensors[name] for name in group}) for group, _ in groups]
    scales = {
        name: min(1.0, bound * (1 - _MARGIN) / max(norm, 2.0**-1000))
        for (group, bound), norm in zip(groups, norms, strict=True)
        for name in group
    }
    clipped = {name: _times(values, scales[name]) for name, values in tensors.items()}
    return clipped, dict(zip(bounds, norms, strict=True))


def rounded_bound(l2: float, *, unit: float, elements: int) -> float:
    """What the norm of the integers is at most, in units, if a vector of norm `l2` is rounded to the nearest. Certain."""
    validate.positive(l2=l2, unit=unit)
    validate.whole(1, elements=elements)
    return nextafter(l2 / unit + sqrt(elements) / 2, inf) * (1 + 2.0**-50)


def conditional_bound(l2: float, *, unit: float, elements: int) -> float:
    """What `round_to_grid` can be asked to keep, in units: a random rounding of norm `l2` keeps it with a chance of at least 0.39.

    On a coarse grid it is much below that of the worst rounding, l2 / unit + sqrt(elements): the error of the sum is, too.
    """
    validate.positive(l2=l2, unit=unit)
    validate.whole(1, elements=elements)
    norm, root = l2 / unit, sqrt(elements)
    likely = norm**2 + elements / 4 + norm + root / 2  # with beta = exp(-1/2), sqrt(2 ln(1/beta)) is 1
    return min(sqrt(likely), norm + root)


def round_to_grid(tensors: Mapping[str, np.ndarray], *, unit: float, bound: float, source: Source) -> Tensors:
    """The tensors as integers in units, each up or down at random so that its mean is its value, together of norm at most `bound`.

    A rounding that is longer is drawn again, of all tensors: what is kept is then nearly, not wholly, without bias.

    Args:
        tensors: by name, floats.
        unit: of the grid.
        bound: of the integers' norm, in units: `conditional_bound`.
        source: of random bytes, 8 an element and try.

    Raises:
        UpdateRefused: not finite, or no rounding is short enough: the tensors were not clipped to what the bound is for.
    """
    validate.positive(unit=unit, bound=bound)
    for _ in range(_MAX_TRIES if l2_norm(tensors) / unit <= bound else 0):
        rounded = {name: _round(values, unit, source) for name, values in tensors.items()}
        if l2_norm(rounded) * (1 + 2.0**-40) <= bound:
            return rounded
    raise UpdateRefused(
        f"Expected tensors whose rounding has a norm of at most {bound:g} units, got a norm of {l2_norm(tensors) / unit:g} before it. "
        "Clip them first.",
        reason="out of bounds",
    )


def l1_bound(l2: float, elements: int) -> float:
    """What the L1 norm of integers is at most, if their L2 norm is at most `l2`: for `accounting.skellam_rdp`."""
    return min(l2**2, sqrt(elements) * l2)


def update_noise_multiplier(noise_multiplier: float, *, bit: float) -> float:
    """The noise multiplier of an update, with which it and a bit beside it are together one release of `noise_multiplier`.

    Args:
        noise_multiplier: of the release.
        bit: that of the bit alone, the larger one.

    References:
        Andrew et al. 2021, theorem 1.
    """
    validate.positive(noise_multiplier=noise_multiplier, bit=bit)
    if bit <= noise_multiplier:
        raise ValueError(
            f"Expected bit > noise_multiplier, got bit={bit} and noise_multiplier={noise_multiplier}: the bit alone would spend all."
        )
    return 1 / sqrt(noise_multiplier**-2 - bit**-2)


def _times(values: np.ndarray, scale: float) -> np.ndarray:
    dtype = np.float64 if values.dtype == np.float64 else np.float32
    return np.asarray((values.astype(np.float64) * scale).astype(dtype))


def _round(values: np.ndarray, unit: float, source: Source) -> np.ndarray:
    exact = values.astype(np.float64) / unit
    below = np.floor(exact)
    uniform = np.frombuffer(source(8 * values.size), "<u8") >> np.uint64(11)
    is_up = uniform.reshape(values.shape) * 2.0**-53 < exact - below
    return np.asarray((below + is_up).astype(np.int64))
