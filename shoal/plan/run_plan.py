"""Where a run keeps its plan: in the record, so that a Coordinator, `predict` or `load` needs no source of the task."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shoal.clock import Clock, SystemClock
from shoal.errors import StoreError
from shoal.plan.plan import Plan
from shoal.record.provenance import provenance
from shoal.record.run import new_run_id
from shoal.record.store import CommitRow, RunKind, RunRow, Store
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


def begin_run(
    store: Store,
    plan: Plan,
    model: Tensors,
    *,
    kind: RunKind,
    rounds: int,
    seed: int,
    config: Mapping[str, Any] | None = None,
    clock: Clock | None = None,
    population: str = "default",
) -> str:
    """Writes a new run into the record: plan, initial model, settings. Returns its id.

    Its status is `stopped` until a host or a simulation takes it up.

    Args:
        store: the record.
        plan: signed.
        model: version 0.
        kind: which place it runs in.
        rounds: versions that the line will have beyond the first.
        seed: of the run.
        config: further settings, as JSON. `events_kept`: rounds whose events stay in the record, to be run again; 0: none.
        clock: time.
        population: the devices that it draws on.

    Raises:
        ValueError: only a simulation can select as the policy says.
    """
    if kind == "host":
        plan.manifest.server.rounds.check_on_fleet()
    now_s = (clock or SystemClock()).wall_s()
    run_id = new_run_id(now_s, entropy=secrets.randbits(15))
    kept = {**(config or {}), **save_plan(store, plan), "rounds": rounds, "seed": seed}
    store.create_run(
        RunRow(
            id=run_id, name=plan.manifest.task, kind=kind, plan_hash=plan.hash, config=kept, provenance=provenance(),
            status="stopped", created_s=now_s, population=population,
        )
    )  # fmt: skip
    write_initial_model(store, run_id, plan, model, time_s=now_s)
    return run_id


def write_initial_model(store: Store, run_id: str, plan: Plan, model: Tensors, *, time_s: float) -> CommitRow:
    """Commits version 0."""
    check(model, plan.manifest.broadcast, what="the initial model")
    index = put_tensors(store.blobs, model, plan.manifest.broadcast)
    row = CommitRow(
        version=0, model=index, server_state=Index(()), round=0, members=0, weight=0, created_s=time_s
    )  # fmt: skip
    store.commit(run_id, row, round=None)
    return row
