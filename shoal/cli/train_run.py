"""One process's part of `shoal train`: alone, or as a worker of a pod (`train_pod.py`), of which the first writes the record."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from shoal.cli import words
from shoal.cli.failures import Stopped, command_line
from shoal.cli.screen import Screen, Stopwatch
from shoal.cli.train_asked import Asked
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.data import Examples
    from shoal.pod.mesh import MeshSpec
    from shoal.pod.run import Schedule
    from shoal.pod.servers.trainer import ServerTrainer
    from shoal.pod.trainer import Trainer
    from shoal.pod.training import Watch
    from shoal.pod.worker import Worker
    from shoal.record.store import Store
    from shoal.task import Task

TRIED_SIZES: Final = tuple(2**power for power in range(4, 14))
AUTO: Final = "auto"


def train_here(asked: Asked) -> None:
    """In this process."""
    with Told() as told:
        screen, watch = Screen(json=asked.as_json), Stopwatch()
        prepared = _prepared(asked, 1, screen, watch)
        told.check()
        from shoal.cli import run_folder

        folder = run_folder.existing_run(asked.run, kind="train").path if asked.resume else None
        folder = folder or run_folder.new_folder(asked.run, prepared.trainer.task.name)
        _first(prepared, folder, screen, watch, None)


def train_in_pod(asked: Asked, pod: "Worker", folder: Path, hosts: int) -> None:
    """As a worker, with `jax.distributed` joined already. Its folder, which all see, may hold the run or not yet.

    `hosts`: for so many the mesh was asked for.
    """
    import jax

    screen, watch = Screen(json=asked.as_json), Stopwatch()
    is_first = jax.process_index() == 0
    prepared = _prepared(asked, hosts, screen, watch, is_first=is_first, folder=folder)
    if is_first:
        _first(prepared, folder, screen, watch, pod)
        return
    from shoal.pod.run import checkpoints_folder
    from shoal.pod.training import Watch

    schedule = prepared.schedule
    prepared.trainer.train(
        prepared.examples, steps=schedule.steps, commit_every=schedule.commit_every, checkpoint_every=schedule.checkpoint_every,
        seed=asked.seed, held_out=prepared.held_out, folder=checkpoints_folder(folder), watch=Watch(pod=pod),
    )  # fmt: skip


@dataclass(frozen=True)
class _Prepared:
    """A training that can begin."""

    asked: Asked
    trainer: "Trainer | ServerTrainer"
    examples: "Examples"
    held_out: "Examples | None"
    schedule: "Schedule"


def _prepared(
    asked: Asked, hosts: int, screen: Screen, watch: Stopwatch, *, is_first: bool = True, folder: Path | None = None
) -> _Prepared:
    task = _load(asked, hosts)
    watch.lap("start")
    examples, held_out = _examples(task, asked, screen)
    watch.lap("data")
    say = screen.say if is_first else lambda text: None
    trainer = _with_servers(task, asked, say) if asked.servers else _trainer(task, asked, examples, say, folder)
    schedule = _schedule(trainer, len(examples), asked)
    if is_first:
        _say(trainer, schedule, len(examples), asked.seed, screen)
    watch.lap("start")
    return _Prepared(asked, trainer, examples, held_out, schedule)


def _load(asked: Asked, hosts: int) -> "Task":
    """The task; before it, as many devices as this process's part of the mesh has, since JAX starts with it."""
    from shoal.cli.task_argument import load_task
    from shoal.plan.compile_cache import cache_folder, switch_on
    from shoal.pod.mesh import MeshSpec
    from shoal.pod.virtual_devices import make_virtual_devices
    from shoal.simulate.layout import use_all_cores

    if asked.mesh == AUTO:
        use_all_cores()
    elif asked.mesh:
        make_virtual_devices(max(1, MeshSpec.parse(asked.mesh).num_devices // hosts))
    switch_on(cache_folder())
    return load_task(asked.task)


def _examples(task: "Task", asked: Asked, screen: Screen) -> "tuple[Examples, Examples | None]":
    from shoal.cli import data_argument

    examples = data_argument.open_joined(asked.data, user_column=asked.user_column)
    held_out = data_argument.open_held_out(asked.held_out, data_text=asked.data, user_column=asked.user_column)
    if held_out is not None and not asked.held_out and task.evaluate is None:
        screen.say("the task has no evaluate: versions are not evaluated on the test part of the data")
        held_out = None
    return examples, held_out


def _trainer(task: "Task", asked: Asked, examples: "Examples", say: Any, folder: Path | None) -> "Trainer":
    from shoal.pod.auto_batch import try_batches
    from shoal.pod.loss_scaling import LossScaling
    from shoal.pod.run import checkpoints_folder
    from shoal.pod.self_check import kept_way
    from shoal.pod.trainer import Trainer

    mesh, update = _mesh(task, asked, say)
    settings: dict[str, Any] = {
        "mesh": mesh, "rules": asked.rules, "inputs": asked.inputs, "update": update, "sum_type": asked.sums, "accumulate": asked.accumulate,
        "sums_by": kept_way(checkpoints_folder(folder)) if folder else None,
        "window": asked.window, "remat": asked.remat, "group": asked.batch_norm_group, "scaling": LossScaling() if asked.loss_scaling else None,
    }  # fmt: skip
    if asked.batch != AUTO:
        size = int(asked.batch) if asked.batch else None
        return Trainer(task, batch_size=size, steps_per_call=asked.steps_per_call, **settings)
    members = Trainer(task, steps_per_call=1, **settings).spec.num_members
    sizes = [size for size in TRIED_SIZES if size >= members and size % members == 0] or [members]
    trial = try_batches(
        lambda size: Trainer(task, batch_size=size, steps_per_call=1, **settings), examples, sizes, seed=asked.seed
    )
    for line in trial.lines():
        say(line)
    return Trainer(task, batch_size=trial.chosen, steps_per_call=asked.steps_per_call, **settings)


def _with_servers(task: "Task", asked: Asked, say: Any) -> "ServerTrainer":
    import jax

    from shoal.plan.compile_cache import cache_folder
    from shoal.pod.servers.trainer import ServerTrainer

    processes = jax.process_count()
    workers = 1 if processes == 1 else processes - asked.servers
    size = int(asked.batch) if asked.batch else None
    trainer = ServerTrainer(
        task, workers=workers, servers=asked.servers, staleness=asked.steps_ahead, ahead=asked.ahead, order=asked.order, batch_size=size, window=asked.window,  # type: ignore[arg-type]
        choices=cache_folder() / "transfers",
    )  # fmt: skip
    say(f"{words.count(workers, 'worker')}, {words.count(asked.servers, 'server')}")
    for line in trainer.lines():
        say(line)
    return trainer


def _mesh(task: "Task", asked: Asked, say: Any) -> "tuple[MeshSpec | None, Any]":
    """The mesh for the devices there are, and the kind of update."""
    import jax

    from shoal.pod.auto_mesh import best, lines, proposals
    from shoal.pod.mesh import MeshSpec

    update = asked.update or None
    if not asked.mesh:
        return None, update
    if asked.mesh != AUTO:
        spec = MeshSpec.parse(asked.mesh)
        return (spec.fitted(len(jax.devices()), jax.process_count()) if jax.process_count() > 1 else spec), update
    updates: dict[str, Any] = {} if update is None else {"updates": (update,)}
    found = proposals(
        task, len(jax.devices()), _machine(asked), rules=asked.rules, num_processes=jax.process_count(), sum_type=asked.sums,  # type: ignore[arg-type]
        batch_size=int(asked.batch) if asked.batch.isdigit() else None, **updates,
    )  # fmt: skip
    chosen = best(found)
    for line in lines(found):
        say(line)
    return chosen.mesh, chosen.update


def _machine(asked: Asked) -> Any:
    from shoal.pod.machine import Machine

    return Machine.named(asked.machine) if asked.machine else Machine.measured()


def _schedule(trainer: "Trainer | ServerTrainer", num_examples: int, asked: Asked) -> "Schedule":
    from shoal.pod.run import Schedule

    an_epoch = trainer.order(num_examples, seed=0).steps_per_epoch
    last = asked.steps if asked.steps is not None else max(1, round((asked.epochs or 0) * an_epoch))
    return Schedule(steps=last, commit_every=asked.commit_every or an_epoch, checkpoint_every=asked.checkpoint_every)


def _say(
    trainer: "Trainer | ServerTrainer", schedule: "Schedule", num_examples: int, seed: int, screen: Screen
) -> None:
    from shoal.pod.order import mixing

    order = trainer.order(num_examples, seed=seed)
    screen.say(
        f"{words.count(num_examples, 'example')}, {words.count(order.steps_per_epoch, 'step')} an epoch, {schedule.steps:,} in all, "
        f"{words.count(schedule.versions, 'version')}"
    )
    if order.window is not None:
        screen.say(
            f"shuffled within {order.window:,}: a batch lies {mixing(order):.2f} as far apart as one of a full shuffle"
        )


def _first(prepared: _Prepared, folder: Path, screen: Screen, watch: Stopwatch, pod: "Worker | None") -> None:
    """Trains, and writes the record; begins it where there is none."""
    import jax

    from shoal.fleet.keys import HostKeys
    from shoal.pod.run import begin, checkpoints_folder
    from shoal.pod.self_check import keep_way
    from shoal.pod.trainer import Trainer
    from shoal.record.lock import only_writer
    from shoal.record.sqlite import DATABASE_NAME, open_store

    asked, trainer, schedule = prepared.asked, prepared.trainer, prepared.schedule
    is_new = not (folder / DATABASE_NAME).exists()
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(only_writer(folder))
        if isinstance(trainer, Trainer) and jax.process_count() > 1:
            keep_way(checkpoints_folder(folder), trainer.program.members.how)
        store = open_store(folder)
        stack.callback(store.close)
        if is_new or not store.runs():
            config = {"task": asked.task, "data": asked.data}
            signing = HostKeys.load_or_make(folder).signing
            run_id = begin(trainer, store, schedule, seed=asked.seed, signing=signing, config=config)
            watch.lap("plan")
        else:
            run_id = store.runs()[-1].id
        again = asked.settled(steps=schedule.steps, commit_every=schedule.commit_every, batch_size=trainer.batch_size)
        _run(prepared, store, run_id, folder, screen, watch, pod, command_line(again.command(folder)))


def _run(
    prepared: _Prepared, store: "Store", run_id: str, folder: Path, screen: Screen, stopwatch: Stopwatch, pod: "Worker | None", again: str
) -> None:  # fmt: skip
    from shoal.cli.run_summary import summarize
    from shoal.pod.run import go_on

    trainer, schedule, before = prepared.trainer, prepared.schedule, summarize(store, run_id)
    with screen.hearing("shoal.pod"), Told(is_patient=True) as told:
        watch = _watch(prepared, screen, told, pod)
        state = go_on(
            trainer, store, run_id, prepared.examples, schedule, held_out=prepared.held_out, folder=folder, watch=watch
        )
    if told.number:
        text = f"stopped at step {int(state['step'])} of {schedule.steps}, which is kept. Go on with: {again}"
        raise Stopped(text, code=told.code)
    stopwatch.lap("training")
    summary = summarize(store, run_id)
    inside = summary.seconds_since(before)
    others = {phase: s for phase, s in stopwatch.seconds.items() if phase != "training"}
    rest = {"rest": max(0.0, stopwatch.seconds["training"] - sum(inside.values()))}
    screen.line(f"{summary.task} version {summary.version}: {words.values(summary.metrics) or 'no metrics'}")
    for line in trainer.told():
        screen.line(line)
    screen.line(f"where the time went: {words.phases({**others, **inside, **rest}, total=stopwatch.total)}")
    screen.line(f"run: {folder}")
    more = {
        "folder": str(folder),
        "steps": int(state["step"]),
        "pod": trainer.settings(),
        "total_seconds": stopwatch.total,
    }
    screen.document(summary.to_json() | more)


def _watch(prepared: _Prepared, screen: Screen, told: Told, pod: "Worker | None") -> "Watch":
    from shoal.cli.train_lines import TrainLines
    from shoal.pod.training import Watch

    lines = TrainLines(prepared.trainer.batch_size, prepared.schedule.versions, screen)
    said: list[bool] = []

    def describe(made: Any, call: Any) -> None:
        if not said:  # later ones differ in their number of steps alone
            from shoal.pod.describe import describe
            from shoal.pod.trainer import Trainer

            assert isinstance(prepared.trainer, Trainer)
            found = describe(prepared.trainer.program, call.batches, _machine(prepared.asked), made=made)
            for line in found.lines():
                screen.say(line)
        said.append(True)

    joined = {} if pod is None else {"pod": pod}
    return Watch(
        on_made=describe,
        on_call=lines.call,
        on_version=lines.version,
        should_stop=lambda step: bool(told.number),
        **joined,
    )
