"""`shoal new`: writes a task to start from."""

import re
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.failures import command_line
from shoal.cli.screen import Screen
from shoal.cli.task_template import TEMPLATE

EPILOG = options.examples("shoal new digits", "shoal new tasks/digits.py")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the task, or path of the file.")],
    json: options.AsJson = False,
) -> None:
    """Write a task to start from.

    NAME.py runs as it is, and its comments say what to change. A file that exists is never overwritten.
    """
    screen = Screen(json=json)
    path = Path(name if name.endswith(".py") else f"{name}.py")
    task_name = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-.")
    if not task_name:
        raise ValueError(f"Expected a name with a letter or a digit, got {name!r}.")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(TEMPLATE.replace("NAME", task_name).replace("FILE", str(path)))
    except FileExistsError:
        raise ValueError(f"{path} exists, and is left as it is. Choose another name.") from None
    except FileNotFoundError:
        raise ValueError(f"There is no folder {path.parent}. Make it first.") from None
    commands = [
        command_line(["shoal", "check", path, "--data", "name:digits"]),
        command_line(["shoal", "simulate", path, "--data", "name:digits", "--rounds", "10"]),
        command_line(["shoal", "host", path, "--rounds", "10", "--port", "8500"]),
    ]
    screen.line(f"wrote {path}. Next:")
    for command in commands:
        screen.line(f"  {command}")
    screen.document({"file": str(path), "task": task_name, "next": commands})
