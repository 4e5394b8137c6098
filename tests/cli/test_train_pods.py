"""`shoal train --pods`: DiLoCo on one machine; a pod is killed, the whole is stopped and gone on with, bad words are refused."""

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
from tests.cli.test_train_servers import TASK

WORDS = ["train", "task.py", "--data", "data.npz", "--held-out", "data.npz", "--run", "run"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 6)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=(x[:, 0] > 0).astype(np.int32))
    return tmp_path


def started(folder: Path, *words: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "shoal", *WORDS, *map(str, words)]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)


def log_of(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def until(is_so: Callable[[], bool], process: Any) -> None:
    for _ in range(900):
        if is_so():
            return
        assert process.poll() is None
        time.sleep(0.1)
    raise AssertionError("it took too long")


def version_of(folder: Path) -> int:
    found = re.findall(r"version +(\d+)/", log_of(folder))
    return int(found[-1]) if found else 0


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(150)
def test_pods_train_by_rounds_of_many_steps(folder: Path) -> None:
    command = [sys.executable, "-m", "shoal", *WORDS, "--pods", "2", "--inner-steps", "20", "--fragments", "2", "--steps", "50", "--json"]  # fmt: skip
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=140, check=False)
    assert made.returncode == 0, made.stderr
    assert "2 pods, each with 32 examples and a batch of 4; 6 rounds of 10 steps" in made.stderr
    assert "1/2 of the model is averaged: 60 steps in all" in made.stderr and "uses of examples" not in made.stderr
    assert "shoal device" not in made.stderr  # nobody else is asked to join
    assert json.loads(made.stdout)["folder"] == "run"
    with open_run(folder / "run") as run:
        versions, values = run.history("right")
        assert versions[-1] == 6
        assert values[-1] > 0.6
        assert run.store.run(run.id).status == "finished"
    assert not list((folder / "run" / "pods").glob("*.npz")), "copies of the examples are left"


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_killed_pod_comes_back_and_a_stopped_training_goes_on(folder: Path) -> None:
    process = started(folder, "--pods", 2, "--inner-steps", 4, "--steps", 1200)
    try:
        until(lambda: version_of(folder) >= 2, process)
        pods = [each for each in psutil.Process(process.pid).children() if "device" in each.cmdline()]
        pods[0].kill()
        before = version_of(folder)
        until(lambda: "is begun again" in log_of(folder) and version_of(folder) >= before + 3, process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert not [each for each in pods if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]
    finally:
        process.kill()
        process.wait()
    assert "--resume" in log_of(folder) and "--pods 2" in log_of(folder)
    at = version_of(folder)
    process = started(folder, "--pods", 2, "--inner-steps", 4, "--steps", 1200, "--resume")
    try:
        until(lambda: version_of(folder) >= at + 2, process)
    finally:
        os.kill(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(150)
def test_with_a_goal_below_their_number_nobody_waits(folder: Path) -> None:
    process = started(folder, "--pods", 4, "--inner-steps", 4, "--goal", 2, "--late", "discount:0.7:4", "--steps", 60)
    assert process.wait(140) == 0, log_of(folder)
    with open_run(folder / "run") as run:
        assert run.store.last_version(run.id) == 15
        assert {commit.members for commit in run.store.commits(run.id)} == {0, 2}


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(200)
def test_a_finished_training_goes_on_with_more_steps_and_with_nothing_else(folder: Path) -> None:
    words = ["--pods", 1, "--inner-steps", 4]
    assert started(folder, *words, "--steps", 8).wait(90) == 0, log_of(folder)
    assert started(folder, *words, "--steps", 16, "--resume").wait(90) == 0, log_of(folder)
    with open_run(folder / "run") as run:
        assert run.store.last_version(run.id) == 4
    assert started(folder, "--pods", 2, "--inner-steps", 4, "--steps", 16, "--resume").wait(60) == 1
    assert "The run began with pods=1, and would go on with 2" in " ".join(log_of(folder).split())


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(150)
def test_examples_that_do_not_fit_are_refused_before_anything_is_begun(folder: Path) -> None:
    np.savez(folder / "other.npz", x=np.zeros((8, 5), np.float32), y=np.zeros(8, np.int32))
    words = ["train", "task.py", "--data", "other.npz", "--run", "other", "--pods", "2", "--steps", "4"]
    made = subprocess.run([sys.executable, "-m", "shoal", *words], cwd=folder, capture_output=True, text=True, timeout=90, check=False)  # fmt: skip
    assert made.returncode == 1 and "reads 'x' as float32[6]" in " ".join(made.stderr.split())
    assert not (folder / "other" / "record.sqlite").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pods", 2, "--servers", 1], "Expected --servers or --pods"),
        (["--pods", 2, "--fragments", 2, "--late", "patch:2"], "--late discard with --fragments"),
        (["--inner-steps", 10], "--inner-steps would be ignored with a mesh"),
        (["--pods", 2, "--mesh", "data=2"], "--mesh would be ignored with --pods"),
        (["--pods", 2, "--commit-every", 5], "--commit-every would be ignored with --pods"),
        (["--pods", 2, "--goal", 3], "a --goal of at most --pods 2"),
        (["--pods", 2, "--inner-steps", 10, "--fragments", 3], "--inner-steps that --fragments 3 divide"),
        (["--pods", 2, "--late", "never"], "--late discard"),
        (["--pods", 2, "--workers", 2], "not for --pods"),
        (["--pods", 100], "an example for each of --pods 100"),
    ],
)
def test_what_makes_no_sense_has_one_clear_error(folder: Path, shoal: Shoal, words: list[object], message: str) -> None:
    found = shoal(
        "train", folder / "task.py", "--data", folder / "data.npz", "--steps", 5, "--run", folder / "run", *words
    )
    assert found.code != 0
    assert message in " ".join(found.err.split())
