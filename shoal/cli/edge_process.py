"""What an Edge process does: attaches, serves devices, starts the host again when that has died. It imports no JAX."""

import json
import logging
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from shoal.cli import words
from shoal.cli.ending import run_until_told
from shoal.cli.host_checks import read_certificates
from shoal.cli.host_edges import RESTART, read_credential
from shoal.cli.screen import Screen
from shoal.clock import SystemClock
from shoal.errors import NetworkError
from shoal.fleet.address import joined
from shoal.fleet.edge_node import EdgeNode
from shoal.fleet.entrance import Entrance
from shoal.fleet.grpc_server import GrpcServer
from shoal.fleet.process import be_a_server
from shoal.record.blobs import FolderBlobs
from shoal.record.lock import was_left

log = logging.getLogger("shoal.edge")

LINGER_S: Final = 10.0
QUIET_S: Final = 0.5
LOG: Final = "host.log"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one Edge serves."""

    coordinator: str
    credential: Path
    name: str
    address: str
    port: int
    public: str
    shares_port: bool
    ca: Path | None
    server_name: str
    tls_cert: Path | None
    tls_key: Path | None
    restarts: Path | None
    client_ca: Path | None
    per_address: int


def run(settings: Settings, *, screen: Screen) -> None:
    """Serves until the run is over.

    Raises:
        Stopped: by Ctrl-C or SIGTERM.
        ProtocolError: the host refuses this Edge.
        NetworkError: the port is taken, or the host that it is to start again was ended.
    """
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {settings.name}: %(message)s", datefmt="%H:%M:%S")
    be_a_server()
    with tempfile.TemporaryDirectory(prefix="shoal-edge-") as folder:
        run_until_told(_serve(settings, Path(folder), screen))


async def _serve(settings: Settings, folder: Path, screen: Screen) -> None:
    from shoal.fleet.tls import read_tls

    restarts = _Restarts(settings.restarts)
    node = EdgeNode(
        settings.coordinator, credential=read_credential(settings.credential), name=settings.name,
        blobs=FolderBlobs(folder), clock=SystemClock(), address=settings.public,
        ca=None if settings.ca is None else read_certificates(settings.ca, option="--ca"), server_name=settings.server_name or None,
        entrance=Entrance(per_address=settings.per_address), on_lost=restarts,
    )  # fmt: skip
    tls = read_tls(settings.tls_key, settings.tls_cert) if settings.tls_key and settings.tls_cert else None
    if tls is not None and settings.client_ca is not None:
        tls = replace(tls, client_ca=settings.client_ca.read_bytes())
    own = joined(settings.address, 0) if settings.shares_port else ""
    server = GrpcServer(node.door, address=joined(settings.address, settings.port), tls=tls, own_address=own)
    try:
        await server.start()
        if not settings.public and settings.address not in ("0.0.0.0", "::"):
            node.address = joined(settings.address, server.own_port)
        line = f"listening on {joined(settings.address, server.port)}"
        screen.say(line) if screen.json else screen.line(line)
        await node.run()
        await server.until_quiet(quiet_s=QUIET_S, longest_s=LINGER_S)
        seen = node.door.edge.statistics() if node.door.edge is not None else None
        if seen is not None:
            screen.line(
                f"the run is over; since it attached last: {words.count(seen.check_ins, 'check-in')}, {seen.counted} counted, "
                f"sent down {words.size(seen.down_bytes)}, up {words.size(seen.up_bytes)}"
            )
            screen.document(asdict(seen) | {"name": settings.name})
    finally:
        await server.close(grace_s=0.2)


class _Restarts:
    """Starts a host again that has died, if no other Edge was faster: the run folder's lock lets only one in."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._started: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        folder = self._folder
        if folder is not None and not folder.exists():
            raise NetworkError(f"The run folder {folder} is gone, and its host with it.")
        if folder is None or not was_left(folder) or (self._started is not None and self._started.poll() is None):
            return
        try:
            again = json.loads((folder / RESTART).read_text())
        except FileNotFoundError:
            raise NetworkError(f"The host of {folder} has ended while this Edge was not attached.") from None
        command = [sys.executable, "-P", "-m", "shoal", *again]  # not a folder of that name that happens to be here
        log.warning("the host has died; starting it again")
        with (folder / LOG).open("ab") as out:
            self._started = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
