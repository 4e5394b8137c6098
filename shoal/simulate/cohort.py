"""Which examples each member of a cohort sees in which step, made ahead on the host: small integers, no copies.

    population ─┐                          ┌─ pool {field: (P, …)}: examples of the cohort, or of everybody
                ├─ stage(members, seed) ───┼─ indices (C, S, B), counts (C, S), steps (C,)
    round seed ─┘                          └─ keys (C, 2)

A population whose users are parts of one array has one pool for all rounds: it is handed over once, and a round carries
nothing but indices. Other populations are gathered for each round. The order of examples is that of a device
(`plan.train`): the same generator, the same batches, the same mask.

What is compiled depends on the shapes. So they are those of the largest cohort that the population can give, where this wastes
little (`ROOM_BYTES`), else rounded up to few sizes: rows and steps in excess train on nothing and take no time.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.data.batch import num_steps, step_counts, step_indices
from shoal.data.store import Population
from shoal.errors import DataError
from shoal.plan.manifest import Manifest
from shoal.plan.train import Randomness, chosen_examples, conform, measured_examples, program_key
from shoal.tensors import Tensors

ALIGNMENT: Final = 64
"""Bytes; what XLA asks of memory that it did not allocate itself."""
POOL_BYTES: Final = 2 << 30
"""Larger arrays are not handed over whole: what a round needs is gathered from them."""
MEND_DATA: Final = "Mend its data, or leave it out."
MEND_UPDATE: Final = (
    "Lower the learning rate, mend its data (a label out of range makes a loss NaN, too), or leave it out."
)
"""What to do about a member."""
ROOM_BYTES: Final = 16 << 20
"""Most that indices, or gathered examples, may take beyond what a cohort needs, so that all cohorts have one shape."""


@dataclass(frozen=True, eq=False)
class Cohort:
    """The members of one round, C of them, in S steps at most of B examples."""

    pool: Tensors
    """Field -> (P, …)."""
    indices: np.ndarray
    """(C, S, B) int32, into the pool. What is masked repeats a real example."""
    counts: np.ndarray
    """(C, S) int32: so many of a step's examples count, its first; negative where they are held out."""
    keys: np.ndarray
    """(C, 2) uint32, or as many words as `Privacy.key_words` says: what the programs draw from."""

    @property
    def steps(self) -> np.ndarray:
        """(C,) int32: steps that train on something."""
        return np.asarray(np.count_nonzero(self.counts, axis=1), np.int32)


class Stage:
    """Makes cohorts of a population."""

    def __init__(self, population: Population, manifest: Manifest) -> None:
        """Raises DataError where the fields do not fit the task."""
        self._population, self._manifest = population, manifest
        self._sizes = np.sort([*population.sizes().values()])[::-1]
        self._randomness = Randomness()
        self._members = 0
        """Room for so many: cohorts may differ in size."""
        whole = population.whole()
        self._parts: Mapping[str, np.ndarray] | None = None
        self._pool: Tensors = {}
        if whole is not None and sum(array.nbytes for array in whole[0].fields.values()) <= POOL_BYTES:
            fields = conform(whole[0], manifest).fields
            self._pool, self._parts = {name: _aligned(values) for name, values in fields.items()}, whole[1]

    def cohort(self, members: Sequence[str], seed: bytes) -> Cohort:
        """The members' part of the round with that seed. Raises DataError: a member's examples do not fit the task."""
        of = {member: self._named(member, seed) for member in members}  # who is drawn twice is gathered once
        first = dict(zip(of, np.cumsum([0, *(_rows(each.fields) for each in of.values())]).tolist(), strict=False))
        size = self._manifest.training.batch_size
        most = _with_room(max(len(each.counts) for each in of.values()), self._most_steps(), len(members) * size * 4)
        indices = np.zeros((len(members), most, size), np.int32)
        counts = np.zeros((len(members), most), np.int32)
        for row, member in enumerate(members):
            each, steps = of[member], len(of[member].counts)
            indices[row, :steps], counts[row, :steps] = each.indices + first[member], each.counts
            indices[row, steps:] = indices[row, 0, 0]
        self._members = room_for(len(members), before=self._members)
        pool = self._pool or self._gathered([each.fields for each in of.values()])
        return Cohort(pool, indices, counts, np.stack([of[member].key for member in members]))

    def _most_steps(self) -> int:
        """What no member exceeds."""
        training = self._manifest.training
        used = min(training.num_used(int(self._sizes[0])), training.max_examples // training.epochs)
        steps = num_steps(used, training.batch_size, training.epochs)
        return steps if training.part != "both" else steps + num_steps(int(self._sizes[0]), training.batch_size)

    def _gathered(self, parts: Sequence[Tensors]) -> Tensors:
        """The examples of a cohort, one member's after the other's."""
        used, most = sum(map(_rows, parts)), int(self._sizes[: self._members].sum())
        pool: Tensors = {}
        row_bytes = sum(values[:1].nbytes for values in parts[0].values())
        for name, like in parts[0].items():
            pool[name] = _zeros((_with_room(used, most, row_bytes), *like.shape[1:]), like.dtype)
            np.concatenate([part[name] for part in parts], out=pool[name][:used])
        return pool

    def _named(self, member: str, seed: bytes) -> "_Batches":
        try:
            return self._batches(member, seed)
        except (DataError, ValueError) as error:
            raise DataError(f"Member {member!r} cannot be used: {error} {MEND_DATA}") from error

    def _batches(self, member: str, seed: bytes) -> "_Batches":
        randomness, training = self._randomness.of(seed, member), self._manifest.training
        fields: Tensors = {}
        if self._parts is not None:
            where = self._parts[member]
        else:
            fields = conform(self._population[member], self._manifest).fields
            where = np.arange(_rows(fields))
        chosen = chosen_examples(len(where), self._manifest, randomness.rng, member=member)
        used = where if chosen is None else where[chosen]
        size, epochs, drop = training.batch_size, training.epochs, training.drop_remainder
        at = used[step_indices(len(used), size, epochs, rng=randomness.rng, drop_remainder=drop)]
        counts = step_counts(len(used), size, epochs, drop_remainder=drop)
        if (measured := measured_examples(len(where), training)) is not None:
            at = np.concatenate([at, where[measured][step_indices(len(measured), size, rng=None)]])
            counts = np.concatenate([counts, -step_counts(len(measured), size)])
        key = program_key(self._manifest.promises.privacy, randomness.key, noise_seed=seed, member=member)
        return _Batches(at, counts, key, fields)


@dataclass(frozen=True, eq=False)
class _Batches:
    """One member's."""

    indices: np.ndarray
    counts: np.ndarray
    key: np.ndarray
    fields: Tensors
    """Its examples, where they are not in the shared pool."""


def packed(steps: np.ndarray, *, devices: int, together: int, chunks: int = 0) -> np.ndarray:
    """Who trains where, so that no device waits long: members of like length together, the chunks dealt longest first to
    the device with least to do (Graham 1969).

    Args:
        steps: (C,), of each member.
        devices: D.
        together: V, members of a chunk; it takes as long as its longest.
        chunks: the least that each device has.

    Returns:
        (D, n, V) int64: members by device and chunk; -1 is nobody.
    """
    order = np.argsort(-steps, kind="stable")
    count = max(-(-len(order) // (devices * together)), chunks)
    dealt = np.full((devices * count, together), -1)
    dealt.reshape(-1)[: len(order)] = order
    if steps[order[0]] == steps[order[-1]]:
        return dealt.reshape(count, devices, together).swapaxes(0, 1)
    given: list[list[np.ndarray]] = [[] for _ in range(devices)]
    loads = [(0, device) for device in range(devices)]
    for chunk in dealt:
        load, device = heapq.heappop(loads)
        given[device].append(chunk)
        if len(given[device]) < count:
            heapq.heappush(loads, (load + int(steps[chunk[0]] if chunk[0] >= 0 else 0), device))
    return np.array(given)


def arranged(cohort: Cohort, rows: np.ndarray) -> Cohort:
    """The members in that order; -1 is one that trains on nothing."""
    counts = np.where(rows[:, None] >= 0, cohort.counts[rows], 0)
    return Cohort(cohort.pool, cohort.indices[rows], counts, cohort.keys[rows])


def ladder(size: int) -> int:
    """The next of 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, …: few sizes, none more than a quarter too large."""
    if size <= 8:
        return max(1, size)
    unit = 1 << (size - 1).bit_length() - 3
    return -(-size // unit) * unit


def room_for(needed: int, *, before: int) -> int:
    """As much as there was before, where that will do; else so much more that it need not grow often."""
    if needed <= before:
        return before
    return max(needed, ladder(before * 3 // 2)) if before else needed


def _with_room(needed: int, most: int, item_bytes: int) -> int:
    """The size for all cohorts, where it takes little memory; else the next of few."""
    return max(needed, most) if (most - needed) * item_bytes <= ROOM_BYTES else min(ladder(needed), most)


def _aligned(values: np.ndarray) -> np.ndarray:
    """The same values where JAX takes them as they are on all devices of a CPU, instead of copying them for each."""
    if values.ctypes.data % ALIGNMENT == 0 and values.flags.c_contiguous:
        return values
    made = _zeros(values.shape, values.dtype)
    made[...] = values
    return made


def _zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)


def _rows(fields: Tensors) -> int:
    return len(next(iter(fields.values()))) if fields else 0


def refuse(members: Sequence[str], is_good: np.ndarray, why: str, values: np.ndarray) -> None:
    """Raises DataError naming the first member that is not good; VALUE in `why` is what is wrong with it."""
    bad = np.flatnonzero(~is_good)
    if len(bad):
        others = f", nor can {len(bad) - 1} more of {len(members)}" if len(bad) > 1 else ""
        told = why.replace("VALUE", f"{values[bad[0]]:g}")
        raise DataError(f"Member {members[bad[0]]!r} cannot be used{others}: {told} {MEND_UPDATE}")
