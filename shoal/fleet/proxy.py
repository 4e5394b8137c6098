"""The HTTP proxy that a connection goes through, where the environment names one: for gRPC and for what looks at certificates.

One rule for both, as gRPC itself reads the variables in lower case only: `grpc_proxy`, `https_proxy`, `HTTPS_PROXY`, `http_proxy`,
the first that is there; hosts of `no_proxy` or `NO_PROXY`, and this machine's own addresses, are reached directly.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

from shoal.fleet.address import split

NAMES: Final = ("grpc_proxy", "https_proxy", "HTTPS_PROXY", "http_proxy")


@dataclass(frozen=True)
class Proxy:
    """One that tunnels by CONNECT. Its repr does not show the password."""

    host: str
    port: int
    user: str = field(default="", repr=False)
    """`user:password`, as the URL has it; empty: none."""

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{self.user}{'@' if self.user else ''}{host}:{self.port}"


def proxy_for(address: str, environ: Mapping[str, str] = os.environ) -> Proxy | None:
    """The proxy for host:port; None: none.

    Raises:
        ValueError: the environment names one that cannot be used.
    """
    host, _ = split(address)
    name = next((name for name in NAMES if environ.get(name)), None)
    left_out = {"no": environ.get("no_proxy") or environ.get("NO_PROXY") or ""}
    if name is None or is_loopback(host):
        return None
    # Here, as it brings HTTP, which a device without a proxy has no use for.
    from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # typeshed leaves it out

    if proxy_bypass_environment(host, left_out):
        return None
    value = environ[name]
    try:
        parts = urlsplit(value if "://" in value else f"http://{value}")
        found = parts.hostname, parts.port or 80
    except ValueError:
        parts, found = urlsplit(""), (None, 0)
    if parts.scheme != "http" or found[0] is None:
        shown = value.rpartition("@")[2][:80]
        raise ValueError(
            f"Expected {name} of the form http://[USER:PASSWORD@]HOST:PORT, got {shown!r}; for hosts without a proxy set no_proxy."
        )
    return Proxy(found[0], found[1], parts.netloc.rpartition("@")[0])


def proxy_options(address: str) -> list[tuple[str, Any]]:
    """Options of a gRPC channel to host:port."""
    proxy = proxy_for(address)
    return [("grpc.http_proxy", proxy.url)] if proxy is not None else [("grpc.enable_http_proxy", 0)]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
