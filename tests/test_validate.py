"""What checks say: the value, and what is allowed."""

from dataclasses import dataclass
from typing import Literal

import pytest

from shoal import validate


@dataclass
class Paint:
    colour: Literal["red", "blue"]


def test_a_choice_that_is_none_is_told_the_choices() -> None:
    validate.types(Paint("red"))
    with pytest.raises(TypeError, match=r"^Expected colour of Paint to be 'red' \| 'blue', got 'green'\.$"):
        validate.types(Paint("green"))  # type: ignore[arg-type]


def test_kinds_flags_and_choices_take_anything_that_callers_pass() -> None:
    validate.of_kind(int | None, "a number or None", seed=None)
    validate.flags(shadow=False)
    with pytest.raises(TypeError, match=r"^Expected seed to be a number or None, got seed=\[1, 2\]\.$"):
        validate.of_kind(int | None, "a number or None", seed=[1, 2])
    with pytest.raises(TypeError, match=r"^Expected shadow to be True or False, got shadow=1\.$"):
        validate.flags(shadow=1)
    with pytest.raises(ValueError, match=r"^Expected mode to be one of max \| sum, got mode=\['sum'\]\.$"):
        validate.one_of({"sum", "max"}, mode=["sum"])


def test_names_that_differ_only_in_case() -> None:
    validate.distinct_in_any_case(["a", "b", "a"], "names")
    with pytest.raises(
        ValueError, match=r"^Expected names that differ in more than case, got 'a' and 'A': .* Rename one\.$"
    ):
        validate.distinct_in_any_case(["a", "b", "A"], "names")
