"""What provenance says, and what it must not."""

import getpass
import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from shoal.record.provenance import provenance, tell_command


def test_it_says_what_made_a_result() -> None:
    said = provenance()
    assert json.loads(json.dumps(said)) == said
    assert said["python"] == platform.python_version()
    assert said["libraries"]["numpy"] == metadata.version("numpy")
    assert said["cores"] >= 1 and said["memory_bytes"] > 1 << 20
    assert said["dirty"] is None if said["commit"] == "" else len(said["commit"]) == 40


def test_it_does_not_say_who_and_where() -> None:
    said = json.dumps(
        provenance(["/home/ann/.venv/bin/shoal", "train", "/home/ann/task.py:task", "--password", "p4ss"])
    )
    assert platform.node() not in said or len(platform.node()) < 4
    assert "ann" not in said and "p4ss" not in said
    assert str(Path.home()) + "/" not in said and f"/{getpass.getuser()}/" not in said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["shoal", "demo", "--seed", "3"], ["shoal", "demo", "--seed", "3"]),
        (["/a/b/shoal", "train", "examples/digits.py:task"], ["shoal", "train", "examples/digits.py:task"]),
        (["x", "/home/ann/digits.py:task", "--out=/data/x,/data/y"], ["x", "digits.py:task", "--out=x,y"]),
        (["x", "~/data/a.npz", r"C:\Users\ann\a.npz"], ["x", "a.npz", "a.npz"]),
        (["x", "--token=abc", "--api-key", "k", "y"], ["x", "--token=…", "--api-key", "…", "y"]),
        (["x", "--secret", "--flag", "1e-3"], ["x", "--secret", "--flag", "1e-3"]),
        ([], []),
    ],
)
def test_the_command_line_is_told_without_places_and_secrets(arguments: list[str], told: list[str]) -> None:
    assert tell_command(arguments) == told


@pytest.mark.integration
def test_it_starts_nothing() -> None:
    program = (
        "import sys\n"
        "import shoal.record.provenance\n"
        "said = shoal.record.provenance.provenance()\n"
        "assert said['accelerators'] == [] and said['libraries']['jax']\n"
        "assert not [name for name in ('jax', 'jaxlib', 'flax', 'optax') if name in sys.modules]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


def test_all_names_are_there_and_sorted() -> None:
    import shoal.record as room

    assert room.__all__ == sorted(room.__all__)
    assert all(hasattr(room, name) for name in room.__all__)
