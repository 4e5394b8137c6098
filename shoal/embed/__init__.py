"""Embedding tables on block storage: placement, a small cache in memory, few block reads. Needs the extra `embed`.

This package imports only NumPy and Numba. Names are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.embed.cache import Cache
    from shoal.embed.layout import Layout
    from shoal.embed.trace import Trace

_HOMES = {
    "Cache": "shoal.embed.cache",
    "Layout": "shoal.embed.layout",
    "Trace": "shoal.embed.trace",
}

__all__ = ["Cache", "Layout", "Trace"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.embed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
