"""How long a device's update may be: in all, or by groups of its tensors. Plain data, part of `policy.Privacy`; no JAX.

The programs that scale updates down are in `local.py` and `clip_update.py`.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from math import sqrt
from typing import Any

from shoal import validate

ClipNorm = float | Mapping[str, float]
"""The largest L2 norm of an update; or pattern of tensor names -> that of the tensors which it is the first to match, together."""


def check_clip_norm(clip_norm: ClipNorm) -> None:
    """Raises TypeError or ValueError unless every bound is above zero."""
    if not isinstance(clip_norm, Mapping):
        validate.positive(clip_norm=clip_norm)
        return
    if not clip_norm:
        raise ValueError("Expected clip_norm to name tensors, got {}: {'*': 1.0} is one bound for all.")
    validate.of_kind(str, "patterns of tensor names", **{f"clip_norm[{pattern!r}]": pattern for pattern in clip_norm})
    validate.positive(**{f"clip_norm[{pattern!r}]": bound for pattern, bound in clip_norm.items()})


def norm_bound(clip_norm: ClipNorm) -> float:
    """What the norm of a whole update is at most."""
    return sqrt(sum(bound**2 for bound in clip_norm.values())) if isinstance(clip_norm, Mapping) else clip_norm


def groups_of(names: Iterable[str], clip_norm: ClipNorm) -> list[tuple[tuple[str, ...], float]]:
    """(names of the tensors that are scaled together, the bound of their norm), for every group.

    Raises:
        ValueError: a tensor matches no pattern, or a pattern is the first match of no tensor.
    """
    if not isinstance(clip_norm, Mapping):
        return [(tuple(names), clip_norm)]
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
    if not isinstance(clip_norm, Mapping):
        return f"a norm of {clip_norm:g}"
    each = ", ".join(f"{bound:g} for {pattern}" for pattern, bound in clip_norm.items())
    return f"norms by tensor ({each}), {norm_bound(clip_norm):.4g} together"


def clip_norm_to_json(clip_norm: ClipNorm) -> Any:
    """A number; or pairs, whose order counts."""
    return [list(pair) for pair in clip_norm.items()] if isinstance(clip_norm, Mapping) else clip_norm


def clip_norm_from_json(data: Any) -> Any:
    """What `clip_norm_to_json` was given; anything else is left for `Privacy` to refuse."""
    return {pattern: bound for pattern, bound in data} if isinstance(data, list) else data
