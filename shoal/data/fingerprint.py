"""Whether a population is the one that a run began with: how many there are, and a hash of a few of them.

It is made of ids, of numbers of examples, and of the first examples of a few users: quick on any population. Other
values in the examples of the rest are not noticed.
"""

import hashlib
from typing import Any, Final

import numpy as np

from shoal.data.store import Population

CONFIG: Final = "population"
"""Where a run's config keeps it."""
USERS, EXAMPLES = 8, 100
"""Whose examples are looked at, and how many of each."""


def fingerprint(population: Population) -> dict[str, Any]:
    """`users`, `examples` and `hash`, as JSON."""
    sizes = population.sizes()
    digest = hashlib.sha256("\0".join(f"{user}\0{size}" for user, size in sizes.items()).encode())
    for place in np.unique(np.linspace(0, len(sizes) - 1, USERS).astype(int)):
        examples = population[population.ids[place]]
        for name, values in examples.take(np.arange(min(len(examples), EXAMPLES))).items():
            digest.update(f"{name} {values.dtype} {values.shape}".encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return {"users": len(sizes), "examples": sum(sizes.values()), "hash": digest.hexdigest()[:16]}


def difference(began: dict[str, Any], now: dict[str, Any]) -> str:
    """In what the population differs, in words; empty where nothing tells them apart."""
    if began == now:
        return ""
    for what in ("users", "examples"):
        if began[what] != now[what]:
            return f"{began[what]:,} {what} then, {now[what]:,} now"
    return "as many users and examples, but others"
