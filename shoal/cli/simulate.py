"""`shoal simulate`: trains a task on simulated devices in this process."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options, words
from shoal.cli.failures import Stopped, command_line
from shoal.cli.late_argument import parse_late
from shoal.cli.round_lines import RoundLines
from shoal.cli.screen import Screen, Stopwatch
from shoal.cli.stop_argument import parse_stop_when
from shoal.metric_names import without_tails
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.cli.run_summary import RunSummary
    from shoal.data import Examples, Population
    from shoal.record.store import Store
    from shoal.simulate.engine import RoundResult, Simulation
    from shoal.stop_when import StopWhen
    from shoal.task import Task

EPILOG = options.examples(
    "shoal simulate task.py --data name:digits --split dirichlet:0.3 --users 100 --rounds 10",
    "shoal simulate examples/one_task.py:task --data users/ --held-out test.npz --rounds 20 --goal 4",
    "shoal simulate examples/fashion.py --virtual examples/population.toml --hours 3 --late patch:5",
    "shoal simulate task.py --data visits.parquet --user-column patient --rounds 10",
    "shoal simulate task.py --data name:digits --users 100 --leave-out 0.2 --rounds 200 --stop-when left_out/accuracy:patience=20",
    "shoal simulate task.py --data name:digits --rounds 2000 --keep 100:1000",
    "shoal simulate --data users/ --run runs/2026-01-31-digits --resume --rounds 40",
)


def simulate(
    task: Annotated[
        str, typer.Argument(metavar="TASK", help="module:attribute or file.py:attribute; not needed with --resume.")
    ] = "",
    data: options.Data = "",
    user_column: options.UserColumn = "",
    rounds: options.Rounds = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random in the run.")] = 0,
    goal: options.Goal = None,
    held_out: options.HeldOut = "",
    split: options.Split = "iid",
    users: options.Users = 20,
    virtual: Annotated[
        Path | None,
        typer.Option("--virtual", help="A population (TOML): play a fleet of such devices under a virtual clock."),
    ] = None,
    hours: Annotated[
        float | None, typer.Option("--hours", min=0.01, help="With --virtual: virtual hours to play.")
    ] = None,
    late: options.Late = None,
    buffer: options.Buffer = None,
    concurrency: options.Concurrency = None,
    evaluate_every: Annotated[
        int, typer.Option("--evaluate-every", min=1, help="Versions between two evaluations.")
    ] = 1,
    backend: Annotated[
        str,
        typer.Option("--backend", help="fused: a cohort in one program; sequential: slower, with the bits of a fleet."),
    ] = "fused",
    leave_out: Annotated[
        list[str] | None,
        typer.Option(
            "--leave-out",
            help="Users who do not train, and are measured one by one: a share such as 0.1, or an id; several may be given.",
        ),
    ] = None,
    by_user: Annotated[
        bool, typer.Option("--by-user", help="Measure the users of --held-out one by one: how metrics are distributed.")
    ] = False,
    stop_when: Annotated[
        str,
        typer.Option(
            "--stop-when",
            help="End early: METRIC:reaches=VALUE or METRIC:patience=ROUNDS, or both with a comma; none lifts it on --resume.",
            show_default="at the last round",
        ),
    ] = "",
    run: options.RunFolder = None,
    keep: options.Keep = "",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run in --run.")] = False,
    json: options.AsJson = False,
) -> None:
    """Train a task on simulated devices.

    Each round draws members of the population, lets them train, all in one compiled program, and commits the next version
    by the very code of a fleet. The run is kept in a folder and can be taken up again: with TASK as fast as before,
    without it by the run's own copy of the task, one member after the other.
    """  # fmt: skip
    with Told() as told:  # from the first import on: they take seconds, and swallow what is raised in them
        from shoal.cli import data_argument, run_folder
        from shoal.cli.task_argument import load_task
        from shoal.plan.compile_cache import cache_folder, switch_on
        from shoal.record.lock import only_writer
        from shoal.record.retention import Retention
        from shoal.simulate.engine import own_config
        from shoal.simulate.layout import use_all_cores
        from shoal.validate import one_of

        told.check()
        screen, watch = Screen(json=json), Stopwatch()
        if virtual is not None:
            if leave_out or by_user or stop_when or keep:
                raise ValueError("--leave-out, --by-user, --stop-when and --keep are not for --virtual.")
            policy = {
                "goal": goal, "buffer": buffer, "concurrency": concurrency, "late": None if late is None else parse_late(late),
            }  # fmt: skip
            return _virtually(
                task, virtual, data, user_column, held_out, split, users, rounds=rounds, hours=hours, seed=seed, run=run, resume=resume,
                policy={name: value for name, value in policy.items() if value is not None}, evaluate_every=evaluate_every,
                screen=screen, watch=watch,
            )  # fmt: skip
        if hours or late or buffer or concurrency:
            raise ValueError(
                "--hours, --late, --buffer and --concurrency go with --virtual: else no device is ever late."
            )
        if not data:
            raise ValueError("Expected --data PATH (or --data name:digits): whose examples are to be trained on?")
        if resume and (goal or seed or keep):
            raise ValueError("With --resume --goal, --seed and --keep are those of the run: leave them out.")
        one_of(("fused", "sequential"), backend=backend)
        rule = parse_stop_when(stop_when) if stop_when else None
        retention = Retention.parse(keep) if keep else None
        if not resume and not (task and rounds):
            missing = " and ".join(name for name, given in (("TASK", task), ("--rounds N", rounds)) if not given)
            raise ValueError(f"Expected {missing} for a new run, or --resume --run DIR to go on with one.")
        use_all_cores()
        switch_on(cache_folder())
        made = load_task(task) if task else None
        told.check()
        population = data_argument.open_data(data, split=split, users=users, user_column=user_column)
        open_held_out = data_argument.open_held_out_users if by_user else data_argument.open_held_out
        examples = open_held_out(held_out, data_text=data, user_column=user_column)
        watch.lap("data")
        screen.say(
            f"{words.count(sum(population.sizes().values()), 'example')} of {words.count(len(population), 'user')}"
        )
        found = run_folder.existing_run(run, kind="simulate") if resume else None
        seed = int(found.run.config["seed"]) if found is not None else seed
        population, left_out = data_argument.shut_out(population, leave_out or [], seed=seed)
        if left_out is not None:
            screen.say(f"{words.count(len(left_out), 'user')} left out of training")
        about = _changed(
            split,
            users,
            held_out,
            user_column,
            by_user=by_user,
            leave_out=leave_out or [],
            evaluate_every=evaluate_every,
        )
        if found is not None:
            folder, run_id = found.path, found.run.id  # how large its rounds are is the run's affair
        else:
            assert made is not None
            made = _with_goal(made, goal, screen)
            config = own_config(population, left_out, rule, retention) | {
                "task": task,
                "data": " ".join([data, *about]),
            }
            folder, run_id = _begin(made, rounds or 0, seed, run, config), ""
            watch.lap("plan")
        as_before = [] if backend == "fused" else ["--backend", backend]
        again = ["--data", data, *about, *as_before, "--run", folder, "--resume"]
        go_on = command_line(["shoal", "simulate", *([task] if task else []), *again])
        with only_writer(folder):
            if found is not None and stop_when:
                _set_stop_when(folder, run_id, rule)
            _train(
                folder, run_id, rounds or 0, population, examples, left_out, evaluate_every, screen, watch, go_on,
                told=told, asked=bool(held_out), task=made if backend == "fused" else None,
            )  # fmt: skip


def _virtually(
    task: str, file: Path, data: str, user_column: str, held_out: str, split: str, users: int, *, rounds: int | None,
    hours: float | None, seed: int, run: Path | None, resume: bool, policy: dict[str, Any], evaluate_every: int, screen: Screen, watch: Stopwatch,
) -> None:  # fmt: skip
    from shoal.cli import data_argument
    from shoal.cli.virtual import simulate_virtually

    if resume:
        raise ValueError("A virtual fleet cannot be resumed: leave out --resume; the same --seed plays the same again.")
    if not task or not (rounds or hours):
        raise ValueError("Expected TASK and --rounds or --hours with --virtual.")
    population = None
    if data:
        population = data_argument.open_data(data, split=split, users=users, user_column=user_column)
    examples = data_argument.open_held_out(held_out, data_text=data, user_column=user_column) if data else None
    watch.lap("data")
    simulate_virtually(
        task, file, population, examples, rounds=rounds, hours=hours, policy=policy, evaluate_every=evaluate_every,
        seed=seed, run=run, screen=screen, watch=watch,
    )  # fmt: skip


def _with_goal(task: "Task", goal: int | None, screen: Screen) -> "Task":
    from shoal.simulate.engine import with_goal

    if not goal:
        return task
    if goal < task.rounds.minimum_group:
        screen.say(f"the smallest group is lowered from {task.rounds.minimum_group} to {goal}: fit for simulation only")
    return with_goal(task, goal)


def _begin(task: "Task", rounds: int, seed: int, run: Path | None, config: dict[str, Any]) -> Path:
    """Builds the plan and begins the run; returns its folder."""
    from shoal.cli import run_folder
    from shoal.fleet.keys import HostKeys
    from shoal.plan.build import build
    from shoal.plan.run_plan import begin_run
    from shoal.record.sqlite import open_store

    folder = run_folder.new_folder(run, task.name)
    built = build(task, seed=seed)
    plan = built.plan.sign(HostKeys.load_or_make(folder).signing)
    store = open_store(folder)
    try:
        begin_run(store, plan, built.model, kind="simulate", rounds=rounds, seed=seed, config=config)
    finally:
        store.close()
    return folder


def _set_stop_when(folder: Path, run_id: str, rule: "StopWhen | None") -> None:
    from shoal.record.sqlite import open_store
    from shoal.simulate.stopping import keep_stop_when

    store = open_store(folder)
    try:
        keep_stop_when(store, run_id, rule)
    finally:
        store.close()


def _train(
    folder: Path, run_id: str, rounds: int, population: "Population", examples: "Examples | Population | None",
    left_out: "Population | None", evaluate_every: int, screen: Screen, watch: Stopwatch, go_on_with: str, *, told: Told,
    asked: bool, task: "Task | None",
) -> None:  # fmt: skip
    from shoal.cli.run_summary import summarize
    from shoal.errors import PlanError, StoreError
    from shoal.plan.run_plan import load_plan
    from shoal.record.sqlite import open_store
    from shoal.simulate.engine import go_on

    store = open_store(folder)
    try:
        is_new = not run_id
        run_id = run_id or store.runs()[-1].id
        first = store.last_version(run_id) or 0
        last = rounds or int(store.run(run_id).config["rounds"])
        if examples is not None and not asked and not load_plan(store, run_id).plan.manifest.variants("evaluate"):
            screen.say("the task has no evaluate: versions are not evaluated on the test part of the data")
            examples = None
        before, progress = summarize(store, run_id), RoundLines(first, last, screen)

        def on_round(result: "RoundResult") -> None:
            progress(result)
            told.check()

        try:
            with screen.hearing("shoal.simulate"):
                made = go_on(
                    store, run_id, population, rounds=last, held_out=examples, left_out=left_out,
                    evaluate_every=evaluate_every, folder=folder, on_round=on_round, task=task, is_its_task=is_new,
                )  # fmt: skip
        except KeyboardInterrupt:
            version = store.last_version(run_id)
            text = f"stopped at version {version} of {last}. Go on with: {go_on_with}"
            raise Stopped(text, code=told.code) from None
        except (PlanError, StoreError):  # the same command would be refused again
            raise
        except Exception:
            if version := store.last_version(run_id):
                screen.say(f"version {version} of {last} is kept. Once this is mended, go on with: {go_on_with}")
            raise
        watch.lap("rounds")
        _tell(store, before, made, folder, screen, watch)
    finally:
        store.close()


def _tell(
    store: "Store", before: "RunSummary", made: "Simulation", folder: Path, screen: Screen, watch: Stopwatch
) -> None:
    from shoal.cli import over_users_section
    from shoal.cli.run_summary import summarize

    summary = summarize(store, made.run_id)
    # The members' phases lie within the rounds; what the rounds took beside them is the rest.
    inside = summary.seconds_since(before)
    others = {phase: s for phase, s in watch.seconds.items() if phase != "rounds"}
    rest = {"rest": max(0.0, watch.seconds["rounds"] - sum(inside.values()))}
    last = made.history[-1].metrics if made.history else _metrics_of(store, made.run_id, made.version)
    screen.line(f"{summary.task} version {made.version}: {words.values(without_tails(last)) or 'no metrics'}")
    if made.stopped_early:
        screen.line(f"ended early: {made.stopped_early}")
    users = over_users_section.show(store, made.run_id, screen)
    screen.line(f"where the time went: {words.phases({**others, **inside, **rest}, total=watch.total)}")
    screen.line(f"run: {folder}")
    document: dict[str, Any] = summary.to_json() | {"folder": str(folder), "total_seconds": watch.total}
    rounds = [{"version": r.version, "seconds": r.seconds, "metrics": dict(r.metrics)} for r in made.history]
    document |= {"rounds": rounds, "stopped_early": made.stopped_early, "over_users": users}
    screen.document(document)


def _metrics_of(store: "Store", run_id: str, version: int) -> dict[str, float]:
    """The metrics of the round that made a version, and of that version where it was measured."""
    rows = [row for row in store.metrics(run_id) if row.scope != "class"]
    found = {row.name: row.value for row in rows if row.version + (row.scope == "cohort") == version}
    return dict(sorted(found.items(), key=lambda item: ("/" in item[0], item[0])))


def _changed(
    split: str,
    users: int,
    held_out: str,
    user_column: str,
    *,
    by_user: bool,
    leave_out: list[str],
    evaluate_every: int = 1,
) -> list[str]:
    """The options about data that are not as if left out."""
    return [
        *(["--user-column", user_column] if user_column else []),
        *(["--split", split] if split != "iid" else []),
        *(["--users", str(users)] if users != 20 else []),
        *(["--held-out", held_out] if held_out else []),
        *(["--by-user"] if by_user else []),
        *(part for each in leave_out for part in ("--leave-out", each)),
        *(["--evaluate-every", str(evaluate_every)] if evaluate_every != 1 else []),
    ]
