"""What `shoal device --join LINE` goes by: the host's address, its certificate, whose plans are run, what makes it a member."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.cli.screen import Screen
from shoal.errors import NetworkError

if TYPE_CHECKING:
    from shoal.fleet.handshake import ClientCertificate
    from shoal.fleet.invitation import Invitation

STATE: Final = Path("shoal-device")
"""Where a member keeps what it is known by, if it is not told where."""
LINE: Final = "invitation"
"""File of that folder: the line, so that it has to be given once only."""
LOOK_S: Final = 5.0
"""For a look at the host's certificate that may come to nothing."""
AGAIN_S: Final = (0.5, 10.0)


@dataclass(frozen=True, kw_only=True)
class Door:
    """The host, as a device is told of it."""

    server: str
    population: str
    key: str
    """Hexadecimal; empty: that of the first plan."""
    authority: bytes | None
    server_name: str
    token: bytes = b""


def kept_line(state: Path) -> str:
    """The line that the folder's devices came in by before; empty: by none."""
    try:
        return (state / LINE).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return ""


def kept_key(state: Path) -> bytes | None:
    """Whose plans the folder's devices run, by the line that they came in by."""
    from shoal.fleet.invitation import Invitation

    line = kept_line(state)
    return Invitation.parse(line).plan_key if line else None


def read_invitation(line: str, given: dict[str, object], *, state: Path | None) -> "Invitation":
    """What a line says; whoever came in by it before, which `state` tells, may come again when it has ended: the host knows members.

    Raises:
        ValueError: it is none, has ended, or options say the same.
    """
    from shoal.fleet.invitation import Invitation

    if twice := [name for name, value in given.items() if value]:
        raise ValueError(
            f"Leave out {', '.join(twice)}: the invitation says it, which --join gives or the --state folder keeps."
        )
    made = Invitation.parse(line)
    if not (made.token and _kept(_authority(state or STATE, made.pin), made.pin)):
        made.check(time.time())
    return made


def join(invitation: "Invitation", *, state: Path | None, patience_s: float, screen: Screen) -> Door:
    """Looks for the host's certificate, unless it is kept, for as long as patience lasts. Keeps both and the line in the `state` folder.

    Raises:
        NetworkError: the host was not reached.
        ProtocolError: who answers is not who the invitation names.
    """
    authority = None
    if invitation.pin:
        kept = None if state is None else _authority(state, invitation.pin)
        authority = _kept(kept, invitation.pin) or _fetched(invitation, patience_s, screen)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(authority)
    if state is not None:
        _keep_line(state / LINE, invitation.text)
    return Door(
        server=invitation.address, population=invitation.population, key=invitation.plan_key.hex(), authority=authority,
        server_name=invitation.server_name, token=invitation.token,
    )  # fmt: skip


def refuse_unwelcome(door: Door, client: "ClientCertificate | None") -> None:
    """Raises NetworkError where host and device do not believe each other's certificates, ValueError where a file is wrong."""
    if door.authority is None:
        if client is not None:
            raise ValueError(
                "--client-cert is for a host with TLS: give its authority with --ca FILE, or an invitation with --join."
            )
        return
    from shoal.fleet.handshake import refusal  # it brings much that a device without TLS has no use for

    if client is not None:
        refuse_ended(client)
    if why := refusal(door.server, ca=door.authority, client=client, server_name=door.server_name, timeout_s=LOOK_S):
        raise NetworkError(why)


def refuse_unprotected(door: Door, *, insecure: bool) -> None:
    """Raises ValueError where a network is between and there is no TLS, unless the owner says that this is as it should be."""
    from shoal.fleet.address import split
    from shoal.fleet.proxy import is_loopback

    if insecure or door.authority is not None or is_loopback(split(door.server)[0]):
        return
    raise ValueError(
        f"Expected --join LINE, or --ca FILE: without TLS whoever is on the way to {door.server} can read updates and answer in its place. "
        "On a network that you trust: --insecure."
    )


def refuse_ended(client: "ClientCertificate") -> None:
    """Raises ValueError where a device's certificate is none, or not good now."""
    from datetime import UTC, datetime

    from cryptography import x509

    _, chain = client.read()
    try:
        made = x509.load_pem_x509_certificate(chain)
    except ValueError as error:
        raise ValueError(f"Expected a PEM certificate in {client.certificate}, got something else: {error}.") from error
    if not made.not_valid_before_utc <= datetime.now(UTC) < made.not_valid_after_utc:
        raise ValueError(
            f"The certificate in {client.certificate} is good from {made.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{made.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, which is not now. Have another made: shoal enrol tls-device."
        )


def client_certificate(certificate: Path | None, key: Path | None) -> "ClientCertificate | None":
    """What --client-cert and --client-key name. Raises ValueError where one is missing."""
    if (certificate is None) != (key is None):
        raise ValueError("Expected --client-cert and --client-key together.")
    if certificate is None or key is None:
        return None
    from shoal.fleet.handshake import ClientCertificate

    return ClientCertificate(certificate, key)


def pseudonym_window_s(text: str, *, member: Path | None, client: Path | None, joins: bool) -> float | None:
    """The seconds of --pseudonyms. Raises ValueError where the host would know the device by something else in any window."""
    from shoal.cli.words import parse_duration
    from shoal.fleet.device_secret import SHORTEST_WINDOW_S

    if not text:
        return None
    known = (
        "--member"
        if member
        else "--client-cert"
        if client
        else "an invitation to a host of members only"
        if joins
        else ""
    )
    if known:
        raise ValueError(f"Expected --pseudonyms without {known}, by which the host knows this device in any window.")
    if (window_s := parse_duration(text)) < SHORTEST_WINDOW_S:
        raise ValueError(f"Expected --pseudonyms of at least {SHORTEST_WINDOW_S:.0f}s, got {text!r}.")
    return window_s


def _keep_line(path: Path, line: str) -> None:
    """It may hold a token: nobody but the owner reads it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with open(partial, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _authority(state: Path, pin: bytes) -> Path:
    return state / f"authority-{pin.hex()[:16]}.pem"


def _kept(path: Path | None, pin: bytes) -> bytes | None:
    """The certificate of a file, where it is the one that is pinned."""
    from shoal.errors import StoreError
    from shoal.fleet.tls import pin_of

    try:
        data = path.read_bytes() if path is not None else b""
        return data if pin_of(data) == pin else None
    except (OSError, StoreError):
        return None


def _fetched(invitation: "Invitation", patience_s: float, screen: Screen) -> bytes:
    from shoal.fleet.handshake import TIMEOUT_S, pinned_certificate

    ends_s, wait_s, told = time.monotonic() + patience_s, AGAIN_S[0], ""
    while True:
        left_s = ends_s - time.monotonic()
        try:
            return pinned_certificate(invitation.address, invitation.pin, timeout_s=max(0.1, min(TIMEOUT_S, left_s)))
        except NetworkError as error:
            if left_s <= wait_s:
                raise NetworkError(f"{error} Is the host running, and reached from here at that address?") from error
            if str(error) != told:
                told = str(error)
                screen.say(f"{told} Trying again.")
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, AGAIN_S[1])
