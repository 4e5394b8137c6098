"""Edges of a host in other processes: where they attach, and those that the host starts itself."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.cli.failures import command_line
from shoal.cli.screen import Screen
from shoal.errors import NetworkError, StoreError
from shoal.fleet.address import joined
from shoal.fleet.edges import Edges
from shoal.fleet.grpc_server import Tls
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.remote_edge import EdgesServer

CREDENTIAL: Final = "edges.key"
RESTART: Final = "restart.json"
"""How to start a host again that has died; one that ends takes the file along."""
START_S: Final = 60.0
AGAIN_S: Final = 1.0
ADOPT_S: Final = 3.0
"""So long after a host was started again, Edges of before that are alive have attached."""
END_S: Final = 10.0
IS_SHARED: Final = sys.platform == "linux"
"""Whether several processes can listen on one port, and the system deals connections out to them."""


@dataclass(frozen=True, kw_only=True)
class EdgeSettings:
    """What `shoal host` was asked about Edges."""

    number: int
    """Processes that it starts; 0: none."""
    address: tuple[str, int]
    """Where Edges attach."""
    folder: Path
    devices: tuple[str, int]
    """Address and port that the started ones listen on for devices; the others know for themselves."""
    tls: tuple[Path, Path] | None
    """Key and certificate files that devices are served with."""
    authority: Path | None
    """PEM file of what signed the certificate, where Edges attach with TLS."""
    client_ca: Path | None
    """What devices' certificates are to be signed by."""
    per_address: int
    """Sessions of one network address that each may have."""
    again: Callable[[int], Sequence[str]]
    """Port where Edges attach -> the command, but for `shoal`, that takes the run up when this process has died."""
    adopts: bool
    """The host was started again: Edges that the last one started may still be there."""


@asynccontextmanager
async def attached(
    host: Host, settings: EdgeSettings, *, tls: Tls | None, screen: Screen
) -> AsyncGenerator[EdgesServer, None]:
    """Within the block Edges can attach, and those that the host starts run, and are started again when they die.

    Raises:
        NetworkError: they do not come.
    """
    server = host.edges_server(address=joined(*settings.address), tls=tls)
    await server.start()
    here = joined({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.address[0], settings.address[0]), server.port)
    where = f"THIS-MACHINE:{server.port}" if settings.address[0] in ("0.0.0.0", "::") else here
    credential = write_credential(settings.folder, HostKeys.load_or_make(settings.folder))
    trusted = ["--ca", settings.authority] if settings.authority else []
    screen.say(
        f"edges: {command_line(['shoal', 'edge', '--coordinator', where, '--credential', credential, *trusted])}"
    )
    written = settings.folder / f"{RESTART}.new"
    written.write_text(json.dumps(settings.again(server.port)))
    written.replace(settings.folder / RESTART)
    assert host.edges is not None
    children = [
        asyncio.create_task(
            _keep(f"edge-{i + 1}", _command(settings, i, here, credential), host.edges, settings.adopts)
        )
        for i in range(settings.number)
    ]
    try:
        await _until_here(server, host, settings.number)
        yield server
        if children:
            await asyncio.wait(children, timeout=END_S)
    finally:
        (settings.folder / RESTART).unlink(missing_ok=True)
        host.edges.finish("the host was asked to stop")
        await server.until_gone(longest_s=1.0)
        for child in children:
            child.cancel()
        await asyncio.gather(*children, return_exceptions=True)
        await server.close(grace_s=0.2)


def write_credential(folder: Path, keys: HostKeys) -> Path:
    """The file that `shoal edge --credential` reads, mode 0600."""
    path = folder / CREDENTIAL
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(keys.edge_credential.hex())
    return path


def read_credential(path: Path) -> bytes:
    """Raises StoreError where the file is none of `write_credential`."""
    hint = f"`shoal host` writes {CREDENTIAL} into the run folder."
    try:
        made = bytes.fromhex(path.read_text().strip())
    except OSError as error:
        raise StoreError(f"Cannot read the credential {path}: {error.strerror}. {hint}") from error
    except ValueError as error:
        raise StoreError(f"Expected 64 hexadecimal digits in {path}, got something else. {hint}") from error
    if len(made) != 32:
        raise StoreError(f"Expected 64 hexadecimal digits in {path}, got {2 * len(made)}. {hint}")
    return made


def _command(settings: EdgeSettings, number: int, here: str, credential: Path) -> list[str]:
    address, port = settings.devices
    mine = port if IS_SHARED or not port else port + number
    words: list[object] = [
        sys.executable, "-P", "-m", "shoal", "edge", "--coordinator", here, "--credential", credential,
        "--name", f"edge-{number + 1}", "--address", address, "--port", mine, "--restarts", settings.folder,
        *(["--share-port"] if IS_SHARED and port else []),
        *(["--tls-key", settings.tls[0], "--tls-cert", settings.tls[1]] if settings.tls else ["--insecure"]),
        *(["--ca", settings.authority] if settings.authority else []),
        *(["--client-ca", settings.client_ca] if settings.client_ca else []),
        "--per-address", settings.per_address,
    ]  # fmt: skip
    return [str(word) for word in words]


async def _keep(name: str, command: Sequence[str], edges: Edges, adopts: bool) -> None:
    """Runs an Edge, again when it dies, until it ends by itself or this is cancelled."""
    if adopts:
        await asyncio.sleep(ADOPT_S)
    while True:
        while name in edges.names:  # of another's making: its end will be seen here
            await asyncio.sleep(AGAIN_S)
        child = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.DEVNULL)
        try:
            if await child.wait() == 0:
                return
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.terminate()
                await child.wait()
        await asyncio.sleep(AGAIN_S)


async def _until_here(server: EdgesServer, host: Host, number: int) -> None:
    assert host.edges is not None
    try:
        async with asyncio.timeout(START_S):
            while len(host.edges.names) <= number and number and not host.edges.is_finished:
                server.changed.clear()
                await server.changed.wait()
    except TimeoutError:
        raise NetworkError(
            f"Expected {number} Edges to attach within {START_S:.0f} s, got {len(host.edges.names) - 1}."
        ) from None
