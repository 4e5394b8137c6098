"""`shoal train`: trains on a mesh, goes on, says what is wrong in one line."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from shoal.record.run import open_run

from .conftest import Process, Shoal


def test_it_trains_goes_on_on_another_mesh_and_predicts(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    task, data = f"{place / 'line.py'}:task", ("--data", place / "users", "--held-out", place / "test.npz")
    mesh = ("--mesh", "slow=2,data=4")
    made = shoal("train", task, *data, *mesh, "--epochs", 1, "--batch", 8, "--run", tmp_path / "r", "--json")
    assert made.code == 0, made
    assert made.json["version"] == 1 and made.json["pod"]["mesh"] == "slow=2,data=4" and made.json["kind"] == "train"
    assert (
        "mesh slow=2,data=4, update sharded, sums in float32, batch 8" in made.err
        and "a device sends" in made.err
        and "version 1/1" in made.err
    )
    again = shoal(
        "train",
        task,
        *data,
        "--mesh",
        "data=4,model=2",
        "--epochs",
        3,
        "--batch",
        8,
        "--run",
        tmp_path / "r",
        "--resume",
        "--json",
    )
    assert again.code == 0 and again.json["version"] == 3, again
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "finished"
        assert [row.state for row in run.store.rounds(run.id)] == ["committed"] * 3
        errors, losses = run.history("error")[1], run.history("train/loss")[1]
        assert len(errors) == len(losses) == 3 and errors[-1] < errors[0] and losses[-1] < losses[0]
    assert shoal("report", tmp_path / "r").code == 0
    card = (tmp_path / "r" / "CARD.md").read_text()
    assert "on a mesh of accelerators" in card and "The mesh: data=4,model=2; batches of 8 over all members." in card
    predicted = shoal("predict", tmp_path / "r", place / "test.npz", "--out", tmp_path / "made.npz")
    assert predicted.code == 0, predicted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "Expected one of --epochs and --steps"),
        (("--epochs", 1, "--mesh", "data"), "Expected --mesh NAME=SIZE"),
        (("--epochs", 1, "--mesh", "data=3"), "Expected a mesh of 8 devices"),
        (("--epochs", 1, "--rule", "params/w"), "Expected --rule NAME=WORDS"),
        (("--epochs", 1, "--rule", "params/x=model"), "Expected each of rules to be used, got 'params/x'"),
        (("--epochs", 1, "--batch", "large"), "Expected --batch NUMBER or auto, got 'large'"),
        (("--epochs", 1, "--sums", "int8"), "sums='int8'"),
        (("--epochs", 1, "--resume"), "Expected --run DIR with --resume"),
    ],
)
def test_bad_options_are_said_in_one_line(options: tuple[str, ...], said: str, place: Path, shoal: Shoal) -> None:
    made = shoal("train", f"{place / 'line.py'}:task", "--data", place / "users", *options)
    assert made.code == 1 and said in made.err and "Traceback" not in made.err, made


@pytest.mark.slow
def test_ctrl_c_keeps_a_checkpoint_and_says_how_to_go_on(
    place: Path, tmp_path: Path, start: Callable[..., Process]
) -> None:
    process = start(
        "train", place / "line.py", "--data", place / "users", "--steps", 10_000_000, "--commit-every", 200, "--mesh", "data=2",
        "--run", tmp_path / "r",
    )  # fmt: skip
    process.until(lambda: "version " in process.text)
    process.kill(signal.SIGINT)
    assert process.wait() == 130
    assert "stopped at step" in process.text and "--resume" in process.text
    assert list((tmp_path / "r" / "checkpoints").iterdir())
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "stopped"


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("num_killed", "every", "said"),
    [
        (1, 3000, "which was rescued when the training ended last"),
        (2, 100, "goes on from the checkpoint of step"),
    ],
)
def test_a_pod_goes_on_when_workers_are_killed(
    place: Path, tmp_path: Path, start: Callable[..., Process], num_killed: int, every: int, said: str
) -> None:
    process = start(
        "train", place / "line.py", "--data", place / "users", "--held-out", place / "test.npz", "--steps", 3000, "--commit-every", 100,
        "--checkpoint-every", every, "--workers", 2, "--run", tmp_path / "r",
    )  # fmt: skip
    kept = tmp_path / "r" / "checkpoints"
    process.until(
        lambda: "/30 " in process.text and (every == 3000 or any(each.name.isdigit() for each in kept.glob("*"))),
        timeout_s=100,
    )
    workers = filter(is_at_work, psutil.Process(process.popen.pid).children(recursive=True))
    for victim in list(workers)[:num_killed]:
        os.kill(victim.pid, signal.SIGKILL)
    assert process.wait(150) == 0, process.text
    assert (
        "life 1 was ended" in process.text
        and "SIGKILL" in process.text
        and "life 2 begins with 2 workers" in process.text
        and said in process.text
    )
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "finished" and run.store.last_version(run.id) == 30
        assert run.history("error")[1][-1] < 0.1


def is_at_work(process: psutil.Process) -> bool:
    """Spares have no connections."""
    return "shoal.cli.train_pod" in process.cmdline() and bool(process.net_connections())
