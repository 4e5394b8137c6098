"""Users left out, early stopping and progress of `shoal simulate`; `shoal runs plot` and `shoal runs compare`."""

import shutil
from pathlib import Path

import pytest

from shoal.cli.round_lines import RoundLines
from shoal.cli.screen import Screen
from shoal.record.run import open_run
from shoal.simulate.engine import RoundResult

from .conftest import Shoal, write_users

PLAIN = ("--backend", "sequential")


@pytest.fixture(scope="module")
def left_out(place: Path, tmp_path_factory: pytest.TempPathFactory, shoal: Shoal) -> Path:
    """A run of 12 users, half of them left out, that ends early."""
    users = write_users(tmp_path_factory.mktemp("twelve") / "users", 12)
    folder = tmp_path_factory.mktemp("runs") / "early"
    made = shoal(
        "simulate", place / "line.py", "--data", users, "--leave-out", 0.5, "--rounds", 50, "--run", folder, *PLAIN,
        "--stop-when", "left_out/error:reaches=1.5", "--held-out", users, "--by-user",
    )  # fmt: skip
    assert made.code == 0, made
    assert "6 users left out of training" in made.err
    assert "ended early: left_out/error has reached 1.5" in made.out and "worst tenth" in made.out
    return folder


def test_what_a_run_with_users_left_out_keeps(left_out: Path, shoal: Shoal) -> None:
    shown = shoal("runs", "show", left_out, "--json")
    assert shown.code == 0, shown
    assert shown.json["config"]["left_out"]["users"] == 6 and shown.json["version"] < 50
    assert shown.json["config"]["stop_when"] == {"metric": "left_out/error", "reaches": 1.5}
    assert {(each["metric"], each["users"]) for each in shown.json["over_users"]} == {
        ("left_out/error", 6),
        ("error", 12),
    }
    assert "over users" in shoal("runs", "show", left_out).out
    card = shoal("report", left_out)
    assert "took no part in training" in card.out and "It ended before its last round" in card.out, card
    with open_run(left_out) as run:
        assert not any("user-" in repr(row) for row in run.store.events(run.id))


def test_a_run_goes_on_only_with_the_same_users_left_out(left_out: Path, tmp_path: Path, shoal: Shoal) -> None:
    left_out = shutil.copytree(left_out, tmp_path / "again")
    with open_run(left_out) as run:
        version, data = run.store.last_version(run.id), run.row.config["data"].split()
    assert version is not None
    again = ("simulate", "--data", *data, "--run", left_out, "--resume", "--rounds", version + 1)
    made = shoal(*again)
    assert made.code == 0 and f"version {version}" in made.out and "ended early" in made.out, made
    made = shoal("simulate", "--data", data[0], "--run", left_out, "--resume", "--rounds", version + 1)
    assert made.code == 1 and "6 users left out of training" in made.err, made
    made = shoal(*again, "--stop-when", "none")
    assert made.code == 0 and f"version {version + 1}" in made.out and "ended early" not in made.out, made


def test_options_that_do_not_fit_are_refused(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    task, users, run = place / "line.py", place / "users", ("--rounds", 1, "--run", tmp_path / "r")
    for options, says in (
        (("--leave-out", "nobody"), "No user 'nobody'"),
        (("--leave-out", "1.5"), "a share of the users above 0 and below 1"),
        (("--by-user",), "--by-user needs --held-out with users"),
        (("--stop-when", "error"), "Expected --stop-when METRIC:"),
        (("--stop-when", "error:patience=2"), "will not have"),
    ):
        made = shoal("simulate", task, "--data", users, *options, *run)
        assert made.code == 1 and says in made.err.splitlines()[-1], made
    made = shoal("simulate", task, "--virtual", "x.toml", "--leave-out", "0.1", *run)
    assert made.code == 1 and "not for --virtual" in made.err, made


def test_runs_beside_one_another(left_out: Path, trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    made = shoal("runs", "compare", left_out, trained, "--metric", "error")
    assert made.code == 0, made
    for part in ("early", "trained", "error, best", "reaches", "seconds at work", "bytes down*", "stop_when.reaches"):
        assert part in made.out, made
    document = shoal("runs", "compare", left_out, trained, "--metric", "error", "--target", "2.0", "--json").json
    assert document["target"] == 2.0 and document["better"] == "lower"
    assert [run["label"] for run in document["runs"]] == ["early", "trained"]
    assert document["runs"][1]["rounds_to_target"] >= 1
    out = tmp_path / "both.png"
    made = shoal("runs", "plot", left_out, trained, "--metric", "error", "--out", out, "--json")
    assert made.code == 0 and made.json["metrics"] == ["error"] and out.stat().st_size > 10_000, made
    made = shoal("runs", "plot", trained)
    assert made.code == 0 and (trained / "curves.png").is_file() and str(trained / "curves.png") in made.out, made
    made = shoal("runs", "compare", left_out, trained, "--metric", "speed")
    assert made.code == 1 and "got 'speed'" in made.err.splitlines()[-1], made


def test_progress_has_rate_and_time_left_and_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    time_s = [0.0]
    lines = RoundLines(0, 5, Screen(json=False), now_s=lambda: time_s[0])
    for version in range(1, 6):
        time_s[0] += 0.2
        lines(RoundResult(version, ("a", "b"), {"accuracy": 0.5, "accuracy/p10": 0.1}, 0.2))
    told = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in told] == ["round 1/5", "round 4/5", "round 5/5"]
    assert told[0] == "round 1/5  accuracy 0.5  200 ms", "of the first round alone nothing is foretold"
    assert "accuracy 0.5  200 ms  5 rounds/s  100 ms a member  200 ms left" in told[1]
