"""`shoal host`: serves tasks to a fleet. The process imports no JAX; plans are built by short-lived ones."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import options
from shoal.cli.host_asked import Asked, parse_each
from shoal.cli.host_checks import check_client_ca, check_helper, check_port, check_tls, wants_tls
from shoal.cli.late_argument import parse_late
from shoal.cli.screen import Screen, Stopwatch
from shoal.fleet.entrance import PER_ADDRESS
from shoal.fleet.proxy import is_loopback

if TYPE_CHECKING:
    from shoal.cli.host_process import Settings

EPILOG = options.examples(
    "shoal host task.py --rounds 20 --port 8500 --run runs/digits",
    "shoal host task.py --rounds 20 --port 8500 --goal 8 --held-out name:digits",
    "shoal host task.py --rounds 20 --address 0.0.0.0 --port 8500 --members-only",
    "shoal host digits.py words.py --rounds 20 --weight digits=3 --set words.goal=10",
    "shoal host task.py --rounds 20 --port 8500 --edges 4",
    "shoal host task.py --rounds 20 --port 8500 --iree x86_64-linux --iree aarch64-linux-android",
    "shoal host task.py --rounds 1000 --port 8500 --telemetry helper.example.org:8600 --telemetry-ca helper.pem",
    "shoal host --resume --run runs/digits --port 8500",
)


def host(
    tasks: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TASK…", help="module:attribute or file.py:attribute, one or several; not needed with --resume."
        ),
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
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="TASK.NAME=VALUE", help="A setting of one task: rounds or one of the options above."
        ),
    ] = None,
    weight: Annotated[
        list[str] | None, typer.Option("--weight", metavar="TASK=NUMBER", help="A task's share of the devices; else 1.")
    ] = None,
    order: Annotated[
        bool, typer.Option("--order", help="Devices go to the first task that wants some, not by weight.")
    ] = False,
    population: Annotated[
        list[str] | None,
        typer.Option("--population", metavar="NAME | TASK=NAME", help="The devices that serve; else `default`."),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="Of everything random in the run.", show_default="0; with secure groups another each time"
        ),
    ] = None,
    events_kept: Annotated[
        int | None,
        typer.Option("--events-kept", min=0, help="Newest rounds that `shoal replay` can show.", show_default="100"),
    ] = None,
    keep: options.Keep = "",
    iree: Annotated[
        list[str] | None,
        typer.Option(
            "--iree",
            metavar="TARGET",
            help="Compile the plan for devices without JAX, too: x86_64-linux | x86_64-linux-avx512 | aarch64-linux | aarch64-linux-android (docs/devices.md). May be repeated.",
        ),
    ] = None,
    held_out: options.HeldOut = "",
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="Encrypt, with a certificate made for this run.",
            show_default="where other machines reach the host",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="PEM file of the server's certificate chain.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="PEM file of the server's key.")] = None,
    client_ca: Annotated[
        Path | None,
        typer.Option("--client-ca", help="PEM file of an authority: only devices with a certificate of it come in."),
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Allow listening on a network without TLS.")] = False,
    members_only: Annotated[
        bool,
        typer.Option("--members-only", help="Serve only devices that were invited, and go on doing so (shoal invite)."),
    ] = False,
    per_address: Annotated[
        int,
        typer.Option(
            "--per-address",
            min=1,
            help="Most sessions of one network address at once, and new ones of it a minute.",
        ),
    ] = PER_ADDRESS,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Write HOST:PORT there once devices can come.")
    ] = None,
    with_parent: Annotated[
        bool, typer.Option("--with-parent", help="End when the process that started this one ends.")
    ] = False,
    edges: Annotated[
        int, typer.Option("--edges", min=0, max=64, help="Processes of their own that hold devices' sessions.")
    ] = 0,
    edge_port: Annotated[
        int | None,
        typer.Option("--edge-port", min=0, max=65535, help="Where Edges attach (`shoal edge`); 0: any free port."),
    ] = None,
    edge_address: Annotated[
        str, typer.Option("--edge-address", help="Interface where Edges attach; 0.0.0.0 for other machines.")
    ] = "127.0.0.1",
    telemetry: Annotated[
        str,
        typer.Option(
            "--telemetry",
            metavar="HOST:PORT",
            help="Take devices' telemetry; the helper there opens its sums (docs/telemetry.md).",
        ),
    ] = "",
    telemetry_ca: Annotated[
        Path | None,
        typer.Option("--telemetry-ca", help="PEM file of the authority that signed the helper's certificate."),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Serve tasks to a fleet of devices.

    The runs are kept in a folder; after Ctrl-C, a kill or a crash `--resume` goes on from the last versions without the
    tasks' source, and devices that still hold work are welcome.
    """  # fmt: skip
    from shoal.cli.ending import end_with_parent

    parent = end_with_parent() if with_parent else 0
    screen, watch = Screen(json=json), Stopwatch()
    tls = wants_tls(address, edge_address, tls=tls, cert=tls_cert, insecure=insecure)
    check_tls(address, tls=tls, cert=tls_cert, key=tls_key, insecure=insecure)
    check_client_ca(client_ca, tls=tls or tls_cert is not None)
    policy: dict[str, Any] = {
        "goal": goal, "minimum_group": minimum_group, "over_selection": over_selection,
        "selection_window_s": selection_window, "reporting_window_s": reporting_window, "buffer": buffer,
        "concurrency": concurrency, "late": None if late is None else parse_late(late).to_json(),
    }  # fmt: skip
    asked = Asked(
        tasks=tuple(tasks or ()), rounds=rounds, seed=seed, order=order,
        policy={name: value for name, value in policy.items() if value is not None},
        each=parse_each(set_ or [], weight or [], population or []), events_kept=events_kept, keep=keep,
        iree=tuple(iree or ()),
    )  # fmt: skip
    asked.check(resume=resume)
    if len(asked.tasks) > 1 and (edges or edge_port is not None):
        raise ValueError("Expected one TASK with --edges or --edge-port: this version serves several with one Edge.")
    if members_only and insecure:
        raise ValueError(
            "Expected --members-only without --insecure: on a network without TLS anyone sees what members show."
        )
    if telemetry or telemetry_ca:
        check_helper(telemetry, telemetry_ca, several_edges=bool(edges) or edge_port is not None)
    if edges and tls_cert is not None and not is_loopback(edge_address):
        raise ValueError(
            f"Expected --edge-address 127.0.0.1 with --edges and --tls-cert, got {edge_address}: the Edges cannot know what "
            "signed that certificate. Use --tls, or start each with `shoal edge --ca`."
        )
    if resume:
        from shoal.cli.run_folder import unfinished_runs
        from shoal.record.lock import only_writer

        found = unfinished_runs(run, kind="host")
        with only_writer(found[0].path):
            pass  # who writes it, an Edge that started it again perhaps, is said before that a port is taken
    check_tls(edge_address, tls=tls, cert=tls_cert, key=tls_key, insecure=insecure)
    if not edges:  # else the port is shared by these
        check_port(address, port)

    from shoal.cli import host_process

    if resume:
        if tasks:
            screen.say(f"the run has its own copy of the task: {tasks[0]} is not read")
        folder, run_ids = found[0].path, tuple(each.run.id for each in found)
    else:
        folder, run_ids = host_process.begin(asked, run=run, screen=screen)
        watch.lap("plan")
    settings: Settings = host_process.Settings(
        folder=folder, run_ids=run_ids, rounds=rounds if resume else None, address=address, port=port, held_out=held_out,
        ready_file=ready_file, make_tls=tls, tls_cert=tls_cert, tls_key=tls_key, resumed=resume, insecure=insecure,
        edges=edges, edge_port=edge_port, edge_address=edge_address, client_ca=client_ca, per_address=per_address,
        members_only=members_only, telemetry=telemetry, telemetry_ca=telemetry_ca,
    )  # fmt: skip
    host_process.run(settings, screen=screen, watch=watch, parent=parent)
