"""Simulation: the members' part of a round in this process, the server's part by the very code of a fleet.

This first engine is the *sequential* backend: it calls the plan's own programs, one member at a time, and closes a round
with the same accumulator, server rule and record as a Coordinator. Given the same members it therefore commits the same
bits as a fleet (rule 7). `reference.py` is the readable loop that it is held against.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shoal.aggregate.choose import aggregator_of
from shoal.data.store import Examples, Population
from shoal.errors import DataError, StoreError, UpdateRefused
from shoal.fleet.configuration import Configuration, configure
from shoal.fleet.host import begin_run, run_seed
from shoal.fleet.keys import HostKeys
from shoal.plan.build import build
from shoal.plan.evaluate_version import evaluate_version, hand_over
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.left_out import EMPTY, HEED_THE_MASK, left_out, named, told
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.run_plan import keep_rounds, load_plan
from shoal.plan.runner import Runner
from shoal.plan.train import train
from shoal.record.resume import take_up
from shoal.record.store import CommitRow, GroupRow, MetricRow, RoundRow, Store, UsageRow
from shoal.record.tensor_blobs import view_tensors
from shoal.task import Task
from shoal.tensors import Tensors

log = logging.getLogger("shoal.simulate")


@dataclass(frozen=True)
class RoundResult:
    """One committed round."""

    version: int
    members: tuple[str, ...]
    metrics: Mapping[str, float]
    """Over the cohort, before this version (`train/…`), and centrally after it (plain names), where evaluated."""
    seconds: float


@dataclass(frozen=True)
class Simulation:
    """What a simulation leaves."""

    run_id: str
    folder: Path | None
    model: Tensors
    """The last version."""
    version: int
    history: tuple[RoundResult, ...] = field(repr=False, default=())


def simulate(
    task: Task,
    population: Population,
    *,
    rounds: int,
    store: Store,
    seed: int = 0,
    held_out: Examples | None = None,
    evaluate_every: int = 1,
    folder: Path | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Simulation:
    """Trains a task on simulated devices.

    Args:
        task: what is learned.
        population: the members' examples.
        rounds: versions to commit.
        store: the record to write to.
        seed: of the initial model, the selection, the members' randomness.
        held_out: examples on which versions are evaluated.
        evaluate_every: versions between two evaluations; the last is always evaluated.
        folder: the run folder, for the keys and to say where it is.
        on_round: told of each committed round.

    Raises:
        DataError: fewer members than a round needs, or examples that do not fit the task.
    """
    keys = HostKeys.load_or_make(folder) if folder is not None else HostKeys.make()
    built = build(task, seed=seed)
    plan = built.plan.sign(keys.signing)
    run_id = begin_run(store, plan, built.model, kind="simulate", rounds=rounds, seed=seed)
    return go_on(
        store, run_id, population, held_out=held_out, evaluate_every=evaluate_every, folder=folder, on_round=on_round
    )


def go_on(
    store: Store,
    run_id: str,
    population: Population,
    *,
    rounds: int | None = None,
    held_out: Examples | None = None,
    evaluate_every: int = 1,
    folder: Path | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
    runner: Runner | None = None,
) -> Simulation:
    """Runs a simulation from where its record stands to its last version. Arguments as for `simulate`.

    `rounds`, if given, is in the run's config from now on. `runner` is one of the run's plan, where there is one already.

    Raises:
        StoreError: members keep state between rounds, and the run is taken up in the middle.
    """
    found = load_plan(store, run_id)
    taken = take_up(store, run_id, time_s=time.time())
    if taken.last is None:
        raise StoreError(f"Run {run_id} has no initial model; it was never begun.")
    if taken.last.version and found.plan.manifest.device_state:
        raise StoreError(
            f"Run {run_id} cannot be resumed: its members keep state ({len(found.plan.manifest.device_state)} tensors) "
            "that this version of the simulator holds in memory only. Start it anew."
        )
    last = int(found.config["rounds"]) if rounds is None else rounds
    keep_rounds(store, run_id, last)
    history = []
    try:
        members = _members(found.plan.manifest, population)
        if held_out is not None and not found.plan.manifest.variants("evaluate"):
            raise DataError(f"Task {found.row.name!r} has no evaluate: leave out held_out, or give the task one.")
        engine = _Engine(
            store, run_id, found.plan, population, members, runner=runner or JaxRunner(found.plan),
            seed=int(found.config["seed"]), head=taken.last,
        )  # fmt: skip
        engine.next_round = taken.next_round
        while engine.head.version < last:
            evaluated = (
                held_out if (engine.head.version + 1) % evaluate_every == 0 or engine.head.version + 1 == last else None
            )
            history.append(engine.round(evaluated))
            on_round(history[-1])
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        store.set_status(run_id, "stopped" if stopped else "failed", time_s=time.time())
        raise
    store.set_status(run_id, "finished", time_s=time.time())
    model = view_tensors(store.blobs, engine.head.model)
    return Simulation(run_id, folder, model, engine.head.version, tuple(history))


class _Engine:
    """The sequential backend."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        plan: Plan,
        population: Population,
        members: Sequence[str],
        *,
        runner: Runner,
        seed: int,
        head: CommitRow,
    ) -> None:
        self.store, self.run_id, self.plan, self.population, self.head = store, run_id, plan, population, head
        self.members = members
        self.runner = runner
        self.seed = run_seed(seed)
        self.states: dict[str, Tensors] = {}
        self.next_round = 1
        half = plan.manifest.server
        self.aggregator = aggregator_of(half.aggregator, half.rule, half.options, call=self.runner.call)
        self.compile_s = self.runner.compile()

    @property
    def manifest(self) -> Manifest:
        return self.plan.manifest

    def round(self, held_out: Examples | None) -> RoundResult:
        """One round: select, train, sum, commit, evaluate."""
        begun, wall_s = time.perf_counter(), time.time()
        number, version = self.next_round, self.head.version
        configuration = configure(self.manifest, run_seed=self.seed, round=number, base_version=version)
        members = self.select(configuration)
        root = hand_over(self.runner, self.store, self.head)
        sums = configuration.accumulator(self.manifest)
        seconds: dict[str, float] = {}
        for member in members:
            try:
                update = train(
                    self.runner, self.manifest, root, self.population[member], self.states.get(member),
                    seed=configuration.seed, member=member,
                )  # fmt: skip
                sums.add(update.sums, weight=update.weight)
            except (DataError, UpdateRefused, ValueError) as error:
                raise DataError(f"Member {member!r} cannot be used: {error} Mend its data, or leave it out.") from error
            if update.device_state:
                self.states[member] = update.device_state
            for phase, value in update.seconds.items():
                seconds[phase] = seconds.get(phase, 0.0) + value
        commit_begun = time.perf_counter()
        model, server_state = self.aggregator.commit(sums, self.head.model, self.head.server_state, self.store.blobs)
        row = CommitRow(
            version=version + 1, model=model, server_state=server_state, round=number, members=sums.members,
            weight=sums.weight, created_s=time.time(),
        )  # fmt: skip
        prefix = self.manifest.server.metrics_prefix
        metrics = {f"{prefix}/{name}": value for name, value in sums.metrics().items()}
        if self.compile_s:
            seconds["compile"], self.compile_s = self.compile_s, 0.0
        self._write(row, configuration, metrics, seconds, opened_s=wall_s, commit_s=time.perf_counter() - commit_begun)
        self.head, self.next_round = row, number + 1
        metrics |= self.evaluate(held_out) if held_out is not None else {}
        return RoundResult(row.version, members, metrics, time.perf_counter() - begun)

    def select(self, configuration: Configuration) -> tuple[str, ...]:
        """The cohort: the exact ids, or drawn at random from the run's seed and the version."""
        policy = self.manifest.server.rounds
        if policy.selection.kind == "exact":
            return policy.selection.ids
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(configuration.seed[:16], "little")))
        return tuple(self.members[i] for i in rng.choice(len(self.members), policy.goal, replace=False))

    def evaluate(self, held_out: Examples) -> dict[str, float]:
        """The task's metrics of the head on held-out examples, also into the record."""
        return evaluate_version(self.runner, self.manifest, self.store, self.run_id, self.head, held_out)

    def _metric_rows(self, version: int, metrics: Mapping[str, float], scope: Any) -> list[MetricRow]:
        time_s = time.time() - self.store.run(self.run_id).created_s
        return [
            MetricRow(version=version, name=name, value=value, scope=scope, time_s=time_s)
            for name, value in metrics.items()
        ]

    def _write(
        self,
        row: CommitRow,
        configuration: Configuration,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
        *,
        opened_s: float,
        commit_s: float,
    ) -> None:
        round_row = RoundRow(
            number=row.round, base_version=row.version - 1, state="committed", opened_s=opened_s, closed_s=row.created_s,
            selected=row.members, counted=row.members, reason="goal", configuration=configuration.to_json(),
        )  # fmt: skip
        usage = [UsageRow(round=row.round, phase=p, seconds=s, count=row.members) for p, s in seconds.items()]
        self.store.commit(
            self.run_id,
            row,
            round=round_row,
            groups=[GroupRow(round=row.round, base_version=row.version - 1, members=row.members, weight=row.weight)],
            metrics=self._metric_rows(row.version - 1, metrics, "cohort"),
            usage=[*usage, UsageRow(round=row.round, phase="commit", seconds=commit_s)],
        )


def _members(manifest: Manifest, population: Population) -> tuple[str, ...]:
    """The users who can take part, in order; who is left out, and why, is said.

    Raises:
        DataError: they are too few for a round, or one that the selection names is not among them.
    """
    policy, out = manifest.server.rounds, left_out(manifest.training, population.sizes())
    for why, users in out.items():
        hint = f". {HEED_THE_MASK}" if manifest.training.whole_batches and why != EMPTY else ""
        log.warning("%s%s", told(users, why), hint)
    gone = {user for users in out.values() for user in users}
    members = tuple(user for user in population.ids if user not in gone)
    if missing := sorted(set(policy.selection.ids) - set(members)):
        raise DataError(
            f"Selection names members that the population does not have, or that cannot take part: {named(missing)}."
        )
    if len(members) < policy.goal:
        raise DataError(
            f"Expected at least {policy.goal} members for rounds of goal={policy.goal}, the population has {len(members)}"
            f"{f' who can take part, and {len(gone)} who cannot' if gone else ''}. Lower RoundPolicy(goal=…), or bring more "
            "members."
        )
    return members


def with_goal(task: Task, goal: int) -> Task:
    """The task with rounds of another size; a goal below the minimum group lowers that too, which is to be said aloud."""
    minimum = min(task.rounds.minimum_group, goal)
    return task.replace(rounds=replace(task.rounds, goal=goal, minimum_group=minimum))
