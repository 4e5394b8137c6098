"""`shoal invite`: the line that a second machine needs to take part in a run."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

EPILOG = options.examples(
    "shoal invite runs/digits",
    "shoal invite runs/digits --address train.example.org:443",
    "shoal invite runs/digits --uses 20 --expires 12h",
    "shoal invite runs/digits --remove anna",
)


def invite(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder of a host that was started.")],
    address: Annotated[
        str,
        typer.Option(
            "--address",
            metavar="HOST[:PORT]",
            help="Where devices find it.",
            show_default="this machine's own address, and the host's port",
        ),
    ] = "",
    population: Annotated[
        str, typer.Option("--population", help="The device's, where the host has several.", show_default="the only one")
    ] = "",
    expires: Annotated[
        str,
        typer.Option(
            "--expires", help="How long devices may come by it: 90s, 15min, 12h, 7d.", show_default="7d, or never"
        ),
    ] = "",
    uses: Annotated[
        int | None,
        typer.Option(
            "--uses", min=1, help="How many devices it makes members, where only members are served.", show_default="1"
        ),
    ] = None,
    remove: Annotated[
        str, typer.Option("--remove", metavar="DEVICE", help="Invite nobody; this member is one no more.")
    ] = "",
    json: options.AsJson = False,
) -> None:
    """Print one line that a second machine pastes: shoal device --join LINE --data PATH.

    It says where the host is, which certificate to believe and whose plans to run. Of a host with --members-only it holds a secret
    besides that makes whoever shows it a member: pass it on as you would a password.
    """
    import os
    import time

    from shoal.cli.host_door import DoorFile
    from shoal.cli.words import parse_duration
    from shoal.fleet import members
    from shoal.fleet.invitation import TOKEN_BYTES

    door, screen = DoorFile.read(run), Screen(json=json)
    if uses is not None and not door.members_only:
        raise ValueError(
            "--uses is for hosts that were started with --members-only: this one serves whoever reaches it."
        )
    if remove:
        return _remove(run, remove, door.one_population(population), screen)
    seconds = parse_duration(expires) if expires else 7 * 86_400.0 if door.members_only else 0.0
    expires_s = int(time.time() + seconds) if seconds else 0
    token = os.urandom(TOKEN_BYTES) if door.members_only else b""
    made = door.invitation(address, population=population, token=token, expires_s=expires_s)
    if token:
        members.invite(run, token, population=made.population, expires_s=expires_s, uses=uses or 1)
    if not door.is_reachable and not address:
        screen.say(
            f"the host listens on {door.address}, which only this machine reaches (shoal host --address 0.0.0.0)"
        )
    screen.line(made.text)
    screen.document(
        {
            "invitation": made.text, "address": made.address, "population": made.population, "uses": uses or 1 if token else None,
            "expires_s": expires_s or None,
        }
    )  # fmt: skip


def _remove(run: Path, device: str, population: str, screen: Screen) -> None:
    from shoal.fleet import members

    members.remove(run, device, population=population)
    screen.line(
        f"{device} is no member any more: the host ends its stream within five minutes, and refuses it from then on"
    )
    screen.document({"removed": device, "population": population})
