"""Options that several commands have, and examples under a command's help."""

from pathlib import Path
from typing import Annotated, Final

import typer

AS_THE_TASK_SAYS: Final = "as the task says"

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="Users' examples: a file (.csv, .parquet, .npz), a folder of them or of users' folders, an example store "
        "(NAME.examples), or name:NAME of a known data set, such as name:digits or name:movielens-100k (docs/data.md).",
    ),
]
UserColumn = Annotated[
    str, typer.Option("--user-column", help="For tables: the column that names the user.", show_default="user")
]
Split = Annotated[
    str,
    typer.Option("--split", help="For name:…, how it is dealt out to users: iid, dirichlet:ALPHA or shards:NUMBER."),
]
Users = Annotated[int, typer.Option("--users", min=1, help="For name:…, how many users it is dealt out to.")]
Rounds = Annotated[
    int | None,
    typer.Option("--rounds", min=1, help="Versions to commit; with --resume, those of the run if not given."),
]
Goal = Annotated[
    int | None, typer.Option("--goal", min=1, help="Updates that close a round.", show_default=AS_THE_TASK_SAYS)
]
Late = Annotated[
    str | None,
    typer.Option(
        "--late",
        help="Updates whose round has closed: discard, discount:FACTOR:VERSIONS or patch:VERSIONS.",
        show_default=AS_THE_TASK_SAYS,
    ),
]
Buffer = Annotated[
    int | None,
    typer.Option(
        "--buffer",
        min=0,
        help="Asynchronous: commit every so many updates (with --late discount:…).",
        show_default=AS_THE_TASK_SAYS,
    ),
]
Concurrency = Annotated[
    int | None,
    typer.Option("--concurrency", min=0, help="With a buffer: devices at once.", show_default=AS_THE_TASK_SAYS),
]
HeldOut = Annotated[
    str, typer.Option("--held-out", help="Examples to evaluate versions on; name:… means its test part.")
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="The run folder; a new one under runs/ if not given.")]
Keep = Annotated[
    str,
    typer.Option(
        "--keep",
        metavar="RECENT[:EVERY]",
        help="Keep the newest versions, and of the older ones every so manyth: 100:1000.",
        show_default="all",
    ),
]
RunId = Annotated[
    str | None,
    typer.Option(
        "--id",
        help="Which run of the folder, by its id or its task; `shoal runs list` shows them.",
        show_default="the newest",
    ),
]
TaskName = Annotated[
    str, typer.Argument(metavar="TASK", help="module:attribute or file.py:attribute (the attribute of an only task may be left out).")
]  # fmt: skip


def examples(*commands: str) -> str:
    """The end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)
