"""A server that takes a run up once its lease has expired: ``python -m tests.fleet.lease_server FOLDER RUN ROUNDS LIFE_S``.

It says its address when it has the lease. It does not hold the folder's lock: as if it were on another machine.
"""

import asyncio
import logging
import os
import sys
from pathlib import Path

from shoal.cli.failures import describe
from shoal.clock import SystemClock
from shoal.errors import ShoalError
from shoal.fleet.host import Host
from shoal.fleet.lease_keeper import LeaseKeeper
from shoal.record.sqlite import open_store
from tests.fleet.toy import KEYS


async def main(folder: Path, run_id: str, rounds: int, life_s: float) -> None:
    store = open_store(folder)
    host = Host(store, run_id, KEYS, rounds=rounds)
    host.lease = LeaseKeeper(store, run_id, clock=SystemClock(), life_s=life_s, waits=True)
    server = host.server(address="127.0.0.1:0")
    await server.start()
    serving = asyncio.create_task(host.run())
    while (row := store.lease(run_id)) is None or f"process {os.getpid()} " not in row.holder:
        await asyncio.sleep(0.01)
    print(f"127.0.0.1:{server.port}", flush=True)
    try:
        await serving
        await server.until_quiet(quiet_s=0.2, longest_s=10.0)
    finally:
        await server.close()
        store.close()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    try:
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    except ShoalError as error:
        sys.exit(f"shoal: {describe(error)}")
