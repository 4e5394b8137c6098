"""`shoal simulate --virtual`: a fleet of made-up devices, with and without training."""

from pathlib import Path

import pytest

from shoal.cli.late_argument import parse_late
from shoal.policy import Late
from shoal.record.run import open_run

from .conftest import LINE, Shoal

POPULATION = "devices = 200\nwindow_hours = 12\ntrain_s = 30\n"


@pytest.fixture
def population(tmp_path: Path) -> Path:
    path = tmp_path / "population.toml"
    path.write_text(POPULATION)
    return path


def test_it_trains_and_draws_and_keeps_a_record(place: Path, tmp_path: Path, population: Path, shoal: Shoal) -> None:
    made = shoal(
        "simulate", place / "line.py", "--virtual", population, "--data", place / "users", "--held-out",
        place / "test.npz", "--rounds", 6, "--late", "patch:3", "--run", tmp_path / "r", "--json",
    )  # fmt: skip
    assert made.code == 0, made
    assert made.json["versions"] == 6 and made.json["virtual_seconds"] > 30 and made.json["wasted"] < 0.2
    assert (tmp_path / "r" / "virtual.png").read_bytes()[:4] == b"\x89PNG"
    with open_run(tmp_path / "r") as run:
        assert run.row.status == "finished" and run.row.config["virtual"]["devices"] == 200
        errors = run.history("error")[1]
        assert errors[-1] < errors[0], "it learns"


def test_a_task_with_noise_has_it_on_a_virtual_fleet_too(
    place: Path, tmp_path: Path, population: Path, shoal: Shoal
) -> None:
    text = LINE.replace("epochs=2", 'epochs=2, weighting="uniform"').replace(
        "over_selection=1.0),",
        "over_selection=1.0),\n    privacy=shoal.Privacy(clip_norm=0.5, noise_multiplier=2.0, correlated=shoal.Correlated(rounds=2)),",
    )
    (place / "noisy.py").write_text(text)
    models = []
    for name in ("a", "b"):
        made = shoal(
            "simulate", place / "noisy.py", "--virtual", population, "--data", place / "users", "--seed", 3, "--hours", 20,
            "--run", tmp_path / name,
        )  # fmt: skip
        assert made.code == 0, made
        with open_run(tmp_path / name) as run:
            assert run.store.last_version(run.id) == 2, "as many rounds as its noise is made for"
            models.append(run.store.last_commit(run.id).model.root)
    assert models[0] != models[1], "each run's keys are its own, and its noise"


def test_without_data_only_who_and_when_is_played(place: Path, tmp_path: Path, population: Path, shoal: Shoal) -> None:
    made = shoal(
        "simulate", place / "line.py", "--virtual", population, "--hours", 0.5, "--buffer", 3, "--late", "discount:1:9",
        "--run", tmp_path / "r",
    )  # fmt: skip
    assert made.code == 0 and "of virtual time" in made.out and "virtual.png" in made.out, made


def test_a_fleet_that_commits_nothing_says_so(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    path = tmp_path / "rare.toml"
    path.write_text("devices = 10\nwindow_hours = 0.1\n")
    made = shoal(
        "simulate", place / "line.py", "--virtual", path, "--hours", 0.1, "--goal", 10, "--run", tmp_path / "r"
    )
    assert made.code == 0 and "0 versions" in made.out and "no round was committed" in made.err, made
    assert "0 ms of training: none" in made.out, made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--virtual", "nowhere.toml", "--rounds", 1), "Cannot read nowhere.toml"),
        (("--virtual", "POPULATION"), "--rounds or --hours"),
        (("--virtual", "POPULATION", "--rounds", 1, "--resume"), "cannot be resumed"),
        (("--virtual", "POPULATION", "--rounds", 1, "--late", "never"), "discount:FACTOR:VERSIONS"),
        (("--virtual", "POPULATION", "--rounds", 1, "--buffer", 5), "late=Late.discount"),
        (("--virtual", "POPULATION", "--rounds", 1, "--late", "patch:0"), "max_staleness >= 1 with 'patch'"),
        (("--virtual", "POPULATION", "--rounds", 1, "--goal", 300), "expected devices >= 240, got 200"),
        (("--data", "name:digits", "--rounds", 1, "--late", "patch:2"), "go with --virtual"),
    ],
)
def test_what_does_not_go_is_said_in_one_line(
    arguments: tuple[object, ...], expected: str, place: Path, population: Path, shoal: Shoal, tmp_path: Path
) -> None:
    given = [population if argument == "POPULATION" else argument for argument in arguments]
    made = shoal("simulate", place / "line.py", *given, "--run", tmp_path / "r")
    assert made.code == 1 and expected in made.err and "Traceback" not in made.err, made


def test_late_as_people_write_it() -> None:
    assert parse_late("discard") == Late()
    assert parse_late("discount:0.9:5") == Late.discount(0.9, max_staleness=5)
    assert parse_late("patch:3") == Late.patch(max_staleness=3)
    for text in ("patch", "patch:0", "patch:x", "discount:2:1", "discount:0.5", "discard:1", ""):
        with pytest.raises(ValueError, match="late"):
            parse_late(text)


def test_an_adaptive_clip_norm_moves_in_a_virtual_fleet_too(
    place: Path, tmp_path: Path, population: Path, shoal: Shoal
) -> None:
    clipped = place / "clipped.py"
    privacy = "    privacy=shoal.Privacy(clip_norm=shoal.AdaptiveClip(initial=0.01, learning_rate=1.0)),\n)\n"
    clipped.write_text((place / "line.py").read_text().rstrip().removesuffix(")") + privacy)
    made = shoal(
        "simulate", clipped, "--virtual", population, "--data", place / "users", "--rounds", 4, "--run", tmp_path / "r"
    )
    assert made.code == 0, made
    with open_run(tmp_path / "r") as run:
        norms = run.history("train/clip_norm")[1]
    assert norms[0] == 0.01 and norms[1] == pytest.approx(0.01 * 2.71828**0.5, rel=1e-4) and len(norms) == 4
    shown = shoal("runs", "show", tmp_path / "r").out
    assert "updates to a norm that followed their quantile 0.5, 0.01 at first" in shown and "train/clip_norm" in shown
