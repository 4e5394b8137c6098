"""What a report needs of a run, read once from its record. Works for any run, whatever made it, finished or not.

Time: a run that was stopped and taken up again has pauses. `Facts.seconds` is time at work: each `session` event of the
journal (`data["began_s"]`, seconds since the run was created) starts a stretch that lasts until the last commit before
the next one. A run without such events is one stretch from its creation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from shoal.errors import StoreError
from shoal.plan.manifest import Manifest
from shoal.plan.run_plan import load_plan
from shoal.privacy.spending import BUDGET
from shoal.record.distribution import Distribution, read_distributions
from shoal.record.run import latest_run
from shoal.record.sqlite import open_store
from shoal.record.store import CommitRow, EventRow, LedgerRow, RoundRow, RunRow, Store
from shoal.report.examples_spent import ExamplesSpent
from shoal.report.privacy_spent import Spent
from shoal.tensors import is_of_model


@dataclass(frozen=True, slots=True)
class Point:
    """A metric of one version."""

    version: int
    value: float


@dataclass(frozen=True, slots=True)
class Usage:
    """What one phase took, over all rounds and members."""

    seconds: float = 0.0
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One run at a moment."""

    run: RunRow
    manifest: Manifest | None
    """None for a run without a plan (a training loop of one's own)."""
    version: int | None
    """The last version; None before the initial model."""
    parameters: int
    """Numbers in the model."""
    metrics: Mapping[str, Sequence[Point]]
    """Name -> values by version, the newest of each version; the server's by plain name, cohorts' as `train/…`."""
    seconds: Mapping[int, float]
    """Version -> seconds at work until its commit."""
    rounds: Sequence[RoundRow] = ()
    commits: Sequence[tuple[int, int]] = ()
    """(members, weight) of versions 1, 2, …"""
    usage: Mapping[str, Usage] = field(default_factory=dict)
    """By phase."""
    distributions: Mapping[str, Mapping[int, Distribution]] = field(default_factory=dict)
    """Metric -> version -> how it is distributed over users, where it was measured user by user."""
    stopped_early: str = ""
    """Why the run ended before its last round; empty if it did not."""
    ledger: Sequence[LedgerRow] = ()
    """Of the population's privacy budget."""

    @property
    def spent(self) -> Spent | None:
        """What was spent of privacy; None where there is no noise."""
        if self.manifest is None or not (privacy := self.manifest.promises.privacy).noise_multiplier:
            return None
        separation = self.manifest.server.rounds.min_separation
        return Spent(run=self.run.id, privacy=privacy, min_separation=separation, ledger=self.ledger)

    @property
    def of_examples(self) -> ExamplesSpent | None:
        """What noise on examples promises; None where there is none."""
        if self.manifest is None or (hides := self.manifest.promises.privacy.examples) is None:
            return None
        return ExamplesSpent(
            privacy=hides, epochs=self.manifest.training.epochs, rounds=self.version or 0, is_simulated=self.run.kind == "simulate"
        )  # fmt: skip

    def last(self, name: str) -> float | None:
        """The newest value of a metric; None if it was never measured."""
        points = self.metrics.get(name, ())
        return points[-1].value if points else None

    def first_reaching(self, name: str, value: float) -> int | None:
        """The first version whose metric is at least this."""
        return next((point.version for point in self.metrics.get(name, ()) if point.value >= value), None)

    @property
    def num_examples_used(self) -> int:
        """Examples that counted, each as often as it was used."""
        return sum(weight for _, weight in self.commits)


def read_facts(folder: Path, run_id: str | None = None) -> Facts:
    """Reads a run's facts.

    Args:
        folder: a run folder, or a folder of them: then the newest.
        run_id: which run of it, by id or by task; None: the newest.

    Raises:
        DataError: there is no run.
        StoreError: the record cannot be read.
    """
    found = latest_run(folder, task=run_id or "")
    store = open_store(found.path, read_only=True)
    try:
        return facts_of(store, found.run.id)
    finally:
        store.close()


def facts_of(store: Store, run_id: str) -> Facts:
    """The facts of a run in an open store."""
    row = store.run(run_id)
    commits, events = list(store.commits(run_id)), store.events(run_id)
    head = commits[-1] if commits else None
    return Facts(
        run=row,
        manifest=_manifest(store, run_id),
        version=head.version if head is not None else None,
        parameters=sum(_numbers(e.spec.shape) for e in head.model if is_of_model(e.spec.name))
        if head is not None
        else 0,
        metrics=_metrics(store, run_id),
        seconds=seconds_at_work(commits, events, created_s=row.created_s),
        rounds=tuple(store.rounds(run_id)),
        commits=tuple((commit.members, commit.weight) for commit in commits if commit.version),
        usage=_usage(store, run_id),
        distributions=read_distributions(events),
        stopped_early=stopped_early(events),
        ledger=store.ledger(row.population, BUDGET),
    )


def seconds_at_work(
    commits: Sequence[CommitRow], events: Sequence[EventRow], *, created_s: float
) -> Mapping[int, float]:
    """Version -> seconds at work; see the module's text."""
    begins = sorted(float(event.data["began_s"]) for event in events if event.kind == "session") or [0.0]
    times = {commit.version: commit.created_s - created_s for commit in commits if commit.version}
    seconds: dict[int, float] = {}
    before_s = 0.0
    for number, begin_s in enumerate(begins):
        end_s = begins[number + 1] if number + 1 < len(begins) else float("inf")
        here = {version: time_s for version, time_s in times.items() if begin_s <= time_s < end_s}
        seconds |= {version: before_s + time_s - begin_s for version, time_s in here.items()}
        before_s = max(seconds.values(), default=0.0)
    return dict(sorted(seconds.items()))


def stopped_early(events: Sequence[EventRow]) -> str:
    """Why the last session of a run ended before its last round; empty if it did not."""
    last = next((event for event in reversed(events) if event.kind in ("session", "stopped_early")), None)
    return str(last.data["why"]) if last is not None and last.kind == "stopped_early" else ""


def _manifest(store: Store, run_id: str) -> Manifest | None:
    try:
        return load_plan(store, run_id).plan.manifest
    except StoreError:
        return None


def _metrics(store: Store, run_id: str) -> dict[str, list[Point]]:
    found: dict[str, dict[int, float]] = {}
    for row in store.metrics(run_id):
        if row.scope != "class":
            found.setdefault(row.name, {})[row.version] = row.value
    return {name: [Point(v, value) for v, value in sorted(values.items())] for name, values in sorted(found.items())}


def _usage(store: Store, run_id: str) -> dict[str, Usage]:
    total: dict[str, Usage] = {}
    for row in store.usage(run_id):
        old = total.get(row.phase, Usage())
        total[row.phase] = Usage(
            old.seconds + row.seconds, old.bytes_down + row.bytes_down, old.bytes_up + row.bytes_up
        )
    return total


def _numbers(shape: Sequence[int]) -> int:
    count = 1
    for dim in shape:
        count *= dim
    return count
