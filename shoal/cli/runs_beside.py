"""`shoal runs plot` and `shoal runs compare`: runs beside one another, as a picture and as a table."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Final

from shoal.cli import words
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    from shoal.record.run import FoundRun
    from shoal.report.comparison import Comparison, Result
    from shoal.report.facts import Facts, Point

MOST_METRICS: Final = 3


def read_runs(paths: list[Path]) -> "list[tuple[str, Facts]]":
    """The runs at some paths, each with what it is called by. A folder of several runs stands for all of them.

    Raises:
        DataError: there is none at one of the paths.
    """
    from shoal.record.run import find_runs, latest_run
    from shoal.report.facts import read_facts

    found = [run for path in paths for run in find_runs(path) or [latest_run(path)]]
    chosen = list({run.run.id: run for run in found}.values())
    return [(label, read_facts(run.path, run.run.id)) for label, run in zip(_labels(chosen), chosen, strict=True)]


def plot(runs: "list[tuple[str, Facts]]", metrics: list[str], out: Path, screen: Screen) -> None:
    """Writes the picture and says where it is."""
    from shoal.report.comparison import shared_metrics
    from shoal.report.run_curves import draw_runs

    chosen = metrics or shared_metrics([facts for _, facts in runs])[:MOST_METRICS]
    if not chosen:
        raise ValueError(
            "The runs have no metric in common. Name one with --metric; `shoal runs show RUN` lists a run's."
        )
    made = draw_runs(runs, out, metrics=chosen)
    screen.line(f"{', '.join(chosen)} of {words.count(len(runs), 'run')}: {made}")
    screen.document({"picture": str(made), "metrics": chosen, "runs": [facts.run.id for _, facts in runs]})


def tell(made: "Comparison", screen: Screen) -> None:
    """The table: what differs, then what came of it; a column for each run."""
    rows: list[tuple[str, ...]] = [(name, *values) for name, values in made.settings.items()]
    if rows:
        rows.append(("",) * (len(made.results) + 1))
    rows += [
        ("rounds", *(str(each.version) for each in made.results)),
        (f"{made.metric}, last", *(_told(each.last) for each in made.results)),
        (f"{made.metric}, best", *(_told(each.best) for each in made.results)),
    ]
    if made.target is not None:
        rows.append((f"reaches {words.value(made.target)} at version", *(_reached(each) for each in made.results)))
    rows.append(("seconds at work", *(words.duration(each.seconds) for each in made.results)))
    mark = "*" if any(each.is_reckoned for each in made.results) else ""
    rows.append((f"bytes down{mark}", *(words.size(each.bytes_down) for each in made.results)))
    rows.append((f"bytes up{mark}", *(words.size(each.bytes_up) for each in made.results)))
    screen.table(("", *(each.label for each in made.results)), rows)
    if mark:
        screen.line("* of a simulation: what the devices of a fleet would have moved, uncompressed")
    screen.document(made.to_json())


def _labels(runs: "list[FoundRun]") -> list[str]:
    """The folders' names; where those are the same, the paths; where those are, the tasks or ids."""
    for made in (
        [run.path.resolve().name for run in runs],
        [str(run.path) for run in runs],
        [f"{run.path.resolve().name} {run.run.name}" for run in runs],
    ):
        if max(Counter(made).values(), default=1) == 1:
            return made
    return [f"{run.path.resolve().name} {run.run.id}" for run in runs]


def _told(point: "Point | None") -> str:
    return "-" if point is None else f"{words.value(point.value)} (version {point.version})"


def _reached(result: "Result") -> str:
    if result.reached is None:
        return "never"
    return str(result.reached) + ("" if result.reached_s is None else f" ({words.duration(result.reached_s)})")
