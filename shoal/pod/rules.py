"""Which dimension of a tensor is split along which axis of the mesh: path patterns to partition specs, the first that matches.

``{"params/*/kernel": "-,model", "params/embed": "model,-"}``: one word for each dimension, `-` for one that is whole, `a+b` for one
that is split along two axes. A tensor that no rule matches is whole. Batches are split over the members along their first dimension; a rule of a
field, ``{"image": "space"}``, says how the dimensions after it are (spatial partitioning).
"""

import fnmatch
from collections.abc import Mapping

from jax.sharding import PartitionSpec

from shoal.pod.mesh import MEMBER_AXES, MeshSpec

Rules = Mapping[str, str]
"""Glob over names -> a word for each dimension."""


def specs(
    rules: Rules, shapes: Mapping[str, tuple[int, ...]], mesh: MeshSpec, *, what: str
) -> dict[str, PartitionSpec]:
    """Name -> how the tensor is split.

    Args:
        rules: the first that matches counts.
        shapes: name -> shape.
        mesh: whose axes are named.
        what: the names are of, for errors: `rules`, `inputs`.

    Raises:
        ValueError: a rule matches nothing, names what is no axis (or one of the members'), or does not fit a shape that it matches.
    """
    used: set[str] = set()
    made: dict[str, PartitionSpec] = {}
    for name, shape in shapes.items():
        pattern = next((pattern for pattern in rules if fnmatch.fnmatchcase(name, pattern)), None)
        made[name] = (
            PartitionSpec() if pattern is None else _spec(f"{what}[{pattern!r}]", rules[pattern], name, shape, mesh)
        )
        used |= {pattern} - {None}  # type: ignore[arg-type]
    for pattern in rules:
        if pattern not in used:
            shadow = next((other for other in used if any(fnmatch.fnmatchcase(n, pattern) for n in shapes)), None)
            why = (
                f"rules before it match the same tensors ({shadow!r}, say)"
                if shadow
                else f"it matches none of {', '.join(sorted(shapes))}"
            )
            raise ValueError(f"Expected each of {what} to be used, got {pattern!r}: {why}.")
    return made


def _spec(rule: str, text: str, name: str, shape: tuple[int, ...], mesh: MeshSpec) -> PartitionSpec:
    words = [word.strip() for word in text.split(",")]
    if len(words) > len(shape):
        raise ValueError(
            f"Expected {rule} to have at most {len(shape)} words for {name} of shape {shape}, got {text!r}."
        )
    parts: list[tuple[str, ...] | None] = []
    for size, word in zip(shape, words, strict=False):
        axes = () if word in ("-", "") else tuple(axis.strip() for axis in word.split("+"))
        _check_axes(rule, text, axes, mesh)
        if size % mesh.size(*axes):
            raise ValueError(
                f"Expected dimensions that can be split evenly, got {rule} = {text!r}: {name} has shape {shape}, and {size} is no multiple of "
                f"{'+'.join(axes)}={mesh.size(*axes)}."
            )
        parts.append(axes or None)
    named = [axis for axes in parts if axes for axis in axes]
    if len(set(named)) != len(named):
        raise ValueError(f"Expected {rule} to name an axis once, got {text!r}.")
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in parts))


def _check_axes(rule: str, text: str, axes: tuple[str, ...], mesh: MeshSpec) -> None:
    allowed = [axis for axis in mesh.sizes if axis not in MEMBER_AXES]
    for axis in axes:
        if axis in MEMBER_AXES:
            raise ValueError(
                f"Expected {rule} to split along axes for tensors, got {text!r}: {axis!r} splits the batch. "
                "To split parameters over it take update='fully_sharded'."
            )
        if axis not in allowed:
            raise ValueError(
                f"Expected {rule} to name axes of the mesh {mesh}, {' | '.join(allowed) or 'which has none'}, got {text!r}."
            )
