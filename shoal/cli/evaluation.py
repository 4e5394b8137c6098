"""Evaluates a host's versions on held-out examples, beside the rounds: always the newest, in a child process."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import final

from shoal.data.store import Examples
from shoal.errors import ShoalError
from shoal.plan.child import ChildRunner
from shoal.plan.plan import Plan
from shoal.plan.train import evaluate
from shoal.record.store import CommitRow, MetricRow, Store, UsageRow
from shoal.record.tensor_blobs import view_tensors

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
    ) -> None:
        self._store, self._run_id, self._plan, self._held_out = store, run_id, plan, held_out
        self._on_metrics = on_metrics
        self._runner = ChildRunner(plan)
        self._created_s = store.run(run_id).created_s
        self._newest: CommitRow | None = None
        self._done = -1
        self._changed = asyncio.Event()

    def committed(self, row: CommitRow) -> None:
        """There is a newer version."""
        self._newest = row
        self._changed.set()

    async def run(self) -> None:
        """Evaluates until it is cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self.catch_up()

    async def catch_up(self) -> None:
        """Evaluates the newest version, if that was not done; a failure is said and ends nothing."""
        row = self._newest
        if row is None or row.version <= self._done:
            return
        try:
            metrics = await asyncio.to_thread(self._evaluate, row)
        except ShoalError as error:
            log.warning("version %d could not be evaluated: %s", row.version, error)
        else:
            self._done = max(self._done, row.version)
            self._on_metrics(row.version, metrics)

    def _evaluate(self, row: CommitRow) -> Mapping[str, float]:
        begun_s = time.perf_counter()
        root = row.model.root
        if not self._runner.has_model(root):
            self._runner.set_model(root, view_tensors(self._store.blobs, row.model))
        metrics = evaluate(self._runner, self._plan.manifest, root, self._held_out)
        took_s, time_s = time.perf_counter() - begun_s, time.time() - self._created_s
        self._store.log(
            self._run_id,
            [
                MetricRow(version=row.version, name=n, value=v, scope="server", time_s=time_s)
                for n, v in metrics.items()
            ],
        )
        self._store.add_usage(self._run_id, [UsageRow(round=row.round, phase="evaluate", seconds=took_s, count=1)])
        return metrics

    def close(self) -> None:
        """Ends the child process."""
        self._runner.close()
