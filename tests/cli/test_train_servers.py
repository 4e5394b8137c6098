"""`shoal train --servers`: in one process, in several, stopped and gone on, and what it refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from shoal.record.run import open_run
from tests.cli.conftest import Shoal

TASK = """
import jax, jax.numpy as jnp, optax, shoal

def scores(params, x):
    return jnp.tanh(x @ params["one"]) @ params["two"]

def init(key):
    return {"one": jax.random.normal(key, (6, 16)) * 0.3, "two": jax.random.normal(key, (16, 3)) * 0.3}

task = shoal.Task(
    name="small", init=init, batch={"x": ((6,), "float32"), "y": ((), "int32")},
    loss=lambda params, state, batch, key: optax.softmax_cross_entropy_with_integer_labels(scores(params, batch["x"]), batch["y"]),
    evaluate=lambda params, state, batch: {"right": shoal.Sum((jnp.argmax(scores(params, batch["x"]), 1) == batch["y"]).astype(jnp.float32), jnp.ones(batch["y"].shape[0]), (0.0, 1.0))},
    local=shoal.Local(optimizer=optax.adam(1e-2), batch_size=8),
)
"""  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(np.int32))
    return tmp_path


def train(folder: Path, *words: object) -> Any:
    command = [
        sys.executable,
        "-m",
        "shoal",
        "train",
        "task.py",
        "--data",
        "data.npz",
        "--held-out",
        "data.npz",
        *map(str, words),
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110, check=False)


def test_in_one_process_it_makes_a_run_and_says_what_became_of_the_order(folder: Path) -> None:
    made = train(folder, "--steps", 60, "--commit-every", 30, "--servers", 1, "--run", "run", "--json")
    assert made.returncode == 0, made.stderr
    told = json.loads(made.stdout)
    assert told["steps"] == 60
    assert told["pod"]["servers"] == 1
    assert told["pod"]["transfers"]["order"] == "auto"
    assert told["pod"]["transfers"]["why"]
    with open_run(folder / "run") as run:
        versions, values = run.history("right")
        assert list(versions) == [1, 2]
        assert values[-1] > 0.6
        assert run.store.run(run.id).status == "finished"


@pytest.mark.slow
@pytest.mark.integration
def test_processes_train_together(folder: Path) -> None:
    made = train(folder, "--steps", 40, "--commit-every", 20, "--workers", 2, "--servers", 1, "--run", "run")
    assert made.returncode == 0, made.stderr
    assert "life 1 begins with 3 workers" in made.stderr
    with open_run(folder / "run") as run:
        assert list(run.history("right")[0]) == [1, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--servers", 1, "--mesh", "data=2"], "--mesh would be ignored with --servers"),
        (["--servers", 1, "--update", "sharded"], "--update would be ignored"),
        (["--servers", 1, "--staleness", "much"], "--staleness STEPS or any"),
        (["--order", "tac"], "of training with --servers"),
        (["--ahead"], "of training with --servers"),
        (["--servers", 9], "as many servers as tensors"),
    ],
)
def test_what_makes_no_sense_has_one_clear_error(folder: Path, shoal: Shoal, words: list[object], message: str) -> None:
    task, data = folder / "task.py", folder / "data.npz"
    found = shoal("train", task, "--data", data, "--steps", 5, "--run", folder / "run", *words)
    assert found.code != 0
    assert message in " ".join(found.err.split())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(200)
@pytest.mark.parametrize("which", ["a worker", "a server"])
def test_when_one_is_killed_all_go_on_from_the_last_checkpoint(folder: Path, which: str) -> None:
    words = ["--steps", "6000", "--commit-every", "600", "--workers", "2", "--servers", "1", "--run", "run"]
    command = [sys.executable, "-m", "shoal", "train", "task.py", "--data", "data.npz", *words]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=folder, stdout=file, stderr=file)
        try:
            until(lambda: re.search(r"version +1/", log.read_text()) is not None, process)
            roles = worker_pids(process.pid)
            os.kill(roles[-1] if which == "a server" else roles[0], signal.SIGKILL)
            assert process.wait(100) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "life 2 begins" in log.read_text()
    with open_run(folder / "run") as run:
        assert run.store.run(run.id).status == "finished"
        assert run.store.last_version(run.id) == 10


def until(is_so: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    for _ in range(1000):
        if is_so():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("it took too long")


def worker_pids(supervisor: int) -> list[int]:
    """Of the workers that train, not of spares: those that have connections. As they were started, the servers last."""
    children = psutil.Process(supervisor).children(recursive=True)
    return [
        each.pid
        for each in sorted(children, key=psutil.Process.create_time)
        if "shoal.cli.train_pod" in " ".join(each.cmdline()) and each.net_connections()
    ]
