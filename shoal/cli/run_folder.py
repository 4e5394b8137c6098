"""Run folders: a new one under `runs/`, or one that exists and is taken up again."""

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from shoal.record.run import FoundRun

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


def existing_run(chosen: Path | None) -> "FoundRun":
    """The newest run in the folder of --run.

    Raises:
        ValueError: no folder was given.
        DataError: it holds no run.
    """
    from shoal.record.run import latest_run

    if chosen is None:
        raise ValueError("Expected --run DIR with --resume: which run is to go on? `shoal runs list` shows runs.")
    return latest_run(chosen)


def _free(parent: Path, name: str) -> Path:
    number = 1
    while (path := parent / (f"{name}-{number}" if number > 1 else name)).exists():
        number += 1
    return path
