"""What the benchmarks of embeddings share: the real trace if it is at hand, and the split in time."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.embed.generator import generate, tables
from shoal.embed.trace import Trace

VECTOR_BYTES = 128
"""32 dimensions of float32, the paper's size."""
PER_BLOCK = 32


@dataclass(frozen=True, eq=False)
class Case:
    """A table's trace in its three parts."""

    name: str
    is_real: bool
    train: Trace
    """The first half: placement learns from it."""
    tune: Trace
    """A fifth: thresholds and policies are chosen on it, and it warms caches before the test."""
    before: Trace
    """The last two fifths of training, to warm caches, and the tuning part."""
    both: Trace
    """The tuning part and the test, which are replayed one after the other."""

    @property
    def rows(self) -> int:
        return self.train.num_rows

    def permuted(self) -> "Case":
        """The same queries with ids at random."""
        new_of = np.random.default_rng(7).permutation(self.rows)
        parts = (part.renamed(new_of) for part in (self.train, self.tune, self.before, self.both))
        return Case(self.name + " permuted", self.is_real, *parts)


def case(name: str, trace: Trace, *, is_real: bool = False) -> Case:
    """Splits a trace 50 : 20 : 30."""
    train, tune, test = trace.split(0.5, 0.2, 0.3)
    begin = len(train)
    before = trace.slice(begin - 2 * begin // 5, begin + len(tune))
    return Case(name, is_real, train, tune, before, trace.slice(begin, begin + len(tune) + len(test)))


def real_trace() -> Trace | None:
    """The trace that `SHOAL_TRACE` names, by default ../shared/data/traces/diginetica.npz beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "traces" / "diginetica.npz"
    path = Path(os.environ.get("SHOAL_TRACE", beside))
    return Trace.load(path) if path.exists() else None


def cases(scale: float, numbers: tuple[int, ...]) -> list[Case]:
    """The real trace, if there is one, and the made-up tables with these numbers, 1 to 8."""
    real = real_trace()
    found = [] if real is None else [case("real", real, is_real=True)]
    return found + [case(kind.name, generate(kind).trace) for kind in (tables(scale)[n - 1] for n in numbers)]
