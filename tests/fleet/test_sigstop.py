"""Real processes, one of them really stopped: another takes its run over, and it can write nothing when it goes on."""

import asyncio
import contextlib
import signal
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

import numpy as np
import pytest

from shoal.fleet.grpc_link import GrpcLink
from shoal.plan.run_plan import begin_run
from shoal.record.sqlite import open_store
from tests.fleet import toy

LIFE_S = 1.0
ROUNDS = 3


async def started(folder: Path, run_id: str) -> tuple[Process, str]:
    args = ["-m", "tests.fleet.lease_server", str(folder), run_id, str(ROUNDS), str(LIFE_S)]
    root = Path(__file__).parents[2]
    server = await asyncio.create_subprocess_exec(sys.executable, *args, cwd=root, stdout=PIPE, stderr=PIPE)
    assert server.stdout is not None
    return server, (await server.stdout.readline()).decode().strip()


async def played(folder: Path, run_id: str) -> str:
    """Returns what the first host said at its end."""
    first, address = await started(folder, run_id)
    try:
        link = GrpcLink(address)
        alone = asyncio.create_task(toy.device("a", link).run())  # half of a round: it stays open
        with contextlib.closing(open_store(folder, read_only=True)) as store:
            while not store.rounds(run_id):
                await asyncio.sleep(0.01)
            first.send_signal(signal.SIGSTOP)
            second, address = await started(folder, run_id)  # says it when it has the lease, which had to expire
            row = store.lease(run_id)
            assert row is not None and row.fence == 2 and f"process {second.pid} " in row.holder
            both = GrpcLink(address)
            other = asyncio.create_task(toy.device("b", both).run())
            while len(store.rounds(run_id)) < 2:  # the second has abandoned the round of the first, and opened its own
                await asyncio.sleep(0.01)
            rounds, commits = store.rounds(run_id), store.last_version(run_id)
            first.send_signal(signal.SIGCONT)
            _, said = await asyncio.wait_for(first.communicate(), timeout=20)
            assert first.returncode == 1
            assert (store.rounds(run_id), store.last_version(run_id)) == (rounds, commits), "it has written nothing"
            alone.cancel()
            await asyncio.gather(alone, return_exceptions=True)
            again = asyncio.create_task(toy.device("a", both).run())
            await asyncio.wait_for(asyncio.gather(other, again), timeout=20)
            assert await asyncio.wait_for(second.wait(), timeout=20) == 0
            await link.close()
            await both.close()
        return said.decode()
    finally:
        for process in (first, second):
            if process.returncode is None:
                process.kill()


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.skipif(sys.platform == "win32", reason="no signal stops a process there")
@pytest.mark.timeout(60)
def test_a_host_that_was_stopped_writes_nothing_when_it_goes_on(tmp_path: Path) -> None:
    plan = toy.plan(toy.exact("a", "b", reporting_window_s=300.0))
    with contextlib.closing(open_store(tmp_path)) as store:
        model = {s.name: np.zeros(s.shape, s.numpy_dtype) for s in plan.manifest.broadcast}
        run_id = begin_run(store, plan, model, kind="host", rounds=ROUNDS, seed=0)
    said = asyncio.run(played(tmp_path, run_id))
    (line,) = said.splitlines()
    assert f"Run {run_id} is no longer this process's (fence 1)" in line and "has taken it over (fence 2)" in line
    with contextlib.closing(open_store(tmp_path)) as store:
        commits = list(store.commits(run_id))
        assert [commit.version for commit in commits] == list(range(ROUNDS + 1))
        assert all(commit.members == 2 for commit in commits[1:])
        row = store.lease(run_id)
        assert row is not None and (row.holder, row.fence) == ("", 2)
        assert store.run(run_id).status == "finished"
