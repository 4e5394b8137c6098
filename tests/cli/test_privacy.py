"""`shoal privacy`, and what a user meets who asks for noise."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shoal.aggregate.noised import Noised
from shoal.audit.read_back import ReadBack
from shoal.cli.audit import ModelLines
from shoal.cli.run_sections import _protection
from shoal.cli.screen import Screen
from shoal.policy import Correlated, Privacy, Secure
from shoal.privacy.accounting import epsilon_of_zcdp
from shoal.privacy.spending import Release
from shoal.privacy.spending import epsilon as epsilon_of

from .conftest import LINE, Shoal

NOISY = LINE.replace("batch_size=4, epochs=2", 'batch_size=4, epochs=2, weighting="uniform"').replace(
    "over_selection=1.0),",
    "over_selection=1.0),\n    privacy=shoal.Privacy(clip_norm=0.5, noise_multiplier=2.0, epsilon=6.0),",
)

EXAMPLES = "examples=shoal.ExamplePrivacy(clip_norm=0.5, noise_multiplier=2.0)"


@pytest.fixture
def noisy(place: Path) -> Path:
    path = place / "noisy.py"
    path.write_text(NOISY)
    return path


def run_of(noisy: Path, place: Path, shoal: Shoal, run: Path, *options: object) -> None:
    made = shoal("simulate", f"{noisy}:task", "--data", place / "users", "--rounds", 3, "--run", run, *options)
    assert made.code == 0, made


def test_the_spend_is_said_drawn_and_on_the_card(noisy: Path, place: Path, tmp_path: Path, shoal: Shoal) -> None:
    run = tmp_path / "run"
    run_of(noisy, place, shoal, run)
    told = shoal("privacy", run, "--plot", tmp_path / "spent.png")
    assert told.code == 0 and "epsilon 4.44 at delta 1e-06, of a budget of 6" in told.out, told
    assert (tmp_path / "spent.png").read_bytes().startswith(b"\x89PNG")
    found = shoal("privacy", run, "--json").json
    assert found["epsilon"] == pytest.approx(4.44, abs=0.01) and found["releases"][0]["count"] == 3
    assert "epsilon 4.44" in shoal("report", run).out
    shown = shoal("runs", "show", run).out
    assert "epsilon at most 6 at delta 1e-06" in shown and "train/loss" not in shown, (
        "metrics of training have no noise"
    )


def test_a_run_that_would_overspend_is_refused_before_it_begins(
    noisy: Path, place: Path, tmp_path: Path, shoal: Shoal
) -> None:
    made = shoal("simulate", f"{noisy}:task", "--data", place / "users", "--rounds", 6, "--run", tmp_path / "run")
    assert made.code != 0 and "its budget is 6. It allows 5 more" in made.err, made
    assert len([line for line in made.err.splitlines() if "budget" in line]) == 1


def test_a_resumed_run_draws_on_the_same_budget(noisy: Path, place: Path, tmp_path: Path, shoal: Shoal) -> None:
    run = tmp_path / "run"
    run_of(noisy, place, shoal, run)
    more = shoal("simulate", f"{noisy}:task", "--data", place / "users", "--rounds", 6, "--run", run, "--resume")
    assert more.code != 0 and "It allows 2 more" in more.err, more
    assert (
        shoal("simulate", f"{noisy}:task", "--data", place / "users", "--rounds", 5, "--run", run, "--resume").code == 0
    )
    assert shoal("privacy", run, "--json").json["releases"][0]["count"] == 5


def test_noise_for_a_budget(shoal: Shoal) -> None:
    assert "noise_multiplier=6.893" in shoal("privacy", "--epsilon", 8, "--rounds", 100).out
    found = shoal("privacy", "--epsilon", 8, "--json").json
    assert found["noise_multiplier"] == pytest.approx(6.893, abs=1e-3)
    assert found["distributed"] == pytest.approx({"noise_multiplier": 6.9467, "noise_in_sum": 69.467}, abs=1e-3)


def test_the_noise_that_is_printed_keeps_to_the_budget(shoal: Shoal) -> None:
    ways: dict[str, Callable[..., Release]] = {
        "each round's own": Release,
        "distributed": partial(Release, l2=2.0**22, elements=1000),
    }
    told = shoal("privacy", "--epsilon", 8, "--rounds", 100).out
    for way, release in ways.items():
        (line,) = (line for line in told.splitlines() if way in line)
        multiplier = float(line.split("noise_multiplier=")[1].split(",")[0])
        assert 7.999 < epsilon_of({release(noise_multiplier=multiplier): 100}, 1e-6) <= 8.0, line


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "2 times that norm on each round's sum; no limit"),
        (
            {"distributed": True, "secure": Secure(members=40)},
            "2 times that norm on each secure group's sum, by the devices of a group together; no limit",
        ),
        (
            {"correlated": Correlated(rounds=9)},
            "2 times what a device's updates can come to in all 9 rounds together, cancelling from round to round (blt); no limit",
        ),
    ],
    ids=["server", "devices", "correlated"],
)
def test_noise_is_shown_for_what_it_is(settings: dict[str, Any], text: str) -> None:
    shown = _protection(Privacy(clip_norm=1.0, noise_multiplier=2.0, **settings))
    assert shown["noise"].startswith(text)


def test_devices_that_rest_are_shown(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    path, run = place / "resting.py", tmp_path / "run"
    path.write_text(NOISY.replace("over_selection=1.0", "over_selection=1.0, min_separation=2"))
    run_of(path, place, shoal, run)
    assert (
        "min_separation 2 (a device that was in a version is in none of the next 1)" in shoal("runs", "show", run).out
    )
    assert "Who was in one rested for the next 1." in shoal("report", run).out
    told = shoal("privacy", run).out
    assert "rested for the next 1 at least, so one device was in at most 2 of 3 rounds: epsilon rests on that" in told


def test_what_is_wrong_is_said(trained: Path, shoal: Shoal) -> None:
    assert "Expected a RUN, or --epsilon" in shoal("privacy").err
    assert "has no noise, so it spends nothing" in shoal("privacy", trained).err
    assert "got both" in shoal("privacy", trained, "--epsilon", 8).err


def test_an_audit_bounds_the_epsilon_of_a_task_from_below(noisy: Path, place: Path, shoal: Shoal) -> None:
    wide = noisy.with_name("wide.py")
    wide.write_text(
        NOISY.replace('"w": jnp.zeros(())', '"w": jnp.zeros((300,))').replace('params["w"] *', 'params["w"].sum() *')
    )
    made = shoal("audit", f"{wide}:task", "--data", place / "users", "--rounds", 2, "--canaries", 200, "--json")
    assert made.code == 0, made
    assert made.json["claimed"] == pytest.approx(3.55, abs=0.2) and made.json["epsilon_at_least"] < made.json["claimed"]


def test_an_audit_fails_where_the_noise_is_left_out(
    noisy: Path, place: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = noisy.with_name("wide_too.py")
    wide.write_text(
        NOISY.replace('"w": jnp.zeros(())', '"w": jnp.zeros((300,))').replace('params["w"] *', 'params["w"].sum() *')
        .replace("noise_multiplier=2.0", "noise_multiplier=8.0")
    )  # fmt: skip
    monkeypatch.setattr(Noised, "noised", lambda self, sums, base: sums)
    made = shoal("audit", f"{wide}:task", "--data", place / "users", "--rounds", 2, "--canaries", 200)
    assert made.code == 1 and "REFUTED" in made.out, made


def test_other_attacks_are_asked_for_by_name_and_can_fail_a_run(noisy: Path, place: Path, shoal: Shoal) -> None:
    made = shoal(
        "audit", f"{noisy}:task", "--data", place / "users", "--rounds", 1, "--attack", "membership", "--shadows", 0, "--json",
        "--at-most", -1,
    )  # fmt: skip
    assert made.code == 1 and made.json["exceeds"], made
    assert set(made.json["loss"]) == {"found", "low", "high", "wrong", "auc"}, made
    assert made.json["claimed"] > 0 and "refuted" not in made.json and "model 1/1" in made.err
    assert made.json["found"] == made.json["loss"]["low"]
    made = shoal("audit", f"{noisy}:task", "--data", place / "users", "--attack", "inversion")
    assert made.code == 1 and "no dense layer with a bias" in made.err, made


def test_shadows_that_make_no_pairs_are_refused_before_anything_is_read(noisy: Path, place: Path, shoal: Shoal) -> None:
    made = shoal("audit", f"{noisy}:task", "--data", place / "nowhere", "--attack", "membership", "--shadows", 3)
    assert made.code == 1 and "Expected shadows to be even" in made.err, made


def test_trainings_one_after_the_other_say_a_line_each_with_the_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter(range(0, 60, 2))
    told = ModelLines(3, 2, Screen(json=False), now_s=lambda: next(seconds))
    for _ in range(6):
        told(None)
    assert [line.split() for line in capsys.readouterr().err.splitlines()] == [
        ["model", "1/3", "4.0", "s", "8.0", "s", "left"], ["model", "2/3", "8.0", "s", "4.0", "s", "left"],
        ["model", "3/3", "12.0", "s", "0", "ms", "left"],
    ]  # fmt: skip


def test_what_is_read_of_noise_does_not_exceed_what_is_allowed_by_chance_s_part(
    noisy: Path, place: Path, shoal: Shoal, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_chance = ReadBack(what="", devices=8, noise=1.0, guessed=(0.3,) * 3, known=(0.7,) * 3, chance=(0.68,) * 3)
    monkeypatch.setattr("shoal.audit.read_back.read_back", lambda *_, **__: [by_chance])
    given = ("audit", f"{noisy}:task", "--data", place / "users", "--attack", "inversion", "--json", "--at-most")
    made = shoal(*given, 0.5)
    assert made.code == 0 and made.json["found"] == pytest.approx(0.0625), made
    assert shoal(*given, 0.05).code == 1


def test_what_noise_on_examples_is_worth_is_said_and_on_the_card(place: Path, tmp_path: Path, shoal: Shoal) -> None:
    path, run = place / "examples.py", tmp_path / "run"
    path.write_text(NOISY.replace("clip_norm=0.5, noise_multiplier=2.0, epsilon=6.0", EXAMPLES))
    run_of(path, place, shoal, run)
    told = shoal("privacy", run)
    assert (
        told.code == 0
        and "epsilon 3.54 at delta 1e-06 for a device that was in one round, 6.58 for one that was in all 3" in told.out
    ), told
    assert "an example was in 2 steps of a round at most" in told.out and "follows from its seed" in told.out
    found = shoal("privacy", run, "--json").json["examples"]
    assert found["rounds"] == 3 and found["epsilon_of_all_rounds"] == pytest.approx(epsilon_of_zcdp(3 * 2 / 8, 1e-6))
    card = shoal("report", run).out
    assert "epsilon 3.54 at delta 1e-06" in card and "No differential privacy" not in card
    shown = shoal("runs", "show", run).out
    assert "2 times 0.5, the norm of an example's gradient" in shown and "train/loss" not in shown
    assert "each device has a budget" in shoal("privacy", run, "--plot", tmp_path / "spent.png").err


def test_a_device_that_would_forget_what_it_spent_has_no_budget(place: Path, shoal: Shoal) -> None:
    made = shoal("device", "--server", "127.0.0.1:1", "--data", place / "users", "--max-epsilon", 8)
    assert made.code != 0 and "Expected --state FOLDER with --max-epsilon" in made.err, made
