"""What a round came to, in words."""

from typing import Any

import pytest

from shoal.errors import DataError
from shoal.fleet.analytics import Errors, Folding, Seen
from shoal.record.store import RoundRow
from shoal.report.explain import explain


def row(
    number: int, *, took_s: float = 10.0, selecting: float = 1.0, seen: Seen | None = None, **changes: Any
) -> RoundRow:
    values: dict[str, Any] = {
        "number": number, "base_version": number - 1, "state": "committed", "opened_s": 100.0, "closed_s": 100.0 + took_s,
        "selected": 26, "counted": 20, "released": 6, "reason": "goal",
        "analytics": Folding(8).fold(seen or Seen(counts={"selected": 26, "counted": 20}))
        | {"seconds": {"selecting": selecting, "reporting": took_s - selecting}},
    }  # fmt: skip
    return RoundRow(**{**values, **changes})


USUAL = [row(number) for number in range(1, 8)]


def test_a_round_in_which_nothing_failed() -> None:
    made = explain(USUAL, 3)
    assert made.lines() == [
        "Round 3, from version 2, was committed after 10 s: its goal was met.",
        "Devices: 26 taken, 20 counted.",
        "Nothing failed.",
    ]
    assert made.to_json()["slow"] is False and made.to_json()["failures"] == []


def test_an_abandoned_round_says_what_failed_first_and_where() -> None:
    seen = Seen(
        counts={"selected": 26, "counted": 3, "gave_up": 9, "check_ins": 40},
        errors={"refused: not finite": Errors(2, 9.0), "gave up training": Errors(9, 4.0), "stream broke": Errors(12, 0.5, "north")},
    )  # fmt: skip
    last = row(8, state="abandoned", reason="3 of at least 16 reported in the window", seen=seen, took_s=12.0)
    made = explain([*USUAL, last], 8)
    assert made.lines() == [
        "Round 8, from version 7, was abandoned after 12 s: 3 of at least 16 reported in the window.",
        "14 of the 26 devices that were taken had not reported when it ended.",
        "Devices: 26 taken, 3 counted, 9 gave up.",
        "What failed first, 0.5 s after it was opened, while selecting, at Edge north: connections lost by devices with work in "
        "hand: 12.",
        "Then, from 4 s on, while reporting: devices that gave up (training): 9.",
        "At times that are not told: errors of kinds that too few devices had for them to be named: 2.",
    ]
    document = made.to_json()
    assert [failure["kind"] for failure in document["failures"]] == ["stream broke", "gave up training", "other"]
    assert document["words"] == made.lines()


def test_a_round_that_nobody_came_to() -> None:
    last = row(8, state="abandoned", reason="stopped", selected=0, counted=0, seen=Seen(counts={"check_ins": 4}))
    assert "No device was taken; 4 checked in while it was open." in explain([*USUAL, last], 8).lines()


def test_a_slow_round_says_where_its_time_went() -> None:
    made = explain([*USUAL, row(8, took_s=30.0, selecting=20.0)], 8)
    assert made.is_slow and list(made.longer) == ["selecting", "reporting"]
    lines = made.lines()
    assert lines[1] == "It took 3.0 times as long as the median round (10 s)."
    assert (
        lines[2] == "Most of that went into selecting: 20 s, where the median is 1 s."
        and lines[-1] == "Nothing failed."
    )


def test_too_few_rounds_have_no_usual_time() -> None:
    made = explain([row(1), row(2, took_s=500.0)], 2)
    assert made.usual_s is None and not made.is_slow


def test_rounds_of_older_records_and_open_ones() -> None:
    old = explain([row(1, analytics={})], 1)
    assert old.lines()[1:] == ["Nothing is recorded of its devices.", "Nothing failed."]
    opened = explain([row(1, state="open", closed_s=None, reason="", analytics={})], 1)
    assert opened.lines()[0] == "Round 1, from version 0, is open."
    late = explain([row(1, seen=Seen(errors={"commit failed": Errors(9, 10.5)}))], 1)
    assert late.failures[0].phase == "committing"


def test_a_round_that_is_kept_no_more() -> None:
    rows = [row(1), row(50), *(row(number) for number in range(91, 96))]
    assert explain(rows, 50).round.number == 50
    with pytest.raises(DataError, match=r"Round 59 is not kept \(`--keep`\): of this run's, rounds 91 to 95 are"):
        explain(rows, 59)
    with pytest.raises(DataError, match="which has rounds 1 to 95, got 96"):
        explain(rows, 96)


def test_a_round_that_there_is_not() -> None:
    with pytest.raises(DataError, match="rounds 1 to 7, got 9"):
        explain(USUAL, 9)
    with pytest.raises(DataError, match="no rounds yet"):
        explain([], 1)
