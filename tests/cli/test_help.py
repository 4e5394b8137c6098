"""Every command has help with an example, and every example names options that exist; starting is quick."""

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from shoal.__main__ import main
from shoal.cli.main import app

from .conftest import Shoal


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


ALL = dict(commands(typer.main.get_command(app)))


def examples(help_text: str) -> list[str]:
    _, _, after = help_text.partition("Examples:")
    return [line.strip() for line in after.splitlines() if line.strip()]


def test_the_commands_of_the_design_are_there() -> None:
    assert {" ".join(path) for path in ALL} == {
        "", "demo", "new", "check", "simulate", "host", "device", "invite", "edge", "privacy", "audit", "train", "predict", "report", "replay", "doctor", "runs",
        "runs list", "runs show", "runs plot", "runs compare", "runs explain",
        "enrol", "enrol authority", "enrol device", "enrol certify", "enrol tls-authority", "enrol tls-server", "enrol tls-device",
        "telemetry", "telemetry helper", "telemetry show", "data", "data show", "data push", "data take",
        "embed", "embed inspect", "embed place", "embed replay", "embed tune",
    }  # fmt: skip


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_help_has_examples_of_options_that_exist(path: tuple[str, ...], shoal: Shoal) -> None:
    made = shoal(*path, "--help")
    assert made.code == 0 and made.err == "", made
    found = examples(made.out)
    assert found, made
    for example in found:
        words = example.split()
        assert words[0] == "shoal"
        named = next(ALL[tuple(words[1:n])] for n in (3, 2) if tuple(words[1:n]) in ALL)
        options = {option for parameter in named.params for option in parameter.opts}
        given = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", example))
        assert given <= options, f"{example}: {given - options}"
        assert path == tuple(words[1 : len(path) + 1]), f"an example of another command: {example}"


@pytest.mark.parametrize("path", [path for path, c in ALL.items() if not hasattr(c, "commands")], ids=" ".join)
def test_every_option_says_what_it_is_for(path: tuple[str, ...]) -> None:
    for parameter in ALL[path].params:
        assert getattr(parameter, "help", None), f"{' '.join(path)}: {parameter.name}"


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_no_number_stands_for_something_else(path: tuple[str, ...], shoal: Shoal) -> None:
    told = " ".join(shoal(*path, "--help").out.split())
    assert not re.search(r"\[default: (0\.0|-1)|\[\[", told), told
    assert told.count("(as the task says)") == {"host": 8, "simulate": 4, "train": 2}.get(" ".join(path), 0)
    assert "(the newest)" in told or path != ("predict",)


def test_every_command_but_groups_knows_json() -> None:
    without = {
        " ".join(p)
        for p, c in ALL.items()
        if p and not hasattr(c, "commands") and "json" not in {x.name for x in c.params}
    }
    assert without == set()


@pytest.mark.integration
def test_starting_imports_nothing_heavy() -> None:
    heavy = ("jax", "grpc", "sqlalchemy", "matplotlib", "numpy", "flax", "optax", "cryptography")
    source = f"import sys, shoal.cli.main; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_ctrl_c_while_it_is_loaded_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    class Loading:
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "shoal.cli.main", Loading())
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_version(shoal: Shoal) -> None:
    assert re.fullmatch(r"shoal \d+\.\d+\.\d+\n", shoal("--version").out)


def test_wrong_use_is_one_line(shoal: Shoal) -> None:
    for arguments in (("nothing",), ("simulate", "--nothing"), ("host", "--port", "x"), ("predict",)):
        made = shoal(*arguments)
        assert made.code == 2 and made.out == "" and made.err.count("\n") == 1 and "--help" in made.err, made
