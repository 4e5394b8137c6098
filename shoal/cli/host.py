"""`shoal host`: serves one task to a fleet. The process imports no JAX; the plan is built by a short-lived one."""

import ipaddress
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.late_argument import parse_late
from shoal.cli.screen import Screen, Stopwatch

if TYPE_CHECKING:
    from shoal.cli.host_process import Settings

EPILOG = options.examples(
    "shoal host task.py --rounds 20 --port 8500 --run runs/digits",
    "shoal host task.py --rounds 20 --port 8500 --goal 8 --held-out name:digits",
    "shoal host task.py --rounds 20 --address 0.0.0.0 --port 8500 --tls",
    "shoal host --resume --run runs/digits --port 8500",
)


def host(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(metavar="TASK", help="module:attribute or file.py:attribute; not needed with --resume."),
    ] = None,
    rounds: options.Rounds = None,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Where to listen; 0: any free port.")] = 8500,
    address: Annotated[str, typer.Option("--address", help="Interface to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    run: options.RunFolder = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run in --run.")] = False,
    goal: options.Goal = None,
    minimum_group: Annotated[
        int | None,
        typer.Option(
            "--minimum-group",
            min=1,
            help="Fewest updates in a sum that anybody sees.",
            show_default=options.AS_THE_TASK_SAYS,
        ),
    ] = None,
    over_selection: Annotated[
        float | None,
        typer.Option(
            "--over-selection",
            min=1.0,
            help="Devices selected for each update wanted.",
            show_default=options.AS_THE_TASK_SAYS,
        ),
    ] = None,
    selection_window: Annotated[
        float | None,
        typer.Option(
            "--selection-window", help="Longest wait for devices, in seconds.", show_default=options.AS_THE_TASK_SAYS
        ),
    ] = None,
    reporting_window: Annotated[
        float | None,
        typer.Option(
            "--reporting-window", help="Longest wait for updates, in seconds.", show_default=options.AS_THE_TASK_SAYS
        ),
    ] = None,
    late: options.Late = None,
    buffer: options.Buffer = None,
    concurrency: options.Concurrency = None,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random in the run.")] = 0,
    held_out: options.HeldOut = "",
    tls: Annotated[bool, typer.Option("--tls", help="Encrypt, with a certificate made for this run.")] = False,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="PEM file of the server's certificate chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file of the server's key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening on a network without TLS.")] = False,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Write HOST:PORT there once devices can come.")
    ] = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="End when the process that started this one ends.")
    ] = False,
    json: options.AsJson = False,
) -> None:
    """Serve a task to a fleet of devices.

    The run is kept in a folder; after Ctrl-C, a kill or a crash `--resume` goes on from the last version without the
    task's source, and devices that still hold work are welcome.
    """  # fmt: skip
    from shoal.cli.ending import end_with_parent

    parent = end_with_parent() if with_parent else 0
    screen, watch = Screen(json=json), Stopwatch()
    _check_tls(address, tls=tls, cert=tls_cert, key=tls_key, insecure=insecure)
    policy: dict[str, Any] = {
        "goal": goal, "minimum_group": minimum_group, "over_selection": over_selection,
        "selection_window_s": selection_window, "reporting_window_s": reporting_window, "buffer": buffer,
        "concurrency": concurrency, "late": None if late is None else parse_late(late).to_json(),
    }  # fmt: skip
    policy = {name: value for name, value in policy.items() if value is not None}
    task = _one_task(tasks or [], resume=resume, rounds=rounds, own={**policy, **({"seed": seed} if seed else {})})
    _check_port(address, port)

    from shoal.cli import host_process

    if resume:
        from shoal.cli.run_folder import existing_run

        if task:
            screen.say(f"the run has its own copy of the task: {task} is not read")
        found = existing_run(run, kind="host")
        folder, run_id = found.path, found.run.id
    else:
        folder, run_id = host_process.begin(task, rounds=rounds or 0, seed=seed, policy=policy, run=run, screen=screen)
        watch.lap("plan")
    settings: Settings = host_process.Settings(
        folder=folder, run_id=run_id, rounds=rounds, address=address, port=port, held_out=held_out,
        ready_file=ready_file, make_tls=tls, tls_cert=tls_cert, tls_key=tls_key, resumed=resume,
    )  # fmt: skip
    host_process.run(settings, screen=screen, watch=watch, parent=parent)


def _one_task(tasks: list[str], *, resume: bool, rounds: int | None, own: dict[str, Any]) -> str:
    if len(tasks) > 1:
        raise ValueError(
            f"Expected one TASK, got {len(tasks)}: this version serves one task a host. Start one host for each, on ports of their own."
        )
    if resume and own:
        given = ", ".join(f"--{name.removesuffix('_s').replace('_', '-')}" for name in own)
        raise ValueError(f"With --resume the settings are those of the run: leave out {given}.")
    if not resume and not (tasks and rounds):
        raise ValueError("Expected TASK and --rounds for a new run, or --resume --run DIR to go on with one.")
    return tasks[0] if tasks else ""


def _check_tls(address: str, *, tls: bool, cert: Path | None, key: Path | None, insecure: bool) -> None:
    if (cert is None) != (key is None):
        raise ValueError("Expected --tls-cert and --tls-key together.")
    if tls and cert is not None:
        raise ValueError(
            "Expected --tls (a certificate is made) or --tls-cert and --tls-key (yours is used), not both."
        )
    if not (tls or cert or insecure or is_loopback(address)):
        raise ValueError(
            f"Refused to listen on {address} without encryption. Add --tls, or --tls-cert and --tls-key; --insecure if the "
            "network is trusted."
        )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _check_port(address: str, port: int) -> None:
    """A port that is taken is found out before a plan is built and a run begun."""
    if not port:
        return
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except socket.gaierror as error:
        raise ValueError(
            f"Expected --address to be an address of this machine, got {address!r}: {error.strerror}."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Cannot listen on {address}:{port}: {(error.strerror or str(error)).lower()}. Choose another with --port, or --port 0 for any "
            "free one."
        ) from error
