"""Run folders: a new one under `runs/`, or one that exists and is taken up again."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.record.run import FoundRun
    from shoal.record.store import RunKind

RUNS: Final = "runs"


def new_folder(chosen: Path | None, name: str) -> Path:
    """Where a new run goes.

    Raises:
        ValueError: the folder that was asked for holds a run already.
    """
    if chosen is None:
        return _free(Path(RUNS), f"{time.strftime('%Y-%m-%d')}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}")
    if (chosen / "record.sqlite").exists():
        raise ValueError(f"{chosen} holds a run already. Go on with it by --resume, or choose another folder.")
    return chosen


def existing_run(chosen: Path | None, *, kind: "RunKind") -> "FoundRun":
    """The newest run in the folder of --run, to go on with.

    Raises:
        ValueError: no folder was given, or the run is of another kind.
        DataError: it holds no run.
    """
    from shoal.record.run import latest_run

    if chosen is None:
        raise ValueError("Expected --run DIR with --resume: which run is to go on? `shoal runs list` shows runs.")
    found = latest_run(chosen)
    if found.run.kind != kind:
        made = found.run.kind
        raise ValueError(f"Run {found.run.id} in {found.path} was made by `shoal {made}`; resume it with that.")
    return found


def unfinished_runs(chosen: Path | None, *, kind: "RunKind") -> "list[FoundRun]":
    """The runs of the folder of --run that are not finished, to go on with; where all are, the newest. Oldest first.

    Raises:
        ValueError: no folder was given, or the newest run is of another kind.
        DataError: it holds no run.
    """
    from shoal.record.run import find_runs

    newest = existing_run(chosen, kind=kind)
    found = [run for run in find_runs(newest.path) if run.run.kind == kind and run.run.status != "finished"]
    return found or [newest]


def _free(parent: Path, name: str) -> Path:
    number = 1
    while (path := parent / (f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    return path
