"""A pod's training as a run in the record: the same line of versions, metrics and phases as a fleet's, so that `predict` and `report` read it.

A version is a round: N members, and as many examples as its steps saw. What a checkpoint has beyond a version (the optimizer's state, where in the
data it stands) is in `checkpoints` in the run folder; without it a run starts at its beginning again.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from shoal.data.store import Examples
from shoal.local import model_specs
from shoal.plan.build import build
from shoal.plan.run_plan import begin_run, keep_rounds, load_plan
from shoal.pod.training import Version, Watch
from shoal.record.resume import take_up
from shoal.record.store import CommitRow, GroupRow, MetricRow, RoundRow, Store, UsageRow
from shoal.record.tensor_blobs import put_tensors
from shoal.task import Task
from shoal.tensors import Index


@runtime_checkable
class Trains(Protocol):
    """What trains a task into versions: `Trainer` on a mesh, `ServerTrainer` with parameter servers."""

    task: Task
    batch_size: int

    @property
    def num_members(self) -> int: ...

    def settings(self) -> dict[str, Any]: ...

    def train(
        self, examples: Examples, *, steps: int, commit_every: int, seed: int = 0, held_out: Examples | None = None, folder: Path | None = None,
        checkpoint_every: int | None = None, watch: Watch | None = None,
    ) -> dict[str, Any]: ...  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is, in steps."""

    steps: int
    commit_every: int
    checkpoint_every: int | None = None

    @property
    def versions(self) -> int:
        """Beyond the first."""
        return -(-self.steps // self.commit_every)


def begin(
    trainer: Trains, store: Store, schedule: Schedule, *, seed: int, signing: Ed25519PrivateKey, config: dict[str, Any]
) -> str:
    """Writes a new run into the record: the task as a plan, the initial model, the settings. Returns its id.

    Args:
        trainer: of the task.
        store: the record.
        schedule: of the run.
        seed: of the run.
        signing: the host's key, by which plans are signed.
        config: further settings, as JSON.
    """
    built = build(trainer.task, seed=seed)
    return begin_run(
        store, built.plan.sign(signing), built.model, kind="train", rounds=schedule.versions, seed=seed,
        config={**config, "pod": trainer.settings()},
    )  # fmt: skip


def checkpoints_folder(folder: Path) -> Path:
    """Where the checkpoints of a run folder's run are."""
    return folder / "checkpoints"


def go_on(
    trainer: Trains,
    store: Store,
    run_id: str,
    examples: Examples,
    schedule: Schedule,
    *,
    held_out: Examples | None = None,
    folder: Path | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Trains a run from its newest checkpoint, or its beginning, to its last step. Arguments as for `Trainer.train`.

    Its status ends as finished, stopped (`should_stop`, Ctrl-C) or failed.
    """
    found = load_plan(store, run_id)
    taken = take_up(store, run_id, time_s=time.time())
    keep_rounds(store, run_id, schedule.versions)
    store.set_config(run_id, {**store.run(run_id).config, "pod": trainer.settings()})  # it may go on on another mesh
    rows = _Rows(trainer, store, run_id, first_round=taken.next_round)

    watch = watch or Watch()

    def told(version: Version) -> None:
        rows.write(version)
        watch.on_version(version)

    try:
        state = trainer.train(
            examples, steps=schedule.steps, commit_every=schedule.commit_every, checkpoint_every=schedule.checkpoint_every,
            seed=int(found.config["seed"]), held_out=held_out, folder=None if folder is None else checkpoints_folder(folder),
            watch=replace(watch, on_version=told),
        )  # fmt: skip
    except BaseException as error:
        store.set_status(
            run_id, "stopped" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed", time_s=time.time()
        )
        raise
    store.set_config(run_id, {**store.run(run_id).config, "pod": trainer.settings()})  # what it has learned of itself
    is_whole = int(state["step"]) >= schedule.steps
    store.set_status(run_id, "finished" if is_whole else "stopped", time_s=time.time())
    return state


@final
class _Rows:
    """Writes the versions of a run."""

    def __init__(self, trainer: Trains, store: Store, run_id: str, *, first_round: int) -> None:
        self._store, self._run_id, self._members = store, run_id, trainer.num_members
        self._specs = model_specs(trainer.task)
        self._round, self._opened_s = first_round, time.time()
        self._created_s = store.run(run_id).created_s

    def write(self, version: Version) -> None:
        """One that the record does not have yet: after a crash a run goes through steps a second time."""
        if version.version <= (self._store.last_version(self._run_id) or 0):
            return
        begun, now_s = time.perf_counter(), time.time()
        model = {spec.name: np.asarray(version.model[spec.name]) for spec in self._specs}
        row = CommitRow(
            version=version.version, model=put_tensors(self._store.blobs, model, self._specs), server_state=Index(()),
            round=self._round, members=self._members, weight=version.examples, created_s=now_s,
        )  # fmt: skip
        round_row = RoundRow(
            number=self._round, base_version=version.version - 1, state="committed", opened_s=self._opened_s, closed_s=now_s,
            selected=self._members, counted=self._members, reason="steps", 
            configuration={"last_step": version.step, "members": [each.to_json() for each in version.members]},
        )  # fmt: skip
        seconds = {**version.seconds, "commit": version.seconds.get("commit", 0.0) + time.perf_counter() - begun}
        self._store.commit(
            self._run_id, row, round=round_row,
            groups=[GroupRow(round=self._round, base_version=version.version - 1, members=self._members, weight=version.examples)],
            metrics=[
                *(self._metric(version.version - 1, f"train/{name}", value, "cohort") for name, value in version.training.items()),
                *(self._metric(version.version, name, value, "server") for name, value in version.metrics.items()),
            ],
            usage=[UsageRow(round=self._round, phase=phase, seconds=value, count=1) for phase, value in seconds.items()],
        )  # fmt: skip
        self._round, self._opened_s = self._round + 1, now_s

    def _metric(self, version: int, name: str, value: float, scope: Any) -> MetricRow:
        return MetricRow(version=version, name=name, value=value, scope=scope, time_s=time.time() - self._created_s)
