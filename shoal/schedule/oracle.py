"""How long each part of a step takes: estimated first, measured then, with a stated error.

    estimate     flops and bytes of a stage over what the processor does; for the first step only
    measured     each stage alone, nothing being sent meanwhile: times under contention are contaminated by the very order that they are to find
    online       a decayed median of what later steps show, so that it follows a machine that changes

A transfer takes its bytes over the measured bandwidth, not what a trace of it says: that has waiting in it. What is learned is kept for the next run
of the same program on the same hardware.
"""

import hashlib
import json
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np

from shoal import validate
from shoal.schedule.graph import Graph, Times

FLOPS_PER_S: Final = 5e10
BYTES_PER_S: Final = 1e10
"""Of a processor that nothing is known of."""
_KEPT: Final = 32
_VERSION: Final = 1


@final
class DecayedMedian:
    """The median of the last values, each counting less the older it is."""

    def __init__(self, values: Sequence[float] = (), *, decay: float = 0.9) -> None:
        """
        Args:
            values: oldest first.
            decay: weight of a value, of that of the one after it.
        """
        validate.positive(decay=decay)
        self._values = deque((float(value) for value in values), maxlen=_KEPT)
        self._decay = decay

    def add(self, value: float) -> None:
        self._values.append(float(value))

    def value(self) -> float | None:
        """None before the first."""
        if not self._values:
            return None
        values = np.array(self._values)
        weights = self._decay ** np.arange(len(values) - 1, -1, -1.0)
        order = np.argsort(values, kind="stable")
        total = np.cumsum(weights[order])
        return float(values[order][np.searchsorted(total, total[-1] / 2)])

    def values(self) -> list[float]:
        """Oldest first."""
        return list(self._values)


@dataclass(frozen=True)
class Cost:
    """What a stage does, from its trace."""

    flops: float
    """In products and convolutions."""
    size_bytes: float
    """Read and written."""

    def estimated_s(self) -> float:
        return self.flops / FLOPS_PER_S + self.size_bytes / BYTES_PER_S


@final
@dataclass
class Oracle:
    """Of one program on one machine and one line."""

    costs: Sequence[Cost]
    """Of each stage."""
    bytes_per_s: DecayedMedian = field(default_factory=DecayedMedian)
    stages: list[DecayedMedian] = field(default_factory=list)
    slower: DecayedMedian = field(default_factory=DecayedMedian)
    """Measured over simulated makespans: what sending takes of the processor that computes, which no stage alone shows."""
    errors: DecayedMedian = field(default_factory=DecayedMedian)
    """|foretold - measured| / measured, of makespans."""

    def __post_init__(self) -> None:
        self.stages = self.stages or [DecayedMedian() for _ in self.costs]

    def saw_stage(self, stage: int, seconds: float) -> None:
        """It took so long while nothing was sent."""
        self.stages[stage].add(seconds)

    def saw_sent(self, size_bytes: int, seconds: float) -> None:
        """The line was busy for so long with so many bytes; what is too short to say anything is passed over."""
        if seconds > 0 and size_bytes >= 1 << 16:
            self.bytes_per_s.add(size_bytes / seconds)

    def foretold(self, simulated_s: float) -> float:
        """What a step will take whose makespan is simulated so, by how much steps were slower until now."""
        return simulated_s * (self.slower.value() or 1.0)

    def saw_step(self, simulated_s: float, measured_s: float) -> None:
        """A step is done: it says how far it was from what was foretold, and what to expect of the next."""
        self.errors.add(abs(self.foretold(simulated_s) - measured_s) / measured_s)
        self.slower.add(measured_s / simulated_s)

    def times(self, graph: Graph) -> Times:
        """What is known best of each part."""
        rate = self.bytes_per_s.value() or BYTES_PER_S
        found = [each.value() for each in self.stages]
        seconds = [cost.estimated_s() if s is None else s for cost, s in zip(self.costs, found, strict=True)]
        return Times.of_seconds((graph.sizes / rate).tolist(), seconds)

    @property
    def is_measured(self) -> bool:
        """Whether nothing is estimated any more."""
        return self.bytes_per_s.value() is not None and all(each.value() is not None for each in self.stages)

    def error(self) -> float | None:
        """The decayed median of its errors; None before the first."""
        return self.errors.value()

    def to_json(self) -> dict[str, Any]:
        return {
            "version": _VERSION, "bytes_per_s": self.bytes_per_s.values(), "stages": [each.values() for each in self.stages],
            "slower": self.slower.values(), "errors": self.errors.values(),
        }  # fmt: skip


def read(path: Path, costs: Sequence[Cost]) -> Oracle:
    """What was kept of another run of the same program; a new one where there is nothing, or nothing that fits."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["version"] != _VERSION or len(kept["stages"]) != len(costs):
            return Oracle(costs)
        return Oracle(
            costs, DecayedMedian(kept["bytes_per_s"]), [DecayedMedian(v) for v in kept["stages"]], DecayedMedian(kept["slower"]),
            DecayedMedian(kept["errors"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError):
        return Oracle(costs)


def write(path: Path, oracle: Oracle) -> None:
    """Keeps it, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".new", delete=False, encoding="utf-8") as beside:
        json.dump(oracle.to_json(), beside)  # several workers may keep theirs at once
    Path(beside.name).replace(path)


def kept_as(graph: Graph, costs: Sequence[Cost], hardware: Mapping[str, str]) -> str:
    """The name of the file: the same for the same program, with what its stages compute, on the same hardware."""
    said = {
        "transfers": [(each.name, each.size_bytes) for each in graph.transfers],
        "stages": [(each.name, each.after, each.needs, each.makes) for each in graph.stages],
        "costs": [(cost.flops, cost.size_bytes) for cost in costs],
        "hardware": dict(hardware),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32] + ".json"
