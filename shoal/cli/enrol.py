"""`shoal enrol`: who may take part in secure groups whose server is not trusted."""

import time
from pathlib import Path
from typing import Annotated, Final

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Keys and certificates for secure groups whose server may lie: made by an authority that is not the server.",
    epilog=options.examples(
        "shoal enrol authority authority.key",
        "shoal enrol device anna.key",
        "shoal enrol certify KEY --authority authority.key --days 365",
    ),
)

DAY_S: Final = 86_400.0

New = Annotated[Path, typer.Argument(help="File to be made, which nobody else should read.")]


@app.command(epilog=options.examples("shoal enrol authority authority.key"))
def authority(file: New, json: options.AsJson = False) -> None:
    """Make an authority: prints the key that a task names, Secure(authority=…)."""
    _make(file, json=json)


@app.command(epilog=options.examples("shoal enrol device anna.key"))
def device(file: New, json: options.AsJson = False) -> None:
    """Make a device's key: prints what the authority certifies."""
    _make(file, json=json)


@app.command(
    epilog=options.examples("shoal enrol certify KEY --authority authority.key --population watches --days 365")
)
def certify(
    key: Annotated[str, typer.Argument(help="The device's key, as `shoal enrol device` printed it.")],
    authority: Annotated[Path, typer.Option("--authority", help="File that `shoal enrol authority` made.")],
    population: Annotated[str, typer.Option("--population", help="Which population the device is of.")] = "default",
    days: Annotated[float, typer.Option("--days", min=0.0, help="How long the certificate holds.")] = 365.0,
    json: options.AsJson = False,
) -> None:
    """Certify a device once: prints the certificate, for `shoal device --certificate`."""
    from shoal.fleet.enrolment import certify as made
    from shoal.fleet.enrolment import read_secret

    try:
        public = bytes.fromhex(key)
    except ValueError:
        public = b""
    if len(public) != 32:
        raise ValueError(
            f"Expected a key of 64 hexadecimal digits, as `shoal enrol device` prints it, got {key[:80]!r}."
        )
    certificate = made(read_secret(authority), public, population=population, until_s=time.time() + days * DAY_S)
    _tell("certificate", certificate, json=json)


def _make(file: Path, *, json: bool) -> None:
    from shoal.fleet.enrolment import make_secret, public_key

    public = public_key(make_secret(file)).hex()
    _tell("key", public, json=json)


def _tell(what: str, value: str, *, json: bool) -> None:
    screen = Screen(json=json)
    screen.line(value)
    screen.document({what: value})
