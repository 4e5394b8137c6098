"""`shoal`: the commands and how they end. A command's own module is imported by it, what it needs when it runs."""

import os
from typing import Annotated

import typer

from shoal import __version__
from shoal.cli import (
    audit,
    check,
    data,
    demo_command,
    device,
    doctor,
    edge,
    embed,
    enrol,
    host,
    invite,
    new,
    options,
    predict,
    privacy,
    replay,
    report,
    runs,
    simulate,
    telemetry,
    train,
)
from shoal.cli.group import ShoalGroup

app = typer.Typer(
    name="shoal",
    cls=ShoalGroup,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        print(f"shoal {__version__}")
        raise typer.Exit
    return wanted


@app.callback(epilog=options.examples("shoal demo", "shoal new digits", "shoal doctor"))
def shoal(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:  # fmt: skip
    """One system for a model's whole life: write a Task once, train it on simulated devices or on a fleet that keeps
    its data, use any version of it.

    A command that fails says why in one line; SHOAL_DEBUG=1 shows the traceback too.
    """
    # gRPC's core writes to standard error on its own, in its own words.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


for _name, _function, _epilog in (
    ("demo", demo_command.demo, demo_command.EPILOG),
    ("new", new.new, new.EPILOG),
    ("check", check.check, check.EPILOG),
    ("simulate", simulate.simulate, simulate.EPILOG),
    ("host", host.host, host.EPILOG),
    ("device", device.device, device.EPILOG),
    ("invite", invite.invite, invite.EPILOG),
    ("edge", edge.edge, edge.EPILOG),
    ("train", train.train, train.EPILOG),
    ("predict", predict.predict, predict.EPILOG),
    ("report", report.report, report.EPILOG),
    ("replay", replay.replay, replay.EPILOG),
    ("privacy", privacy.privacy, privacy.EPILOG),
    ("audit", audit.audit, audit.EPILOG),
):
    app.command(_name, epilog=_epilog)(_function)
app.add_typer(data.app, name="data")
app.add_typer(embed.app, name="embed")
app.add_typer(enrol.app, name="enrol")
app.add_typer(runs.app, name="runs")
app.add_typer(telemetry.app, name="telemetry")
app.command("doctor", epilog=doctor.EPILOG)(doctor.doctor)


def main() -> None:
    """The entry point."""
    app(prog_name="shoal")


if __name__ == "__main__":
    main()
