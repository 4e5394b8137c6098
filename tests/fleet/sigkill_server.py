"""A server that takes up a run and serves it: ``python -m tests.fleet.sigkill_server FOLDER RUN PORT ROUNDS``."""

import asyncio
import sys
from pathlib import Path

from shoal.fleet.host import Host
from shoal.record.lock import only_writer
from shoal.record.sqlite import open_store
from tests.fleet.toy import KEYS


async def main(folder: Path, run_id: str, port: int, rounds: int) -> None:
    store = open_store(folder)
    host = Host(store, run_id, KEYS, rounds=rounds, alone=True)
    server = host.server(address=f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await host.run()
    await server.close()
    store.close()


if __name__ == "__main__":
    with only_writer(Path(sys.argv[1])):
        asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
