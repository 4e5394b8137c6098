"""An evaluation that follows a training run: version after version is taken over, measured on devices, and told of.

A version that is due becomes the next version of the evaluation's own line, by a commit without a round; the round from
there adds up what devices measure, and its commit keeps the model. So whatever a device holds a token for is one version
of the training run, also after a crash. Between two evaluations the run rests: it has an Edge, so that devices can ask
what became of their updates, and wants nobody.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final, TypeVar

import numpy as np

from shoal.clock import Clock
from shoal.errors import StoreError, StoreUnavailable
from shoal.fleet import durable
from shoal.fleet.host import Host
from shoal.record.store import CommitRow, Store
from shoal.tensors import Entry, Index, TensorSpec

log = logging.getLogger("shoal.host")

T = TypeVar("T")

FOLLOWED = TensorSpec(name="followed/version", shape=(), dtype="int64")
"""In the state of a line: the version of the training run that its model is."""
PREFIX: Final = "evaluate/"
"""Of the metrics' names."""


class Following:
    """See the module's text."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        *,
        make_host: Callable[[int], Host],
        clock: Clock,
        on_metrics: Callable[[int, dict[str, float]], None] = lambda version, metrics: None,
    ) -> None:
        """
        Args:
            store: the record; the run that is followed is in it.
            run_id: of the evaluation.
            make_host: last version -> a host of the evaluation that runs to it.
            clock: time.
            on_metrics: told of a version of the training run and its metrics.

        Raises:
            StoreError: the record has no run of the task that is followed.
        """
        self.store, self.run_id, self._make_host, self._clock = store, run_id, make_host, clock
        self._on_metrics = on_metrics
        self.host = make_host(store.last_version(run_id) or 0)
        options = self.host.plan.manifest.server.options
        self._every = int(options["every"])
        named = [run.id for run in store.runs() if run.name == options["follows"] and run.kind == "host"]
        if not named:
            raise StoreError(
                f"Task {self.host.plan.manifest.task!r} evaluates task {options['follows']!r}, which has no run here: name "
                "that task too."
            )
        self.followed = named[-1]
        """The training run."""
        self._changed = asyncio.Event()
        self._is_last = False

    def committed(self) -> None:
        """The training run has a newer version."""
        self._changed.set()

    def ended(self) -> None:
        """The training run makes no more versions."""
        self._is_last = True
        self._changed.set()

    async def run(self, serve: Callable[[Host], None], rest: Callable[[], None]) -> None:
        """Evaluates what is due until the training run has ended and its last version is measured."""
        rest()
        await self._durably(self._tell_again)
        while (last_version := await self._next()) is not None:
            await self._evaluate(last_version, serve)
            rest()
            for version, metrics in await self._durably(self._tell_again):
                self._on_metrics(version, metrics)
        time_s = self._clock.wall_s()
        await self._durably(lambda: self.store.set_status(self.run_id, "finished", time_s=time_s))

    async def _evaluate(self, last_version: int, serve: Callable[[Host], None]) -> None:
        delay_s, longest_s = durable.RETRY_S
        while True:
            self.host = self._make_host(last_version)
            serve(self.host)
            try:
                return await self.host.run()
            except (
                StoreUnavailable
            ) as error:  # a host does not start on a full disk; the training run goes on meanwhile
                log.error("an evaluation cannot begin, trying again in %.1f s: %s", delay_s, error)
                self.host.edge.finish("the disk is full")
            await self._clock.sleep_until(self._clock.now_s() + delay_s)
            delay_s = min(2 * delay_s, longest_s)

    async def _durably(self, write: Callable[[], T]) -> T:
        return await durable.durably(self.store, self._clock, write)

    async def _next(self) -> int | None:
        """The version that the next evaluation ends with, once one is due; None at the end."""
        while True:
            self._changed.clear()
            is_last = self._is_last
            if (found := await self._durably(lambda: self._take_over(is_last))) is not None:  # noqa: B023 (awaited here)
                return found
            if is_last:
                return None
            await self._durably(lambda: self.store.set_status(self.run_id, "running", time_s=None))
            await self._changed.wait()

    def _take_over(self, is_last: bool) -> int | None:
        head, newest = self.store.last_commit(self.run_id), self.store.last_commit(self.followed)
        assert head is not None and newest is not None, "both runs were begun"
        if head.version and not head.round:
            return head.version + 1  # taken over by an earlier life
        measured = self._followed_by(head)
        if newest.version < measured + (1 if is_last else self._every):
            return None
        if newest.model.specs != head.model.specs:
            raise StoreError(
                f"Run {self.followed} has other tensors than run {self.run_id} evaluates: begin both anew."
            )
        data = np.array(newest.version, np.int64).tobytes()
        state = Index((Entry(FOLLOWED, self.store.blobs.put(data)),))
        row = CommitRow(
            version=head.version + 1, model=newest.model, server_state=state, round=0, members=0, weight=0,
            created_s=self._clock.wall_s(),
        )  # fmt: skip
        self.store.commit(self.run_id, row, round=None)
        return row.version + 1

    def _followed_by(self, row: CommitRow) -> int:
        """The version of the training run that a version of the evaluation is; 0 at first."""
        return int(self.store.blobs.view(row.server_state.entries[0].hash, FOLLOWED)) if row.server_state.entries else 0

    def _tell_again(self) -> list[tuple[int, dict[str, float]]]:
        """Writes what was measured last into the training run, unless it is there; a crash may have come between.

        What was measured before that has been told: only then is another version taken over. (It is not looked for: the
        training run may have been rid of it since.)
        """
        head = self.store.last_commit(self.run_id)
        assert head is not None, "the run was begun"
        if not head.round:
            return []
        version = self._followed_by(head)
        told = self.store.metrics(self.followed)
        if any(row.version == version and row.name.startswith(PREFIX) for row in told):
            return []
        time_s = self._clock.wall_s() - self.store.run(self.followed).created_s
        rows = [
            replace(row, version=version, time_s=time_s)
            for row in self.store.metrics(self.run_id)
            if row.version == head.version - 1 and row.name.startswith(PREFIX)
        ]
        self.store.log(self.followed, rows)
        return [(version, {row.name: row.value for row in rows})]
