"""What a device alone knows: 32 bytes, of which its member's secret and its pseudonyms are made.

They are in its file (`device_file.py`); without a folder they are made anew each time.
"""

import hashlib
import hmac
import os
from dataclasses import dataclass, field
from math import floor
from typing import Final, Self

from shoal import validate
from shoal.fleet.device_file import DeviceFile

FACT: Final = "secret"
"""Its name in the device's file."""
SECRET_BYTES: Final = 32
CREDENTIAL: Final = b"\x01"
"""What a credential begins with."""
_NAME_DIGITS: Final = 32
SHORTEST_WINDOW_S: Final = 60.0


def credential(token: bytes, secret: bytes) -> bytes:
    """What a device shows to a host that serves members only: the invitation's token, 16 bytes, and its member's secret, 32."""
    return CREDENTIAL + token + secret


@dataclass(frozen=True)
class DeviceSecret:
    """See the module's text. Its repr shows nothing."""

    data: bytes = field(repr=False)

    @classmethod
    def of(cls, file: DeviceFile) -> Self:
        """The one that a device's file holds; made there the first time. Raises StoreError where it cannot be kept."""
        data = file.fact(FACT)
        if data is None:
            data = os.urandom(SECRET_BYTES)
            file.keep_fact(FACT, data)
        return cls(data)

    def of_member(self, host: bytes, population: str, device: str) -> bytes:
        """What a host that serves members only knows a device by, 32 bytes.

        Another one for each host (the key that signs its plans), population and device: what one host is shown opens no other's door.
        """
        return _mac(self.data, b"member", host.hex(), population, device)


@dataclass(frozen=True, kw_only=True)
class Pseudonyms:
    """Names of a device that nobody else can tell to be one device's: another in each window of time.

    Windows of different devices begin at different times, so that they do not all come anew at once.

    Guarantees:
        * Without the secret, names of two windows are as good as independent random ones.
    """

    secret: DeviceSecret
    host: str
    """HOST:PORT: two hosts that compare what they store find no name twice."""
    population: str
    device: str
    """Its own name for itself, which nobody else is told."""
    window_s: float

    def __post_init__(self) -> None:
        validate.between(SHORTEST_WINDOW_S, float("inf"), window_s=self.window_s)

    def name(self, wall_s: float) -> str:
        """At a time, in seconds since the epoch."""
        number = floor(self._windows(wall_s))
        return _mac(self.secret.data, b"pseudonym", self.host, self.population, self.device, str(number)).hex()[
            :_NAME_DIGITS
        ]

    def left_s(self, wall_s: float) -> float:
        """How long the name of that time is good, in seconds; above 0."""
        windows = self._windows(wall_s)
        return (floor(windows) + 1 - windows) * self.window_s

    def _windows(self, wall_s: float) -> float:
        shift = (
            int.from_bytes(_mac(self.secret.data, b"window", self.host, self.population, self.device)[:6], "big")
            / 2**48
        )
        return wall_s / self.window_s + shift


def _mac(secret: bytes, what: bytes, *words: str) -> bytes:
    said = b"".join(len(word.encode()).to_bytes(4, "big") + word.encode() for word in words)
    return hmac.new(secret, b"shoal " + what + b" v1\0" + said, hashlib.sha256).digest()
