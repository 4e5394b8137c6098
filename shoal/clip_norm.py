"""How long a device's update may be: in all, by groups of its tensors, or as a quantile of the updates' own lengths. Plain data, part of
`policy.Privacy`; no JAX.

The programs that scale updates down are in `local.py` and `clip_update.py`.
"""

import fnmatch
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import log, sqrt
from typing import Any, Final

from shoal import validate

LOG_SCALE: Final = "clip/log_scale"
"""Tensor of a line beside its model: the logarithm of the adaptive bound over the initial one, float32, zero at first."""
MAX_RANGE: Final = 2.0**60
"""Between the initial bound and the lowest or highest: what float32 holds."""
MAX_SHARE_OF_BIT: Final = 0.25
"""Of what a release spends, at most, where nobody says how much noise the bit has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaptiveClip:
    """A bound on updates' norms that follows a quantile of them (Andrew, Thakkar, McMahan, Ramaswamy 2021, "Differentially Private Learning
    with Adaptive Clipping", algorithm 1, https://arxiv.org/abs/1905.03871).

    Each device tells one bit, whether its update was within the bound, in the same sum as the update.
    """

    initial: float
    """The bound of the first round. Where it is a tenth of what it should be, about 2.3 / (learning_rate × quantile) rounds mend that."""
    quantile: float = 0.5
    """Share of the devices, each as its update counts, whose updates shall not be scaled down; above 0 and below 1."""
    learning_rate: float = 0.2
    """The bound changes by at most a factor of exp(learning_rate) a round, but for noise."""
    bit_stddev: float | None = None
    """With noise: its standard deviation on the number of devices within the bound. None: a twentieth of the rounds' goal, as in the paper, or
    more where the bit would spend more than a quarter of each release."""
    lowest: float = 1e-6
    """The bound falls no further, but for the noise of a round."""
    highest: float = 1e6
    """Nor does it rise further."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(initial=self.initial, learning_rate=self.learning_rate, lowest=self.lowest)
        if not 0.0 < self.quantile < 1.0:
            raise ValueError(f"Expected 0 < quantile < 1, got quantile={self.quantile!r}.")
        validate.between(self.lowest, self.highest, initial=self.initial)
        if max(self.initial / self.lowest, self.highest / self.initial) > MAX_RANGE:
            raise ValueError(
                f"Expected lowest and highest within a factor of 2^60 of initial={self.initial:g}, got {self.lowest:g} and {self.highest:g}."
            )
        if self.bit_stddev is not None:
            validate.positive(bit_stddev=self.bit_stddev)

    @property
    def log_range(self) -> tuple[float, float]:
        """Between what `LOG_SCALE` is held."""
        return log(self.lowest / self.initial), log(self.highest / self.initial)

    @property
    def largest_bit(self) -> float:
        """Most that one device adds to the number of those within the bound, less the quantile of all."""
        return max(self.quantile, 1.0 - self.quantile)

    @property
    def largest_step(self) -> float:
        """Most by which one device changes `LOG_SCALE`, before the mean is taken; a float32."""
        return float(struct.unpack("f", struct.pack("f", self.learning_rate * self.largest_bit))[0])

    def bit_noise_multiplier(self, noise_multiplier: float, *, goal: int) -> float:
        """The noise on the bits over what one device can change of them, where all of a release has `noise_multiplier`."""
        if self.bit_stddev is not None:
            return self.bit_stddev / self.largest_bit
        return max(goal / 20 / self.largest_bit, noise_multiplier / sqrt(MAX_SHARE_OF_BIT))


ClipNorm = float | Mapping[str, float] | AdaptiveClip
"""The largest L2 norm of an update; or pattern of tensor names -> that of the tensors which it is the first to match, together; or what
it follows."""


def check_clip_norm(clip_norm: ClipNorm) -> None:
    """Raises TypeError or ValueError unless every bound is above zero."""
    if isinstance(clip_norm, AdaptiveClip):
        return
    if not isinstance(clip_norm, Mapping):
        validate.positive(clip_norm=clip_norm)
        return
    if not clip_norm:
        raise ValueError("Expected clip_norm to name tensors, got {}: {'*': 1.0} is one bound for all.")
    validate.of_kind(str, "patterns of tensor names", **{f"clip_norm[{pattern!r}]": pattern for pattern in clip_norm})
    validate.positive(**{f"clip_norm[{pattern!r}]": bound for pattern, bound in clip_norm.items()})


def norm_bound(clip_norm: ClipNorm) -> float:
    """What the norm of a whole update is at most, as it is sent: one that is clipped adaptively is over its bound, times the initial one."""
    if isinstance(clip_norm, AdaptiveClip):
        return clip_norm.initial
    return sqrt(sum(bound**2 for bound in clip_norm.values())) if isinstance(clip_norm, Mapping) else clip_norm


def groups_of(names: Iterable[str], clip_norm: ClipNorm) -> list[tuple[tuple[str, ...], float]]:
    """(names of the tensors that are scaled together, the bound of their norm), for every group.

    Raises:
        ValueError: a tensor matches no pattern, or a pattern is the first match of no tensor.
    """
    if not isinstance(clip_norm, Mapping):
        return [(tuple(names), norm_bound(clip_norm))]
    found: dict[str, list[str]] = {pattern: [] for pattern in clip_norm}
    missed: list[str] = []
    for name in names:
        pattern = next((pattern for pattern in clip_norm if fnmatch.fnmatchcase(name, pattern)), None)
        (missed if pattern is None else found[pattern]).append(name)
    if missed:
        raise ValueError(
            f"Expected every tensor of an update to match a pattern of clip_norm={dict(clip_norm)}, got {', '.join(missed[:5])}. Add '*' "
            "for the rest."
        )
    if idle := [pattern for pattern, members in found.items() if not members]:
        every = [name for members in found.values() for name in members]
        raise ValueError(
            f"Expected each pattern of clip_norm to be the first that some tensor matches, got {idle[0]!r}, which is that for none of "
            f"{', '.join(every[:20])}. Correct it, or put it before a wider one."
        )
    return [(tuple(members), clip_norm[pattern]) for pattern, members in found.items()]


def described(clip_norm: ClipNorm) -> str:
    """In words, for people: `a norm of 0.1`."""
    if isinstance(clip_norm, AdaptiveClip):
        return f"a norm that followed their quantile {clip_norm.quantile:g}, {clip_norm.initial:g} at first"
    if not isinstance(clip_norm, Mapping):
        return f"a norm of {clip_norm:g}"
    each = ", ".join(f"{bound:g} for {pattern}" for pattern, bound in clip_norm.items())
    return f"norms by tensor ({each}), {norm_bound(clip_norm):.4g} together"


def clip_norm_to_json(clip_norm: ClipNorm) -> Any:
    """A number; pairs, whose order counts; or an object."""
    if isinstance(clip_norm, AdaptiveClip):
        return asdict(clip_norm)
    return [list(pair) for pair in clip_norm.items()] if isinstance(clip_norm, Mapping) else clip_norm


def clip_norm_from_json(data: Any) -> Any:
    """What `clip_norm_to_json` was given; anything else is left for `Privacy` to refuse."""
    if isinstance(data, dict):
        return AdaptiveClip(**data)
    return {pattern: bound for pattern, bound in data} if isinstance(data, list) else data
