"""Real processes, really killed: twenty lives of a server, and the line has no gap and the bits of an undisturbed run."""

import asyncio
import contextlib
import random
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

import shoal.fleet.device
from shoal.fleet.grpc_link import GrpcLink
from shoal.plan.run_plan import begin_run
from shoal.record.memory import MemoryStore
from shoal.record.sqlite import open_store
from shoal.record.store import Store
from tests.fleet import toy

KILLS = 20
VALUES = {"a": 0.1, "b": 0.2, "c": 0.7}
SHAPES = {"params/w": (3,), "params/large": (5000,)}
"""Small enough to be quick, too large to go inline."""


def plan() -> toy.Plan:
    return toy.plan(toy.exact(*VALUES, reporting_window_s=5.0), SHAPES)


async def one_life(folder: Path, run_id: str, port: int, rounds: int, *, kill_after_s: float | None) -> None:
    args = ["-m", "tests.fleet.sigkill_server", str(folder), run_id, str(port), str(rounds)]
    root = Path(__file__).parents[2]
    server = await asyncio.create_subprocess_exec(sys.executable, *args, cwd=root, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None and await server.stdout.readline() == b"ready\n"
    if kill_after_s is not None:
        await asyncio.sleep(kill_after_s)
        server.kill()
    try:
        assert await asyncio.wait_for(server.wait(), timeout=60) == (0 if kill_after_s is None else -9)
    finally:
        if server.returncode is None:
            server.kill()


async def lives(folder: Path, run_id: str, port: int) -> int:
    """Kills the server again and again, then lets it run to five versions more; returns the last version."""
    rng = random.Random(0)
    link = GrpcLink(f"127.0.0.1:{port}")
    devices = [toy.device(name, link, value=value) for name, value in VALUES.items()]
    tasks = [asyncio.create_task(device.run()) for device in devices]
    for _ in range(KILLS):
        await one_life(folder, run_id, port, 10**6, kill_after_s=rng.uniform(0.0, 1.5))
        assert not any(task.done() for task in tasks), [task.exception() for task in tasks if task.done()]
    with contextlib.closing(open_store(folder)) as store:
        last = (store.last_version(run_id) or 0) + 5
    await one_life(folder, run_id, port, last, kill_after_s=None)
    await asyncio.wait_for(asyncio.gather(*tasks), timeout=60)
    assert all(device.progress.counted <= last for device in devices)
    await link.close()
    return last


def begin(store: Store) -> str:
    made = plan()
    model = {s.name: np.zeros(s.shape, s.numpy_dtype) for s in made.manifest.broadcast}
    return begin_run(store, made, model, kind="host", rounds=10**6, seed=0)


async def undisturbed(rounds: int) -> str:
    async with toy.fleet(plan(), rounds=rounds, store=MemoryStore()) as fleet:
        fleet.start(*(toy.device(name, fleet.link, value=value) for name, value in VALUES.items()))
        await asyncio.gather(*fleet.tasks)
        commit = fleet.store.last_commit(fleet.host.run_id)
        assert commit is not None
        return commit.model.root


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_twenty_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shoal.fleet.device, "BACK_OFF_S", (0.05, 0.2))  # the lives are short
    with contextlib.closing(open_store(tmp_path)) as store:
        run_id = begin(store)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    last = asyncio.run(lives(tmp_path, run_id, port))
    with contextlib.closing(open_store(tmp_path)) as store:
        commits = list(store.commits(run_id))
        assert [commit.version for commit in commits] == list(range(last + 1))
        assert last > KILLS, "most of the lives got somewhere"
        assert all(commit.members == len(VALUES) for commit in commits[1:])
        assert commits[-1].model.root == asyncio.run(undisturbed(last)), f"the bits of an undisturbed run of {last}"
        print(f"{last} versions over {KILLS} kills, {len(store.rounds(run_id))} rounds")
