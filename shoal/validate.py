"""Checks of arguments that put the caller's name and value into the text.

>>> positive(clip_norm=-1.0)
Traceback (most recent call last):
ValueError: Expected clip_norm > 0, got clip_norm=-1.0.
"""

from collections.abc import Collection


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
