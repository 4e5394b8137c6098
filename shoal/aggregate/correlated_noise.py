"""Central differential privacy with noise that cancels from version to version (DP-FTRL, `privacy/correlated.py`).

All versions of a run together are one release, of the noise multiplier that the task says; `RoundPolicy.min_separation` bounds how
often one device is in them. Each summed tensor has a stream of noise, whose seed follows from the secret and the run.

Where a stream stands is server state, written in the transaction of the version that has its noise: a tag of each step that was taken, what its
strategy is, and a fingerprint of its seed. What is new in a step's noise follows from the seed and its tag, a digest of version and sum: made again
after a crash it is the same, and another sum (after a commit that failed, in a copy of the folder) never has it. Buffers are kept in
memory and, after a restart, drawn again; none of them is in the record.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Final

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import Aggregator
from shoal.aggregate.noised import check_grid, largest_part, purpose_of, with_noise
from shoal.errors import RoundError
from shoal.fixed import FixedPoint, SumSpec
from shoal.policy import Correlated, Privacy
from shoal.privacy.accounting import participations
from shoal.privacy.correlated import Blt, BltNoise, Schedule, State, TreeNoise, fit_blt, tree_sensitivity
from shoal.privacy.masks import derive
from shoal.record.store import Blobs
from shoal.tensors import Entry, Index, TensorSpec

TAGS: Final = "noise/tags"
"""(steps, 16) uint8: of the steps that were taken."""
SEED: Final = "noise/seed"
"""(16,) uint8."""
_TAG_BYTES: Final = 16
STRATEGY: Final = "noise/strategy"
"""(2, buffers) float64, of a BLT: scales and decays. It is fitted once: another version of the search might find another."""


def schedule_of(correlated: Correlated, min_separation: int) -> Schedule:
    """How one device can take part, where all it may is made use of."""
    most = participations(correlated.rounds, min_separation)
    return Schedule(steps=correlated.rounds, min_separation=min_separation, participations=most)


@dataclass(frozen=True)
class CorrelatedNoised:
    """An aggregator that sees sums with noise only. Its commits follow one another; they are not replayed."""

    inner: Aggregator
    privacy: Privacy
    min_separation: int
    divisor: int
    """What the mean is over."""
    secret: bytes = field(repr=False)
    """32 bytes of this run alone; as secret as the noise."""
    _reached: dict[str, State] = field(default_factory=dict, repr=False)
    """Name of a sum -> the state after the last step that was drawn."""
    _drawn: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    """That step's noise: a commit that could not be written is made again."""
    _tags: list[bytes] = field(default_factory=list, repr=False)
    """Of the steps up to that one."""

    @property
    def needs(self) -> str:
        return "sum"

    @property
    def _correlated(self) -> Correlated:
        assert self.privacy.correlated is not None
        return self.privacy.correlated

    @cached_property
    def _schedule(self) -> Schedule:
        return schedule_of(self._correlated, self.min_separation)

    @cached_property
    def _fingerprint(self) -> bytes:
        return hashlib.sha256(b"shoal noise seed v1\0" + self.secret).digest()[:16]

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        ours = {entry.spec.name: blobs.view(entry.hash, entry.spec) for entry in server_state if _is_ours(entry)}
        rest = Index(tuple(entry for entry in server_state if not _is_ours(entry)))
        tags = [*self._taken(ours), purpose_of(model.root, sums)[:_TAG_BYTES]]
        blt = self._strategy(ours)
        noised = with_noise(sums, self._noise(sums, tags, blt), divisor=self.divisor)
        made, state = self.inner.commit(noised, model, rest, blobs)
        entries = [
            _entry(blobs, TAGS, np.frombuffer(b"".join(tags), np.uint8).reshape(-1, _TAG_BYTES)),
            _entry(blobs, SEED, np.frombuffer(self._fingerprint, np.uint8)),
            *([_entry(blobs, STRATEGY, np.array([blt.scales, blt.decays]))] if blt is not None else []),
        ]
        return made, Index(tuple(sorted((*state, *entries), key=lambda entry: entry.spec.name)))

    def _taken(self, ours: Mapping[str, np.ndarray]) -> list[bytes]:
        """The tags of the steps before this one.

        Raises:
            RoundError: the stream has no more, or it is another.
        """
        tags = [tag.tobytes() for tag in ours[TAGS]] if ours else []
        if ours and ours[SEED].tobytes() != self._fingerprint:
            raise RoundError(
                "The run's correlated noise was begun under other keys: noise drawn now would not cancel it. Go on with the run's own "
                "folder and host.key, or begin another run from its model."
            )
        if len(tags) >= self._correlated.rounds:
            raise RoundError(
                f"The noise of this run was made for {self._correlated.rounds} rounds, which it has had. Begin another run from its model; "
                "privacy.correlated.rounds says for how many."
            )
        return tags

    def _strategy(self, ours: Mapping[str, np.ndarray]) -> Blt | None:
        if STRATEGY in ours:
            scales, decays = ours[STRATEGY].tolist()
            return Blt(scales=tuple(scales), decays=tuple(decays))
        return strategy_of(self._correlated, self._schedule)

    def _noise(self, sums: Accumulator, tags: list[bytes], blt: Blt | None) -> dict[str, np.ndarray]:
        """Of the step with the last of the tags."""
        step, is_next = len(tags) - 1, self._tags == tags[:-1]
        if self._tags == tags:
            return self._drawn
        made = streams(self.privacy, self._schedule, sums.specs, sums.fixed, blt=blt, secret=self.secret)
        for name, stream in made.items():
            before = self._reached[name] if is_next and step else stream.at(step, tags)
            self._drawn[name], self._reached[name] = stream.step(before, tags[-1])
        self._tags[:] = tags
        return self._drawn


def strategy_of(correlated: Correlated, schedule: Schedule) -> Blt | None:
    """What a new stream of that kind is made by; None: the tree, which needs none."""
    return None if correlated.kind == "tree" else fit_blt(schedule)


def streams(
    privacy: Privacy,
    schedule: Schedule,
    specs: Sequence[SumSpec],
    fixed: Mapping[str, FixedPoint],
    *,
    blt: Blt | None,
    secret: bytes,
) -> dict[str, BltNoise | TreeNoise]:
    """Name of a sum -> the noise of its steps.

    Args:
        privacy: of the task.
        schedule: that is kept to.
        specs, fixed: what is added up, and on what grid.
        blt: the strategy; None: the tree.
        secret: 32 bytes of the run alone.

    Raises:
        ValueError: there is a sum that is not clipped, a grid that noise cannot be drawn on, or a strategy that float64 cannot hold.
    """
    multiplier, part = privacy.noise_multiplier, largest_part(privacy, specs, fixed)
    sizes = {spec.tensor.name: prod(spec.tensor.shape) for spec in specs}
    if blt is None:
        stddev = multiplier * tree_sensitivity(schedule) * part
    else:  # what rounding adds is counted for all tensors together, in the largest unit
        coarsest = max(point.unit for point in fixed.values())
        stddev = coarsest * blt.stddev(multiplier, schedule, l2=part / coarsest, elements=sum(sizes.values()))
    check_grid(stddev, fixed)
    made: dict[str, BltNoise | TreeNoise] = {}
    for name, elements in sizes.items():
        seed, own = derive(secret, b"shoal noise stream v1\0" + name.encode()), stddev / fixed[name].unit
        if blt is None:
            made[name] = TreeNoise(stddev=own, elements=elements, steps=schedule.steps, seed=seed)
        else:
            made[name] = BltNoise(blt=blt, stddev=own, elements=elements, seed=seed)
    return made


def _is_ours(entry: Entry) -> bool:
    return entry.spec.name.startswith("noise/")


def _entry(blobs: Blobs, name: str, value: np.ndarray) -> Entry:
    return Entry(TensorSpec.of(name, value), blobs.put(value.tobytes()))
