"""Thousands of lives of a server, and of Edges, killed at any point, in virtual time: what was said holds. See `world.py`.

Most of them run in a process of their own, without the run-time type checks that make them five times as slow.
"""

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fleet.histories import POLICIES, history, many
from tests.fleet.world import Faults


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Abandoned rounds are logged; here they are thousands."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


LONG = {"exact", "late", "patched", "stored", "exact_stored", "surplus", "asynchronous", "resting"}
"""For which each point, types checked, is for the whole gate."""
FEW = {"uniform", "stored", "asynchronous", "resting"}
"""Which meet most rules between them."""


QUICK = [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in POLICIES]


@pytest.mark.parametrize("name", QUICK)
def test_a_crash_at_every_single_point(name: str) -> None:
    points = history(name, 1, Faults()).points
    for point in range(1, points + 1):
        assert history(name, 1, Faults(crash_at=point)).crashes == 1, f"point {point}"


@pytest.mark.parametrize("name", QUICK)
def test_histories_with_types_checked(name: str) -> None:
    many(name, range(8))


def apart(name: str, first: int, last: int, *, num_edges: int = 1) -> None:
    command = [sys.executable, "-m", "tests.fleet.histories", name, str(first), str(last), str(num_edges)]
    made = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    print(name, made.stdout)
    assert made.returncode == 0, made.stderr[-4000:]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in POLICIES])
def test_a_hundred_histories(name: str) -> None:
    apart(name, 30, 130)


@pytest.mark.parametrize(
    "name",
    ["patched", "resting", *(pytest.param(n, marks=pytest.mark.slow) for n in ("exact", "stored", "asynchronous"))],
)
def test_dozens_of_histories_of_three_edges_that_die(name: str) -> None:
    apart(name, 0, 40, num_edges=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [name for name in POLICIES if name != "exact_stored"])
def test_thousands_of_histories_of_three_edges_that_die(name: str) -> None:
    apart(name, 40, 2_000, num_edges=3)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", POLICIES)
def test_thousands_of_histories(name: str) -> None:
    apart(name, 130, 5_000)
