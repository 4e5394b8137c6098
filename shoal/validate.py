"""Checks of arguments that put the caller's name and value into the text.

>>> positive(clip_norm=-1.0)
Traceback (most recent call last):
ValueError: Expected clip_norm > 0, got clip_norm=-1.0.
"""

from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import fields
from functools import cache
from math import isfinite
from numbers import Integral
from types import UnionType
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints


def positive(**named: float) -> None:
    """Raises ValueError unless every value is above zero (NaN is refused too)."""
    for name, value in named.items():
        if not _is_number(value) or not value > 0:
            raise ValueError(f"Expected {name} > 0, got {name}={value!r}.")


def not_negative(**named: float) -> None:
    """Raises ValueError unless every value is zero or more."""
    for name, value in named.items():
        if not _is_number(value) or not value >= 0:
            raise ValueError(f"Expected {name} >= 0, got {name}={value!r}.")


def between(low: float, high: float, **named: float) -> None:
    """Raises ValueError unless low <= value <= high for every value."""
    for name, value in named.items():
        if not _is_number(value) or not low <= value <= high:
            raise ValueError(f"Expected {low} <= {name} <= {high}, got {name}={value!r}.")


def whole(low: int, **named: object) -> None:
    """Raises ValueError unless every value is a whole number of at least `low`."""
    for name, value in named.items():
        if type(value) is bool or not isinstance(value, Integral) or value < low:
            raise ValueError(f"Expected {name} to be a whole number of at least {low}, got {name}={value!r}.")


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__") and not isinstance(value, bool) and not getattr(value, "shape", ())


def of_kind(kind: type | UnionType, words: str, **named: object) -> None:
    """Raises TypeError unless every value is of a kind; `words` says which that is, and how one makes one.

    >>> of_kind(list, "a list of ids", ids=7)
    Traceback (most recent call last):
    TypeError: Expected ids to be a list of ids, got ids=7.
    """
    for name, value in named.items():
        if not isinstance(value, kind):
            raise TypeError(f"Expected {name} to be {words}, got {name}={_shown(value)}.")


def flags(**named: object) -> None:
    """Raises TypeError unless every value is True or False."""
    of_kind(bool, "True or False", **named)


def distinct_in_any_case(names: Iterable[str], what: str) -> None:
    """Raises ValueError where two names differ only in case: some file systems would take their files for one."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ValueError(
                f"Expected {what} that differ in more than case, got {other!r} and {name!r}: on some disks their files would "
                "be the same. Rename one."
            )


def one_of(allowed: Collection[object], **named: object) -> None:
    """Raises ValueError unless every value is among those allowed."""
    for name, value in named.items():
        if not isinstance(value, Hashable) or value not in allowed:
            choices = " | ".join(sorted(str(a) for a in allowed))
            raise ValueError(f"Expected {name} to be one of {choices}, got {name}={value!r}.")


def types(instance: object) -> None:
    """Raises TypeError unless every field of a dataclass has the plain type that its annotation says.

    Data from a peer is put into dataclasses field by field; this is what keeps a list out of a name and a NaN out of a
    number. Understood are int (no bool), float (any finite number), bool, str,
    bytes, None, Literal, unions of them, tuples `tuple[T, ...]`, mappings, and classes.
    """
    for name, (hint, is_one) in _fields(cast(Hashable, type(instance))).items():
        value = getattr(instance, name)
        if not is_one(value):
            of_choices = get_origin(hint) is Literal
            text = " | ".join(map(repr, get_args(hint))) if of_choices else getattr(hint, "__name__", None) or str(hint)
            raise TypeError(f"Expected {name} of {type(instance).__name__} to be {text}, got {_shown(value)}.")


def _shown(value: object) -> str:
    """The beginning of a value, in one line."""
    return " ".join(repr(value).split())[:80]


Check = Callable[[Any], bool]


@cache
def _fields(cls: Any) -> dict[str, tuple[Any, Check]]:
    """The fields with their hints and checks: looked at once a class, as this is on the way of every message."""
    hints = get_type_hints(cls)
    return {field.name: (hints[field.name], _check(hints[field.name])) for field in fields(cls)}


def _check(hint: Any) -> Check:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: True
    if hint in (int, bool):  # no bool is an int here
        return lambda value: type(value) is hint
    if hint is float:
        return lambda value: type(value) in (int, float) and isfinite(value)
    if origin is Literal:
        return lambda value: any(type(value) is type(allowed) and value == allowed for allowed in inner)
    if origin in (Union, UnionType):
        options = [_check(option) for option in inner]
        return lambda value: any(is_one(value) for is_one in options)
    if origin is tuple:
        return _tuple_check(inner)
    if origin is not None:
        return lambda value: isinstance(value, origin)
    return lambda value: isinstance(value, type(None) if hint is None else hint)


def _tuple_check(inner: tuple[Any, ...]) -> Check:
    checks = [_check(hint) for hint in inner if hint is not Ellipsis]
    if inner[1:] == (Ellipsis,):
        return lambda value: type(value) is tuple and all(map(checks[0], value))
    return lambda value: (
        type(value) is tuple and len(value) == len(checks) and all(c(v) for c, v in zip(checks, value, strict=True))
    )
