"""The Coordinator: owns a task's rounds and line, and is the only writer of commits.

One asyncio actor around the round machine: it takes events from a queue, steps the machine, and carries its commands
out (record, Edge, clock). All that it must not forget is in the record; started anew on the same run it goes on from
the last commit, and tokens that devices still hold stay good.

Guarantees:
    * A device is told *counted* only after the commit that holds its update is durable.
    * A commit that fails for want of disk is tried again, with what was counted, until it succeeds or the host stops.
    * One whose lease another has taken can write nothing (`record/store.py`, invariant 6), and ends with LeaseLost.
"""

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import numpy as np

from shoal.aggregate.cohort_metrics import cohort_metrics
from shoal.aggregate.commit import Aggregator
from shoal.aggregate.sums import save_sums
from shoal.clock import Clock
from shoal.errors import LeaseLost, RoundError, ShoalError, StoreError, StoreUnavailable
from shoal.fleet import round_events as r
from shoal.fleet.analytics import Folding, Seen
from shoal.fleet.configuration import Configuration, configure
from shoal.fleet.costs import Costs
from shoal.fleet.durable import durably
from shoal.fleet.edge import Coordinator as HeardByEdge
from shoal.fleet.group_sums import GroupResult
from shoal.fleet.next_version import NextVersion
from shoal.fleet.round import RoundMachine
from shoal.fleet.round_log import RoundRecorder
from shoal.fleet.token import TokenKey
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest
from shoal.plan.secure import grouping, members_noise
from shoal.privacy import spending
from shoal.record.retention import Retention
from shoal.record.store import CommitRow, GroupRow, MetricRow, RoundLog, RoundRow, Store, TokenRow, UsageRow
from shoal.tensors import Index

log = logging.getLogger("shoal.coordinator")

SWEEP_EVERY: Final = 64
"""Versions between two times that the record is rid of what nobody needs any more."""
EVENTS_KEPT: Final = 100
"""Rounds whose events are kept."""

T = TypeVar("T")


@runtime_checkable
class Edge(Protocol):
    """What the Coordinator says to an Edge."""

    def connect(self, coordinator: HeardByEdge) -> None: ...
    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None: ...
    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool: ...
    async def close_groups(self, *, final: bool = True) -> list[GroupResult]: ...
    def stored(self) -> None: ...
    def gather(self) -> None: ...
    def committed(self, version: int) -> None: ...
    def failed(self, why: str) -> None: ...
    def take_analytics(self) -> Seen:
        """What was seen of devices since this was asked last."""
        ...

    def finish(self, why: str) -> None: ...


@dataclass(frozen=True)
class Commit:
    """What observers are told when a version is durable."""

    row: CommitRow
    metrics: dict[str, float]
    """Over the cohort, on the version before."""
    late: int
    """Its members whose update was of a version before."""
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
        events_kept: int = EVENTS_KEPT,
        retention: Retention | None = None,
        sent: Callable[[Index], Index] = lambda model: model,
        on_commit: Callable[[Commit], None] = lambda commit: None,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
        beside: Callable[[Coroutine[Any, Any, None]], Awaitable[None]] = asyncio.ensure_future,
    ) -> None:
        """`events_kept`: rounds whose events stay in the record, to be run again; 0: none. `retention`: None keeps all versions.

        `in_thread` runs what blocks, `beside` starts what is awaited later; the rest is the Edge's and the clock's."""
        self._in_thread, self._beside, self._sent = in_thread, beside, sent
        self.store, self._run, self._manifest, self._edge = store, run, manifest, edge
        self._aggregator, self._token_key, self._run_seed, self._clock = aggregator, token_key, run_seed, clock
        self._population, self._on_commit = population, on_commit
        self._policy, self._last_version = grouping(manifest), last_version
        self._machine = RoundMachine(
            self._policy,
            last_version=last_version,
            nonce_of=lambda version, device: token_key.nonce(run, version, device),
            rng=rng,
        )
        self._recorder = RoundRecorder(self._machine, is_on=events_kept > 0)
        self._events_kept = events_kept
        self._folding = Folding(self._policy.minimum_group)
        self._analytics: dict[str, Any] = {}
        """Of the round that is being closed."""
        self._begun_s = 0.0
        self._selected_s: float | None = None
        self._events: asyncio.Queue[r.Event] = asyncio.Queue()
        self.wake_s: float | None = None
        """When it wants to be woken, if nothing happens before."""
        self._configuration: Configuration | None = None
        self._signed_configuration = b""
        self._opened_s = 0.0
        self._journaled: Awaitable[None] | None = None
        """The open round's row, on its way into the record: training need not wait for it, what ends the round does."""
        self._head: CommitRow | None = None
        self._waiting: list[GroupRow] = []
        """Groups of the record that the next commit takes in."""
        self._taken: dict[int, int] = {}
        self._retention, self._swept = retention, 0
        privacy = manifest.promises.privacy
        self._release = None
        if privacy.noise_multiplier:
            self._release = spending.release_of(privacy, self._policy, run=run, devices=members_noise(manifest))
        self._spend = spending.spend_of(privacy, self._release) if self._release is not None else None
        self._told_of_rest = 0
        """The round that was last said to wait for those who rest."""
        self._has_looked = False
        """Something was made of the round's sum."""
        self.finished = asyncio.Event()
        self.on_step: Callable[[], None] = lambda: None
        """Told whenever the machine has moved: what it wants may be another."""
        edge.connect(self)

    def snapshot(self) -> r.Snapshot:
        """Where the round is."""
        return self._machine.snapshot()

    @property
    def machine(self) -> RoundMachine:
        """To be asked what it wants; only `step` moves it."""
        return self._machine

    # What the Edge says.

    def arrived(self, *devices: str, edge: str = "") -> None:
        self._events.put_nowait(r.Arrived(devices, edge))

    def left(self, device: str) -> None:
        self._events.put_nowait(r.Left(device))

    def joined(self, nonce: bytes, version: int) -> None:
        self._events.put_nowait(r.Joined(nonce, version))

    def counted(self, nonce: bytes, version: int, staleness: int, *, edge: str = "") -> None:
        if self._manifest.promises.privacy.distributed:
            self._has_looked = True  # its group may open at any time, and the server sees the sum
        self._events.put_nowait(r.Counted(nonce, version, staleness, edge))

    def released(self, nonce: bytes) -> None:
        self._events.put_nowait(r.Released(nonce))

    def away(self, nonce: bytes) -> None:
        self._events.put_nowait(r.Away(nonce))

    async def token_row(self, nonce: bytes) -> TokenRow | None:
        row: TokenRow | None = await self._in_thread(lambda: self.store.token(self._run, nonce))
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
            journaled = self._journaled
            if isinstance(journaled, asyncio.Future) and not journaled.cancel() and not journaled.cancelled():
                journaled.exception()  # heard: what has ended the run says it

    async def take_up(self) -> None:
        """Goes on from the last commit, as after a crash."""
        head = await self._in_thread(lambda: self.store.last_commit(self._run))
        if head is None:
            raise StoreError(f"Run {self._run} has no initial model; it was never begun.")
        await self._in_thread(lambda: self._sent(head.model))
        self._head = head
        if self._release is not None:
            entries = await self._in_thread(lambda: self.store.ledger(self._population, spending.BUDGET))
            spending.refuse_overspending(
                self._manifest.promises.privacy,
                spending.counted(entries),
                self._release,
                rounds=self._last_version - head.version,
            )
        rounds = await self._in_thread(lambda: self.store.rounds(self._run))
        for row in rounds:
            if row.state == "open":
                await self._abandon(row, "the host stopped")
        await self._sweep(head.version)
        counted = await self._in_thread(self._load_groups)
        recent = await self._in_thread(lambda: self._took_part(head.version))
        await self.step(r.Started(head.version, rounds[-1].number if rounds else 0, frozenset(counted), recent))

    def _load_groups(self) -> Sequence[bytes]:
        """What earlier lives have left in groups; returns the nonces in those that wait for a commit."""
        assert self._head is not None
        self._waiting = list(self.store.groups(self._run, waiting=True))
        oldest = max(0, self._head.version - self._policy.max_staleness)
        for group in self.store.groups(self._run, since_version=oldest):
            self._taken[group.base_version] = self._taken.get(group.base_version, 0) + group.members
        return self.store.waiting_nonces(self._run)

    def _took_part(self, head: int) -> Mapping[int, frozenset[bytes]]:
        """Who is in the versions that `min_separation` still looks at, by the version that they trained from."""
        if self._policy.min_separation == 1:
            return {}
        by_version = self.store.counted_nonces(self._run, since_version=head + 2 - self._policy.min_separation)
        return {version - 1: frozenset(nonces) for version, nonces in by_version.items()}

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
            for command in self._recorder.step(pending.pop(0), self._clock.now_s()):
                answer = await self._carry_out(command)
                if answer is not None:
                    pending.append(answer)
            self.on_step()
        if self._policy.min_separation > 1:
            self._tell_who_rests()

    def _tell_who_rests(self) -> None:
        """Says once a round that nothing happens because those who wait rest."""
        seen = self._machine.snapshot()
        is_stuck = (
            seen.phase is r.Phase.SELECTING and seen.deadline_s is not None and self._clock.now_s() >= seen.deadline_s
        )
        if not is_stuck or not seen.resting or self._told_of_rest == seen.round:
            return
        self._told_of_rest = seen.round
        wanted = self._policy.goal * self._policy.min_separation
        log.warning(
            "round %d waits for devices: %d of the %d that are there were in a version lately and rest (min_separation=%d takes %d devices "
            "or more)",
            seen.round, seen.resting, seen.waiting, self._policy.min_separation, wanted,
        )  # fmt: skip

    async def _carry_out(self, command: r.Command) -> r.Event | None:
        match command:
            case r.OpenRound(round, base_version):
                self._open(round, base_version)
            case r.Assign(devices):
                if self._selected_s is None and self._machine.snapshot().phase is r.Phase.REPORTING:
                    self._selected_s = self._clock.now_s()
                for device in devices:
                    self._assign(device)
            case r.Gather():
                self._edge.gather()
            case r.StoreGroup():
                return await self._store_group()
            case r.CommitRound(round, reason):
                return await self._commit(round, reason)
            case r.AbandonRound(round, reason):
                log.warning("round %d abandoned: %s", round, reason)
                await self._until_journaled()
                self._look_back()
                await self._abandon(self._round_row(round), reason, self._log(round), gives_back=not self._has_looked)
                return r.Abandoned()
            case r.Finish():
                assert self._head is not None
                at_end = self._head.version >= self._last_version
                self._edge.finish("the run has its last version" if at_end else "the host was asked to stop")
                self.finished.set()
            case r.WakeAt(time_s):
                self.wake_s = time_s
        return None

    def _open(self, round: int, base_version: int) -> None:
        assert self._head is not None and self._head.version == base_version
        self._opened_s = self._clock.wall_s()
        self._begun_s, self._selected_s, self._analytics = self._clock.now_s(), None, {}
        self._has_looked = False
        self._configuration = configure(self._manifest, run_seed=self._run_seed, round=round, base_version=base_version)
        self._signed_configuration = hashlib.sha256(
            self._configuration.to_proto().SerializeToString(deterministic=True)
        ).digest()
        self._journaled = self._beside(self._journal(self._round_row(round)))
        self._edge.open_groups(self._configuration, self._sent(self._head.model), taken=self._taken)
        self._taken = {}

    async def _journal(self, row: RoundRow) -> None:
        tries = 0

        def write() -> None:
            nonlocal tries
            tries += 1
            if tries > 1 and any(known.number == row.number for known in self.store.rounds(self._run)):
                return  # written by the try before this one, which heard of a failure nonetheless
            self.store.open_round(self._run, row, spend=self._spend)

        await self._durably(write)

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
            model=self._sent(self._head.model).root,
            configuration=self._signed_configuration,
        )
        if not self._edge.assign(device, self._token_key.sign(assignment), assignment):
            self.released(assignment.nonce)

    @property
    def is_committing(self) -> bool:
        """A version is being made of the round's groups."""
        return self._machine.snapshot().phase is r.Phase.COMMITTING

    async def put_away(self) -> None:
        """At the end, when nothing is stepped any more: writes down the sums that are there, but for those still to have their noise."""
        if self._release is None and self._configuration is not None:
            await self._store_group()

    async def _store_group(self) -> r.Event:
        try:
            groups = await self._edge.close_groups(final=False)
        except StoreError as error:
            log.error("a group could not be closed: %s", error)
            self._edge.failed(str(error))
            return r.Stored(frozenset())
        await self._until_journaled()
        for group in groups:
            row = await self._durably(lambda g=group: self._write_group(g))  # type: ignore[misc]
            self._waiting.append(row)
        self._edge.stored()
        return r.Stored(frozenset(nonce for group in groups for nonce, _ in group.counted))

    def _write_group(self, group: GroupResult) -> GroupRow:
        settled = self.store.token(self._run, group.counted[0][0])
        if settled is not None and settled.state == "counted":
            # Written by the try before this one, which heard of a failure nonetheless.
            return self.store.groups(self._run, waiting=True)[-1]
        row = self._group_row(group, kept=True)
        number = self.store.add_group(self._run, row, counted=group.counted, usage=group.costs.rows(row.round))
        return replace(row, number=number)

    def _group_row(self, group: GroupResult, *, kept: bool) -> GroupRow:
        assert self._configuration is not None
        return GroupRow(
            round=self._configuration.round,
            base_version=group.base_version,
            members=group.sums.members,
            weight=group.sums.weight,
            sums_root=save_sums(self.store.blobs, group.sums) if kept else "",
        )

    async def _commit(self, round: int, reason: str) -> r.Event:
        try:
            groups = await self._edge.close_groups()
        except StoreError as error:  # an addition broke off: the sum is of no use
            return self._failed(error)
        await self._until_journaled()
        self._look_back()
        taken, left = self._that_fit(groups)
        if left and (self._manifest.promises.privacy.binds_to_version or self._policy.min_separation > 1):
            return self._failed(RoundError("there are more updates than its sum has room for"))
        if not (taken or self._waiting):
            return self._failed(RoundError("no sum came of the round's groups"))
        try:
            commit = await self._durably(lambda: self._write_commit(taken, round, reason))
            self._head, self._waiting = commit.row, []
            for group in left:
                self._waiting.append(await self._durably(lambda g=group: self._write_group(g)))  # type: ignore[misc]
        except StoreError:
            raise  # the record is not what this host takes it for: it must not go on
        except ShoalError as error:
            return self._failed(error)
        if left:
            self._edge.stored()  # so that nobody is told a version that it is not in
        self._edge.committed(commit.row.version)
        self._on_commit(commit)
        if commit.row.version % SWEEP_EVERY == 0:
            await self._sweep(commit.row.version)
        return r.Committed(commit.row.version, frozenset(nonce for group in groups for nonce, _ in group.counted))

    def _that_fit(self, groups: Sequence[GroupResult]) -> tuple[list[GroupResult], list[GroupResult]]:
        """Those that the version's sum has room for, and the rest, for the next: an Edge knows only its own members."""
        if self._policy.late.kind == "patch":
            return list(groups), []  # each has a version of its own; a sum that is too full fails
        members = sum(row.members for row in self._waiting)
        fit: list[GroupResult] = []
        for group in groups:
            if members + group.sums.members <= self._policy.max_members:
                fit.append(group)
                members += group.sums.members
        return fit, [group for group in groups if not any(group is other for other in fit)]

    async def _sweep(self, head: int) -> None:
        """Rids the record of tokens that have expired, final forms that have served, and what retention does not keep."""
        kept = self._retention
        oldest = max(0, head - self._policy.max_staleness)  # that something may still be late for
        forgotten = head - max(self._policy.max_staleness, self._policy.min_separation - 1)
        before = 0 if kept is None else max(0, min(head + 1 - kept.recent, oldest))

        def sweep() -> None:
            with self.store.settling:
                self.store.forget_tokens(self._run, before_s=self._clock.wall_s(), to_version=forgotten)
                self.store.sweep(
                    self._run, since_version=self._swept, before_version=before, every=kept.every if kept else 0,
                    finals_before=oldest,
                )  # fmt: skip

        try:
            await self._in_thread(sweep)
        except StoreUnavailable as error:  # it is done the next time
            log.warning("the record could not be swept: %s", error)
        else:
            self._swept = before

    def _failed(self, error: ShoalError) -> r.Event:
        self._edge.failed(str(error))
        return r.Failed(str(error))

    async def _durably(self, write: Callable[[], T]) -> T:
        """Writes to the record, again and again while the disk does not let it: nothing that was counted is given up."""
        return await durably(self.store, self._clock, write, in_thread=self._in_thread)

    def _write_commit(self, closed: Sequence[GroupResult], round: int, reason: str) -> Commit:
        head = self._head
        assert head is not None
        begun = self._clock.now_s()
        keeps = self._policy.late.kind == "patch"
        rows = [*self._waiting, *(self._group_row(group, kept=keeps) for group in closed)]
        late = {row.base_version for row in rows} - {head.version}
        late_members = self._machine.snapshot().late
        costs = Costs()
        for group in closed:
            costs.merge(group.costs)
        following = self._following(head)
        present = following.sums(closed, self._waiting, head.version if keeps else None)
        metrics = cohort_metrics(present, self._manifest.promises.privacy, head.model, self.store.blobs)
        last = self.store.last_commit(self._run)
        if last is not None and last.version == head.version + 1 and last.round == round:
            # Written by the try before this one, which heard of a failure nonetheless.
            return Commit(last, metrics, late_members, last.created_s - self._opened_s)
        final = following.final(rows) if keeps else None
        self._has_looked = True
        model, server_state = following.model(present, rows, final if late else None)
        self._sent(model)  # a large model is rounded here, where nobody waits for it
        now = self._clock.wall_s()
        time_s = now - self.store.run(self._run).created_s
        row = CommitRow(
            version=head.version + 1,
            model=model,
            server_state=server_state,
            round=round,
            members=sum(group.members for group in rows),
            weight=sum(group.weight for group in rows),
            created_s=now,
        )
        usage = [*costs.rows(round), UsageRow(round=round, phase="commit", seconds=self._clock.now_s() - begun)]
        self.store.commit(
            self._run,
            row,
            round=self._closed_row(round, row.members, closed_s=now, reason=reason),
            groups=rows,
            counted=[counted for group in closed for counted in group.counted],
            metrics=[
                MetricRow(
                    version=head.version,
                    name=f"{self._manifest.server.metrics_prefix}/{name}",
                    value=value,
                    scope="cohort",
                    time_s=time_s,
                )
                for name, value in metrics.items()
            ],
            usage=usage,
            final=final if final is not None and final.version else None,
            log=self._log(round),
        )
        if any(row.sums_root for row in rows):
            self.store.forget_sums(self._run, before_version=row.version - self._policy.max_staleness)
        return Commit(row, metrics, late_members, now - self._opened_s)

    def _following(self, head: CommitRow) -> NextVersion:
        assert self._configuration is not None
        return NextVersion(
            store=self.store, run=self._run, head=head, aggregator=self._aggregator, max_staleness=self._policy.max_staleness,
            empty=partial(self._configuration.accumulator, self._manifest),
        )  # fmt: skip

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
            analytics=self._analytics,
        )

    def _look_back(self) -> None:
        """What was seen of the round's devices, and where its time went; once, also where its commit fails."""
        if not self._analytics:
            now_s = self._clock.now_s()
            selected_s = now_s if self._selected_s is None else self._selected_s
            seconds = {"selecting": selected_s - self._begun_s, "reporting": now_s - selected_s}
            self._analytics = self._folding.fold(self._edge.take_analytics()) | {"seconds": seconds}

    def _log(self, round: int) -> RoundLog | None:
        """What the round's machine was told."""
        if not self._events_kept:
            return None
        try:
            return RoundLog(round=round, data=self._recorder.data(), kept=self._events_kept)
        except Exception:  # our bug; it costs the log and nothing else
            log.exception("the events of round %d could not be kept", round)
            return None

    async def _abandon(
        self, row: RoundRow, reason: str, events: RoundLog | None = None, *, gives_back: bool = False
    ) -> None:
        closed = replace(row, state="abandoned", closed_s=self._clock.wall_s(), reason=reason)
        try:
            await self._in_thread(
                lambda: self.store.close_round(
                    self._run, closed, log=events, gives_back=gives_back and self._spend is not None
                )
            )
        except LeaseLost:
            raise
        except StoreError as error:  # the journal of a round that gave nothing is not worth the run
            log.error("round %d could not be closed in the record: %s", row.number, error)
