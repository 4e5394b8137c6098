"""Checks of arguments that put the caller's name and value into the text.

>>> positive(clip_norm=-1.0)
Traceback (most recent call last):
ValueError: Expected clip_norm > 0, got clip_norm=-1.0.
"""

from collections.abc import Collection, Hashable
from dataclasses import fields
from functools import cache
from math import isfinite
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints


def positive(**named: float) -> None:
    """Raises ValueError unless every value is above zero (NaN is refused too)."""
    for name, value in named.items():
        if not value > 0:
            raise ValueError(f"Expected {name} > 0, got {name}={value!r}.")


def not_negative(**named: float) -> None:
    """Raises ValueError unless every value is zero or more."""
    for name, value in named.items():
        if not value >= 0:
            raise ValueError(f"Expected {name} >= 0, got {name}={value!r}.")


def between(low: float, high: float, **named: float) -> None:
    """Raises ValueError unless low <= value <= high for every value."""
    for name, value in named.items():
        if not low <= value <= high:
            raise ValueError(f"Expected {low} <= {name} <= {high}, got {name}={value!r}.")


def one_of(allowed: Collection[object], **named: object) -> None:
    """Raises ValueError unless every value is among those allowed."""
    for name, value in named.items():
        if value not in allowed:
            choices = " | ".join(sorted(str(a) for a in allowed))
            raise ValueError(f"Expected {name} to be one of {choices}, got {name}={value!r}.")


def types(instance: object) -> None:
    """Raises TypeError unless every field of a dataclass has the plain type that its annotation says.

    Data from a peer is put into dataclasses field by field; this is what keeps a list out of a name and a NaN out of a
    number. Understood are int (no bool), float (any finite number), bool, str,
    bytes, None, Literal, unions of them, tuples `tuple[T, ...]`, mappings, and classes.
    """
    for name, hint in _hints(cast(Hashable, type(instance))).items():
        value = getattr(instance, name)
        if type(value) is hint and hint is not float:
            continue  # most of them, and this is on the way of every message
        if not _is_a(value, hint):
            text = getattr(hint, "__name__", None) or str(hint)
            raise TypeError(f"Expected {name} of {type(instance).__name__} to be {text}, got {repr(value)[:80]}.")


@cache
def _hints(cls: Any) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def _is_a(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if hint is Any:
        return True
    if hint is int:
        return type(value) is int
    if hint is float:
        return type(value) in (int, float) and isfinite(value)
    if origin is Literal:
        return any(type(value) is type(allowed) and value == allowed for allowed in get_args(hint))
    if origin in (Union, UnionType):
        return any(_is_a(value, option) for option in get_args(hint))
    if origin is tuple:
        inner, *rest = get_args(hint)
        if rest == [Ellipsis]:
            return type(value) is tuple and all(_is_a(item, inner) for item in value)
        return type(value) is tuple and len(value) == 1 + len(rest) and all(map(_is_a, value, (inner, *rest)))
    if origin is not None:
        return isinstance(value, origin)
    return isinstance(value, type(None) if hint is None else hint)
