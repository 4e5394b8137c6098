"""Evaluates a host's versions on held-out examples, beside the rounds: always the newest, once, in a child process."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import final

from shoal.data.store import Examples
from shoal.errors import ShoalError
from shoal.plan.child import ChildRunner
from shoal.plan.evaluate_version import evaluate_version
from shoal.plan.plan import Plan
from shoal.record.store import CommitRow, Store

log = logging.getLogger("shoal.host")


@final
class Evaluation:
    """Of one run. A version that comes while another is evaluated waits; of those that wait only the newest is taken."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        plan: Plan,
        held_out: Examples,
        *,
        on_metrics: Callable[[int, Mapping[str, float]], None],
        prefix: str = "",
        threads: int | None = None,
    ) -> None:
        """
        Args:
            store: the record.
            run_id: the run.
            plan: its plan.
            held_out: what versions are evaluated on.
            on_metrics: told of a version and its metrics.
            prefix: before their names.
            threads: of the CPU; None: all.
        """
        self._store, self._run_id, self._plan, self._held_out = store, run_id, plan, held_out
        self._on_metrics, self._prefix = on_metrics, prefix
        self._runner = ChildRunner(plan, threads=threads)
        self._newest: CommitRow | None = None
        known = (row for row in store.metrics(run_id) if row.scope == "server" and row.name.startswith(prefix))
        self._done = max((row.version for row in known), default=-1)
        self._is_over = False
        self._changed = asyncio.Event()

    def committed(self, row: CommitRow) -> None:
        """There is a newer version; one that the record has metrics of is not evaluated again."""
        self._newest = row
        self._changed.set()

    def finish(self) -> None:
        """The newest version is the last: `run` ends with it."""
        self._is_over = True
        self._changed.set()

    async def run(self) -> None:
        """Evaluates what comes until `finish`; a failure is said and ends nothing."""
        is_over = False
        while not is_over:
            await self._changed.wait()
            self._changed.clear()
            row, is_over = self._newest, self._is_over
            if row is not None and row.version > self._done:
                await self._evaluate_newest(row)

    async def _evaluate_newest(self, row: CommitRow) -> None:
        try:
            metrics = await asyncio.to_thread(self.evaluate, row, self._held_out, prefix=self._prefix)
        except ShoalError as error:
            log.warning("version %d could not be evaluated: %s", row.version, error)
        else:
            self._done = row.version
            self._on_metrics(row.version, metrics)

    def evaluate(self, row: CommitRow, examples: Examples, *, prefix: str = "") -> Mapping[str, float]:
        """The metrics of a version, into the record too. Blocks."""
        return evaluate_version(
            self._runner, self._plan.manifest, self._store, self._run_id, row, examples, prefix=prefix
        )

    def close(self) -> None:
        """Ends the child process."""
        self._runner.close()
