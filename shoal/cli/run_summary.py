"""What the record says of a run, in the few numbers that commands print."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.record.store import Store


@dataclass(frozen=True)
class RunSummary:
    """A run at a moment."""

    run_id: str
    task: str
    kind: str
    status: str
    version: int | None
    """None before the initial model."""
    metrics: Mapping[str, float]
    """The newest value of each metric: the server's by plain name, the cohorts' as `train/…`."""
    seconds: Mapping[str, float]
    """Phase -> seconds, over all members and rounds."""
    bytes_down: int
    bytes_up: int

    def seconds_since(self, before: "RunSummary") -> dict[str, float]:
        """What was added to each phase since an earlier summary of the run; padding, a part of compute, is left out."""
        since = {phase: value - before.seconds.get(phase, 0.0) for phase, value in self.seconds.items()}
        return {phase: value for phase, value in since.items() if phase != "padding"}

    def to_json(self) -> dict[str, Any]:
        return {
            "run": self.run_id, "task": self.task, "kind": self.kind, "status": self.status, "version": self.version,
            "metrics": dict(self.metrics), "seconds": dict(self.seconds), "bytes_down": self.bytes_down,
            "bytes_up": self.bytes_up,
        }  # fmt: skip


def summarize(store: "Store", run_id: str) -> RunSummary:
    """Reads a summary from the record."""
    row = store.run(run_id)
    metrics: dict[str, tuple[int, float]] = {}
    for metric in store.metrics(run_id):
        if metric.scope != "class" and metric.version >= metrics.get(metric.name, (-1, 0.0))[0]:
            metrics[metric.name] = (metric.version, metric.value)
    # Plain names are the server's: they come first.
    order = sorted(metrics, key=lambda name: ("/" in name, name))
    seconds: dict[str, float] = {}
    down = up = 0
    for usage in store.usage(run_id):
        seconds[usage.phase] = seconds.get(usage.phase, 0.0) + usage.seconds
        down, up = down + usage.bytes_down, up + usage.bytes_up
    return RunSummary(
        run_id=run_id, task=row.name, kind=row.kind, status=row.status, version=store.last_version(run_id),
        metrics={name: metrics[name][1] for name in order},
        seconds={phase: value for phase, value in seconds.items() if value},
        bytes_down=down, bytes_up=up,
    )  # fmt: skip
