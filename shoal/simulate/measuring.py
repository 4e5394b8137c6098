"""What the versions of a simulation are measured on: examples held out, users held out, how metrics are distributed over them.

    held out, as examples       the metrics over all of them:                                          accuracy
    held out, as a population   the same, and user by user: quantiles, a histogram in the record:      accuracy, accuracy/p10
    left out                    users who never train, user by user:                                   left_out/accuracy, …

No user's value leaves this module: `record/distribution.py` says what is kept. Fewer users than the task's smallest group
have no distribution, only their sums.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from shoal.data.store import Examples, Population
from shoal.errors import DataError, StoreError
from shoal.metric_names import HIGH_TAIL, LEFT_OUT, LOW_TAIL
from shoal.plan.evaluate_version import evaluate_version, hand_over, write_evaluation
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Runner
from shoal.plan.train import ratios
from shoal.record.distribution import Distribution, write_distributions
from shoal.record.store import CommitRow, Store
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.by_user import ByUser, OneByOne, Packed
from shoal.task import Task


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What versions are measured on, and how often."""

    held_out: Examples | Population | None = None
    """Examples of nobody's in particular, or of users: the metrics by their plain names."""
    left_out: Population | None = None
    """Users who do not train: the metrics as `left_out/…`."""
    every: int = 1
    """Versions between two measurements; the last is always measured."""

    def is_due(self, version: int, *, last: int) -> bool:
        """Whether a version is to be measured."""
        return (self.held_out is not None or self.left_out is not None) and (
            version % self.every == 0 or version == last
        )

    def check(self, manifest: Manifest, config: Mapping[str, Any]) -> None:
        """Raises DataError where the task has no evaluate; StoreError where other users were left out of the run before."""
        if (self.held_out is not None or self.left_out is not None) and not manifest.variants("evaluate"):
            raise DataError(
                f"Task {manifest.task!r} has no evaluate: leave out held_out and leave_out, or give the task one."
            )
        if config.get("left_out") != left_out_config(self.left_out):
            left_out = config.get("left_out") or {"users": 0}
            raise StoreError(
                f"The run began with {left_out['users']} users left out of training, and now others would be. Leave out the "
                "same (leave_out=…, --leave-out), of the same data."
            )


def left_out_config(left_out: Population | None) -> dict[str, Any] | None:
    """What a run's config keeps of the users left out: how many, and a hash that tells whether they are the same."""
    if left_out is None:
        return None
    joined = "\0".join(sorted(left_out)).encode()
    return {"users": len(left_out), "hash": hashlib.sha256(joined).hexdigest()[:16]}


@final
class Measuring:
    """Measures versions of a run."""

    def __init__(
        self,
        runner: Runner,
        manifest: Manifest,
        store: Store,
        run_id: str,
        measured: Measured,
        *,
        task: Task | None = None,
    ) -> None:
        """`task`, if it is at hand, makes it faster to measure user by user."""
        self._runner, self._manifest, self._store, self._run_id, self._on = runner, manifest, store, run_id, measured
        self._by_user: ByUser = OneByOne(runner, manifest)
        if task is not None and task.evaluate is not None:
            self._by_user = Packed(task, manifest)

    def is_due(self, version: int, *, last: int) -> bool:
        """Whether a version is to be measured."""
        return self._on.is_due(version, last=last)

    def __call__(self, row: CommitRow) -> dict[str, float]:
        """The metrics of a version, which go into the record too, with the time that they took."""
        found: dict[str, float] = {}
        if isinstance(self._on.held_out, Examples):
            found |= evaluate_version(self._runner, self._manifest, self._store, self._run_id, row, self._on.held_out)
        elif self._on.held_out is not None:
            found |= self._of_users(row, self._on.held_out, prefix="")
        if self._on.left_out is not None:
            found |= self._of_users(row, self._on.left_out, prefix=LEFT_OUT)
        return found

    def _of_users(self, row: CommitRow, users: Population, *, prefix: str) -> dict[str, float]:
        begun_s = time.perf_counter()
        root = hand_over(self._runner, self._store, row)
        totals: dict[str, float] = {}
        values: dict[str, list[float]] = {}
        for sums in self._by_user.sums(root, view_tensors(self._store.blobs, row.model), users):
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value
            for name, value in ratios(sums).items():
                values.setdefault(name, []).append(value)
        metrics = {f"{prefix}{name}": value for name, value in ratios(totals).items()}
        distributions = _distributions(values, self._manifest.promises.minimum_group, prefix)
        for name, one in distributions.items():
            metrics |= {name + LOW_TAIL: one.quantile(0.1), name + HIGH_TAIL: one.quantile(0.9)}
        time_s = time.time() - self._store.run(self._run_id).created_s
        write_distributions(self._store, self._run_id, row.version, distributions, time_s=time_s)
        took_s = time.perf_counter() - begun_s
        write_evaluation(self._store, self._run_id, row, metrics, seconds=took_s, count=len(users))
        return metrics


def _distributions(values: Mapping[str, list[float]], fewest: int, prefix: str) -> dict[str, Distribution]:
    """Of the metrics that enough users have a finite value of."""
    made = {}
    for name, each in values.items():
        finite = [value for value in each if abs(value) < float("inf")]
        if len(finite) >= fewest:
            made[f"{prefix}{name}"] = Distribution.of(finite)
    return made
