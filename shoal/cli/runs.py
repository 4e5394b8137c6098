"""`shoal runs`: what runs there are, what became of one, and several beside one another."""

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
    help="List runs, show or plot them, compare several, or explain a round of one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=options.examples("shoal runs list", "shoal runs show runs/digits", "shoal runs compare runs/a runs/b"),
)

LIST_EPILOG = options.examples("shoal runs list", "shoal runs list experiments/ --json")
EXPLAIN_EPILOG = options.examples("shoal runs explain runs/digits --round 7")
SHOW_EPILOG = options.examples("shoal runs show runs/digits", "shoal runs show runs/digits --json")
PLOT_EPILOG = options.examples(
    "shoal runs plot runs/digits",
    "shoal runs plot runs/digits runs/digits-2 --metric accuracy --metric train/loss --out digits.png",
)
COMPARE_EPILOG = options.examples(
    "shoal runs compare runs/digits runs/digits-2",
    "shoal runs compare runs/ --metric accuracy --target 0.9 --json",
)

Several = Annotated[
    list[Path], typer.Argument(metavar="RUN…", help="Run folders; a folder of several runs stands for all of them.")
]


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


@app.command("plot", epilog=PLOT_EPILOG)
def plot(
    runs: Several,
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", help="A row of the picture; several may be given.", show_default="the first three"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The PNG to write.", show_default="curves.png in the first run's folder"),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Draw metrics of one run or of several: over rounds, over seconds, and over users where they were measured so."""
    from shoal.cli import runs_beside

    found = runs_beside.read_runs(runs)
    runs_beside.plot(found, metric or [], out or runs[0] / "curves.png", Screen(json=json))


@app.command("compare", epilog=COMPARE_EPILOG)
def compare(
    runs: Several,
    metric: Annotated[
        str, typer.Option("--metric", help="By which metric.", show_default="the first that all have")
    ] = "",
    target: Annotated[
        float | None,
        typer.Option(
            "--target", help="Tell the rounds that each took to this value.", show_default="the best that all reached"
        ),
    ] = None,
    higher: Annotated[
        bool | None,
        typer.Option(
            "--higher/--lower", help="Which is better.", show_default="losses and errors: lower; all else: higher"
        ),
    ] = None,
    json: options.AsJson = False,
) -> None:
    """Compare runs: the settings that differ, the last and best metric, rounds to a target, seconds, bytes."""
    from shoal.cli import runs_beside
    from shoal.report.comparison import compare as compared

    runs_beside.tell(
        compared(runs_beside.read_runs(runs), metric=metric, target=target, higher=higher), Screen(json=json)
    )


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
