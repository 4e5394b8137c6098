"""What each process of a pod saw since the last version: how long its steps took, what it waited for, its memory, its life; and who is slow.

    every call      seconds of a step, seconds of waiting for examples --> counts by size
    every version   these, memory, life, seconds of a small job --gathered from all (`seeing.py`)--> the record; who is slow is named

Steps that end with a sum over all take everybody the same, however slow one of them is. So who is slow shows in what each does alone: waiting for its examples, and
a product of matrices, the same for all, that each takes by itself when a version is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Self

import numpy as np

SMALLEST_S: Final = 1e-3
NUM_BINS: Final = 26
"""The first is of times below `SMALLEST_S`, each further one ends at twice the time of the one before."""
SLOW: Final = 1.5
"""Times the others' median, from which a process is slow."""
WAITS: Final = 0.2
"""Share of its time that a process waits for examples, from which it is slow."""


def bin_of(seconds: float) -> int:
    """Where a time is counted."""
    return int(np.clip(np.ceil(np.log2(max(seconds, 1e-9) / SMALLEST_S)), 0, NUM_BINS - 1))


def within_s(counts: Sequence[int], share: float) -> float:
    """A time, in seconds, that at least this share of those counted are within: the end of a bin; 0 where none were."""
    total = np.cumsum(counts)
    return float(SMALLEST_S * 2.0 ** int(np.searchsorted(total, share * total[-1]))) if total[-1] else 0.0


@dataclass(frozen=True, kw_only=True)
class MemberSeen:
    """Of one process, since the last version."""

    process: int
    life: int
    """Of the pod; each but the first is a restart."""
    step_s: tuple[int, ...]
    """Steps by the time they took: (NUM_BINS,) counts."""
    wait_s: tuple[int, ...]
    """Calls by the time that was waited for their examples: (NUM_BINS,) counts."""
    waited: float
    """Share of the time in which it waited for examples, in [0, 1]."""
    stalls: int
    """Steps that stood still."""
    memory_bytes: int
    job_s: float
    """Of the small job, the median of a few; 0 where it is alone."""

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """What `to_json` made."""
        return cls(**{**data, "step_s": tuple(data["step_s"]), "wait_s": tuple(data["wait_s"])})

    def plus(self, later: "MemberSeen") -> "MemberSeen":
        """The two together: counts added, the most memory, the later's small job."""
        own, others = max(1, sum(self.step_s)), max(1, sum(later.step_s))
        return replace(
            later, step_s=_added(self.step_s, later.step_s), wait_s=_added(self.wait_s, later.wait_s), stalls=self.stalls + later.stalls,
            waited=(own * self.waited + others * later.waited) / (own + others), memory_bytes=max(self.memory_bytes, later.memory_bytes),
        )  # fmt: skip


def slow(seen: Sequence[MemberSeen]) -> dict[int, str]:
    """Who is slow among several, and how that shows, for people: process -> why."""
    told = {}
    for each in seen if len(seen) > 1 else ():
        others = [other.job_s for other in seen if other is not each and other.job_s]
        times = each.job_s / float(np.median(others)) if others else 1.0
        if times >= SLOW:
            told[each.process] = f"the same small job takes it {times:.1f} times as long as others"
        elif each.waited >= WAITS:
            told[each.process] = f"it waits for its examples {each.waited:.0%} of the time"
    return told


def _added(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=True))
