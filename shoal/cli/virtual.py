"""`shoal simulate TASK --virtual FILE`: what a fleet of such devices would make of a task, without one.

With data the devices train, and the versions have an accuracy over virtual time; without, only who takes part is played, and
when, and what becomes of the work.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.cli import words
from shoal.cli.failures import Stopped
from shoal.cli.screen import Screen, Stopwatch
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.data.store import Examples, Population
    from shoal.plan.plan import Plan
    from shoal.record.store import Store
    from shoal.simulate.virtual import VirtualFleet
    from shoal.simulate.virtual_training import VirtualTraining

STEP_S: Final = 300.0
"""Virtual seconds between two looks at where the fleet is."""
PICTURE: Final = "virtual.png"


def simulate_virtually(
    task: str, file: Path, population: "Population | None", examples: "Examples | None", *, rounds: int | None,
    hours: float | None, policy: Mapping[str, Any], evaluate_every: int, seed: int, run: Path | None, screen: Screen,
    watch: Stopwatch,
) -> None:  # fmt: skip
    """Plays the fleet of a file until so many versions, or so many virtual hours.

    Raises:
        DataError: the file is not right, or the users' examples do not fit the task.
        ValueError: there are too few devices for a round.
    """
    from dataclasses import replace

    from shoal.cli import run_folder
    from shoal.cli.task_argument import load_task
    from shoal.fleet.keys import HostKeys
    from shoal.plan.build import build
    from shoal.plan.run_plan import begin_run
    from shoal.record.lock import only_writer
    from shoal.record.sqlite import open_store
    from shoal.simulate.virtual import VirtualClock, VirtualFleet, drive
    from shoal.simulate.virtual_population import VirtualPopulation
    from shoal.simulate.virtual_training import VirtualTraining

    devices = VirtualPopulation.read(file)
    seed = seed or devices.seed
    devices = replace(devices, seed=seed)
    loaded = load_task(task)
    loaded = loaded.replace(rounds=replace(loaded.rounds, **policy))
    if devices.devices < loaded.rounds.minimum:
        raise ValueError(
            f"{file}: expected devices >= {loaded.rounds.minimum}, got {devices.devices}: fewer can never commit a round of task "
            f"{loaded.name!r}. Take more devices, or a smaller --goal."
        )
    folder = run_folder.new_folder(run, loaded.name)
    built = build(loaded, seed=seed)
    correlated = loaded.privacy.correlated
    last = rounds or (correlated.rounds if correlated is not None else 1 << 30)
    keys, clock = HostKeys.load_or_make(folder), VirtualClock(begins_s=_now_s())
    plan = built.plan.sign(keys.signing)
    watch.lap("plan")
    with only_writer(folder):
        store = open_store(folder)
        try:
            config = {"virtual": devices.to_json()}
            run_id = begin_run(
                store,
                plan,
                built.model,
                kind="simulate",
                rounds=last,
                seed=seed,
                config=config,
                clock=clock,
            )
            training = VirtualTraining(plan, population, store, run_id, seed=seed) if population is not None else None
            fleet = VirtualFleet(
                devices, plan.manifest, clock, update_of=training.update_of if training is not None else None,
                blocks_of=training.partial if training is not None else None, model_bytes=_bytes(plan), update_bytes=plan.manifest.update_bytes,
            )  # fmt: skip
            drive(fleet, store, run_id, rounds=last, keys=keys, seed=seed)
            screen.say(f"{words.count(devices.devices, 'virtual device')} of {file}; run: {folder}")
            curve = _play(fleet, training, examples, store, run_id, evaluate_every, rounds, hours, screen)
            watch.lap("play")
        finally:
            store.close()
    _tell(fleet, curve, folder, screen, watch)


def _now_s() -> float:
    import time

    return time.time()


def _bytes(plan: "Plan") -> int:
    from shoal.tensors import total_bytes

    return total_bytes(plan.manifest.broadcast)


def _play(
    fleet: "VirtualFleet", training: "VirtualTraining | None", examples: "Examples | None", store: "Store", run_id: str,
    every: int, rounds: int | None, hours: float | None, screen: Screen,
) -> list[tuple[float, float]]:  # fmt: skip
    """Lets the fleet live; returns (virtual seconds, accuracy) of the versions that were evaluated."""
    until_s = hours * 3600.0 if hours else float("inf")
    curve: list[tuple[float, float]] = []
    clock, watch, evaluated = fleet.clock, Stopwatch(), 0
    with Told() as told:
        try:
            while clock.time_s < until_s and not fleet.finished:
                told.check()
                fleet.run(until_s=min(until_s, clock.time_s + STEP_S), commits=every)
                version = len(fleet.tally.commits)
                if training is not None and examples is not None and version >= evaluated + every:
                    evaluated = version
                    metrics = training.evaluate(version, examples)
                    _log(store, run_id, version, metrics, fleet.tally.commits[-1][0])
                    if "accuracy" in metrics:
                        curve.append((fleet.tally.commits[-1][0], metrics["accuracy"]))
                screen.live(_line(fleet, curve, rounds, until_s, watch))
        except KeyboardInterrupt:
            store.set_status(run_id, "stopped", time_s=clock.wall_s())
            raise Stopped(
                f"stopped after {words.duration(clock.time_s)} of virtual time, at version {len(fleet.tally.commits)}",
                code=told.code,
            ) from None
    store.set_status(run_id, "finished", time_s=clock.wall_s())
    return curve


def _log(store: "Store", run_id: str, version: int, metrics: Mapping[str, float], time_s: float) -> None:
    from shoal.record.store import MetricRow

    rows = [MetricRow(version=version, name=n, value=v, scope="server", time_s=time_s) for n, v in metrics.items()]
    store.log(run_id, rows)


def _line(
    fleet: "VirtualFleet", curve: list[tuple[float, float]], rounds: int | None, until_s: float, watch: Stopwatch
) -> str:
    done = len(fleet.tally.commits)
    now_s = fleet.clock.time_s
    share = max(done / rounds if rounds else 0.0, now_s / until_s if until_s < float("inf") else 0.0)
    left = f", {words.duration(watch.total / share - watch.total)} left" if share > 0.01 else ""
    accuracy = f", accuracy {curve[-1][1]:.1%}" if curve else ""
    return f"virtual time {words.duration(now_s)}, version {done}{accuracy}, wasted {fleet.tally.wasted:.1%}{left}"


def _tell(
    fleet: "VirtualFleet", curve: list[tuple[float, float]], folder: Path, screen: Screen, watch: Stopwatch
) -> None:
    from shoal.report.virtual_picture import draw_virtual

    tally, seconds = fleet.tally, fleet.tally.seconds
    now_s, versions = fleet.clock.time_s, len(tally.commits)
    updates = sum(number for _, number, _ in tally.commits)
    late = sum(number for _, _, number in tally.commits)
    fates = {"used": "in a commit", "aborted": "aborted by us", "unused": "discounted or refused", "dropped": "lost"}
    trained = sum(seconds[fate] for fate in fates)
    draw_virtual(tally, curve, folder / PICTURE, until_s=now_s)
    watch.lap("picture")
    screen.line(
        f"{versions} versions in {words.duration(now_s)} of virtual time"
        + (f", accuracy {curve[-1][1]:.1%}" if curve else "")
    )
    screen.line(
        f"updates: {updates:,}, {late:,} of them late; {tally.num_check_ins:,} check-ins, {tally.told_later:,} told later"
    )
    told = ", ".join(f"{seconds[fate] / trained:.1%} {text}" for fate, text in fates.items()) if trained else "none"
    screen.line(f"{words.duration(trained)} of training: {told}")
    if not versions:
        screen.say(
            f"no round was committed: `shoal runs show {folder}` says how they ended. More devices, or a smaller goal?"
        )
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"picture: {folder / PICTURE}")
    screen.line(f"run: {folder}")
    screen.document(
        {
            "versions": versions, "virtual_seconds": now_s, "updates": updates, "late": late,
            "check_ins": tally.num_check_ins, "told_later": tally.told_later, "device_seconds": dict(seconds),
            "wasted": tally.wasted, "accuracy": curve, "folder": str(folder), "total_seconds": watch.total,
        }
    )  # fmt: skip
