"""`shoal train`: trains a task on a mesh of accelerators."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from shoal.cli import options, words
from shoal.cli.failures import Stopped, command_line
from shoal.cli.screen import Screen, Stopwatch
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.data import Examples
    from shoal.pod.run import Schedule
    from shoal.pod.trainer import Trainer
    from shoal.record.store import Store
    from shoal.task import Task

EPILOG = options.examples(
    "shoal train task.py --data name:digits --epochs 5",
    "shoal train task.py --data name:fashion-mnist --epochs 3 --mesh data=8 --batch 1024",
    "shoal train task.py --data images.npz --steps 5000 --mesh data=4,model=2 --rule 'params/*/kernel=-,model'",
    "shoal train task.py --data name:digits --epochs 10 --run runs/2026-01-31-digits --resume",
)
TRIED_SIZES: Final = tuple(2**power for power in range(4, 14))


def train(
    task: options.TaskName,
    data: Annotated[
        str, typer.Option("--data", help="Examples: files or name:NAME, as for `shoal simulate`; users are joined.")
    ],
    epochs: Annotated[float | None, typer.Option("--epochs", min=0, help="Passes over the examples.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, instead of --epochs.")] = None,
    mesh: Annotated[
        str, typer.Option("--mesh", help="Axes and sizes, such as data=4,model=2.", show_default="data=ALL DEVICES")
    ] = "",
    rule: Annotated[
        list[str] | None,
        typer.Option(
            "--rule", help="How tensors are split: GLOB=WORDS, such as 'params/*/kernel=-,model'; several may be given."
        ),
    ] = None,
    split_input: Annotated[
        list[str] | None,
        typer.Option("--input", help="How an example's dimensions are split: FIELD=WORDS, such as image=space."),
    ] = None,
    update: Annotated[
        str,
        typer.Option(
            "--update",
            help="replicated, sharded (optimizer in pieces) or fully_sharded (parameters, too).",
            show_default="sharded",
        ),
    ] = "",
    sums: Annotated[str, typer.Option("--sums", help="What of gradients is sent: float32 or bfloat16.")] = "float32",
    batch: Annotated[
        str,
        typer.Option(
            "--batch",
            help="Examples of a step, of all members; auto: tries sizes, and says what it found.",
            show_default=options.AS_THE_TASK_SAYS,
        ),
    ] = "",
    accumulate: Annotated[
        int, typer.Option("--accumulate", min=1, help="Parts a member's share of a batch is taken in.")
    ] = 1,
    steps_per_call: Annotated[
        int | None,
        typer.Option(
            "--steps-per-call", min=1, help="Steps of one call of the program.", show_default=options.AS_THE_TASK_SAYS
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", min=1, help="Examples within which they are shuffled.", show_default="all")
    ] = None,
    remat: Annotated[
        list[str] | None,
        typer.Option(
            "--remat",
            help="Paths of the model, such as 'Decoder/block_*', whose activations are made again on the way back.",
        ),
    ] = None,
    loss_scaling: Annotated[bool, typer.Option("--loss-scaling", help="For models that compute in float16.")] = False,
    commit_every: Annotated[
        int | None,
        typer.Option("--commit-every", min=1, help="Steps from version to version.", show_default="an epoch"),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option("--checkpoint-every", min=1, help="Steps between checkpoints.", show_default="as versions"),
    ] = None,
    held_out: options.HeldOut = "",
    user_column: options.UserColumn = "",
    seed: Annotated[int, typer.Option("--seed", help="Of everything random in the run.")] = 0,
    run: options.RunFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run in --run, on any mesh.")] = False,
    json: options.AsJson = False,
) -> None:
    """Train a task on a mesh of accelerators.

    The members are the devices along the axis `data` (and `slow`): each takes the gradient of its share of the batch, and one compiled program adds
    them up. Other axes split tensors, by --rule. On a CPU the mesh's devices are made of it, so that any layout can be tried out.
    """  # fmt: skip
    with Told() as told:
        screen, watch = Screen(json=json), Stopwatch()
        if (epochs is None) == (steps is None):
            raise ValueError("Expected one of --epochs and --steps: how long is to be trained?")
        made = _load(task, mesh)
        told.check()
        watch.lap("start")
        examples, measured = _examples(made, data, held_out, user_column, screen)
        watch.lap("data")
        settings = {
            "rules": _pairs(rule, "--rule"), "inputs": _pairs(split_input, "--input"), "update": update, "sum_type": sums, "remat": remat or [],
            "accumulate": accumulate, "window": window, "scaling": loss_scaling,
        }  # fmt: skip
        trainer = _trainer(made, mesh, batch, steps_per_call, settings, examples, seed, screen)
        watch.lap("start")
        schedule = _schedule(trainer, len(examples), epochs, steps, commit_every, checkpoint_every)
        _say(trainer, schedule, len(examples), seed, screen)
        from shoal.cli import run_folder
        from shoal.record.lock import only_writer
        from shoal.record.sqlite import open_store

        found = run_folder.existing_run(run, kind="train") if resume else None
        folder = found.path if found is not None else run_folder.new_folder(run, made.name)
        if found is None:
            _begin(trainer, schedule, seed, folder, {"task": task, "data": data})
            watch.lap("plan")
        again = _again(task, data, steps=schedule.steps, commit_every=schedule.commit_every, mesh=mesh, folder=folder)
        with only_writer(folder):
            store = open_store(folder)
            try:
                run_id = found.run.id if found is not None else store.runs()[-1].id
                _run(
                    trainer,
                    store,
                    run_id,
                    examples,
                    measured,
                    schedule,
                    folder,
                    screen,
                    watch,
                    told,
                    command_line(again),
                )
            finally:
                store.close()


def _begin(trainer: "Trainer", schedule: "Schedule", seed: int, folder: Path, config: dict[str, Any]) -> None:
    from shoal.pod.run import begin
    from shoal.record.sqlite import open_store

    store = open_store(folder)
    try:
        begin(trainer, store, schedule, seed=seed, folder=folder, config=config)
    finally:
        store.close()


def _load(task: str, mesh: str) -> "Task":
    """The task; before it, as many devices as the mesh has, since JAX starts with it."""
    from shoal.cli.task_argument import load_task
    from shoal.plan.compile_cache import cache_folder, switch_on
    from shoal.pod.mesh import MeshSpec
    from shoal.pod.virtual_devices import make_virtual_devices

    if mesh:
        make_virtual_devices(MeshSpec.parse(mesh).num_devices)
    switch_on(cache_folder())
    return load_task(task)


def _trainer(
    task: "Task", mesh: str, batch: str, steps_per_call: int | None, settings: dict[str, Any], examples: "Examples", seed: int, screen: Screen
) -> "Trainer":  # fmt: skip
    from shoal.pod.auto_batch import try_batches
    from shoal.pod.loss_scaling import LossScaling
    from shoal.pod.trainer import Trainer
    from shoal.validate import one_of

    one_of(("float32", "bfloat16"), sums=settings["sum_type"])
    one_of(("", "replicated", "sharded", "fully_sharded"), update=settings["update"])
    if not (batch in ("", "auto") or (batch.isascii() and batch.isdigit() and int(batch))):
        raise ValueError(f"Expected --batch NUMBER or auto, got {batch!r}.")
    settings = settings | {
        "update": settings["update"] or None, "scaling": LossScaling() if settings["scaling"] else None, "mesh": mesh or None,
    }  # fmt: skip

    def made(size: int | None, steps_per_call: int | None) -> Trainer:
        return Trainer(task, batch_size=size, steps_per_call=steps_per_call, **settings)

    if batch != "auto":
        return made(int(batch) if batch else None, steps_per_call)
    members = made(None, 1).spec.num_members
    sizes = [size for size in TRIED_SIZES if size >= members and size % members == 0] or [members]
    trial = try_batches(lambda size: made(size, 1), examples, sizes, seed=seed)
    for line in trial.lines():
        screen.say(line)
    return made(trial.chosen, steps_per_call)


def _examples(
    task: "Task", data: str, held_out: str, user_column: str, screen: Screen
) -> "tuple[Examples, Examples | None]":
    from shoal.cli import data_argument

    examples = data_argument.open_joined(data, user_column=user_column)
    measured = data_argument.open_held_out(held_out, data_text=data, user_column=user_column)
    if measured is not None and not held_out and task.evaluate is None:
        screen.say("the task has no evaluate: versions are not evaluated on the test part of the data")
        measured = None
    return examples, measured


def _schedule(
    trainer: "Trainer", num_examples: int, epochs: float | None, steps: int | None, commit_every: int | None, checkpoint_every: int | None
) -> "Schedule":  # fmt: skip
    from shoal.pod.run import Schedule

    an_epoch = trainer.order(num_examples, seed=0).steps_per_epoch
    last = steps if steps is not None else max(1, round((epochs or 0) * an_epoch))
    return Schedule(steps=last, commit_every=commit_every or an_epoch, checkpoint_every=checkpoint_every)


def _say(trainer: "Trainer", schedule: "Schedule", num_examples: int, seed: int, screen: Screen) -> None:
    import jax

    from shoal.pod.order import mixing

    order = trainer.order(num_examples, seed=seed)
    devices = f"{words.count(trainer.spec.num_devices, f'{jax.default_backend()} device')}"
    screen.say(
        f"{words.count(num_examples, 'example')}, batches of {trainer.batch_size:,}: {words.count(order.steps_per_epoch, 'step')} an epoch, "
        f"{schedule.steps:,} in all, {words.count(schedule.versions, 'version')}"
    )
    update = trainer.program.update.replace("_", " ")
    screen.say(f"mesh {trainer.spec} ({devices}), update {update}, sums in {trainer.program.members.sum_type}")
    if order.window is not None:
        screen.say(
            f"shuffled within {order.window:,}: a batch lies {mixing(order):.2f} as far apart as one of a full shuffle"
        )


def _run(
    trainer: "Trainer", store: "Store", run_id: str, examples: "Examples", held_out: "Examples | None", schedule: "Schedule", folder: Path,
    screen: Screen, watch: Stopwatch, told: Told, again: str,
) -> None:  # fmt: skip
    from shoal.cli.run_summary import summarize
    from shoal.cli.train_lines import TrainLines
    from shoal.pod.run import go_on

    before, lines = summarize(store, run_id), TrainLines(trainer.batch_size, schedule.versions, screen)
    with screen.hearing("shoal.pod"):
        state = go_on(
            trainer, store, run_id, examples, schedule, held_out=held_out, folder=folder, on_version=lines.version,
            on_call=lines.call, should_stop=lambda step: bool(told.number),
        )  # fmt: skip
    if told.number:
        raise Stopped(f"stopped at step {int(state['step'])} of {schedule.steps}. Go on with: {again}", code=told.code)
    watch.lap("training")
    summary = summarize(store, run_id)
    inside = summary.seconds_since(before)
    others = {phase: s for phase, s in watch.seconds.items() if phase != "training"}
    rest = {"rest": max(0.0, watch.seconds["training"] - sum(inside.values()))}
    last = {name: value for name, value in summary.metrics.items()}
    screen.line(f"{summary.task} version {summary.version}: {words.values(last) or 'no metrics'}")
    screen.line(f"where the time went: {words.phases({**others, **inside, **rest}, total=watch.total)}")
    screen.line(f"run: {folder}")
    screen.document(
        summary.to_json()
        | {"folder": str(folder), "steps": int(state["step"]), "pod": trainer.settings(), "total_seconds": watch.total}
    )


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """`GLOB=WORDS` each."""
    made = {}
    for text in given or []:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"Expected {option} NAME=WORDS, such as 'params/*/kernel=-,model', got {text!r}.")
        made[name.strip()] = value.strip()
    return made


def _again(task: str, data: str, *, steps: int, commit_every: int, mesh: str, folder: Path) -> list[Any]:
    layout = ["--mesh", mesh] if mesh else []
    return [
        "shoal",
        "train",
        task,
        "--data",
        data,
        "--steps",
        str(steps),
        "--commit-every",
        str(commit_every),
        *layout,
        "--run",
        folder,
        "--resume",
    ]
