"""Several runs of one record in one process, behind one front door: a Coordinator and an Edge each.

The record has one writer at a time however many Coordinators there are, so commits of different runs follow one another.
"""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, final

import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import ShoalError
from shoal.fleet.entrance import Entrance
from shoal.fleet.following import Following
from shoal.fleet.frontdoor import Frontdoor, Served
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.host import Host
from shoal.plan.manifest import Manifest

log = logging.getLogger("shoal.host")


@final
class SeveralHosts:
    """See the module's text."""

    def __init__(
        self,
        hosts: Sequence[Host],
        evaluations: Sequence[Following] = (),
        *,
        weights: Mapping[str, float] | None = None,
        by_order: bool = False,
        clock: Clock | None = None,
        rng: np.random.Generator | None = None,
        entrance: Entrance | None = None,
    ) -> None:
        """
        Args:
            hosts: one for each run; in their order where `by_order` is set.
            evaluations: of runs of the same record, one of each at most.
            weights: run -> its share of the devices, beside those of the others; 1 where it is not named.
            by_order: devices go to the first run that wants some; else by weight.
            clock: time.
            rng: draws devices; None: seeded by the system.
            entrance: who may come in; None: whoever comes, with the default bounds.

        Raises:
            ValueError: two evaluations are of one task.
        """
        self.hosts, self.evaluations = tuple(hosts), tuple(evaluations)
        refuse_evaluated_twice([each.host.plan.manifest for each in evaluations])
        self._weights = weights or {}
        self.frontdoor = Frontdoor(
            clock=clock or SystemClock(), rng=rng or np.random.default_rng(), by_order=by_order, entrance=entrance
        )  # fmt: skip
        for host in (*self.hosts, *(each.host for each in self.evaluations)):
            self._serve(host)
        for each in self.evaluations:
            self.frontdoor.rest(each.run_id)

    def _serve(self, host: Host) -> None:
        self.frontdoor.serve(served(host), weight=self._weights.get(host.run_id, 1.0))

    def server(self, *, address: str, tls: Tls | None = None) -> GrpcServer:
        """A gRPC server for all of them; start it, then `run`."""
        return GrpcServer(self.frontdoor, address=address, tls=tls)

    async def run(self) -> None:
        """Runs each to its last version. One that fails leaves the others alone; its error is raised at the end."""
        # An evaluation whose training run was finished before has only its last version to measure.
        for each in self.evaluations:
            if each.followed not in {host.run_id for host in self.hosts}:
                each.ended()
        outcomes = await asyncio.gather(*map(self._train, self.hosts), *map(self._evaluate, self.evaluations))
        failed = [error for error in outcomes if error is not None]
        if failed:
            raise failed[0]

    async def _train(self, host: Host) -> Exception | None:
        following = [each for each in self.evaluations if each.followed == host.run_id]
        host.listeners += [lambda _, each=each: each.committed() for each in following]  # type: ignore[misc]
        try:
            return await self._until_over(host.run_id, host.plan.manifest.task, host.run())
        finally:
            for each in following:
                each.ended()

    async def _evaluate(self, each: Following) -> Exception | None:
        running = each.run(self._serve, lambda: self.frontdoor.rest(each.run_id))
        return await self._until_over(each.run_id, each.host.plan.manifest.task, running)

    async def _until_over(self, run_id: str, task: str, running: Coroutine[Any, Any, None]) -> Exception | None:
        why = "the run has failed"
        try:
            await running
            why = "the run is over"
        except Exception as error:  # our bugs too
            log.error(
                "task %s has failed, the others go on: %s", task, error, exc_info=not isinstance(error, ShoalError)
            )
            return error
        finally:
            self.frontdoor.over(run_id, why)
        return None


def refuse_evaluated_twice(tasks: Iterable[Manifest]) -> None:
    """Raises ValueError where two of them evaluate one task: their metrics would have the same names."""
    seen: dict[str, str] = {}
    for task in tasks:
        if task.server.aggregator == "evaluation":
            other = seen.setdefault(str(task.server.options["follows"]), task.task)
            if other != task.task:
                raise ValueError(
                    f"Tasks {other!r} and {task.task!r} both evaluate task {task.server.options['follows']!r}: leave one out."
                )


def served(host: Host) -> Served:
    """A host's run as the front door sees it."""
    return Served(
        id=host.run_id, manifest=host.plan.manifest, population=host.population, edge=host.edge,
        coordinator=host.coordinator,
    )  # fmt: skip
