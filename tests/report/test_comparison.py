"""Runs beside one another: as numbers, and as a picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shoal.errors import DataError
from shoal.record.distribution import Distribution
from shoal.report.card import card_text
from shoal.report.comparison import compare, settings, shared_metrics
from shoal.report.facts import Facts, Point, Usage
from shoal.report.over_users import bars, over_users
from shoal.report.run_curves import MOST_RUNS, draw_runs
from shoal.tensors import TensorSpec


def with_metrics(facts: Facts, **metrics: list[float]) -> Facts:
    """The run with other metrics of versions 1, 2, …; `__` is a slash."""
    points = {
        name.replace("__", "/"): [Point(version, value) for version, value in enumerate(values, start=1)]
        for name, values in metrics.items()
    }
    return replace(facts, metrics=points, seconds={1: 10.0, 2: 20.0, 3: 30.0})


def test_last_best_and_rounds_to_what_all_reached(facts: Facts) -> None:
    a, b = with_metrics(facts, accuracy=[0.5, 0.9, 0.8]), with_metrics(facts, accuracy=[0.6, 0.65, 0.7])
    made = compare([("a", a), ("b", b)])
    assert made.metric == "accuracy" and made.higher and made.target == 0.7 and made.settings == {}
    first, second = made.results
    assert (first.last, first.best) == (Point(3, 0.8), Point(2, 0.9)) and first.seconds == 30.0
    assert (first.reached, first.reached_s, second.reached) == (2, 20.0, 3)
    asked = compare([("a", a), ("b", b)], target=0.85).results
    assert (asked[0].reached, asked[1].reached, asked[1].reached_s) == (2, None, None)


def test_less_of_a_loss_is_better(facts: Facts) -> None:
    runs = [("a", with_metrics(facts, loss=[3.0, 1.0, 2.0])), ("b", with_metrics(facts, loss=[2.5, float("nan"), 1.5]))]
    made = compare(runs)
    assert not made.higher and made.target == 1.5 and [each.reached for each in made.results] == [2, 3]
    assert compare(runs, higher=True).target == 2.5


def test_settings_that_differ_are_told(facts: Facts) -> None:
    other = replace(facts, run=replace(facts.run, config={**facts.run.config, "seed": 7, "data": "name:digits"}))
    made = compare([("a", facts), ("b", other)])
    assert made.settings == {"seed": ("0", "7"), "data": ("–", "name:digits")}
    known = settings(facts)
    assert known["round.goal"] == "2" and known["server.kind"] == "sgd" and known["local.batch_size"] == "4"
    assert "plan_blob" not in known


def test_bytes_are_counted_or_reckoned(facts: Facts) -> None:
    reckoned = compare([("a", facts)]).results[0]
    assert facts.manifest is not None and reckoned.is_reckoned
    assert (reckoned.bytes_down, reckoned.bytes_up) == (3 * 2 * 8, 3 * 2 * facts.manifest.update_bytes)
    moved = replace(facts, usage={"reporting": Usage(bytes_down=5, bytes_up=6)})
    counted = compare([("a", moved)]).results[0]
    assert (counted.bytes_down, counted.bytes_up, counted.is_reckoned) == (5, 6, False)


def test_metrics_that_runs_do_not_share_are_refused(facts: Facts) -> None:
    runs = [("a", with_metrics(facts, loss=[1.0])), ("b", with_metrics(facts, error=[1.0]))]
    with pytest.raises(DataError, match="no metric in common"):
        compare(runs)
    with pytest.raises(DataError, match=r"metric of b \(error\), got 'loss'"):
        compare(runs, metric="loss")
    many = with_metrics(facts, train__loss=[1.0], left_out__loss=[1.0], loss=[1.0], accuracy=[1.0], accuracy__p10=[1.0])
    assert shared_metrics([many, many]) == ["accuracy", "loss", "left_out/loss", "train/loss"]


def with_users(facts: Facts) -> Facts:
    found = {version: Distribution.of(np.linspace(0.1 * version, 1.0, 20)) for version in (1, 2, 3)}
    tails = {
        f"accuracy/p{share}": [Point(version, one.quantile(share / 100)) for version, one in found.items()]
        for share in (10, 90)
    }
    return replace(facts, metrics={**facts.metrics, **tails}, distributions={"accuracy": found})


def test_users_are_told_in_numbers_and_bars(facts: Facts) -> None:
    (told,) = over_users(with_users(facts).distributions)
    assert (told.metric, told.version, told.users, told.least, told.most) == ("accuracy", 3, 20, 0.3, 1.0)
    assert told.worst < told.median < told.best and len(told.bars) > 10
    assert bars([0, 3, 1]) == "·█▃"
    text = card_text(with_users(facts))
    assert "| accuracy (version 3) | 20 |" in text and "worst tenth" in text and "accuracy/p10" not in text
    early = card_text(replace(facts, stopped_early="loss has not fallen for 3 rounds (1 in round 2)"))
    assert "It ended before its last round: loss has not fallen" in early


@pytest.mark.filterwarnings("error")
def test_pictures_of_one_run_and_of_several(facts: Facts, tmp_path: Path) -> None:
    users, nan = with_users(facts), with_metrics(facts, accuracy=[float("nan"), 0.5, 0.6], loss=[3.0, 2.0, 1.0])
    one = imread(draw_runs([("a", users)], tmp_path / "one.png", metrics=["accuracy"]))
    two = imread(draw_runs([("a", users), ("b", nan)], tmp_path / "two.png", metrics=["accuracy", "loss"]))
    plain = imread(draw_runs([("b", nan)], tmp_path / "plain.png", metrics=["accuracy"]))
    assert one.shape[1] > plain.shape[1], "a column for the users" and two.shape[0] > one.shape[0]
    blue, vermilion = (np.array(colour) / 255 for colour in ([0, 0x72, 0xB2], [0xD5, 0x5E, 0]))
    for picture, colours in ((one, [blue]), (two, [blue, vermilion])):
        for colour in colours:
            assert (np.abs(picture[..., :3] - colour).max(-1) < 0.02).sum() > 300, "each run is there"


def test_what_cannot_be_drawn_is_refused(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metric of the runs \(accuracy, .*got 'speed'"):
        draw_runs([("a", facts)], tmp_path / "x.png", metrics=["speed"])
    with pytest.raises(DataError, match=f"1 to {MOST_RUNS} runs in a picture, got 9"):
        draw_runs([("a", facts)] * 9, tmp_path / "x.png", metrics=["accuracy"])


def test_what_rounds_do_not_change_is_fetched_once(facts: Facts) -> None:
    assert facts.manifest is not None
    base = TensorSpec(name="params/base", shape=(25,), dtype="float32")
    lora = replace(facts.manifest, broadcast=(*facts.manifest.broadcast, base))
    for users, fetched in (({"users": 4}, 4), ({"users": 100}, 6), (None, 6)):
        config = {name: value for name, value in facts.run.config.items() if name != "population"}
        row = replace(facts.run, config=config if users is None else {**config, "population": users})
        made = compare([("a", replace(facts, manifest=lora, run=row))]).results[0]
        assert made.bytes_down == 3 * 2 * 8 + fetched * 100


def test_algorithms_are_settings_with_their_arguments(facts: Facts) -> None:
    assert facts.manifest is not None and facts.manifest.half is not None
    half = replace(facts.manifest.half, algorithms={"fedprox": {"mu": 0.1}, "measured": {}})
    other = replace(facts, manifest=replace(facts.manifest, half=half))
    assert compare([("a", facts), ("b", other)]).settings == {
        "algorithms.fedprox.mu": ("–", "0.1"), "algorithms.measured": ("–", "yes"),
    }  # fmt: skip
