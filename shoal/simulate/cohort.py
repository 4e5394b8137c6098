"""Which examples each member of a cohort sees in which step, made ahead on the host: small integers, no copies.

    population ─┐                          ┌─ pool {field: (P, …)}: examples of the cohort, or of everybody
                ├─ stage(members, seed) ───┼─ indices (C, S, B), counts (C, S), steps (C,)
    round seed ─┘                          └─ keys (C, 2)

A population whose users are parts of one array has one pool for all rounds: it is handed over once, and a round carries
nothing but indices. Other populations are gathered for each round. The order of examples is that of a device
(`plan.train`): the same generator, the same batches, the same mask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.data.batch import Blocks, num_steps
from shoal.data.store import Examples, Population
from shoal.errors import DataError
from shoal.plan.manifest import Manifest
from shoal.plan.train import chosen_examples, conform, member_randomness
from shoal.tensors import Tensors

POOL_BYTES: Final = 2 << 30
"""Larger arrays are not handed over whole: what a round needs is gathered from them."""
INDEX_BYTES: Final = 1 << 24
"""Up to here every cohort has room for the steps of the longest member there is, so that one program serves all of them."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """The members of one round, C of them, in S steps at most of B examples."""

    pool: Tensors
    """Field -> (P, …)."""
    indices: np.ndarray
    """(C, S, B) int32, into the pool. What is masked repeats a real example."""
    counts: np.ndarray
    """(C, S) int32: so many of a step's examples count, its first."""
    keys: np.ndarray
    """(C, 2) uint32: what the programs draw from."""
    has_whole_pool: bool
    """Whether the pool is everybody's examples, the same for every cohort."""

    @property
    def steps(self) -> np.ndarray:
        """(C,) int32: steps that train on something."""
        return np.asarray(np.count_nonzero(self.counts, axis=1), np.int32)


class Stage:
    """Makes cohorts of a population."""

    def __init__(self, population: Population, manifest: Manifest) -> None:
        """Raises DataError where the fields do not fit the task."""
        self._population, self._manifest = population, manifest
        training = manifest.training
        largest = min(max(population.sizes().values()), training.max_examples // training.epochs)
        self._most_steps = num_steps(largest, training.batch_size, training.epochs)
        whole = population.whole()
        self._parts: Mapping[str, np.ndarray] | None = None
        self._pool: Tensors = {}
        if whole is not None and sum(array.nbytes for array in whole[0].fields.values()) <= POOL_BYTES:
            self._pool, self._parts = conform(whole[0], manifest).fields, whole[1]

    @property
    def is_shared(self) -> bool:
        """Whether every cohort has the same pool."""
        return self._parts is not None

    def cohort(self, members: Sequence[str], seed: bytes) -> Cohort:
        """The members' part of the round with that seed. Raises DataError: a member's examples do not fit the task."""
        batches = [self._batches(member, seed) for member in members]
        size = self._manifest.training.batch_size
        most = self._most_steps
        if len(members) * most * size * 4 > INDEX_BYTES:
            most = max(len(each.counts) for each in batches)
        indices = np.zeros((len(members), most, size), np.int32)
        counts = np.zeros((len(members), most), np.int32)
        first = 0
        parts: list[Tensors] = []
        for row, each in enumerate(batches):
            steps = len(each.counts)
            indices[row, :steps], counts[row, :steps] = each.indices + first, each.counts
            indices[row, steps:] = indices[row, 0, 0]
            if each.fields:
                parts.append(each.fields)
                first += len(next(iter(each.fields.values())))
        pool = self._pool or {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return Cohort(pool, indices, counts, np.stack([each.key for each in batches]), self.is_shared)

    def _batches(self, member: str, seed: bytes) -> "_Batches":
        randomness = member_randomness(seed, member)
        training = self._manifest.training
        fields: Tensors = {}
        if self._parts is not None:
            where = self._parts[member]
        else:
            fields = conform(self._population[member], self._manifest).fields
            where = np.arange(len(next(iter(fields.values()))))
        chosen = chosen_examples(Examples({"at": where}), self._manifest, randomness.rng, member=member)
        blocks = Blocks(
            chosen, batch_size=training.batch_size, steps_per_block=1, epochs=training.epochs, rng=randomness.rng,
            drop_remainder=training.drop_remainder,
        )  # fmt: skip
        made = [(batches["at"][0], np.count_nonzero(mask)) for batches, mask in blocks]
        indices, counts = zip(*made, strict=True)
        return _Batches(np.stack(indices), np.array(counts, np.int32), randomness.key, fields)


@dataclass(frozen=True, eq=False)
class _Batches:
    """One member's."""

    indices: np.ndarray
    counts: np.ndarray
    key: np.ndarray
    fields: Tensors
    """Its examples, where they are not in the shared pool."""


def padded(cohort: Cohort, *, members: int, steps: int, pool: int) -> Cohort:
    """The same for so many members, steps and examples: the new ones train on nothing."""

    def grown(values: np.ndarray, *shape: int) -> np.ndarray:
        if values.shape[: len(shape)] == shape:
            return values
        made = np.zeros((*shape, *values.shape[len(shape) :]), values.dtype)
        made[tuple(slice(0, size) for size in values.shape[: len(shape)])] = values
        return made

    return Cohort(
        {name: grown(values, pool) for name, values in cohort.pool.items()},
        grown(cohort.indices, members, steps),
        grown(cohort.counts, members, steps),
        grown(cohort.keys, members),
        cohort.has_whole_pool,
    )


def refuse(members: Sequence[str], is_good: np.ndarray, why: str) -> None:
    """Raises DataError naming the first members that are not good."""
    bad = [member for member, good in zip(members, is_good, strict=True) if not good]
    if bad:
        raise DataError(f"Member {bad[0]!r} cannot be used: {why} Mend its data, or leave it out.")
