"""Simulation: the members' part of a round in this process, the server's part by the very code of a fleet.

The members train by a backend (`backends.py`): fused into one program, or one after the other by the plan's own programs.
A round is closed with the same accumulator, server rule and record as a Coordinator's; so the sequential backend commits the
same bits as a fleet (rule 7 of the design), and the fused one agrees to rounding. `reference.py` is the readable loop
that both are held against.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import jax
import numpy as np

from shoal.aggregate.choose import aggregator_of, noised
from shoal.aggregate.cohort_metrics import cohort_metrics
from shoal.data.fingerprint import CONFIG as POPULATION
from shoal.data.fingerprint import difference, fingerprint
from shoal.data.store import Examples, Population
from shoal.errors import DataError, StoreError
from shoal.fleet.configuration import Configuration, configure
from shoal.fleet.host import run_seed
from shoal.fleet.keys import HostKeys
from shoal.forms.convolutions import faster_convolutions
from shoal.forms.outer_products import fused_outer_products
from shoal.local import local_rule
from shoal.plan.build import build, refuse_other_task
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.left_out import EMPTY, HEED_THE_MASK, left_out, named, told
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run, keep_rounds, load_plan
from shoal.plan.runner import Runner
from shoal.plan.secure import members_noise
from shoal.privacy.spending import Release, counted, refuse_overspending, release_of, spend_of
from shoal.record.resume import take_up
from shoal.record.retention import SETTING, Retention
from shoal.record.store import CommitRow, EventRow, GroupRow, MetricRow, RoundRow, Store, UsageRow
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.backends import Attempt, Backend, Cohorts, FusedCohorts, Sequential
from shoal.simulate.clipped import Clipped
from shoal.simulate.cohort import Stage
from shoal.simulate.device_states import DeviceStates, states_folder
from shoal.simulate.fused import Fused, Layout
from shoal.simulate.history import History
from shoal.simulate.layout import cache, cached, choose, default, key_of, of_run
from shoal.simulate.measuring import Measured, Measuring, left_out_config
from shoal.simulate.selection import redrawn, select
from shoal.simulate.sent import model_as_sent
from shoal.simulate.stopping import CONFIG as STOP_WHEN
from shoal.simulate.stopping import Stopping
from shoal.simulate.sweeping import Sweeping
from shoal.stop_when import StopWhen
from shoal.task import Task
from shoal.tensors import Tensors

log = logging.getLogger("shoal.simulate")

REDRAWN: Final = 2.0**-40
"""Chance of another draw that amplification by sampling bears: over 2^10 rounds far below any delta."""

BackendName = Literal["fused", "sequential"]
ATTEMPTS, ATTEMPTS_S = 5, 1.0
"""Times that a layout is tried, and seconds after which it is tried no more."""


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
    model: Tensors = field(repr=False)
    """The last version."""
    version: int
    history: History = field(repr=False, default=History())
    """The rounds that were run now, as a tuple; `history.to_pandas()` is a table of them."""
    stopped_early: str = ""
    """Why the run ended before its last round (`StopWhen`); empty if it did not."""


def simulate(
    task: Task,
    population: Population,
    *,
    rounds: int,
    store: Store,
    seed: int = 0,
    held_out: Examples | Population | None = None,
    left_out: Population | None = None,
    evaluate_every: int = 1,
    stop_when: StopWhen | None = None,
    retention: Retention | None = None,
    folder: Path | None = None,
    backend: BackendName = "fused",
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Simulation:
    """Trains a task on simulated devices.

    Args:
        task: what is learned.
        population: the members' examples.
        rounds: versions to commit.
        store: the record to write to.
        seed: of the initial model, the selection, the members' randomness.
        held_out: examples on which versions are evaluated; of a population user by user.
        left_out: users who do not train, on whom versions are evaluated too.
        evaluate_every: versions between two evaluations; the last is always evaluated.
        stop_when: when the run ends before its last round.
        retention: which old versions the record keeps; None: all.
        folder: the run folder, for the keys and to say where it is.
        backend: `fused`: the cohort in one program, fast; `sequential`: one member after the other, with the bits of a fleet.
        on_round: told of each committed round.

    Raises:
        DataError: fewer members than a round needs, or examples that do not fit the task.
    """
    keys = HostKeys.load_or_make(folder) if folder is not None else HostKeys.make()
    built = build(task, seed=seed)
    plan = built.plan.sign(keys.signing)
    run_id = begin_run(
        store, plan, built.model, kind="simulate", rounds=rounds, seed=seed,
        config=own_config(population, left_out, stop_when, retention),
    )  # fmt: skip
    return go_on(
        store, run_id, population, held_out=held_out, left_out=left_out, evaluate_every=evaluate_every, folder=folder, on_round=on_round,
        keys=keys, task=task if backend == "fused" else None, is_its_task=True,
    )  # fmt: skip


def go_on(
    store: Store,
    run_id: str,
    population: Population,
    *,
    rounds: int | None = None,
    held_out: Examples | Population | None = None,
    left_out: Population | None = None,
    evaluate_every: int = 1,
    folder: Path | None = None,
    on_round: Callable[[RoundResult], None] = lambda result: None,
    runner: Runner | None = None,
    keys: HostKeys | None = None,
    task: Task | None = None,
    is_its_task: bool = False,
) -> Simulation:
    """Runs a simulation from where its record stands to its last version, or to where its rule stops it. Arguments as for
    `simulate`; the rule is that of the run's config.

    `rounds`, if given, is in the run's config from now on. `runner` is one of the run's plan, where there is one already.
    `keys` are the run's, which its noise follows from; None: those of the folder.
    `task` is the run's: with it the cohort trains in one program; without, by the programs of the run's plan. That it is, is
    checked, which takes a second or two, unless `is_its_task` says that the plan was made of it just now.

    Raises:
        StoreError: the task, or who is left out, is not that of the run; or members keep state between rounds, which is not
            there, or of others.
    """
    found = load_plan(store, run_id)
    kept = [] if task is None or is_its_task else refuse_other_task(task, found.plan)
    if kept:
        log.warning("the run keeps its own settings: %s", "; ".join(kept))
    taken = take_up(store, run_id, time_s=time.time())
    if taken.last is None:
        raise StoreError(f"Run {run_id} has no initial model; it was never begun.")
    of_devices = None if folder is None else states_folder(folder, run_id)
    if taken.last.version and found.plan.manifest.device_state and not (of_devices is not None and of_devices.exists()):
        raise StoreError(
            f"Run {run_id} cannot be resumed: its members keep state ({len(found.plan.manifest.device_state)} tensors) "
            f"{f'in {of_devices}, which is not there' if of_devices else 'that was in memory only'}. Start it anew."
        )
    began_with = found.config.get(POPULATION) if taken.last.version else None
    if began_with and (why := difference(began_with, fingerprint(population))):
        if found.plan.manifest.server.rounds.min_separation > 1:
            raise StoreError(
                f"Run {run_id} cannot be resumed on other data than it began with ({why}): who rests follows from who is there, and min_separation="
                f"{found.plan.manifest.server.rounds.min_separation} would not hold. Give it the data as it was, or begin another run."
            )
        log.warning("the data is not what the run began with: %s; later versions are trained on it", why)
    last = int(found.config["rounds"]) if rounds is None else rounds
    history = []
    try:
        measured = Measured(held_out=held_out, left_out=left_out, every=evaluate_every)
        measured.check(found.plan.manifest, found.config)
        members = _members(found.plan.manifest, population)
        keys = keys or (HostKeys.make() if folder is None else HostKeys.load_or_make(folder))
        runner = runner or JaxRunner(found.plan)
        to_do = max(0, last - taken.last.version)
        states = DeviceStates(found.plan.manifest.device_state, population.ids, of_devices)
        backend = _backend(store, run_id, found.plan, population, states, runner, task, rounds=to_do)
        sizes = _sizes(found.plan.manifest, population, members)
        engine = _Engine(
            store, run_id, found.plan, (members, sizes), runner=runner, backend=backend, seed=int(found.config["seed"]),
            noise_secret=keys.noise_secret, head=taken.last, last=last,
            measuring=Measuring(runner, found.plan.manifest, store, run_id, measured, task=task),
            sweeping=Sweeping(store, run_id, Retention.of(found.config), found.plan.manifest),
        )  # fmt: skip
        keep_rounds(store, run_id, last)  # once nothing has refused them
        engine.next_round = taken.next_round
        engine.begin_session()
        stopping = Stopping(store, run_id, found.plan.manifest, measured)
        why = stopping.why
        while engine.head.version < last and not why:
            result = engine.round()
            why = stopping.saw(result)
            if why:
                result = engine.measured_at_last(result)
            history.append(result)
            on_round(result)
        engine.sweeping.after(engine.head.version, is_over=True)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        store.set_status(run_id, "stopped" if stopped else "failed", time_s=time.time())
        raise
    store.set_status(run_id, "finished", time_s=time.time())
    model = view_tensors(store.blobs, engine.head.model)
    return Simulation(run_id, folder, model, engine.head.version, History(history), why)


def own_config(
    population: Population, left_out: Population | None, stop_when: StopWhen | None, retention: Retention | None = None
) -> dict[str, Any]:
    """What the config of a simulation has beyond any run's."""
    found = {
        POPULATION: fingerprint(population),
        "left_out": left_out_config(left_out),
        STOP_WHEN: None if stop_when is None else stop_when.to_json(),
        SETTING: None if retention is None else retention.to_json(),
    }
    return {name: value for name, value in found.items() if value is not None}


def _backend(
    store: Store,
    run_id: str,
    plan: Plan,
    population: Population,
    states: DeviceStates,
    runner: Runner,
    task: Task | None,
    *,
    rounds: int,
) -> Backend:
    config = store.run(run_id).config
    if task is None:
        if "engine" in config:
            log.warning("without its task, members train one after the other: slower, and with other last bits")
        return Sequential(runner, plan.manifest, population, states)
    if "engine" not in config and store.last_version(run_id):
        log.warning(
            "members trained one after the other until now, and do so in one program from here on: other last bits"
        )
    stage, manifest = Stage(population, plan.manifest), plan.manifest
    rule = local_rule(task.replace(loss=faster_convolutions(task.loss)))
    rule = replace(rule, block=fused_outer_products(rule.block))

    def made(layout: Layout) -> Fused:
        return Fused(rule, manifest, layout)

    def make(attempt: Attempt) -> Fused:
        kept = config.get("engine")
        if isinstance(kept, Mapping):
            return made(of_run(kept))
        fused = _fastest(manifest, attempt, made, rounds=rounds)
        store.set_config(run_id, {**store.run(run_id).config, "engine": fused.layout.to_json()})
        return fused

    return FusedCohorts(make, stage, states)


def _fastest(manifest: Manifest, attempt: Attempt, made: Callable[[Layout], Fused], *, rounds: int) -> Fused:
    """The engine with the layout of an earlier trial, or of one that is made now if it is worth it."""
    members = len(attempt.round.members)
    if jax.process_count() > 1:  # hosts have to agree without a word
        return made(default(members))
    key = key_of(manifest, members)
    if (known := cached(key)) is not None:
        return made(known)
    begun, fastest = time.perf_counter(), list[tuple[float, Fused]]()

    def seconds_with(layout: Layout) -> float:
        fused = made(layout)
        try:
            seconds = _least_seconds(attempt, fused)
        except jax.errors.JaxRuntimeError as error:
            if fastest and "RESOURCE_EXHAUSTED" in str(error):
                return math.inf
            raise
        if not fastest or seconds < fastest[0][0]:
            fastest[:] = [(seconds, fused)]  # the others go, with what they hold on devices
        return seconds

    trial = choose(members, rounds, seconds_with)
    if not trial.seconds:
        return made(trial.layout)
    chosen = fastest[0][1]
    compile_s = chosen.seconds["compile"]
    chosen.seconds = {"compile": compile_s, "trial": time.perf_counter() - begun - compile_s}
    if len(trial.seconds) > 1:
        cache(key, trial.layout)
        tried = ", ".join(f"{layout} {seconds:.3g} s" for layout, seconds in trial.seconds.items())
        log.info("a round of %d members takes %s; kept for this program and machine", members, tried)
    return chosen


def _least_seconds(attempt: Attempt, fused: Fused) -> float:
    """What training the cohort takes: once where that is long, else the least of a few times."""
    taken: list[float] = []
    while len(taken) < ATTEMPTS and sum(taken) < ATTEMPTS_S:
        before_s = fused.seconds.get("compute", 0.0)
        attempt(fused)
        taken.append(fused.seconds["compute"] - before_s)
    return min(taken)


class _Engine:
    """The rounds, whatever trains the members."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        plan: Plan,
        members: tuple[Sequence[str], np.ndarray],
        *,
        runner: Runner,
        backend: Backend,
        seed: int,
        noise_secret: bytes,
        head: CommitRow,
        last: int,
        measuring: Measuring,
        sweeping: Sweeping,
    ) -> None:
        self.measuring, self.sweeping, self.clipped = measuring, sweeping, Clipped(plan.manifest)
        self.store, self.run_id, self.plan, self.head, self.last = store, run_id, plan, head, last
        self.members = members
        self.runner, self.backend = runner, backend
        self.seed, self.created_s = run_seed(seed), store.run(run_id).created_s
        self.next_round = 1
        self.following: tuple[Configuration, tuple[str, ...]] | None = None
        half = plan.manifest.server
        privacy = self.manifest.promises.privacy
        rule = aggregator_of(half.aggregator, half.rule, half.options, call=self.runner.call)
        devices = members_noise(self.manifest)
        self.aggregator = noised(
            rule, privacy, half.rounds, secret=noise_secret, run=run_id, last_version=last, simulated=devices
        )
        self.spend, self.drawn_by = None, b""
        if privacy.noise_multiplier:
            release = _release(self.manifest, run_id, len(members[0]))
            self.spend = spend_of(privacy, release)
            self.drawn_by = (
                noise_secret if release.sampling < 1 else b""
            )  # a seed that is known tells who is in a cohort
            before = counted(store.ledger(store.run(run_id).population, self.spend.budget))
            refuse_overspending(privacy, before, release, rounds=last - head.version)

    @property
    def manifest(self) -> Manifest:
        return self.plan.manifest

    def begin_session(self) -> None:
        """Tells the record when work begins (anew); what a session that was interrupted had still to measure is measured."""
        version, began_s = self.head.version, time.time() - self.created_s
        self.store.journal(self.run_id, [EventRow(time_s=began_s, kind="session", data={"began_s": began_s})])
        if version and self.measuring.is_due(version, last=self.last):
            known = (row for row in self.store.metrics(self.run_id) if row.scope == "server")
            if all(row.version != version for row in known):
                self.measure()

    def round(self) -> RoundResult:
        """One round: select, train, sum, commit, and measure if that is due."""
        begun, wall_s = time.perf_counter(), time.time()
        number, version = self.next_round, self.head.version
        configuration, members = self.following or self.cohort(number, version)
        self.following = self.cohort(number + 1, version + 1) if version + 1 < self.last else None
        if self.spend is not None:
            opened = RoundRow(
                number=number, base_version=version, state="open", opened_s=wall_s, selected=len(members),
                configuration=configuration.to_json(),
            )  # fmt: skip
            self.store.open_round(self.run_id, opened, spend=self.spend)
        cohorts = Cohorts(configuration, members)
        if self.following is not None:
            cohorts = replace(cohorts, next_seed=self.following[0].seed, next_members=self.following[1])
        trained = self.backend.train(cohorts, *model_as_sent(self.store.blobs, self.head.model, self.manifest))
        sums, seconds = trained.sums, trained.seconds
        commit_begun = time.perf_counter()
        model, server_state = self.aggregator.commit(sums, self.head.model, self.head.server_state, self.store.blobs)
        row = CommitRow(
            version=version + 1, model=model, server_state=server_state, round=number, members=sums.members,
            weight=sums.weight, created_s=time.time(),
        )  # fmt: skip
        prefix = self.manifest.server.metrics_prefix
        found = cohort_metrics(sums, self.manifest.promises.privacy, self.head.model, self.store.blobs)
        metrics = {f"{prefix}/{name}": value for name, value in found.items()}
        self._write(row, configuration, metrics, seconds, opened_s=wall_s, commit_s=time.perf_counter() - commit_begun)
        self.head, self.next_round = row, number + 1
        metrics |= self.measure() if self.measuring.is_due(row.version, last=self.last) else {}
        self.clipped.look(metrics)
        self.sweeping.after(row.version)
        return RoundResult(row.version, members, metrics, time.perf_counter() - begun)

    def cohort(self, number: int, version: int) -> tuple[Configuration, tuple[str, ...]]:
        """The configuration of the round that starts from a version, and who is in it."""
        configuration = configure(self.manifest, run_seed=self.seed, round=number, base_version=version)
        members, sizes = self.members
        seed = hashlib.sha256(self.drawn_by + configuration.seed).digest() if self.drawn_by else configuration.seed
        policy = self.manifest.server.rounds
        return configuration, select(policy, members, sizes, seed, version=version, run_seed=self.seed)

    def measured_at_last(self, result: RoundResult) -> RoundResult:
        """The round, which turns out to be the last, with the head's metrics."""
        if self.measuring.is_due(result.version, last=self.last) or not self.measuring.is_due(
            result.version, last=result.version
        ):
            return result
        return replace(result, metrics={**result.metrics, **self.measure()})

    def measure(self) -> dict[str, float]:
        """The metrics of the head on what versions are measured on, also into the record."""
        return self.measuring(self.head)

    def _metric_rows(self, version: int, metrics: Mapping[str, float], scope: Any) -> list[MetricRow]:
        time_s = time.time() - self.created_s
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


def _release(manifest: Manifest, run_id: str, members: int) -> Release:
    """What one round releases. Cohorts by Poisson sampling are drawn here, by one who is trusted, and nobody sees who is in them.

    Nothing is claimed for them where a cohort may well be drawn again, as too small or too large: it is no Poisson sample then.
    """
    privacy, rounds = manifest.promises.privacy, manifest.server.rounds
    is_sampled = rounds.selection.kind == "poisson" and rounds.goal < members
    is_sampled = is_sampled and privacy.correlated is None and not privacy.distributed
    is_sampled = is_sampled and redrawn(rounds, members) <= REDRAWN
    sampling = rounds.goal / members if is_sampled else 1.0
    return release_of(privacy, rounds, run=run_id, sampling=sampling, devices=members_noise(manifest))


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
    counted_on = manifest.server.algorithms.get("scaffold", {}).get("devices", len(members))
    if counted_on != len(members):
        log.warning(
            "SCAFFOLD was made for devices=%d, and %d can take part: its corrections are too %s. Set devices=%d",
            counted_on, len(members), "large" if counted_on < len(members) else "small", len(members),
        )  # fmt: skip
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
    if len(members) // policy.min_separation < policy.goal:
        raise DataError(
            f"Expected at least {policy.goal * policy.min_separation} members for goal={policy.goal} and "
            f"min_separation={policy.min_separation}, got {len(members)}: so many rest at any time. Lower one of them, or bring more members."
        )
    return members


def _sizes(manifest: Manifest, population: Population, members: Sequence[str]) -> np.ndarray:
    sizes = population.sizes()
    return np.array([manifest.training.num_used(sizes[member]) for member in members], np.int64)


def with_goal(task: Task, goal: int) -> Task:
    """The task with rounds of another size; a goal below the minimum group lowers that too, which is to be said aloud."""
    minimum = min(task.rounds.minimum_group, goal)
    return task.replace(rounds=replace(task.rounds, goal=goal, minimum_group=minimum))
