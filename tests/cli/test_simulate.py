"""`shoal simulate`: trains, resumes, says what is wrong in one line."""

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shoal.cli.round_lines import RoundLines
from shoal.errors import DataError
from shoal.record.run import init, open_run

from .conftest import LINE, Process, Shoal


def one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert "Traceback" not in text
    return lines[-1]


def test_it_trains_and_says_where_the_run_is(trained: Path, shoal: Shoal) -> None:
    with open_run(trained) as run:
        assert run.row.status == "finished" and run.store.last_version(run.id) == 20
        assert run.history("error")[1][-1] < 0.1
        assert [row.state for row in run.store.rounds(run.id)] == ["committed"] * 20


def test_progress_goes_to_standard_error_and_json_to_standard_output(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    made = shoal(
        "simulate", f"{place / 'line.py'}:task", "--data", place / "users", "--rounds", 2, "--run", tmp_path / "r", "--json"
    )  # fmt: skip
    assert made.code == 0, made
    assert made.json["version"] == 2 and made.json["folder"] == str(tmp_path / "r") and len(made.json["rounds"]) == 2
    assert made.json["seconds"]["compute"] > 0
    assert (
        "compiled a round of" in made.err and "round 1/2" in made.err and "rounds/s" in made.err and "left" in made.err
    )


def test_a_run_goes_on_to_the_same_model_as_one_without_a_break(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    data = ("--data", place / "users", "--held-out", place / "test.npz")
    whole = shoal("simulate", place / "line.py", *data, "--rounds", 4, "--run", tmp_path / "whole", "--json")
    assert shoal("simulate", place / "line.py", *data, "--rounds", 2, "--run", tmp_path / "parts").code == 0
    rest = shoal(
        "simulate", place / "line.py", *data, "--run", tmp_path / "parts", "--resume", "--rounds", 4, "--json"
    )  # fmt: skip
    assert rest.code == 0 and "going on from version 2" in rest.err, rest
    with open_run(tmp_path / "whole") as a, open_run(tmp_path / "parts") as b:
        roots = [run.store.get_commit(run.id, 4).model.root for run in (a, b)]
    assert roots[0] == roots[1]
    assert whole.json["metrics"] == rest.json["metrics"]
    again = shoal("simulate", *data, "--run", tmp_path / "parts", "--resume")
    assert again.code == 0 and "version 4 of 4 already" in again.err, "the rounds asked for last are the run's"


@pytest.mark.parametrize("backend", [(), ("--backend", "sequential")], ids=["fused", "sequential"])
def test_ctrl_c_leaves_with_130_and_the_command_to_go_on(
    backend: tuple[str, ...], place: Path, tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = RoundLines.__call__

    def interrupted(self: RoundLines, result: object) -> None:
        real(self, result)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(RoundLines, "__call__", interrupted)
    new = ("simulate", place / "line.py", "--data", place / "users", "--rounds", 5, "--run", tmp_path / "r")
    made = shoal(*new, *backend)
    assert made.code == 130, made
    line = one_line(made.err)
    assert "stopped at version 1 of 5" in line and "--resume" in line and str(tmp_path / "r") in line
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "stopped"
    monkeypatch.undo()
    rest = shoal(*line.split("Go on with: shoal ")[1].split())
    assert rest.code == 0 and "version 5" in rest.out and "other last bits" not in rest.err, rest


def test_who_goes_on_by_another_backend_is_told(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    data, run = ("--data", place / "users"), ("--run", tmp_path / "r")
    assert shoal("simulate", place / "line.py", *data, *run, "--rounds", 1, "--backend", "sequential").code == 0
    rest = shoal("simulate", place / "line.py", *data, *run, "--rounds", 2, "--resume")
    assert rest.code == 0 and "in one program from here on: other last bits" in rest.err, rest


def test_a_run_that_fails_says_what_is_kept_and_how_to_go_on(
    place: Path, tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RoundLines, result: object) -> None:
        raise DataError("Member 'a' cannot be used.")

    monkeypatch.setattr(RoundLines, "__call__", fail)
    made = shoal("simulate", place / "line.py", "--data", place / "users", "--rounds", 5, "--run", tmp_path / "r")
    assert made.code == 1 and one_line(made.err) == "shoal: Member 'a' cannot be used."
    kept = made.err.strip().splitlines()[-2]
    assert kept.startswith("version 1 of 5 is kept.") and f"--run {tmp_path / 'r'} --resume" in kept


@pytest.mark.slow
@pytest.mark.integration
def test_sigterm_ends_it_as_ctrl_c_does(place: Path, tmp_path: Path, start: Callable[..., Process]) -> None:
    made = start(
        "simulate", place / "line.py", "--data", place / "users", "--rounds", 100_000, "--run", tmp_path / "r"
    )  # fmt: skip
    made.until(lambda: "rounds/s" in made.text)
    made.kill(signal.SIGTERM)
    assert made.wait(20) == 143, made.text
    line = one_line(made.text)
    assert "stopped at version" in line and "--resume" in line
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "stopped"


def test_a_smaller_goal_lowers_the_smallest_group_aloud(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    made = shoal(
        "simulate", place / "line.py", "--data", place / "users", "--rounds", 1, "--goal", 2, "--run", tmp_path / "r"
    )
    assert made.code == 0 and "lowered from 3 to 2" in made.err, made


@pytest.mark.slow
@pytest.mark.integration
def test_a_known_data_set_is_dealt_out(tmp_path: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shoal("new", "mine").code == 0
    made = shoal(
        "simulate", "mine.py", "--data", "name:digits", "--split", "dirichlet:0.5", "--users", 12, "--rounds", 2, "--json"
    )  # fmt: skip
    assert made.code == 0, made
    assert made.json["metrics"]["accuracy"] > 0.3 and made.json["folder"].startswith("runs/")


def bad_calls(place: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    task, data = place / "line.py", ("--data", place / "users")
    return {
        "no data": ((task, "--rounds", 1), "--data"),
        "no task": ((*data, "--rounds", 1), "TASK"),
        "no rounds": ((task, *data), "--rounds"),
        "unknown file": ((place / "nothing.py", *data, "--rounds", 1), "no file"),
        "unknown module": (("no_such_module:task", *data, "--rounds", 1), "no_such_module"),
        "wrong task name": ((f"{task}:tusk", *data, "--rounds", 1), "task"),
        "no task at all": (("json", *data, "--rounds", 1), "no shoal.Task"),
        "not a task": ((f"{task}:loss", *data, "--rounds", 1), "function"),
        "empty data path": ((task, "--data", place / "empty", "--rounds", 1), "No data in"),
        "missing data path": ((task, "--data", place / "nowhere", "--rounds", 1), "does not exist"),
        "unknown data set": ((task, "--data", "name:nothing", "--rounds", 1), "fashion-mnist"),
        "wrong split": ((task, "--data", "name:digits", "--split", "odd:3", "--rounds", 1), "dirichlet"),
        "split of files": ((task, *data, "--split", "shards:2", "--rounds", 1), "name:"),
        "too few users": ((task, *data, "--goal", 50, "--rounds", 1), "50"),
        "data that do not fit": ((task, "--data", place / "odd", "--rounds", 1), "reads"),
        "resume of nothing": ((*data, "--resume"), "--run"),
        "resume of no run": ((*data, "--resume", "--run", place / "empty"), "run"),
        "resume with a seed": ((*data, "--resume", "--run", place / "trained", "--seed", 3), "--seed"),
        "a folder that is taken": ((task, *data, "--rounds", 1, "--run", place / "trained"), "--resume"),
    }


@pytest.mark.parametrize("case", bad_calls(Path()))
def test_what_is_wrong_is_said_in_one_line(
    case: str, place: Path, trained: Path, shoal: Shoal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "empty").mkdir(exist_ok=True)
    (place / "odd").mkdir(exist_ok=True)
    for user in range(3):
        np.savez(place / "odd" / f"{user}.npz", z=np.zeros(3, np.float32))
    monkeypatch.chdir(tmp_path)  # where a run would be made
    arguments, expected = bad_calls(place)[case]
    made = shoal("simulate", *arguments)
    assert made.code == 1 and made.out == "", made
    line = one_line(made.err)
    assert line.startswith("shoal: ") and expected in line, made


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import shoal\nraise RuntimeError('boom')\n", "line 2: RuntimeError: boom"),
        ("def f(:\n", "line 1: SyntaxError"),
        ("import sys\nsys.exit(0)\n", "SystemExit"),
        ("x = 3\n", "no shoal.Task"),
        (LINE + "other = task.replace(name='other')\n", "other | task"),
        (LINE.replace("return jnp.square(", "return jnp.mean("), "one loss per example"),
    ],
)
def test_a_task_file_with_a_mistake_is_named(
    source: str, expected: str, place: Path, tmp_path: Path, shoal: Shoal
) -> None:
    (tmp_path / "mistaken.py").write_text(source)
    made = shoal(
        "simulate", tmp_path / "mistaken.py", "--data", place / "users", "--rounds", 1, "--run", tmp_path / "r"
    )
    assert made.code == 1 and expected in one_line(made.err), made


def test_a_run_of_a_host_is_not_gone_on_with_here(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    init("line", kind="host", folder=tmp_path / "r").close()
    made = shoal("simulate", "--data", place / "users", "--resume", "--run", tmp_path / "r", "--rounds", 3)
    assert made.code == 1 and "was made by `shoal host`" in one_line(made.err), made


def test_debug_shows_where(place: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_DEBUG", "1")
    made = shoal("simulate", place / "nothing.py", "--data", place / "users", "--rounds", 1)
    assert (
        made.code == 1
        and "Traceback" in made.err
        and made.err.strip().splitlines()[-1].startswith("shoal: There is no")
    )
