"""When a run ends early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.cli.stop_argument import parse_stop_when
from shoal.metric_names import higher_is_better
from shoal.stop_when import StopWhen

NAN = float("nan")


def points(*values: float) -> list[tuple[int, float]]:
    return [(version, value) for version, value in enumerate(values, start=1)]


def test_reaching_a_value() -> None:
    rule = StopWhen("accuracy", reaches=0.8)
    assert not rule.why([]) and not rule.why(points(0.5, 0.79))
    assert rule.why(points(0.5, 0.8)) == "accuracy has reached 0.8 (0.8)"
    assert not rule.why(points(0.9, 0.7)), "only the newest counts"
    falling = StopWhen("train/loss", reaches=0.1)
    assert falling.why(points(0.1)) and not falling.why(points(0.2)) and not falling.why(points(NAN))
    assert StopWhen("train/loss", reaches=0.1, better="higher").why(points(0.2))


def test_patience_counts_rounds_from_the_best() -> None:
    rule = StopWhen("accuracy", patience=3)
    assert not rule.why([(5, 0.5), (10, 0.6), (12, 0.6)])
    assert rule.why([(5, 0.5), (10, 0.6), (13, 0.6)]) == "accuracy has not risen for 3 rounds (0.6 in round 10)"
    assert not rule.why([(5, 0.5), (10, 0.6), (13, 0.61)])
    least = StopWhen("accuracy", patience=3, least=0.1)
    assert "by more than 0.1" in least.why(points(0.5, 0.55, 0.6, 0.6)), "small steps add up to none"
    assert StopWhen("loss", patience=2).why(points(1.0, 2.0, NAN))
    assert StopWhen("loss", patience=2).why(points(NAN, NAN, NAN)), "what is no number is no improvement"


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(1, 5))
def test_it_stops_exactly_where_the_best_is_old_enough(values: list[float], patience: int) -> None:
    best_at = max(range(len(values)), key=lambda place: (values[place], -place))
    stops = bool(StopWhen("accuracy", patience=patience).why(points(*values)))
    assert stops == (len(values) - 1 - best_at >= patience)


def test_which_way_is_better() -> None:
    assert higher_is_better("accuracy") and higher_is_better("left_out/hit_rate/p10") and higher_is_better("lossless")
    assert not any(map(higher_is_better, ("loss", "train/loss", "mean_error", "loss/p90", "RMSE", "perplexity")))


def test_it_travels_as_json_and_nonsense_is_refused() -> None:
    rule = StopWhen("accuracy", patience=3, least=0.5)
    assert rule.to_json() == {"metric": "accuracy", "patience": 3, "least": 0.5}
    assert StopWhen.from_json(rule.to_json()) == rule
    for bad, says in (
        ({"metric": "a"}, "never stops early"),
        ({"metric": "", "patience": 1}, "name of a metric"),
        ({"metric": "a", "patience": -1}, "patience >= 0"),
        ({"metric": "a", "reaches": NAN}, "finite number"),
        ({"metric": "a", "patience": 1, "when": 2}, "got 'when'"),
    ):
        with pytest.raises(ValueError, match=says):
            StopWhen.from_json(bad)
    with pytest.raises(TypeError, match="patience"):
        StopWhen.from_json({"metric": "a", "patience": 1.5})


def test_the_option_of_the_command_line() -> None:
    assert parse_stop_when("left_out/accuracy:reaches=0.9,patience=20") == StopWhen(
        "left_out/accuracy", patience=20, reaches=0.9
    )
    assert parse_stop_when("loss:patience=5,least=0.1,better=higher") == StopWhen(
        "loss", patience=5, least=0.1, better="higher"
    )
    assert parse_stop_when("none") is None
    for bad in (
        "accuracy",
        "accuracy:",
        "accuracy:0.9",
        "accuracy:patience=x",
        "accuracy:patience=1,patience=2",
        ":reaches=1",
    ):
        with pytest.raises(ValueError, match="Expected --stop-when METRIC:"):
            parse_stop_when(bad)
