"""The examples of docs/models.md run as they are printed, and make tasks of which a plan can be made."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

import shoal
from shoal.local import local_rule

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
MADE = [block for block in BLOCKS if "shoal.Task" in block and "import shoal" in block]


def test_the_page_has_its_examples() -> None:
    assert BLOCKS[0].startswith("BATCH = ") and len(MADE) == 4


@pytest.mark.parametrize("block", MADE, ids=[f"example {i}" for i in range(len(MADE))])
def test_an_example_makes_tasks(block: str) -> None:
    for extra in re.findall(r"^import (equinox|torch)\b", block, re.M):
        pytest.importorskip(extra, reason=f"the extra {extra} is not installed")
    names: dict[str, Any] = {}
    made = block.replace("task = ", "task = tasks[len(tasks)] = ")
    tasks: dict[int, shoal.Task] = names.setdefault("tasks", {})
    # Functions of a module look names up in one mapping: two would make classes and globals strangers.
    exec(BLOCKS[0] + made, names)
    assert len(tasks) == block.count("task = ")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as readers have it
        for task in tasks.values():
            assert local_rule(task).broadcast
