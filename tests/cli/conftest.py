"""A task of two numbers, users' examples in files, and `shoal` as a function or as a process."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

LINE = """
import jax.numpy as jnp
import optax

import shoal


def loss(params, state, batch, key):
    return jnp.square(params["w"] * batch["x"] + params["b"] - batch["y"])


def evaluate(params, state, batch):
    error = jnp.abs(params["w"] * batch["x"] + params["b"] - batch["y"])
    return {"error": shoal.Sum(error, jnp.ones_like(error), (0.0, 100.0))}


task = shoal.Task(
    name="line",
    init=lambda key: {"w": jnp.zeros(()), "b": jnp.zeros(())},
    loss=loss,
    evaluate=evaluate,
    predict=lambda params, state, batch: params["w"] * batch["x"] + params["b"],
    batch={"x": ((), "float32"), "y": ((), "float32")},
    local=shoal.Local(optimizer=optax.sgd(0.05), batch_size=4, epochs=2),
    rounds=shoal.RoundPolicy(goal=3, minimum_group=3, over_selection=1.0),
)
"""


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"code {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


Shoal = Callable[..., Outcome]


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # Programs are compiled into a folder of the test run; data sets stay in the user's cache, which saves downloads.
    real = Path(os.environ.get("SHOAL_CACHE") or Path.home() / ".cache" / "shoal") / "data"
    folder = tmp_path_factory.mktemp("cache")
    real.mkdir(parents=True, exist_ok=True)
    (folder / "data").symlink_to(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(folder))
        yield


@pytest.fixture(scope="session")
def shoal() -> Shoal:
    """Runs a command in this process."""
    from shoal.cli.main import app

    def run(*arguments: object) -> Outcome:
        made = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="shoal")
        return Outcome(made.exit_code, made.stdout, made.stderr)

    return run


def write_users(folder: Path, num: int, *, first: int = 0) -> Path:
    """y = 3 x + 1, with 5, 6, … examples a user."""
    rng = np.random.default_rng(first)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + num):
        x = rng.uniform(-2, 2, 5 + i % 7).astype(np.float32)
        np.savez(folder / f"user-{i:02}.npz", x=x, y=3 * x + 1)
    return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `line.py`, `users/` (6 of them) and `test.npz`."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "line.py").write_text(LINE)
    write_users(folder / "users", 6)
    x = np.linspace(-1, 1, 9, dtype=np.float32)
    np.savez(folder / "test.npz", x=x, y=3 * x + 1)
    return folder


@pytest.fixture(scope="session")
def trained(place: Path, shoal: Shoal) -> Path:
    """The folder of a run of 20 versions."""
    folder = place / "trained"
    made = shoal(
        "simulate", place / "line.py", "--data", place / "users", "--rounds", 20, "--run", folder, "--held-out", place / "test.npz",
    )  # fmt: skip
    assert made.code == 0, made
    return folder


class Process:
    """A command in a process of its own; its output goes to a file, so that no pipe fills."""

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        self.log = log
        with log.open("w") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "shoal.cli.main", *map(str, arguments)], stdout=file, stderr=file, cwd=log.parent
            )

    def wait(self, timeout_s: float = 60.0) -> int:
        return self.popen.wait(timeout_s)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.popen.send_signal(number)

    @property
    def text(self) -> str:
        return self.log.read_text()

    def until(self, seen: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Waits until something is so."""
        end_s = time.monotonic() + timeout_s
        while not seen():
            assert self.popen.poll() is None, f"it ended with {self.popen.returncode}:\n{self.text}"
            assert time.monotonic() < end_s, f"not in {timeout_s} s:\n{self.text}"
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts commands as processes; whatever lives at the end is killed."""
    started: list[Process] = []

    def begin(*arguments: object) -> Process:
        started.append(Process(arguments, tmp_path / f"process-{len(started)}.log"))
        return started[-1]

    yield begin
    for process in started:
        if process.popen.poll() is None:
            process.kill()
        process.wait()
