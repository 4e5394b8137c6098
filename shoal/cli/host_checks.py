"""What `shoal host` finds out before a plan is built: whether it may listen, and can."""

import ipaddress
import socket
from pathlib import Path


def check_tls(address: str, *, tls: bool, cert: Path | None, key: Path | None, insecure: bool) -> None:
    if (cert is None) != (key is None):
        raise ValueError("Expected --tls-cert and --tls-key together.")
    if tls and cert is not None:
        raise ValueError(
            "Expected --tls (a certificate is made) or --tls-cert and --tls-key (yours is used), not both."
        )
    if not (tls or cert or insecure or is_loopback(address)):
        raise ValueError(
            f"Refused to listen on {address} without encryption. Add --tls, or --tls-cert and --tls-key; --insecure if the "
            "network is trusted."
        )


def check_helper(address: str, ca: Path | None, *, several_edges: bool) -> None:
    """Whether a host may take telemetry."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"Expected --telemetry HOST:PORT, where the helper is, got {address!r}.")
    if several_edges:
        raise ValueError(
            "Expected no --edges or --edge-port with --telemetry: in this version Edges elsewhere take none."
        )
    if ca is not None and not ca.is_file():
        raise ValueError(f"Expected --telemetry-ca to be a PEM file, there is none at {ca}.")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def reserve(address: str, port: int) -> tuple[int, socket.socket]:
    """A port that other processes of this host will listen on; it is theirs as long as the socket is open.

    Raises ValueError where it is taken.
    """
    held = socket.socket(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0], socket.SOCK_STREAM)
    if hasattr(socket, "SO_REUSEPORT"):
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        held.bind((address, port))
    except OSError as error:
        held.close()
        raise ValueError(f"Cannot listen on {address}:{port}: {(error.strerror or str(error)).lower()}.") from error
    return int(held.getsockname()[1]), held


def check_port(address: str, port: int) -> None:
    """A port that is taken is found out before a plan is built and a run begun."""
    if not port:
        return
    try:
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except socket.gaierror as error:
        raise ValueError(
            f"Expected --address to be an address of this machine, got {address!r}: {error.strerror}."
        ) from error
    except OSError as error:
        raise ValueError(
            f"Cannot listen on {address}:{port}: {(error.strerror or str(error)).lower()}. Choose another with --port, or --port 0 for any "
            "free one."
        ) from error


def joined(address: str, port: int) -> str:
    """host:port, also for IPv6."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
