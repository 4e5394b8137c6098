"""One line that a second machine needs to take part: where the host is, whom to believe, and the right to come in.

`shoal1:` and base64url of

    address, server name, population     each a byte of length and UTF-8
    plan key                             32 bytes: Ed25519, signs the plans that may be run
    pin                                  a byte of length, 0 or 32: SHA-256 of a certificate that the host shows; 0: no TLS
    token                                a byte of length, 0 or 16: makes who shows it a member, where only members are served
    expires                              8 bytes, big-endian: seconds since the epoch; 0: never
    checksum                             first 4 bytes of SHA-256 of all before

One invitation has one text. Who has a line with a token can become a member in its owner's place: pass it on as one does a password.
"""

import base64
import binascii
import hashlib
import struct
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from shoal.fleet.address import split
from shoal.fleet.check_in import MAX_WORD

PREFIX: Final = "shoal1:"
MAX_TEXT: Final = 2_000
PIN_BYTES: Final = 32
TOKEN_BYTES: Final = 16
_KEY_BYTES: Final = 32
_SUM_BYTES: Final = 4
_MOST_BYTES: Final = 255
_EXPIRES: Final = struct.Struct(">Q")
_ASK: Final = "Paste the whole line that `shoal invite` printed."


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """See the module's text. Its repr does not show the token."""

    address: str
    """HOST:PORT."""
    population: str
    plan_key: bytes
    pin: bytes = b""
    server_name: str = ""
    """Name in the host's certificate, where it is not the address's."""
    token: bytes = field(default=b"", repr=False)
    expires_s: int = 0

    def __post_init__(self) -> None:
        for what, text in (
            ("address", self.address),
            ("server name", self.server_name),
            ("population", self.population),
        ):
            if len(text.encode()) > _MOST_BYTES or (not text and what != "server name") or not text.isprintable():
                raise ValueError(
                    f"Expected an {what} of 1 to {_MOST_BYTES} bytes that can be printed, got {text[:MAX_WORD]!r}."
                )
        split(self.address)
        if len(self.plan_key) != _KEY_BYTES or len(self.pin) not in (0, PIN_BYTES):
            raise ValueError(
                f"Expected a key of {_KEY_BYTES} bytes and a pin of 0 or {PIN_BYTES}, got {len(self.plan_key)} and {len(self.pin)}."
            )
        if len(self.token) not in (0, TOKEN_BYTES) or not 0 <= self.expires_s < 1 << 63:
            raise ValueError(f"Expected a token of 0 or {TOKEN_BYTES} bytes and a time, got others.")

    @property
    def text(self) -> str:
        """The line."""
        body = b"".join(_counted(word.encode()) for word in (self.address, self.server_name, self.population))
        body += self.plan_key + _counted(self.pin) + _counted(self.token) + _EXPIRES.pack(self.expires_s)
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")

    @staticmethod
    def parse(text: str) -> "Invitation":
        """Reads a line; space around it does not matter.

        Raises:
            ValueError: it is none, of another version, cut short or altered.
        """
        text = text.strip()
        prefix, colon, encoded = text.partition(":")
        if not colon or not prefix.startswith("shoal") or not prefix.removeprefix("shoal").isdecimal():
            raise ValueError(f"Expected an invitation, {PREFIX}…, got {text[:20]!r}. {_ASK}")
        if prefix != PREFIX.rstrip(":"):
            raise ValueError(
                f"Expected an invitation of version {PREFIX}, got {prefix[:20]}:…, which another version of shoal has made: bring both to one."
            )
        body = _body(encoded)
        try:
            made = _read(body)
        except (ValueError, IndexError, struct.error):
            raise ValueError(f"The invitation holds something else than {PREFIX} says. {_ASK}") from None
        if made.text != PREFIX + encoded:
            raise ValueError(f"The invitation is not written as `shoal invite` does. {_ASK}")
        return made

    def check(self, wall_s: float) -> None:
        """Raises ValueError where it has ended by that time, in seconds since the epoch."""
        if self.expires_s and wall_s >= self.expires_s:
            ended = datetime.fromtimestamp(self.expires_s, UTC).strftime("%Y-%m-%d %H:%M UTC")
            raise ValueError(f"The invitation ended on {ended}. Ask for a new one: shoal invite.")


def _body(encoded: str) -> bytes:
    """The bytes before the checksum."""
    if len(encoded) > MAX_TEXT:
        raise ValueError(f"Expected an invitation of at most {MAX_TEXT} characters, got {len(encoded)}. {_ASK}")
    try:
        data = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        data = b""
    body, checksum = data[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if not body or checksum != _checksum(body):
        raise ValueError(f"The invitation was cut short or altered on its way. {_ASK}")
    return body


def _read(body: bytes) -> Invitation:
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        piece, at = body[at : at + size], at + size
        if len(piece) != size:
            raise ValueError("too short")
        return piece

    address, server_name, population = (take(take(1)[0]).decode() for _ in range(3))
    key, pin, token = take(_KEY_BYTES), take(take(1)[0]), take(take(1)[0])
    (expires_s,) = _EXPIRES.unpack(take(_EXPIRES.size))
    if at != len(body):
        raise ValueError("too long")
    return Invitation(
        address=address, server_name=server_name, population=population, plan_key=key, pin=pin, token=token, expires_s=expires_s
    )  # fmt: skip


def _counted(data: bytes) -> bytes:
    return bytes((len(data),)) + data


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()[:_SUM_BYTES]
