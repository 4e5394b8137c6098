"""The Coordinator: owns a task's rounds and line, and is the only writer of commits.

One asyncio actor around the round machine: it takes events from a queue, steps the machine, and carries its commands
out (record, Edge, clock). All that it must not forget is in the record; started anew on the same run it goes on from
the last commit, and tokens that devices still hold stay good.

Guarantees:
    * A device is told *counted* only after the commit that holds its update is durable.
    * A commit that fails for want of disk is tried again, with what was counted, until it succeeds or the host stops.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import numpy as np

from shoal.aggregate.commit import Aggregator
from shoal.clock import Clock
from shoal.errors import ShoalError, StoreError, StoreUnavailable
from shoal.fleet import round as r
from shoal.fleet.configuration import Configuration, configure
from shoal.fleet.edge import Coordinator as HeardByEdge
from shoal.fleet.edge import GroupResult
from shoal.fleet.token import TokenKey
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.record.store import CommitRow, GroupRow, MetricRow, RoundRow, Store, TokenRow, UsageRow
from shoal.tensors import Index

log = logging.getLogger("shoal.coordinator")

RETRY_S: Final = (0.5, 30.0)

T = TypeVar("T")


@runtime_checkable
class Edge(Protocol):
    """What the Coordinator says to an Edge."""

    def connect(self, coordinator: HeardByEdge) -> None: ...
    def open_group(self, configuration: Configuration, model: Index) -> None: ...
    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool: ...
    async def close_group(self) -> GroupResult: ...
    def committed(self, version: int) -> None: ...
    def failed(self, why: str) -> None: ...
    def finish(self, why: str) -> None: ...


@dataclass(frozen=True)
class Commit:
    """What observers are told when a version is durable."""

    row: CommitRow
    metrics: dict[str, float]
    """Over the cohort, on the version before."""
    seconds: float
    """From the round's opening to its commit."""


class Coordinator:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self,
        *,
        store: Store,
        run: str,
        manifest: Manifest,
        edge: Edge,
        aggregator: Aggregator,
        token_key: TokenKey,
        run_seed: bytes,
        last_version: int,
        clock: Clock,
        rng: np.random.Generator,
        population: str = "default",
        on_commit: Callable[[Commit], None] = lambda commit: None,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
        beside: Callable[[Coroutine[Any, Any, None]], Awaitable[None]] = asyncio.ensure_future,
    ) -> None:
        """`in_thread` runs what blocks, `beside` starts what is awaited later; the rest is the Edge's and the clock's."""
        self._in_thread, self._beside = in_thread, beside
        self._store, self._run, self._manifest, self._edge = store, run, manifest, edge
        self._aggregator, self._token_key, self._run_seed, self._clock = aggregator, token_key, run_seed, clock
        self._population, self._on_commit = population, on_commit
        self._policy, self._last_version = manifest.server.rounds, last_version
        self._machine = r.RoundMachine(
            self._policy,
            last_version=last_version,
            nonce_of=lambda version, device: token_key.nonce(run, version, device),
            rng=rng,
        )
        self._events: asyncio.Queue[r.Event] = asyncio.Queue()
        self.wake_s: float | None = None
        """When it wants to be woken, if nothing happens before."""
        self._configuration: Configuration | None = None
        self._signed_configuration = b""
        self._opened_s = 0.0
        self._journaled: Awaitable[None] | None = None
        """The open round's row, on its way into the record: training need not wait for it, what ends the round does."""
        self._head: CommitRow | None = None
        self.finished = asyncio.Event()
        edge.connect(self)

    def snapshot(self) -> r.Snapshot:
        """Where the round is."""
        return self._machine.snapshot()

    # What the Edge says.

    def arrived(self, device: str) -> None:
        self._events.put_nowait(r.Arrived(device))

    def left(self, device: str) -> None:
        self._events.put_nowait(r.Left(device))

    def joined(self, nonce: bytes) -> None:
        self._events.put_nowait(r.Joined(nonce))

    def counted(self, nonce: bytes) -> None:
        self._events.put_nowait(r.Counted(nonce))

    def released(self, nonce: bytes) -> None:
        self._events.put_nowait(r.Released(nonce))

    async def token_row(self, nonce: bytes) -> TokenRow | None:
        row: TokenRow | None = await self._in_thread(lambda: self._store.token(self._run, nonce))
        return row

    def stop(self) -> None:
        """Opens no round after this one."""
        self._events.put_nowait(r.Stop())

    # The actor.

    async def run(self) -> None:
        """Runs rounds until the line has its last version. Raises StoreError if the record cannot be read."""
        await self.take_up()
        try:
            while not self.finished.is_set():
                await self.step(await self._next_event())
        finally:
            if isinstance(self._journaled, asyncio.Future):  # the run was cancelled within a round
                self._journaled.cancel()

    async def take_up(self) -> None:
        """Goes on from the last commit, as after a crash."""
        head = await self._in_thread(lambda: self._store.last_commit(self._run))
        if head is None:
            raise StoreError(f"Run {self._run} has no initial model; it was never begun.")
        self._head = head
        rounds = await self._in_thread(lambda: self._store.rounds(self._run))
        for row in rounds:
            if row.state == "open":
                await self._abandon(row, "the host stopped")
        await self._in_thread(lambda: self._store.forget_tokens(self._run, before_s=self._clock.wall_s()))
        await self.step(r.Started(head.version, rounds[-1].number if rounds else 0))

    def pending(self) -> r.Event | None:
        """The next event that is there already, or that it is time for one."""
        if not self._events.empty():
            return self._events.get_nowait()
        if self.wake_s is not None and self.wake_s <= self._clock.now_s():
            self.wake_s = None
            return r.Tick()
        return None

    async def _next_event(self) -> r.Event:
        while (event := self.pending()) is None:
            delay_s = None if self.wake_s is None else self.wake_s - self._clock.now_s()
            try:
                async with asyncio.timeout(delay_s):
                    return await self._events.get()
            except TimeoutError:
                pass  # it is time, or nearly
        return event

    async def step(self, event: r.Event) -> None:
        """Steps the machine, then carries out its commands; what they answer is stepped at once, in order."""
        pending = [event]
        while pending:
            for command in self._machine.step(pending.pop(0), self._clock.now_s()):
                answer = await self._carry_out(command)
                if answer is not None:
                    pending.append(answer)

    async def _carry_out(self, command: r.Command) -> r.Event | None:
        match command:
            case r.OpenRound(round, base_version):
                return await self._open(round, base_version)
            case r.Assign(devices):
                for device in devices:
                    self._assign(device)
            case r.CommitRound(round, reason):
                return await self._commit(round, reason)
            case r.AbandonRound(round, reason):
                log.warning("round %d abandoned: %s", round, reason)
                await self._until_journaled()
                await self._abandon(self._round_row(round), reason)
                return r.Abandoned()
            case r.Finish():
                assert self._head is not None
                at_end = self._head.version >= self._last_version
                self._edge.finish("the run has its last version" if at_end else "the host was asked to stop")
                self.finished.set()
            case r.WakeAt(time_s):
                self.wake_s = time_s
        return None

    async def _open(self, round: int, base_version: int) -> r.Event:
        assert self._head is not None and self._head.version == base_version
        self._opened_s = self._clock.wall_s()
        self._configuration = configure(self._manifest, run_seed=self._run_seed, round=round, base_version=base_version)
        self._signed_configuration = hashlib.sha256(
            self._configuration.to_proto().SerializeToString(deterministic=True)
        ).digest()
        self._journaled = self._beside(self._journal(self._round_row(round)))
        self._edge.open_group(self._configuration, self._head.model)
        return r.Opened()

    async def _journal(self, row: RoundRow) -> None:
        await self._durably(lambda: self._store.open_round(self._run, row))

    async def _until_journaled(self) -> None:
        journaled, self._journaled = self._journaled, None
        if journaled is not None:
            await journaled

    def _assign(self, device: str) -> None:
        assert self._configuration is not None and self._head is not None
        version = self._configuration.base_version
        assignment = pb.Assignment(
            population=self._population,
            run=self._run,
            task=self._manifest.task,
            base_version=version,
            nonce=self._token_key.nonce(self._run, version, device),
            expires_s=self._clock.wall_s() + self._policy.token_life_s,
            round=self._configuration.round,
            plan=self._manifest.hash,
            model=self._head.model.root,
            configuration=self._signed_configuration,
        )
        if not self._edge.assign(device, self._token_key.sign(assignment), assignment):
            self.released(assignment.nonce)

    async def _commit(self, round: int, reason: str) -> r.Event:
        try:
            group = await self._edge.close_group()
        except StoreError as error:  # an addition broke off: the sum is of no use
            return self._failed(error)
        self._drop_group_events()
        await self._until_journaled()
        try:
            commit = await self._durably(lambda: self._write_commit(group, round, reason))
        except StoreError:
            raise  # the record is not what this host takes it for: it must not go on
        except ShoalError as error:
            return self._failed(error)
        self._head = commit.row
        self._edge.committed(commit.row.version)
        self._on_commit(commit)
        return r.Committed(commit.row.version)

    def _failed(self, error: ShoalError) -> r.Event:
        self._drop_group_events()
        self._edge.failed(str(error))
        return r.Failed(str(error))

    def _drop_group_events(self) -> None:
        # What the closed group said and was not stepped yet is in its result; stepped later it would be taken for the
        # next group's.
        waiting = [self._events.get_nowait() for _ in range(self._events.qsize())]
        for event in waiting:
            if not isinstance(event, r.Joined | r.Counted | r.Released):
                self._events.put_nowait(event)

    async def _durably(self, write: Callable[[], T]) -> T:
        """Writes to the record, again and again while the disk does not let it: nothing that was counted is given up."""
        delay_s, longest_s = RETRY_S
        while True:
            try:
                made: T = await self._in_thread(write)
                return made
            except StoreUnavailable as error:
                log.error("the record cannot be written, trying again in %.1f s: %s", delay_s, error)
                await self._clock.sleep_until(self._clock.now_s() + delay_s)
                delay_s = min(2 * delay_s, longest_s)

    def _write_commit(self, group: GroupResult, round: int, reason: str) -> Commit:
        head = self._head
        assert head is not None
        begun = self._clock.now_s()
        last = self._store.last_commit(self._run)
        if last is not None and last.version == head.version + 1 and last.round == round:
            # Written by the try before this one, which heard of a failure nonetheless.
            return Commit(last, group.sums.metrics(), last.created_s - self._opened_s)
        model, server_state = self._aggregator.commit(group.sums, head.model, head.server_state, self._store.blobs)
        now = self._clock.wall_s()
        time_s = now - self._store.run(self._run).created_s
        row = CommitRow(
            version=head.version + 1,
            model=model,
            server_state=server_state,
            round=round,
            members=group.sums.members,
            weight=group.sums.weight,
            created_s=now,
        )
        metrics = group.sums.metrics()
        usage = [*group.costs.rows(round), UsageRow(round=round, phase="commit", seconds=self._clock.now_s() - begun)]
        self._store.commit(
            self._run,
            row,
            round=self._closed_row(round, row.members, closed_s=now, reason=reason),
            groups=[
                GroupRow(round=round, base_version=head.version, members=row.members, weight=row.weight),
            ],
            counted=group.counted,
            metrics=[
                MetricRow(version=head.version, name=f"train/{name}", value=value, scope="cohort", time_s=time_s)
                for name, value in metrics.items()
            ],
            usage=usage,
        )
        return Commit(row, metrics, now - self._opened_s)

    def _closed_row(self, round: int, members: int, *, closed_s: float, reason: str) -> RoundRow:
        row = self._round_row(round)
        released = max(0, row.selected - members)
        return replace(
            row, state="committed", closed_s=closed_s, counted=members, released=released, reason=reason
        )  # fmt: skip

    def _round_row(self, round: int) -> RoundRow:
        assert self._configuration is not None
        snapshot = self._machine.snapshot()
        return RoundRow(
            number=round,
            base_version=self._configuration.base_version,
            state="open",
            opened_s=self._opened_s,
            selected=snapshot.selected,
            counted=snapshot.counted,
            released=snapshot.released,
            configuration=self._configuration.to_json(),
        )

    async def _abandon(self, row: RoundRow, reason: str) -> None:
        closed = replace(row, state="abandoned", closed_s=self._clock.wall_s(), reason=reason)
        try:
            await self._in_thread(lambda: self._store.close_round(self._run, closed))
        except StoreError as error:  # the journal of a round that gave nothing is not worth the run
            log.error("round %d could not be closed in the record: %s", row.number, error)
