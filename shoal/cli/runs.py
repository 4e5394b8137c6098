"""`shoal runs`: what runs there are, and what became of one."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options, words
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    from shoal.cli.run_summary import RunSummary
    from shoal.record.run import FoundRun

app = typer.Typer(
    help="List runs, show one of them, or explain one of its rounds.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=options.examples("shoal runs list", "shoal runs show runs/digits"),
)

LIST_EPILOG = options.examples("shoal runs list", "shoal runs list experiments/ --json")
EXPLAIN_EPILOG = options.examples("shoal runs explain runs/digits --round 7")
SHOW_EPILOG = options.examples("shoal runs show runs/digits", "shoal runs show runs/digits --json")


@app.command("list", epilog=LIST_EPILOG)
def list_runs(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A run folder, or a folder of them.")] = Path("runs"),
    json: options.AsJson = False,
) -> None:
    """List the runs in a folder and below it, oldest first."""
    from shoal.record.run import find_runs

    screen = Screen(json=json)
    found = find_runs(root, on_error=lambda path, error: screen.say(f"left out {path}: {error}"))
    made = [_row(run) for run in found]
    if not made:
        screen.say(f"There are no runs in {root} yet. `shoal simulate` and `shoal host` make them.")
    else:
        columns = ("run", "task", "kind", "status", "versions", "last metrics", "when", "folder")
        screen.table(columns, [tuple(row.values()) for row in made])
    screen.document([_document(run) for run in found])


@app.command("show", epilog=SHOW_EPILOG)
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or a folder of them: then the newest.")],
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Show a run: settings, rounds, metrics, and what it took."""
    from shoal.cli import run_sections
    from shoal.record.run import open_run

    screen = Screen(json=json)
    with open_run(run, run_id=run_id) as opened:
        run_sections.show(opened, screen)


@app.command("explain", epilog=EXPLAIN_EPILOG)
def explain(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or a folder of them: then the newest.")],
    round: Annotated[int, typer.Option("--round", min=1, help="Which round.")],
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Explain a round: how it ended, what failed first and where, and what took longer than it does."""
    from shoal.record.run import open_run
    from shoal.report.explain import explain as explained

    screen = Screen(json=json)
    with open_run(run, run_id=run_id) as opened:
        made = explained(opened.store.rounds(opened.id), round)
        for line in made.lines():
            screen.line(line)
        screen.line(f"run: {opened.folder}")
        screen.document(made.to_json() | {"folder": str(opened.folder)})


def _row(found: "FoundRun") -> dict[str, str]:
    summary = _summary(found)
    shown = {name: value for name, value in list(summary.metrics.items())[:3]}
    return {
        "run": found.run.id, "task": found.run.name, "kind": found.run.kind, "status": found.status,
        "versions": "-" if found.last_version is None else str(found.last_version), "metrics": words.values(shown) or "-",
        "when": time.strftime("%Y-%m-%d %H:%M", time.localtime(found.run.created_s)), "folder": str(found.path),
    }  # fmt: skip


def _document(found: "FoundRun") -> dict[str, object]:
    return {
        **_summary(found).to_json(),
        "status": found.status,
        "folder": str(found.path),
        "created_s": found.run.created_s,
    }


def _summary(found: "FoundRun") -> "RunSummary":
    from shoal.cli.run_summary import summarize
    from shoal.record.sqlite import open_store

    store = open_store(found.path, read_only=True)
    try:
        return summarize(store, found.run.id)
    finally:
        store.close()
