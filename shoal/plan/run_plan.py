"""Where a run keeps its plan: in the record, so that a Coordinator, `predict` or `load` needs no source of the task."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import StoreError
from shoal.plan.plan import Plan
from shoal.record.store import CommitRow, RunRow, Store
from shoal.record.tensor_blobs import put_tensors
from shoal.tensors import Index, Tensors, check


@dataclass(frozen=True)
class RunPlan:
    """A run and the plan that it follows."""

    row: RunRow
    plan: Plan

    @property
    def config(self) -> Mapping[str, Any]:
        return self.row.config


def save_plan(store: Store, plan: Plan) -> dict[str, Any]:
    """Writes a plan's blobs; returns what belongs into the run's config to find it again."""
    store.blobs.put_all([plan.manifest.data, *plan.programs.values()])
    return {"plan_blob": store.blobs.put(plan.to_bytes())}


def load_plan(store: Store, run_id: str) -> RunPlan:
    """The plan of a run. Raises StoreError where it has none."""
    row = store.run(run_id)
    blob = row.config.get("plan_blob")
    if not isinstance(blob, str):
        raise StoreError(f"Run {run_id} ({row.name}) has no plan: it was not made by simulate, host or train.")
    return RunPlan(row, Plan.parse(store.blobs.get(blob)))


def keep_rounds(store: Store, run_id: str, rounds: int) -> None:
    """Makes this the last version that the run's config asks for."""
    config = store.run(run_id).config
    if config.get("rounds") != rounds:
        store.set_config(run_id, {**config, "rounds": rounds})


def write_initial_model(store: Store, run_id: str, plan: Plan, model: Tensors, *, time_s: float) -> CommitRow:
    """Commits version 0."""
    check(model, plan.manifest.broadcast, what="the initial model")
    index = put_tensors(store.blobs, model, plan.manifest.broadcast)
    row = CommitRow(
        version=0, model=index, server_state=Index(()), round=0, members=0, weight=0, created_s=time_s
    )  # fmt: skip
    store.commit(run_id, row, round=None)
    return row
