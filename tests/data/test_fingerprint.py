"""Whether a population is told from another."""

import numpy as np

from shoal.data import Population
from shoal.data.fingerprint import difference, fingerprint


def population(num: int = 20, *, size: int = 3, add: float = 0.0) -> Population:
    return Population.from_arrays({f"u{i}": {"x": np.full(size, i + add, np.float32)} for i in range(num)})


def test_the_same_is_the_same() -> None:
    assert fingerprint(population()) == fingerprint(population())
    assert difference(fingerprint(population()), fingerprint(population())) == ""


def test_others_are_told_apart() -> None:
    first = fingerprint(population())
    assert first["users"] == 20 and first["examples"] == 60
    assert difference(first, fingerprint(population(19))) == "20 users then, 19 now"
    assert difference(first, fingerprint(population(size=4))) == "60 examples then, 80 now"
    assert difference(first, fingerprint(population(add=1.0))) == "as many users and examples, but others"


def test_a_user_without_examples_and_one_alone() -> None:
    assert fingerprint(population(1, size=0))["examples"] == 0
