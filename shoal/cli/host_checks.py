"""What `shoal host` finds out before a plan is built: whether it may listen, and can."""

import socket
from pathlib import Path
from typing import Final

from shoal.fleet.address import split
from shoal.fleet.proxy import is_loopback

LOW_PORTS: Final = 1024


def wants_tls(*addresses: str, tls: bool, cert: Path | None, insecure: bool) -> bool:
    """Whether a certificate is to be made for the run: asked for, or needed as other machines reach one of the addresses."""
    return tls or not (cert is not None or insecure or all(map(is_loopback, addresses)))


def check_client_ca(file: Path | None, *, tls: bool) -> None:
    """Raises ValueError where devices cannot be asked for certificates of that authority."""
    if file is None:
        return
    if not tls:
        raise ValueError(
            "Expected TLS with --client-ca: add --tls, or --tls-cert and --tls-key, and leave out --insecure."
        )
    read_certificates(file, option="--client-ca")


def read_certificates(file: Path, *, option: str) -> bytes:
    """A file of PEM certificates. Raises ValueError where it is none."""
    from cryptography import x509

    data = file.read_bytes()
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ValueError(f"Expected PEM certificates in {option} {file}, got something else: {error}.") from error
    return data


def check_tls(address: str, *, tls: bool, cert: Path | None, key: Path | None, insecure: bool) -> None:
    """Raises ValueError for options that do not go together, or where there is no certificate to listen on a network with."""
    if (cert is None) != (key is None):
        raise ValueError("Expected --tls-cert and --tls-key together.")
    if tls and cert is not None:
        raise ValueError(
            "Expected --tls (a certificate is made) or --tls-cert and --tls-key (yours is used), not both."
        )
    if not (tls or cert or insecure or is_loopback(address)):
        raise ValueError(
            f"Refused to listen on {address} without encryption: give --tls-cert and --tls-key, which `shoal enrol tls-server` makes; "
            "--insecure if the network is trusted."
        )


def check_helper(address: str, ca: Path | None, *, several_edges: bool) -> None:
    """Whether a host may take telemetry."""
    split(address, what="--telemetry, where the helper is,")
    if several_edges:
        raise ValueError(
            "Expected no --edges or --edge-port with --telemetry: in this version Edges elsewhere take none."
        )
    if ca is not None and not ca.is_file():
        raise ValueError(f"Expected --telemetry-ca to be a PEM file, there is none at {ca}.")


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
        raise ValueError(_cannot_listen(address, port, error)) from error
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
        raise ValueError(_cannot_listen(address, port, error)) from error


def _cannot_listen(address: str, port: int, error: OSError) -> str:
    why = f"Cannot listen on {address}:{port}: {(error.strerror or str(error)).lower()}."
    if isinstance(error, PermissionError) and port < LOW_PORTS:
        return (
            f"{why} Ports below {LOW_PORTS} need a right of their own: systemd gives it by AmbientCapabilities=CAP_NET_BIND_SERVICE, a "
            f"machine to all by `sysctl net.ipv4.ip_unprivileged_port_start={port}`; or forward {port} to another --port."
        )
    return f"{why} Choose another with --port, or --port 0 for any free one."
