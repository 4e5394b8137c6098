"""Where devices find a host, as it says itself in `RUN/door.json` once it listens: what an invitation is made of."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from shoal.errors import DataError
from shoal.fleet.address import joined, split
from shoal.fleet.grpc_server import Tls
from shoal.fleet.invitation import Invitation
from shoal.fleet.proxy import is_loopback
from shoal.fleet.tls import names_in, pin_of

FILE_NAME: Final = "door.json"
EVERY_ADDRESS: Final = ("0.0.0.0", "::")
_SOMEWHERE: Final = ("192.0.2.1", 9)
"""Of a network for documentation (RFC 5737). Nothing is sent there: the system only says which of its addresses it would send from."""


@dataclass(frozen=True, kw_only=True)
class DoorFile:
    """See the module's text."""

    address: str
    """That it listens on."""
    port: int
    plan_key: str
    """Hexadecimal, as the pin."""
    pin: str
    """SHA-256 of the certificate that devices are to believe; empty: no TLS."""
    names: list[str]
    """That its certificate is good for."""
    populations: list[str]
    members_only: bool

    @classmethod
    def of(
        cls, address: str, port: int, *, key: bytes, tls: Tls | None, populations: Sequence[str], members_only: bool
    ) -> "DoorFile":
        """That of a host which listens there."""
        pin, names = ("", []) if tls is None else (pin_of(tls.chain).hex(), names_in(tls.chain))
        return cls(
            address=address, port=port, plan_key=key.hex(), pin=pin, names=names, populations=sorted(set(populations)),
            members_only=members_only,
        )  # fmt: skip

    def write(self, folder: Path) -> None:
        partial = folder / f".{FILE_NAME}.{os.getpid()}"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(folder / FILE_NAME)

    @classmethod
    def read(cls, folder: Path) -> "DoorFile":
        """Raises DataError where no host of the folder has listened yet."""
        path = folder / FILE_NAME
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            raise DataError(
                f"Expected the folder of a run that has been served, got {folder}: start it first, with shoal host … --run {folder}."
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read: {error}. The host writes it anew when it is started.") from error

    @property
    def is_reachable(self) -> bool:
        """From other machines."""
        return not is_loopback(self.address)

    def invitation(
        self, public: str = "", *, population: str = "", token: bytes = b"", expires_s: int = 0
    ) -> Invitation:
        """A line for a second machine.

        Args:
            public: HOST:PORT or HOST under which it finds the host; empty: this machine's address on the network.
            population: the device's, where there are several.
            token: that makes it a member.
            expires_s: when the line ends; 0: never.

        Raises:
            ValueError: the population is not one of the host's, or has to be named.
        """
        population = self.one_population(population)
        host, port = self._reached_at(public)
        is_named = not self.names or host in self.names
        return Invitation(
            address=joined(host, port), population=population, plan_key=bytes.fromhex(self.plan_key),
            pin=bytes.fromhex(self.pin), server_name="" if is_named else self.names[0], token=token, expires_s=expires_s,
        )  # fmt: skip

    def one_population(self, named: str) -> str:
        """That which is named, or the only one. Raises ValueError where the host has it not, or several."""
        if (named or len(self.populations) > 1) and named not in self.populations:
            raise ValueError(f"Expected --population {' | '.join(self.populations)}, got {named or 'none of them'!r}.")
        return named or self.populations[0]

    def _reached_at(self, public: str) -> tuple[str, int]:
        if public:
            host, colon, _ = public.rpartition(":")
            if not colon or (public.count(":") > 1 and not host.endswith("]")):  # HOST, also of IPv6
                public = joined(public.strip("[]"), self.port)
            return split(public, what="--address HOST or")
        return own_address() if self.address in EVERY_ADDRESS else self.address, self.port


def own_address() -> str:
    """This machine's on the network; its name where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()
