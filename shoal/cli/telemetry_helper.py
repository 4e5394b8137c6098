"""What the process of a telemetry helper does: serves until it is told to end."""

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shoal.cli.ending import run_until_told
from shoal.cli.screen import Screen
from shoal.clock import SystemClock
from shoal.fleet import tls as tls_files
from shoal.fleet.address import joined
from shoal.fleet.enrolment import make_secret, read_secret
from shoal.fleet.grpc_server import Tls
from shoal.fleet.telemetry_helper import Helper, OpenedSeeds, Terms
from shoal.fleet.telemetry_server import HelperServer
from shoal.privacy.masks import public_key
from shoal.record.lock import only_writer

KEY: Final = "helper.key"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a helper serves."""

    folder: Path
    address: str
    port: int
    terms: Terms
    make_tls: bool = False
    tls_cert: Path | None = None
    tls_key: Path | None = None


def run(settings: Settings, *, screen: Screen) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Raises:
        Stopped: it was told to end.
        NetworkError: the port is taken.
        StoreError: another process serves this helper: each would open what the other has opened.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    path = settings.folder / KEY
    settings.folder.mkdir(parents=True, exist_ok=True)
    with only_writer(settings.folder, what="helper", hint=""):
        private = read_secret(path) if path.exists() else make_secret(path)
        helper = Helper(private, OpenedSeeds(settings.folder / "opened"), terms=settings.terms)
        run_until_told(_serve(settings, helper, public_key(private), screen))


async def _serve(settings: Settings, helper: Helper, public: bytes, screen: Screen) -> None:
    tls, ca = _tls(settings)
    server = HelperServer(helper, address=joined(settings.address, settings.port), clock=SystemClock(), tls=tls)
    await server.start()
    try:
        where = joined(settings.address, server.port)
        line = f"listening on {where}"
        screen.say(line) if screen.json else print(line, flush=True)
        screen.say(f"the host: shoal host … --telemetry {where}" + (f" --telemetry-ca {ca}" if ca else ""))
        screen.say(f"devices: shoal device … --telemetry {public.hex()}")
        screen.document({"address": where, "key": public.hex(), "ca": None if ca is None else str(ca)})
        await asyncio.Event().wait()
    finally:
        await server.close()


def _tls(settings: Settings) -> tuple[Tls | None, Path | None]:
    if settings.tls_cert is not None and settings.tls_key is not None:
        return tls_files.read_tls(settings.tls_key, settings.tls_cert), None
    if settings.make_tls:
        return tls_files.load_or_make_tls(settings.folder, address=settings.address)
    return None, None
