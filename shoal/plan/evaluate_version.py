"""Evaluates a version of a run: the same in simulation, beside a host's rounds, and in the demo."""

import time
from collections.abc import Mapping

from shoal.data.store import Examples
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Runner
from shoal.plan.train import evaluate
from shoal.record.store import CommitRow, MetricRow, Store, UsageRow
from shoal.record.tensor_blobs import view_tensors


def hand_over(runner: Runner, store: Store, row: CommitRow) -> str:
    """Makes the runner hold a version; returns the root that it goes by."""
    root = row.model.root
    if not runner.has_model(root):
        runner.set_model(root, view_tensors(store.blobs, row.model))
    return root


def evaluate_version(
    runner: Runner,
    manifest: Manifest,
    store: Store,
    run_id: str,
    row: CommitRow,
    examples: Examples,
    *,
    prefix: str = "",
) -> dict[str, float]:
    """The task's metrics of a version, which go into the record together with the time that they took. Blocks.

    Args:
        runner: of the run's plan.
        manifest: of that plan.
        store: the record.
        run_id: whose version it is.
        row: the version.
        examples: that it is evaluated on.
        prefix: before the metrics' names, for examples that are not all there are.
    """
    begun_s = time.perf_counter()
    found = evaluate(runner, manifest, hand_over(runner, store, row), examples)
    metrics = {f"{prefix}{name}": value for name, value in found.items()}
    write_evaluation(store, run_id, row, metrics, seconds=time.perf_counter() - begun_s, count=1)
    return metrics


def write_evaluation(
    store: Store, run_id: str, row: CommitRow, metrics: Mapping[str, float], *, seconds: float, count: int
) -> None:
    """Writes a version's metrics into the record, and the time that so many measurements took."""
    time_s = time.time() - store.run(run_id).created_s
    rows = [
        MetricRow(version=row.version, name=name, value=value, scope="server", time_s=time_s)
        for name, value in metrics.items()
    ]
    store.log(run_id, rows)
    store.add_usage(run_id, [UsageRow(round=row.round, phase="evaluate", seconds=seconds, count=count)])
