"""A cohort laid out over the devices of two processes, as over those of two hosts: the same bits as on one."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.record.run import open_run

HOST = """
import sys
import jax, numpy as np
number, address, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
if address:
    jax.distributed.initialize(address, 2, number)
import shoal, shoal.simulate.engine as engine
engine.cached = engine.cache = lambda *given: None
from tests.simulate.test_engine import population, task
chosen = task(leaves={"params/b": "private"}, rounds=shoal.RoundPolicy(goal=5, minimum_group=3))
made = shoal.simulate(chosen, population(9), rounds=3, seed=4, folder=folder + "/run")
np.savez(f"{folder}/{number}.npz", **made.model)
"""


def start(number: int, address: str, folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", HOST, str(number), address, str(folder)])


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_two_hosts_make_what_one_makes(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("localhost", 0))
        address = f"localhost:{listening.getsockname()[1]}"
    hosts = [start(number, address, tmp_path / "both") for number in range(2)]
    alone = start(0, "", tmp_path / "one")
    assert [host.wait() for host in (*hosts, alone)] == [0, 0, 0]
    expected = np.load(tmp_path / "one" / "0.npz")
    for number in range(2):
        model = np.load(tmp_path / "both" / f"{number}.npz")
        assert sorted(model) == sorted(expected)
        for name in expected:
            np.testing.assert_array_equal(model[name], expected[name], err_msg=name)
    with open_run(tmp_path / "both" / "run") as run:
        assert run.row.status == "finished" and run.store.last_version(run.id) == 3
