"""A run for people: start one, log to it, find it again, read its curves.

    with init("digits", config={"rate": 0.1}) as run:
        run.log({"accuracy": 0.8}, version=3)

The machinery writes through `Store`; this is the short way for scripts, notebooks and training loops of one's own.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, SupportsFloat, final

import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import DataError, StoreError
from shoal.record.lock import was_left
from shoal.record.provenance import provenance
from shoal.record.sqlite import DATABASE_NAME, open_store
from shoal.record.store import MetricRow, RunKind, RunRow, RunStatus, Scope, Store

RUNS_FOLDER: Final = "runs"
_DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: sorted, and none looks like another
_MAX_DEPTH: Final = 3


def new_run_id(created_s: float, *, entropy: int) -> str:
    """A short id (12 letters and digits) that sorts by time of creation.

    Args:
        created_s: Epoch seconds; kept to the millisecond.
        entropy: Random number; its low 15 bits tell runs of one millisecond apart.
    """
    number = (int(created_s * 1000) << 15) | (entropy & 0x7FFF)
    return "".join(_DIGITS[(number >> shift) & 31] for shift in range(55, -1, -5))


def init(
    name: str,
    *,
    kind: RunKind = "simulate",
    config: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    clock: Clock | None = None,
) -> "Run":
    """Starts a run.

    Args:
        name: The task's name.
        kind: Which place it runs in.
        config: Settings, as JSON.
        folder: Where its record is; `runs/<date>-<name>-<id>` if not given. A folder that has a record gets one run more.
        clock: Where the time comes from; the machine's if not given.

    Raises:
        ValueError: the name is empty or the config is not JSON.
        StoreError: the folder cannot be made or written.
    """
    if not name:
        raise ValueError("Expected a name for the run, got ''. Name it after the task.")
    clock = SystemClock() if clock is None else clock
    created_s = clock.wall_s()
    run_id = new_run_id(created_s, entropy=secrets.randbits(15))
    row = RunRow(
        id=run_id, name=name, kind=kind, plan_hash="", config=dict(config or {}), provenance=provenance(), status="running",
        created_s=created_s,
    )  # fmt: skip
    folder = Path(RUNS_FOLDER) / _folder_name(row) if folder is None else folder
    store = open_store(folder)
    try:
        store.create_run(row)
    except BaseException:
        store.close()
        raise
    return Run(store, run_id, folder=folder, clock=clock, read_only=False)


def open_run(folder: Path, *, run_id: str | None = None, read_only: bool = True, clock: Clock | None = None) -> "Run":
    """Opens a run that exists: the one named (see `latest_run`), or the newest in the folder.

    Raises:
        DataError: the folder holds no such run.
    """
    found = latest_run(folder, task=run_id or "")
    store = open_store(found.path, read_only=read_only)
    return Run(
        store, found.run.id, folder=found.path, clock=SystemClock() if clock is None else clock, read_only=read_only
    )


@final
class Run:
    """One run of a store. As a context manager it finishes when the block ends (`failed` if by an error), or only closes
    if it was opened to be read."""

    def __init__(self, store: Store, run_id: str, *, folder: Path, clock: Clock, read_only: bool) -> None:
        """Use `init` or `open_run`."""
        self._read_only = read_only
        self._store, self._id, self._folder, self._clock = store, run_id, folder, clock
        self._created_s = store.run(run_id).created_s
        self._is_finished = False

    @property
    def id(self) -> str:
        return self._id

    @property
    def folder(self) -> Path:
        return self._folder

    @property
    def store(self) -> Store:
        return self._store

    @property
    def row(self) -> RunRow:
        """The run as it is now."""
        return self._store.run(self._id)

    def log(
        self,
        values: Mapping[str, SupportsFloat],
        *,
        version: int | None = None,
        scope: Scope = "server",
        device_class: str = "",
    ) -> None:
        """Writes metrics, durably.

        Args:
            values: Name -> value; anything that `float` takes.
            version: The version that they were measured on; the line's last if not given (0 before any commit).
            scope: Whose they are.
            device_class: Which class, where scope is class.
        """
        if version is None:
            version = self._store.last_version(self._id) or 0
        time_s = self._clock.wall_s() - self._created_s
        self._store.log(
            self._id,
            [
                MetricRow(
                    version=version,
                    name=name,
                    value=float(value),
                    scope=scope,
                    time_s=time_s,
                    device_class=device_class,
                )
                for name, value in values.items()
            ],
        )

    def history(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A metric's curve: versions (n,) int64 and values (n,) float64, in the order they were logged.

        Raises:
            DataError: the run has no such metric.
        """
        rows = self._store.metrics(self._id, name)
        if not rows:
            names = sorted({row.name for row in self._store.metrics(self._id)})
            raise DataError(
                f"Expected a metric of run {self._id} ({', '.join(names[:20]) or 'it has none'}), got {name!r}."
            )
        versions = np.array([row.version for row in rows], dtype=np.int64)
        return versions, np.array([row.value for row in rows], dtype=np.float64)

    def finish(self, status: RunStatus = "finished") -> None:
        """Says how the run ended and closes its store. Doing it twice is harmless; the first status stays."""
        if self._is_finished:
            return
        self._is_finished = True
        try:
            self._store.set_status(self._id, status, time_s=self._clock.wall_s())
        finally:
            self._store.close()

    def close(self) -> None:
        """Closes the store and leaves the run's status as it is: for runs opened to be read."""
        self._is_finished = True
        self._store.close()

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._read_only:
            self.close()
        elif error is None:
            self.finish()
        else:
            self.finish("stopped" if isinstance(error, KeyboardInterrupt) else "failed")


class FoundRun(NamedTuple):
    """A run and where it is."""

    path: Path
    """The run folder: what `open_store` takes."""
    run: RunRow
    last_version: int | None
    """None before the initial model."""

    @property
    def status(self) -> str:
        """As `shown_status` says it."""
        return shown_status(self.path, self.run)


def shown_status(folder: Path, run: RunRow) -> str:
    """A run's status, or `stopped (died)` where the process that wrote it ended without a word."""
    return "stopped (died)" if run.status == "running" and was_left(folder) else run.status


def find_runs(root: Path, *, on_error: Callable[[Path, StoreError], None] | None = None) -> list[FoundRun]:
    """All runs in a folder and those below it, oldest first. Nothing is changed.

    Args:
        root: A run folder, or one that holds run folders.
        on_error: Is told of a record that cannot be read, and the search goes on; without it the error is raised.

    Raises:
        DataError: the folder does not exist.
    """
    if not root.is_dir():
        raise DataError(
            f"Expected a folder with runs, got {root}, which is no folder. Runs are made in ./{RUNS_FOLDER}."
        )
    found: list[FoundRun] = []
    for folder in _run_folders(root):
        try:
            found.extend(_runs_in(folder))
        except StoreError as error:
            if on_error is None:
                raise
            on_error(folder, error)
    return sorted(found, key=lambda item: item.run.id)


def latest_run(folder: Path, *, task: str = "") -> FoundRun:
    """The newest run in a run folder, or below a folder of run folders.

    Args:
        folder: where to look.
        task: only runs of this task; or the id of a run, for that one.

    Raises:
        DataError: there is none.
    """
    runs = find_runs(folder)
    found = [each for each in runs if task in ("", each.run.id)] or [each for each in runs if each.run.name == task]
    if runs and not found:
        names = sorted({each.run.name for each in runs})
        raise DataError(
            f"Expected a task that has a run in {folder} ({' | '.join(names)}) or the id of a run, got {task!r}. "
            "`shoal runs list` shows both."
        )
    if not found:
        raise DataError(
            f"Expected a run folder (one with {DATABASE_NAME}) or a folder of them, got {folder}, which has none. "
            "`shoal runs list` shows runs."
        )
    return found[-1]


def _runs_in(folder: Path) -> list[FoundRun]:
    store = open_store(folder, read_only=True)
    try:
        return [FoundRun(folder, row, store.last_version(row.id)) for row in store.runs()]
    finally:
        store.close()


def _run_folders(root: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(root):
        if DATABASE_NAME in files:
            folders.clear()
            yield Path(path)
        elif len(Path(path).relative_to(root).parts) >= _MAX_DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


def _folder_name(row: RunRow) -> str:
    date = time.strftime("%Y-%m-%d", time.gmtime(row.created_s))
    name = re.sub(r"[^a-z0-9]+", "-", row.name.lower()).strip("-")[:40]
    return "-".join(part for part in (date, name, row.id) if part)
