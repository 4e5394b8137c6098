"""`shoal runs show`, `runs explain`, `replay`, `report`: what became of a run's devices and rounds."""

import shutil
import sqlite3
from pathlib import Path

import pytest

from shoal.record.lock import only_writer

from .conftest import Shoal


@pytest.fixture(scope="module")
def played(place: Path, shoal: Shoal) -> Path:
    """A run of a made-up fleet: 8 rounds, late work patched in."""
    (place / "many.toml").write_text("devices = 3000\ntrain_s = 30\ndrop_out = 0.2\n")
    folder = place / "played"
    made = shoal(
        "simulate", place / "line.py", "--virtual", place / "many.toml", "--rounds", 8, "--goal", 30, "--late", "patch:3",
        "--run", folder,
    )  # fmt: skip
    assert made.code == 0, made
    return folder


def test_show_tells_of_devices(played: Path, shoal: Shoal) -> None:
    made = shoal("runs", "show", played)
    assert made.code == 0, made
    for part in (
        "devices, over all rounds",
        "> selected ",
        "-v[]+^",
        "-v[!",
        "fetch and train",
        "errors: stream broke (",
    ):
        assert part in made.out, part
    analytics = shoal("runs", "show", played, "--json").json["analytics"]
    assert analytics["shapes"]["-v[]+^"] >= 8 * 24 and analytics["errors"]["stream broke"] > 8
    assert 10 < analytics["times"]["train"]["p50"] < analytics["times"]["train"]["p90"] < 300


def test_a_simulation_without_a_fleet_has_nothing_of_devices_to_show(trained: Path, shoal: Shoal) -> None:
    made = shoal("runs", "show", trained)
    assert made.code == 0 and "devices, over all rounds" not in made.out, made
    assert "Nothing failed." in shoal("runs", "explain", trained, "--round", 2).out


def test_explain_says_what_failed_first(played: Path, shoal: Shoal) -> None:
    made = shoal("runs", "explain", played, "--round", 2)
    assert made.code == 0 and made.out.startswith("Round 2, from version 1, was committed after "), made
    assert "What failed first" in made.out and "while reporting" in made.out
    document = shoal("runs", "explain", played, "--round", 2, "--json").json
    assert document["state"] == "committed" and document["failures"][0]["phase"] == "reporting"
    missing = shoal("runs", "explain", played, "--round", 99)
    assert missing.code == 1 and "rounds 1 to 8, got 99" in missing.err


def test_replay_runs_a_round_again(played: Path, shoal: Shoal) -> None:
    made = shoal("replay", played, "--round", 3)
    assert made.code == 0 and "run again with the same decisions" in made.out, made
    assert "open round 3 on version 2" in made.out and "it was to commit, because: " in made.out
    document = shoal("replay", played, "--round", 3, "--json").json
    assert document["same"] and document["close"]["how"] == "CommitRound" and document["left_out"] == 0
    assert sum(len(step["commands"]) > 0 for step in document["steps"]) >= 2
    assert shoal("replay", played, "--round", 99).code == 1
    (run,) = shoal("runs", "list", played, "--json").json
    assert shoal("replay", played, "--round", 3, "--id", run["run"]).code == 0
    for command in (
        ("replay", played, "--round", 3),
        ("runs", "explain", played, "--round", 3),
        ("runs", "show", played),
    ):
        made = shoal(*command, "--id", "nobody")
        assert made.code == 1 and "got 'nobody'" in made.err, made
    made = shoal("report", played, "--id", "nobody")
    assert made.code == 1 and not (played / "CARD.md").exists()


def test_replay_says_what_it_has_not(trained: Path, played: Path, tmp_path: Path, shoal: Shoal) -> None:
    made = shoal("replay", trained, "--round", 2)
    assert made.code == 1 and "keeps none" in made.err
    made = shoal("replay", trained, "--round", 21)
    assert made.code == 1 and "1 to 20, got 21" in made.err
    altered = tmp_path / "altered"
    shutil.copytree(played, altered)
    with sqlite3.connect(altered / "record.sqlite") as connection:
        connection.execute("UPDATE round_logs SET data = x'00' WHERE round = 3")
        connection.execute("DELETE FROM round_logs WHERE round < 3")
    connection.close()
    made = shoal("replay", altered, "--round", 3)
    assert made.code == 1 and "damaged" in made.err
    made = shoal("replay", altered, "--round", 1)
    assert made.code == 1 and "those of rounds 3 to 8" in made.err


def test_report_writes_the_card(trained: Path, tmp_path: Path, shoal: Shoal) -> None:
    made = shoal("report", trained)
    assert made.code == 0 and made.out.splitlines()[-1] == f"card: {trained / 'CARD.md'}", made
    card = (trained / "CARD.md").read_text()
    assert card.startswith("# line, version 20") and "## Provenance" in card and card in made.out
    made = shoal("report", trained, "--out", tmp_path / "card.md", "--json")
    assert made.json["card"] == str(tmp_path / "card.md") and (tmp_path / "card.md").read_text() == card
    made = shoal("report", trained, "--out", tmp_path / "no" / "card.md")
    assert made.code == 1 and "No such file" in made.err


def test_a_run_whose_host_died_is_listed_as_such(played: Path, tmp_path: Path, shoal: Shoal) -> None:
    folder = tmp_path / "left"
    shutil.copytree(played, folder)
    with sqlite3.connect(folder / "record.sqlite") as connection:
        connection.execute("UPDATE runs SET status = 'running', finished_s = NULL")
    connection.close()
    with only_writer(folder):
        assert "(died)" not in shoal("runs", "list", folder).out
    assert (
        "stopped (died)" in shoal("runs", "list", folder).out and "stopped (died)" in shoal("runs", "show", folder).out
    )
    assert shoal("runs", "list", folder, "--json").json[0]["status"] == "stopped (died)"
    assert shoal("runs", "show", folder, "--json").json["status"] == "stopped (died)"


def test_of_swept_rounds_is_said_that_they_are(played: Path, tmp_path: Path, shoal: Shoal) -> None:
    shutil.copytree(played, tmp_path / "swept")
    with sqlite3.connect(tmp_path / "swept" / "record.sqlite") as connection:
        connection.execute("DELETE FROM rounds WHERE number BETWEEN 2 AND 5")
    connection.close()
    made = shoal("runs", "show", tmp_path / "swept")
    assert "(kept of " in made.out and "devices, over the rounds that are kept" in made.out, made
    for command in (("runs", "explain"), ("replay",)):
        made = shoal(*command, tmp_path / "swept", "--round", 3)
        assert made.code == 1 and "Round 3 is not kept (`--keep`)" in made.err, made
