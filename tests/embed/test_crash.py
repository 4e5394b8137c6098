"""Guarantee (1): a writer is killed at any point of update, tidying and re-placement; what it had done is there, whole."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")


def kill_at(folder: Path, points: int) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.embed.crash_driver", str(folder), str(points)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


@pytest.mark.integration
def test_a_kill_at_a_few_points_loses_nothing(tmp_path: Path) -> None:
    told = kill_at(tmp_path, 8)
    assert not told["wrong"] and told["killed"] >= 7


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_kill_at_200_points_loses_nothing(tmp_path: Path) -> None:
    """Guarantee (1) of `store.py`: points spread over updates, tidying and re-placement; some fall on every kind of call."""
    told = kill_at(tmp_path, 200)
    assert not told["wrong"] and told["killed"] >= min(200, told["calls"]) - 1
