"""Embedding tables on block storage: placement, a small cache in memory, few block reads. Needs the extra `embed`.

This package imports only NumPy and Numba. Names are loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.embed.cache import Cache
    from shoal.embed.layout import Layout
    from shoal.embed.spec import TableSpec
    from shoal.embed.store import EmbeddingStore
    from shoal.embed.tail import Answer, Tail
    from shoal.embed.trace import Trace

_HOMES = {
    "Answer": "shoal.embed.tail",
    "Cache": "shoal.embed.cache",
    "EmbeddingStore": "shoal.embed.store",
    "Layout": "shoal.embed.layout",
    "TableSpec": "shoal.embed.spec",
    "Tail": "shoal.embed.tail",
    "Trace": "shoal.embed.trace",
}

__all__ = ["Answer", "Cache", "EmbeddingStore", "Layout", "TableSpec", "Tail", "Trace"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'shoal.embed' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
