"""`shoal train`: trains a task on a mesh of accelerators."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.train_asked import Asked

EPILOG = options.examples(
    "shoal train task.py --data name:digits --epochs 5",
    "shoal train task.py --data name:fashion-mnist --epochs 3 --mesh data=8 --batch 1024",
    "shoal train task.py --data images.npz --steps 5000 --mesh data=4,model=2 --rule 'params/*/kernel=-,model'",
    "shoal train task.py --data images.npz --steps 5000 --mesh auto --machine h100",
    "shoal train task.py --data name:digits --epochs 10 --run runs/2026-01-31-digits --resume",
    "shoal train task.py --data images.npz --steps 5000 --workers 2 --checkpoint-every 100",
    "shoal train task.py --data images.npz --steps 5000 --workers 2 --servers 1",
    "shoal train task.py --data images.npz --steps 5000 --pods 2 --inner-steps 100",
)


def train(
    task: options.TaskName,
    data: Annotated[
        str, typer.Option("--data", help="Files of examples, or name:NAME, as for `shoal simulate`; users are joined.")
    ],
    epochs: Annotated[float | None, typer.Option("--epochs", min=0, help="Passes over the examples.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps, instead of --epochs.")] = None,
    mesh: Annotated[
        str,
        typer.Option(
            "--mesh", help="Axes and sizes, such as data=4,model=2; auto: proposed.", show_default="data=ALL DEVICES"
        ),
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
            show_default="sharded; with rules replicated",
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
    batch_norm_group: Annotated[
        int, typer.Option("--batch-norm-group", min=1, help="Members whose batch statistics are taken together.")
    ] = 1,
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
    machine: Annotated[
        str,
        typer.Option(
            "--machine",
            help="Whose numbers times are predicted with, such as h100 or tpu-v5e.",
            show_default="this one, measured",
        ),
    ] = "",
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            min=0,
            help="Processes on this machine that are watched, and started again.",
            show_default="this one alone",
        ),
    ] = 0,
    servers: Annotated[
        int,
        typer.Option(
            "--servers",
            min=0,
            help="Parameter servers: they hold the model, workers ask for it.",
            show_default="none: a mesh",
        ),
    ] = 0,
    staleness: Annotated[
        str,
        typer.Option(
            "--staleness", help="With --servers: steps a worker may be ahead of the slowest; any: nobody waits."
        ),
    ] = "0",
    ahead: Annotated[
        bool,
        typer.Option(
            "--ahead",
            help="With --servers: a step's parameters come while the step before is computed, without its update.",
        ),
    ] = False,
    order: Annotated[
        str,
        typer.Option(
            "--order", help="With --servers, which tensors go first: auto (what pays), tac, tic, layer, tree or random."
        ),
    ] = "auto",
    pods: Annotated[
        int,
        typer.Option(
            "--pods",
            min=0,
            help="Devices of DiLoCo on this machine, each with its part of the examples.",
            show_default="none: a sum every step",
        ),
    ] = 0,
    inner_steps: Annotated[
        int, typer.Option("--inner-steps", min=1, help="With --pods: steps of a pod from one average to the next.")
    ] = 100,
    fragments: Annotated[
        int, typer.Option("--fragments", min=1, help="With --pods: parts of the model that are averaged by turns.")
    ] = 1,
    goal: Annotated[
        int | None,
        typer.Option("--goal", min=1, help="With --pods: how many of them a round waits for.", show_default="all"),
    ] = None,
    late: Annotated[
        str,
        typer.Option(
            "--late", help="What updates of the others are worth: discard, discount:FACTOR:VERSIONS or patch:VERSIONS."
        ),
    ] = "discard",
    hosts: Annotated[
        int | None,
        typer.Option(
            "--hosts", min=1, help="Workers on all machines that the first start waits for.", show_default="--workers"
        ),
    ] = None,
    listen: Annotated[
        str, typer.Option("--listen", metavar="HOST:PORT", help="Workers of other machines join here.")
    ] = "",
    join: Annotated[
        str,
        typer.Option("--join", metavar="HOST:PORT", help="Bring this machine's workers to a pod that listens there."),
    ] = "",
    secret: Annotated[
        Path | None,
        typer.Option(
            "--secret", help="A file with the pod's secret, the same on all machines.", show_default="SHOAL_POD_SECRET"
        ),
    ] = None,
    run: options.RunFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run in --run, on any mesh.")] = False,
    json: options.AsJson = False,
) -> None:
    """Train a task on a mesh of accelerators.

    The members are the devices along the axis `data` (and `slow`): each takes the gradient of its share of the batch, and one compiled program adds
    them up. Other axes split tensors, by --rule. On a CPU the mesh's devices are made of it, so that any layout can be tried out.

    With --servers the model lies there, and --workers ask for it: tensors come in the order in which the step needs them, and each is updated when its gradient
    has arrived.

    With --pods each takes many steps by itself before the models are averaged (DiLoCo): rounds of a fleet, for links that are too slow for a sum every step.

    With --workers the training is done by processes that may die: with those that are left it goes on from the last checkpoint.
    """  # fmt: skip
    asked = Asked(
        task=task, data=data, epochs=epochs, steps=steps, mesh=mesh, rule=tuple(rule or ()), split_input=tuple(split_input or ()), update=update,
        sums=sums, batch=batch, accumulate=accumulate, steps_per_call=steps_per_call, window=window, remat=tuple(remat or ()),
        loss_scaling=loss_scaling, batch_norm_group=batch_norm_group, commit_every=commit_every, checkpoint_every=checkpoint_every,
        held_out=held_out, user_column=user_column, seed=seed, machine=machine, servers=servers, staleness=staleness, ahead=ahead, order=order, pods=pods, inner_steps=inner_steps,
        fragments=fragments, goal=goal, late=late, run=run, resume=resume, as_json=json,
    )  # fmt: skip
    asked.check()
    if pods:
        if workers or listen or join or hosts is not None or secret is not None:
            raise ValueError(
                "--workers, --hosts, --listen, --join and --secret are not for --pods: a pod is a device of a fleet."
            )
        from shoal.cli.train_pods import train_pods

        train_pods(asked)
    elif workers or listen or join:
        from shoal.cli.train_pod import supervise

        supervise(asked, workers=workers, hosts=hosts, listen=listen, join=join, secret=secret)
    else:
        if hosts is not None or secret is not None:
            raise ValueError("--hosts and --secret go with --workers, --listen or --join.")
        from shoal.cli.train_run import train_here

        train_here(asked)
