"""`shoal report`: a run's card."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli import options
from shoal.cli.screen import Screen

EPILOG = options.examples("shoal report runs/digits", "shoal report runs/digits --out digits.md")


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, or one of several: then the newest.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the card here.", show_default="CARD.md in the run folder")
    ] = None,
    run_id: options.RunId = None,
    json: options.AsJson = False,
) -> None:
    """Write a run's card: what the model is for, how it was trained, what it can and cannot do.

    A card that is there is written anew, from the record and the task's `about` alone.
    """
    from shoal.record.run import latest_run
    from shoal.report.card import write_card
    from shoal.report.facts import read_facts

    screen = Screen(json=json)
    found = latest_run(run, task=run_id or "")
    facts = read_facts(found.path, found.run.id)
    card = write_card(facts, out or found.path)
    screen.line(card.read_text(encoding="utf-8"))
    screen.line(f"card: {card}")
    screen.document({"run": facts.run.id, "card": str(card)})
