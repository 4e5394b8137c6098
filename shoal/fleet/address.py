"""HOST:PORT as people write it: the name of a machine, an IPv4 address, or an IPv6 address in brackets; and a port."""

import ipaddress
import re
from typing import Final

MOST_CHARACTERS: Final = 300
_NAME: Final = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


def split(address: str, *, what: str = "an address") -> tuple[str, int]:
    """Host, without brackets, and port, 1 to 65535.

    Args:
        what: the address is, for the error: an option, say.

    Raises:
        ValueError: it is not written so.
    """
    host, _, port = address.rpartition(":")
    is_number = port.isascii() and port.isdigit() and len(port) <= 5
    if len(address) > MOST_CHARACTERS or not is_number or not 0 < int(port) < 65536 or not _is_host(host):
        raise ValueError(f"Expected {what} HOST:PORT, got {address[:MOST_CHARACTERS]!r}.")
    return host.strip("[]"), int(port)


def is_address(text: str) -> bool:
    """Whether it is written so."""
    try:
        split(text)
    except ValueError:
        return False
    return True


def joined(host: str, port: int) -> str:
    """HOST:PORT, also of IPv6."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_host(host: str) -> bool:
    if not host.startswith("["):
        return _NAME.fullmatch(host) is not None
    try:
        ipaddress.IPv6Address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return host.endswith("]")
