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
from shoal.plan.train import evaluated_sums, ratios
from shoal.record.distribution import Distribution, write_distributions
from shoal.record.store import CommitRow, Store


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


def measure(
    runner: Runner, manifest: Manifest, store: Store, run_id: str, row: CommitRow, measured: Measured
) -> dict[str, float]:
    """The metrics of a version, which go into the record too, with the time that they took."""
    found: dict[str, float] = {}
    if isinstance(measured.held_out, Examples):
        found |= evaluate_version(runner, manifest, store, run_id, row, measured.held_out)
    elif measured.held_out is not None:
        found |= _by_user(runner, manifest, store, run_id, row, measured.held_out, prefix="")
    if measured.left_out is not None:
        found |= _by_user(runner, manifest, store, run_id, row, measured.left_out, prefix=LEFT_OUT)
    return found


def _by_user(
    runner: Runner, manifest: Manifest, store: Store, run_id: str, row: CommitRow, users: Population, *, prefix: str
) -> dict[str, float]:
    begun_s = time.perf_counter()
    root = hand_over(runner, store, row)
    totals: dict[str, float] = {}
    values: dict[str, list[float]] = {}
    for user, examples in users.items():
        if not len(examples):
            continue
        try:
            sums = evaluated_sums(runner, manifest, root, examples)
        except DataError as error:
            raise DataError(f"User {user!r} cannot be measured: {error} Mend its data, or leave it out.") from error
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + value
        for name, value in ratios(sums).items():
            values.setdefault(name, []).append(value)
    metrics = {f"{prefix}{name}": value for name, value in ratios(totals).items()}
    distributions = _distributions(values, manifest.promises.minimum_group, prefix)
    for name, one in distributions.items():
        metrics |= {name + LOW_TAIL: one.quantile(0.1), name + HIGH_TAIL: one.quantile(0.9)}
    time_s = time.time() - store.run(run_id).created_s
    write_distributions(store, run_id, row.version, distributions, time_s=time_s)
    write_evaluation(store, run_id, row, metrics, seconds=time.perf_counter() - begun_s, count=len(users))
    return metrics


def _distributions(values: Mapping[str, list[float]], fewest: int, prefix: str) -> dict[str, Distribution]:
    """Of the metrics that enough users have a finite value of."""
    made = {}
    for name, each in values.items():
        finite = [value for value in each if abs(value) < float("inf")]
        if len(finite) >= fewest:
            made[f"{prefix}{name}"] = Distribution.of(finite)
    return made
