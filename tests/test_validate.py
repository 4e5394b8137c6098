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
