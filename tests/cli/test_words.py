"""Numbers as people read them."""

import doctest

import pytest

from shoal.cli import words


def test_the_examples_hold() -> None:
    assert doctest.testmod(words).failed == 0


def test_a_curve_keeps_its_ends_and_passes_over_what_is_no_number() -> None:
    line = words.sparkline([float(i) for i in range(1000)], width=20)
    assert len(line) == 20 and line[0] == "▁" and line[-1] == "█"
    assert words.sparkline([1.0, float("nan"), 2.0, float("inf")]) == "▁ █ "
    assert words.sparkline([]) == "" and words.sparkline([5, 5]) == "▁▁" and words.sparkline([float("nan")]) == " "


@pytest.mark.parametrize("text", ["", "4 XiB", "lots", "-1", "0", "0.1", "GiB", "1e3"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="4GiB"):
        words.parse_size(text)


def test_phases_are_told_longest_first() -> None:
    assert words.phases({"a": 1.0, "b": 2.0, "c": 0.001}, total=3.0) == "b 2.0 s, a 1.0 s (in all 3.0 s)"
    assert words.phases({}) == "nothing took time"
