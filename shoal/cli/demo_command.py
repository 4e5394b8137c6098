"""`shoal demo`: registered here; what it does is in `demo.py`."""

from typing import Annotated

import typer

from shoal.cli import options

EPILOG = options.examples("shoal demo", "shoal demo --quick", "shoal demo --run runs/demo --resume")


def demo(
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Rounds to train.", show_default="as many as it needs")
    ] = None,
    run: options.RunFolder = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the demo in --run, after Ctrl-C or a kill.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A smaller data set and fewer rounds.")] = False,
    json: options.AsJson = False,
) -> None:
    """Watch a fleet train on this machine.

    A server and four device processes train a model on images that never leave the devices.
    """  # fmt: skip
    from shoal.cli import demo as demonstration

    code = demonstration.run(rounds=rounds, folder=run, resume=resume, quick=quick, json=json)
    if code:
        raise typer.Exit(code)
