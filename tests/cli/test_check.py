"""`shoal check`: the lines, the exit code."""

from pathlib import Path

import pytest

from .conftest import LINE, Shoal


@pytest.fixture(autouse=True)
def short_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.testing.SPEED_S", 0.02)


def test_a_good_task_passes(place: Path, shoal: Shoal) -> None:
    made = shoal("check", place / "line.py", "--data", place / "users")
    assert made.code == 0, made
    assert "fail" not in made.out.replace("0 fail", "") and "learns" in made.out and made.out.strip().endswith("s)")


def test_without_data_random_examples_are_taken(place: Path, shoal: Shoal) -> None:
    made = shoal("check", place / "line.py", "--json")
    status = {line["name"]: line["status"] for line in made.json["lines"]}
    assert made.code == 0 and made.json["ok"] and status["learns"] == "skip" and status["deterministic"] == "pass"


def test_a_bad_task_fails_with_the_reason(tmp_path: Path, place: Path, shoal: Shoal) -> None:
    (tmp_path / "bad.py").write_text(LINE.replace("optax.sgd(0.05)", "optax.sgd(-0.05)"))
    made = shoal("check", tmp_path / "bad.py", "--data", place / "users")
    assert made.code == 1 and made.err.strip().splitlines()[-1] == "shoal: task line fails: learns.", made
    assert "learning rate" in next(line for line in made.out.splitlines() if line.startswith("fail"))


@pytest.mark.integration
@pytest.mark.slow
def test_the_task_that_new_writes_passes(tmp_path: Path, shoal: Shoal) -> None:
    assert shoal("new", tmp_path / "fresh.py").code == 0
    made = shoal("check", tmp_path / "fresh.py", "--data", "name:digits")
    assert made.code == 0, made
