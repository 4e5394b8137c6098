"""`shoal enrol`: who may take part in secure groups whose server is not trusted; and TLS certificates of an authority of one's own."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Keys and certificates: for secure groups whose server may lie, made by an authority that is not the server; and (tls-…) "
    "of hosts, Edges and devices for TLS.",
    epilog=options.examples(
        "shoal enrol authority authority.key",
        "shoal enrol device anna.key",
        "shoal enrol certify KEY --authority authority.key --days 365",
        "shoal enrol tls-authority tls",
        "shoal enrol tls-server tls train.example.org 192.0.2.7",
        "shoal enrol tls-device tls anna",
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


Folder = Annotated[Path, typer.Argument(help="The authority's folder.")]
Days = Annotated[float, typer.Option("--days", min=0.001, help="How long the certificate is good.")]
Into = Annotated[Path | None, typer.Option("--into", help="Folder of the files made.", show_default="the authority's")]


@app.command("tls-authority", epilog=options.examples("shoal enrol tls-authority tls"))
def tls_authority(folder: Folder, json: options.AsJson = False) -> None:
    """Make a TLS authority for hosts, Edges and devices of yours: prints the file that others are to believe."""
    from shoal.fleet.tls_authority import make_authority

    _tell("ca", str(make_authority(folder, now=datetime.now(UTC))), json=json)


@app.command(
    "tls-server", epilog=options.examples("shoal enrol tls-server tls train.example.org 192.0.2.7 --into edge-1")
)
def tls_server(
    folder: Folder,
    names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Names and addresses it is reached under.")],
    days: Days = 825.0,
    into: Into = None,
    json: options.AsJson = False,
) -> None:
    """Make a host's or Edge's certificate: prints the options for it."""
    _issue(folder, "server", names, days, into, json=json)


@app.command("tls-device", epilog=options.examples("shoal enrol tls-device tls anna --days 90"))
def tls_device(
    folder: Folder,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the device.")],
    days: Days = 365.0,
    into: Into = None,
    json: options.AsJson = False,
) -> None:
    """Make a device's certificate, for hosts with --client-ca: prints the options for it."""
    _issue(folder, "device", [name], days, into, json=json)


def _issue(
    folder: Path, kind: Literal["server", "device"], names: list[str], days: float, into: Path | None, *, json: bool
) -> None:
    from shoal.cli.failures import command_line
    from shoal.fleet.tls_authority import issue

    certificate, key = issue(folder, kind, names, now=datetime.now(UTC), days=days, into=into)
    option = "tls" if kind == "server" else "client"
    screen = Screen(json=json)
    screen.line(command_line([f"--{option}-cert", certificate, f"--{option}-key", key]))
    screen.document({"certificate": str(certificate), "key": str(key)})


def _make(file: Path, *, json: bool) -> None:
    from shoal.fleet.enrolment import make_secret, public_key

    public = public_key(make_secret(file)).hex()
    _tell("key", public, json=json)


def _tell(what: str, value: str, *, json: bool) -> None:
    screen = Screen(json=json)
    screen.line(value)
    screen.document({what: value})
