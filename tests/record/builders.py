"""Rows for the record's tests."""

from typing import Any

import numpy as np

from shoal.record import (
    CommitRow,
    GroupRow,
    MetricRow,
    RoundRow,
    RunRow,
    Store,
    TelemetryRow,
    UsageRow,
    put_tensors,
)
from shoal.tensors import Index

EMPTY = Index(())


def run_row(run_id: str = "run", **changes: Any) -> RunRow:
    values: dict[str, Any] = {
        "id": run_id, "name": "digits", "kind": "simulate", "plan_hash": "", "config": {"rate": 0.1, "sizes": [1, 2]},
        "provenance": {"cores": 2}, "status": "running", "created_s": 1000.0,
    }  # fmt: skip
    return RunRow(**{**values, **changes})


def round_row(number: int = 1, **changes: Any) -> RoundRow:
    values: dict[str, Any] = {
        "number": number, "base_version": number - 1, "state": "committed", "opened_s": 1.0, "closed_s": 2.0,
        "selected": 3, "counted": 2, "released": 1, "reason": "goal", "configuration": {"bits": 64},
        "analytics": {"counts": {"selected": 3}},
    }  # fmt: skip
    return RoundRow(**{**values, **changes})


def open_row(number: int = 1, **changes: Any) -> RoundRow:
    return round_row(number, **{"state": "open", "closed_s": None, "reason": "", **changes})


def group_row(**changes: Any) -> GroupRow:
    return GroupRow(**{"round": 1, "base_version": 0, "members": 8, "weight": 80, **changes})


def commit_row(store: Store, version: int = 0, **changes: Any) -> CommitRow:
    model = put_tensors(store.blobs, {"w": np.full(3, version, np.float32), "b": np.zeros((), np.int64)})
    values: dict[str, Any] = {
        "version": version, "model": model, "server_state": EMPTY, "round": version, "members": 2, "weight": 20,
        "created_s": 5.0,
    }  # fmt: skip
    return CommitRow(**{**values, **changes})


def metric_row(name: str = "accuracy", **changes: Any) -> MetricRow:
    return MetricRow(**{"version": 0, "name": name, "value": 0.5, "scope": "server", "time_s": 1.5, **changes})


def usage_row(phase: str = "compute", **changes: Any) -> UsageRow:
    return UsageRow(**{"round": 1, "phase": phase, "seconds": 1.0, "bytes_up": 7, "count": 2, **changes})


def telemetry_row(**changes: Any) -> TelemetryRow:
    return TelemetryRow(
        **{"day": 20_000, "schema": "aa", "reports": 70, "noise": 30.0, "sums": (5, -1), "time_s": 9.0, **changes}
    )


def with_initial(store: Store) -> Store:
    """A store with one run that has version 0."""
    store.create_run(run_row())
    store.commit("run", commit_row(store), round=None)
    return store


def contents(store: Store) -> dict[str, Any]:
    """All that a store says of its runs, to be compared."""
    return {
        row.id: [
            row, store.last_version(row.id), list(store.commits(row.id)), list(store.rounds(row.id)),
            list(store.groups(row.id)), list(store.metrics(row.id)), list(store.usage(row.id)), list(store.events(row.id)),
            list(store.telemetry(row.id)),
            [store.round_log(row.id, round.number) for round in store.rounds(row.id)],
        ]
        for row in store.runs()
    }  # fmt: skip
