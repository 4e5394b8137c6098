"""Several runs of one record in one process, behind one front door: a Coordinator and an Edge each.

The record has one writer at a time however many Coordinators there are, so commits of different runs follow one another.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import final

import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import ShoalError
from shoal.fleet.frontdoor import Frontdoor, Served
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.host import Host

log = logging.getLogger("shoal.host")


@final
class SeveralHosts:
    """See the module's text."""

    def __init__(
        self,
        hosts: Sequence[Host],
        *,
        weights: Mapping[str, float] | None = None,
        by_order: bool = False,
        clock: Clock | None = None,
        rng: np.random.Generator | None = None,
    ) -> None:
        """
        Args:
            hosts: one for each run; in their order where `by_order` is set.
            weights: run -> its share of the devices, beside those of the others; 1 where it is not named.
            by_order: devices go to the first run that wants some; else by weight.
            clock: time.
            rng: draws devices; None: seeded by the system.
        """
        self.hosts = tuple(hosts)
        self.frontdoor = Frontdoor(
            clock=clock or SystemClock(), rng=rng or np.random.default_rng(), by_order=by_order
        )  # fmt: skip
        for host in self.hosts:
            self.frontdoor.serve(served(host), weight=(weights or {}).get(host.run_id, 1.0))

    def server(self, *, address: str, tls: Tls | None = None) -> GrpcServer:
        """A gRPC server for all of them; start it, then `run`."""
        return GrpcServer(self.frontdoor, address=address, tls=tls)

    async def run(self) -> None:
        """Runs each to its last version. One that fails leaves the others alone; its error is raised at the end."""
        outcomes = await asyncio.gather(*map(self._run, self.hosts))
        failed = [error for error in outcomes if error is not None]
        if failed:
            raise failed[0]

    async def _run(self, host: Host) -> ShoalError | None:
        why = "the run has failed"
        try:
            await host.run()
            why = "the run is over"
        except ShoalError as error:
            log.error("task %s has failed, the others go on: %s", host.plan.manifest.task, error)
            return error
        finally:
            self.frontdoor.over(host.run_id, why)
        return None


def served(host: Host) -> Served:
    """A host's run as the front door sees it."""
    return Served(
        id=host.run_id, manifest=host.plan.manifest, population=host.population, edge=host.edge,
        coordinator=host.coordinator,
    )  # fmt: skip
