"""A host: Coordinator and Edge of one run in one process, with or without a socket.

A run is begun by `plan/run_plan.py`; ``Host`` takes it up from the record alone, the first time as after a crash. The task's source is not needed for it.
"""

import asyncio
import hashlib
import logging
from collections.abc import Callable
from typing import Final

import numpy as np

from shoal.aggregate.choose import aggregator_of, noised
from shoal.aggregate.commit import CallProgram
from shoal.clock import Clock, SystemClock
from shoal.errors import LeaseLost, ShoalError, StoreError, StoreUnavailable
from shoal.fleet.coordinator import EVENTS_KEPT, Commit, Coordinator
from shoal.fleet.durable import durably
from shoal.fleet.edge import Edge
from shoal.fleet.edges import Edges
from shoal.fleet.entrance import Entrance, admit_all
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.keys import HostKeys
from shoal.fleet.lease import LIFE_S
from shoal.fleet.lease_keeper import LeaseKeeper
from shoal.fleet.remote_edge import EdgesServer
from shoal.fleet.sent import SentBlobs
from shoal.fleet.staging import Limits
from shoal.fleet.wire import edges_pb2
from shoal.plan.run_plan import keep_rounds, load_plan
from shoal.plan.secure import grouping
from shoal.record.retention import Retention
from shoal.record.store import RunStatus, Store

log = logging.getLogger("shoal.host")

HERE: Final = "host"
"""Name of the Edge in the host's own process."""


def run_seed(seed: int) -> bytes:
    """32 bytes that everything random in a run is made of."""
    return hashlib.sha256(b"shoal run\0" + str(seed).encode()).digest()


PUT_AWAY_S: Final = 15.0
"""For a host that is told to end, where members of secure groups have revealed what would be lost."""


class Host:
    """See the module's text."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        keys: HostKeys,
        *,
        rounds: int | None = None,
        clock: Clock | None = None,
        rng: np.random.Generator | None = None,
        limits: Limits | None = None,
        call_program: CallProgram | None = None,
        several_edges: bool = False,
        alone: bool = False,
        lease_s: float = LIFE_S,
        entrance: Entrance | None = None,
        on_commit: Callable[[Commit], None] = lambda commit: None,
    ) -> None:
        """
        Args:
            store: the record.
            run_id: a run that `begin_run` made.
            keys: the run folder's.
            rounds: last version, from now on in the run's config; None: as that says.
            clock: time.
            rng: draws devices; None: seeded by the system.
            limits: of staged updates.
            call_program: runs the plan's server programs, where its rule is one.
            alone: the caller holds the run folder's lock (`record.lock.only_writer`): a host of this machine that has the
                run's lease is dead, and is followed at once.
            lease_s: so long after this host's death hosts elsewhere may take the run up.
            several_edges: whether Edges of other processes may attach, see `edges_server`.
            entrance: who may come in; None: whoever comes, with the default bounds.
            on_commit: told of each version once it is durable.
        """
        found = load_plan(store, run_id)
        if found.plan.public_key != keys.public:
            raise StoreError(f"The keys are not those of run {run_id}: its plan is signed by another key.")
        self.store, self.run_id, self.plan = store, run_id, found.plan
        self.population = found.row.population
        self.last_version = int(found.config["rounds"]) if rounds is None else rounds
        clock, half = clock or SystemClock(), found.plan.manifest.server
        self.listeners: list[Callable[[Commit], None]] = [on_commit]
        """Told of each version once it is durable."""
        self._blobs = SentBlobs(store.blobs, found.plan.manifest)
        self.edge = Edge(
            plan=found.plan,
            run=run_id,
            token_key=keys.signing.public_key(),
            blobs=self._blobs,
            clock=clock,
            limits=limits,
            population=found.row.population,
            entrance=entrance,
        )
        self.edges = Edges(grouping(found.plan.manifest)) if several_edges else None
        self.coordinator = Coordinator(
            store=store,
            run=run_id,
            manifest=found.plan.manifest,
            edge=self.edges or self.edge,
            aggregator=noised(
                aggregator_of(half.aggregator, half.rule, half.options, call=call_program),
                found.plan.manifest.promises.privacy,
                half.rounds,
                secret=keys.noise_secret,
                run=run_id,
                last_version=self.last_version,
            ),
            token_key=keys.token,
            run_seed=run_seed(int(found.config["seed"])),
            last_version=self.last_version,
            clock=clock,
            rng=rng or np.random.default_rng(),
            events_kept=int(found.config.get("events_kept", EVENTS_KEPT)),
            population=found.row.population,
            retention=Retention.of(found.config),
            sent=self._blobs.index,
            on_commit=self._committed,
        )
        self._clock, self._keys = clock, keys
        self._admit = entrance.admit if entrance is not None else None
        self.lease = LeaseKeeper(store, run_id, clock=clock, life_s=lease_s, alone=alone)
        if self.edges is not None:
            self.edges.join(HERE, self.edge)

    def _committed(self, commit: Commit) -> None:
        for listener in self.listeners:
            listener(commit)

    def server(self, *, address: str, tls: Tls | None = None) -> GrpcServer:
        """A gRPC server for this host's Edge; start it, then `run`."""
        return GrpcServer(self.edge, address=address, tls=tls)

    def edges_server(self, *, address: str, tls: Tls | None = None) -> EdgesServer:
        """A gRPC server where Edges of other processes attach. Raises ValueError unless the host has `several_edges`."""
        if self.edges is None:
            raise ValueError("Expected a host with several_edges=True, got one that serves its devices alone.")
        welcome = edges_pb2.Welcome(
            run=self.run_id,
            plan=self.store.run(self.run_id).config["plan_blob"],
            token_key=self._keys.signing.public_key().public_bytes_raw(),
            population=self.population,
            asks=self._admit is not None,
        )
        return EdgesServer(
            self.edges,
            welcome=welcome,
            manifest=self.plan.manifest,
            blobs=self._blobs,
            credential=self._keys.edge_credential,
            address=address,
            clock=self._clock,
            tls=tls,
            admit=self._admit or admit_all,
        )

    async def run(self) -> None:
        """Runs the rounds to the last version, under the run's lease. Nobody else writes the run's status.

        Raises:
            LeaseHeld: another host has the run.
            LeaseLost: another host has taken it over; this one writes nothing more.
        """
        await self.lease.serve(self._serve)

    async def _serve(self) -> None:
        keep_rounds(self.store, self.run_id, self.last_version)
        self.store.set_status(self.run_id, "running", time_s=None)
        running = asyncio.ensure_future(self.coordinator.run())
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            await self._end_in_order(running)
            self._say_ended("stopped")
            raise
        except LeaseLost:
            raise  # how the run goes is for its new host to say
        except BaseException:
            self._say_ended("failed")
            raise
        head = self.store.last_version(self.run_id)
        done = head is not None and head >= self.last_version
        time_s = self._clock.wall_s()
        await durably(
            self.store,
            self._clock,
            lambda: self.store.set_status(self.run_id, "finished" if done else "stopped", time_s=time_s),
        )

    async def _end_in_order(self, running: "asyncio.Future[None]") -> None:
        """Ends the rounds. What members have revealed in secure groups is committed or written down: they never offer it again."""
        is_secure = self.plan.manifest.promises.privacy.secure is not None
        try:
            async with asyncio.timeout(PUT_AWAY_S):
                while is_secure and not running.done() and self.coordinator.is_committing:
                    await asyncio.sleep(0.02)
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                if is_secure:
                    await self.coordinator.put_away()
        except (TimeoutError, ShoalError) as error:
            log.warning("what a secure group has summed up could not be kept: %s", str(error) or "it took too long")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    def _say_ended(self, status: RunStatus) -> None:
        """For a run that ends now, whatever the disk says: without it the run is shown as one whose process died."""
        try:
            self.store.set_status(self.run_id, status, time_s=self._clock.wall_s())
        except StoreUnavailable as error:
            log.error("that the run is %s cannot be written: %s", status, error)
