"""The short way: train a task in simulation, load any version of any run. Re-exported by `shoal`."""

import signal
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from shoal import validate
from shoal.aggregate.statistics import read_results
from shoal.data.federated import leave_out as shut_out
from shoal.data.store import Examples, Population
from shoal.errors import DataError
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import load_plan
from shoal.plan.stablehlo import inputs_read
from shoal.plan.train import evaluate, only_field, predict
from shoal.record.memory import MemoryStore
from shoal.record.retention import Retention
from shoal.record.run import latest_run
from shoal.record.sqlite import DATABASE_NAME, open_store
from shoal.record.store import Store
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.engine import BackendName, RoundResult, Simulation
from shoal.simulate.engine import simulate as run_simulation
from shoal.simulate.layout import use_all_cores
from shoal.simulate.progress import progress_bar
from shoal.stop_when import StopWhen
from shoal.task import Task
from shoal.tensors import Tensors, is_of_model
from shoal.told import Told
from shoal.weights import to_safetensors


def simulate(
    task: Task,
    population: Population | Mapping[Any, Mapping[str, np.ndarray]],
    *,
    rounds: int,
    seed: int = 0,
    held_out: Examples | Population | Mapping[str, Any] | None = None,
    leave_out: float | str | Iterable[str] | None = None,
    evaluate_every: int = 1,
    stop_when: StopWhen | None = None,
    folder: Path | str | None = None,
    keep: str = "",
    backend: BackendName = "fused",
    progress: bool = True,
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Simulation:
    """Trains a task on simulated devices; the run is kept in a folder.

    On several hosts: call `jax.distributed.initialize()` first, then this with the same arguments on each. The cohort is laid out over the
    devices of all; the first host keeps the run, and every one returns the model.

    Args:
        task: what is learned.
        population: the members' examples: a `Population`, or member -> field -> array (N, …).
        rounds: versions to commit.
        seed: of everything random.
        held_out: examples on which versions are evaluated, as `Examples` or field -> array. Of a `Population` (or member ->
            field -> array) they are evaluated user by user: the metrics over all examples, and how they are distributed over users.
        leave_out: users who do not train and are evaluated user by user too (`left_out/…`): a share of them, drawn with the
            seed, or their ids.
        evaluate_every: versions between two evaluations; the last one is always evaluated.
        stop_when: ends the run before its last round.
        folder: the run folder, which must not hold a run yet; None: no run is kept, only what is returned.
        keep: `RECENT[:EVERY]`, such as `100:1000`: of old versions the folder keeps the newest, and every so manyth; empty: all.
        backend: `fused`: the cohort in one compiled program; `sequential`: much slower, one member after the other, with
            the bits of a fleet.
        progress: shows a bar with rate and time left when standard error is a terminal.
        on_round: told of each committed round.

    Returns:
        The last model by name, its version, and the rounds' metrics.

    Raises:
        DataError: fewer members than a round needs, examples that do not fit the task, or a rule to stop by whose metric the
            run does not have.
        ValueError: nobody, or everybody, is left out; the folder holds a run; or `keep` is not of that form, or without a folder.
    """
    validate.whole(1, rounds=rounds, evaluate_every=evaluate_every)
    validate.one_of(("fused", "sequential"), backend=backend)
    if keep and folder is None:
        raise ValueError(f"Expected folder=… with keep={keep!r}: without one no run is kept.")
    retention = Retention.parse(keep) if keep else None
    use_all_cores()
    members = population if isinstance(population, Population) else Population.from_arrays(population)
    left_out = None
    if leave_out is not None:
        members, left_out = shut_out(members, leave_out, rng=np.random.Generator(np.random.Philox(key=seed)))
    examples = _examples(held_out) if isinstance(held_out, Mapping) else held_out
    with tempfile.TemporaryDirectory() as temporary:
        is_kept = folder is not None and jax.process_index() == 0  # of several hosts the first keeps the run
        if is_kept and (Path(str(folder)) / DATABASE_NAME).exists():
            raise ValueError(
                f"{folder} holds a run already. Choose another folder, or go on with that run: shoal simulate TASK --data … --run "
                f"{folder} --resume."
            )
        chosen = Path(folder) if folder is not None and is_kept else Path(temporary)
        store: Store = open_store(chosen) if is_kept else MemoryStore()
        try:
            with (
                progress_bar(task.name, rounds, shown=progress) as tell,
                Told((signal.SIGINT,), from_anybody=False) as stop,
            ):

                def told(round: RoundResult) -> None:
                    tell(round)
                    on_round(round)
                    stop.check()

                result = run_simulation(
                    task, members, rounds=rounds, store=store, seed=seed, held_out=examples, left_out=left_out,
                    evaluate_every=evaluate_every, stop_when=stop_when, folder=chosen, backend=backend, on_round=told,
                    retention=retention if is_kept else Retention(recent=1),
                )  # fmt: skip
        except KeyboardInterrupt:
            version = (store.last_version(store.runs()[-1].id) if store.runs() else None) or 0
            how = f"; go on with: shoal simulate TASK --data … --run {folder} --resume" if is_kept else ""
            raise KeyboardInterrupt(f"stopped at version {version} of {rounds}{how}") from None
        finally:
            store.close()
        # Of an open store's files, or of a memory that goes; the model must not depend on them.
        model = {name: np.array(value) for name, value in result.model.items() if is_of_model(name)}
        return replace(result, folder=chosen if is_kept else None, model=model)


def _examples(held_out: Mapping[str, Any]) -> Examples | Population:
    """Field -> array, or member -> field -> array."""
    is_by_member = all(isinstance(value, Mapping | Examples) for value in held_out.values())
    return Population.from_arrays(held_out) if held_out and is_by_member else Examples(dict(held_out))


@dataclass(frozen=True)
class Model:
    """One version of a run, ready to be used. Needs no source of the task."""

    name: str
    """The task's name."""
    version: int
    tensors: Tensors
    """The model by name (`params/dense/kernel`)."""
    plan: Plan
    _runner: JaxRunner
    _root: str

    def predict(self, fields: Mapping[str, np.ndarray] | np.ndarray) -> np.ndarray:
        """Predictions (N, …).

        Args:
            fields: field -> array (N, …); fields that the prediction does not read may be missing. A bare array is
                taken as the only field it can be.

        Raises:
            DataError: a field does not fit the task, or one that the prediction reads is missing.
            PlanError: the task has no `predict`.
        """
        given = self._fields(fields)
        if missing := [name for name in self._read if name not in given]:
            raise DataError(
                f"The prediction of task {self.name!r} reads {', '.join(self._read)}; {', '.join(missing)} is missing "
                f"(given: {', '.join(given) or 'nothing'})."
            )
        return predict(self._runner, self.plan.manifest, self._root, given)

    @cached_property
    def _read(self) -> tuple[str, ...]:
        """The fields that the prediction reads."""
        variants = self.plan.manifest.variants("predict")
        found = inputs_read(variants[0], self.plan.programs[variants[0].hash]) if variants else set()
        return tuple(spec.name for spec in self.plan.manifest.batch if f"batch/{spec.name}" in found)

    def evaluate(self, examples: Examples | Mapping[str, np.ndarray]) -> dict[str, float]:
        """The task's metrics over all the examples."""
        chosen = examples if isinstance(examples, Examples) else Examples(dict(examples))
        return dict(evaluate(self._runner, self.plan.manifest, self._root, chosen))

    def save(self, path: Path | str, *, bare: bool = False) -> None:
        """Writes the model as a safetensors file; see `shoal.to_safetensors`."""
        to_safetensors(self.tensors, path, bare=bare)

    def _fields(self, fields: Mapping[str, np.ndarray] | np.ndarray) -> Mapping[str, np.ndarray]:
        return {only_field(self.plan.manifest, fields): fields} if isinstance(fields, np.ndarray) else fields

    @classmethod
    def open(cls, folder: Path, *, version: int | None = None, task: str = "") -> Self:
        """See `load`."""
        found = latest_run(folder, task=task)
        store = open_store(found.path, read_only=True)
        try:
            plan = load_plan(store, found.run.id).plan
            commit = store.last_commit(found.run.id) if version is None else store.get_commit(found.run.id, version)
            if commit is None:
                raise DataError(f"Run {found.run.id} in {found.path} has no model yet.")
            if commit.is_swept:
                raise DataError(
                    f"The tensors of version {version} are not kept (`--keep`): the newest versions' are, and those of every "
                    f"{kept.every if (kept := Retention.of(found.run.config)) else 0}th. Leave the version out for the last."
                )
            tensors = {name: np.array(value) for name, value in view_tensors(store.blobs, commit.model).items()}
        finally:
            store.close()
        runner = JaxRunner(plan)
        runner.set_model(commit.model.root, tensors)
        own = {name: value for name, value in tensors.items() if is_of_model(name)}
        return cls(found.run.name, commit.version, own, plan, runner, commit.model.root)


def read_statistics(run: Path | str, *, version: int | None = None, task: str = "") -> dict[str, dict[str, np.ndarray]]:
    """What a task of `shoal.statistics` has found.

    Args:
        run: the run folder (or a folder of run folders: then the newest run).
        version: of which commit; None: the last.
        task: name of the task, or id of the run, where the folder has several.

    Returns:
        Field -> name -> array, S being the shape of the field in one example: `count`, `clipped`, `missing` (S) int64;
        `mean`, `std` (S) float64; `histogram` (S, bins) int64 with `histogram_edges` (bins + 1); `quantiles` (S, Q) with
        `quantiles_at` (Q) and `quantile_width` (S, Q), how far they may be off. NaN where no value was counted.

    Raises:
        DataError: there is no such run or version, or it is of another kind of task.
    """
    found = latest_run(Path(run), task=task)
    store = open_store(found.path, read_only=True)
    try:
        commit = store.last_commit(found.run.id) if version is None else store.get_commit(found.run.id, version)
        results = read_results(commit.server_state, store.blobs) if commit is not None else {}
    finally:
        store.close()
    if not results:
        raise DataError(
            f"Run {found.run.id} of task {found.run.name!r} has no statistics (yet); they come with version 1 of a task of "
            "shoal.statistics. Name it with task=… where the folder has several."
        )
    return results


def load(run: Path | str, *, version: int | None = None, task: str = "") -> Model:
    """A version of a run, ready to predict.

    Args:
        run: the run folder (or a folder of run folders: then the newest).
        version: which commit; None: the last.
        task: name of the task, or id of the run, where the folder has several.

    Raises:
        DataError: there is no run, or it has no such version.

    Example:
        ``shoal.load("runs/demo").predict({"image": images}).argmax(-1)``
    """
    return Model.open(Path(run), version=version, task=task)
