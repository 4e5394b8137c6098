"""The part of `shoal runs show` that prints what a statistics task has found."""

from typing import Any, Final

import numpy as np

from shoal.aggregate.statistics import read_results
from shoal.cli.screen import Screen
from shoal.record.run import Run

SHOWN: Final = 8


def show(run: Run, screen: Screen) -> dict[str, Any]:
    """Prints the results of the last version, if it has some; returns all of them for --json."""
    commit = run.store.last_commit(run.id)
    results = read_results(commit.server_state, run.store.blobs) if commit is not None else {}
    if results:
        screen.line("\nstatistics, of the last version's cohort")
        rows = [(field, name, _text(value)) for field, found in results.items() for name, value in found.items()]
        screen.table(("field", "what", "value"), rows, indent="  ")
    return {field: {name: value.tolist() for name, value in found.items()} for field, found in results.items()}


def _text(value: np.ndarray) -> str:
    flat = [f"{each:.6g}" for each in value.reshape(-1)[:SHOWN].tolist()]
    return " ".join(flat) + (f" … ({value.size} in all)" if value.size > SHOWN else "")
