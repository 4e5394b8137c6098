"""Before the Edges of several runs: each device that waits is dealt out to one of them, by turns.

To a device it is an Edge, to an Edge it is a device: a check-in is kept here until `turns.py` gives the device to a run,
then said to that run's Edge on a session of its own; whatever has a token goes to the run that the token names (the Edge
verifies it). A device that is through with an assignment is dealt out anew. A host with one run does without it.

Guarantees:
    * A device waits at one run at a time, and has at most one assignment.
    * What fails in one run ends that run's sessions, and no other's.
    * Sessions are bounded over all runs together.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

import numpy as np
from google.protobuf.message import DecodeError

from shoal.clock import Clock
from shoal.errors import ProtocolError
from shoal.fleet import turns as t
from shoal.fleet.check_in import check_device_id, essence, needs, shown
from shoal.fleet.coordinator import Coordinator
from shoal.fleet.edge import Edge
from shoal.fleet.entrance import Entrance
from shoal.fleet.pace import Pace
from shoal.fleet.session import Session, Stream, piped
from shoal.fleet.streams import Streams
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest

log = logging.getLogger("shoal.edge")

NOT_ITS_FAULT: Final = ("late", "failed")
"""Why a good update is refused: its round has closed, or could not be committed."""
MAX_UNREAD: Final = 16
"""Messages of a device that its Edge has not read yet."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A run that devices are dealt out to."""

    id: str
    manifest: Manifest
    population: str
    edge: Edge
    coordinator: Coordinator

    @property
    def patience_s(self) -> float:
        return self.manifest.server.rounds.selection_window_s


class _Inner:
    """A device's session with the Edge of one run."""

    def __init__(self, run: Served) -> None:
        self.run = run
        self.said: asyncio.Queue[pb.FromDevice] = asyncio.Queue(MAX_UNREAD)
        self.pump: asyncio.Task[None] | None = None

    async def messages(self) -> AsyncIterator[pb.FromDevice]:
        while True:
            yield await self.said.get()


class _Visit:
    """A device's session with the front door."""

    def __init__(self, stream: Stream) -> None:
        self.told = Session(stream)
        self.check_in: pb.CheckIn | None = None
        self.runs: frozenset[str] = frozenset()
        """What it can serve, as far as its check-in says."""
        self.inner: _Inner | None = None
        self.refused: set[str] = set()
        """Runs that have refused what it made: they would refuse the next one as well."""
        self.token: pb.Token | None = None
        """Of the assignment that it is at work on."""

    @property
    def device(self) -> str:
        return self.told.device


class Frontdoor:
    """See the module's text. All methods belong to one event loop."""

    def __init__(
        self, *, clock: Clock, rng: np.random.Generator, by_order: bool = False, entrance: Entrance | None = None
    ) -> None:
        """
        Args:
            clock: time.
            rng: draws the devices that a run gets of those that wait.
            by_order: devices go to the first run that wants some; else by weight.
            entrance: who may come in; None: whoever comes, with the default bounds.
        """
        self._clock, self._entrance = clock, entrance or Entrance()
        self._machine = t.Turns(may_take=self._may_take, rng=rng, by_order=by_order)
        self._runs: dict[str, Served] = {}
        self._resting: set[str] = set()
        self._over: dict[str, str] = {}
        self._visits: dict[str, _Visit] = {}
        self._streams = Streams(clock, entrance=self._entrance)
        self._events: list[t.Event] = []
        self._pending: asyncio.TimerHandle | asyncio.Handle | None = None
        self._waking: asyncio.TimerHandle | None = None
        self._pace = Pace(devices_a_round=1, now_s=clock.now_s())
        self._versions = 0
        """Of all runs together, when the pace was told last that a round has opened."""
        self._closing: set[asyncio.Task[None]] = set()

    def snapshot(self) -> t.Snapshot:
        """Who waits where."""
        return self._machine.snapshot()

    # What the host says.

    def serve(self, run: Served, *, weight: float = 1.0) -> None:
        """Deals devices out to a run from now on; one that is served already goes on with this Edge and Coordinator."""
        known = run.id in self._runs
        self._runs[run.id] = run
        self._resting.discard(run.id)
        run.coordinator.on_step = self._changed
        if not known:
            self._events.append(t.Opened(run.id, weight, run.patience_s))
            policies = [each.manifest.server.rounds for each in self._runs.values()]
            takes, resting = (
                sum(each) for each in zip(*((p.most_at_once, p.most_resting) for p in policies), strict=True)
            )
            self._pace = Pace(devices_a_round=takes, resting=resting, now_s=self._clock.now_s())
            self._versions = self._versions_now()
        self._changed()

    def rest(self, run_id: str) -> None:
        """The run has nothing to do for now; devices that serve nothing else wait for it."""
        self._resting.add(run_id)
        self._changed()

    def over(self, run_id: str, why: str) -> None:
        """The run is at its end. Updates of it may still be asked about."""
        if run_id not in self._over:
            self._over[run_id] = why
            if not self._runs[run_id].coordinator.finished.is_set():  # it has failed: nobody else tells its devices
                self._runs[run_id].edge.finish(why)
            self._say(t.Over(run_id))
        if len(self._over) == len(self._runs):
            for visit in self._visits.values():
                visit.told.send(pb.FromEdge(finished=pb.Finished(why=why)))

    async def close(self) -> None:
        """Ends every session, then every Edge."""
        for handle in (self._pending, self._waking):
            if handle is not None:
                handle.cancel()
        for visit in list(self._visits.values()):
            visit.told.end()
        pumps = [v.inner.pump for v in self._visits.values() if v.inner is not None and v.inner.pump is not None]
        for pump in (*pumps, *self._closing):
            pump.cancel()
        await asyncio.gather(*pumps, *self._closing, return_exceptions=True)
        for run in self._runs.values():
            await run.edge.close()

    # What devices say.

    def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncGenerator[pb.FromEdge, None]:
        """One control stream within the process: yields what the device is to be told until either side ends it."""
        return piped(self.hold, messages)

    async def hold(self, stream: Stream) -> None:
        """One control stream, until either side ends it."""
        visit = _Visit(stream)
        try:
            await self._streams.hold(visit.told, stream, lambda message: self._handle(visit, message))
        finally:
            self._leave(visit)
            if visit.device and self._visits.get(visit.device) is visit:
                del self._visits[visit.device]
                self._say(t.Left(visit.device))

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        async for piece in self._of(request.token).edge.pull(request):
            yield piece

    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply:
        first = await anext(slices, None)
        if first is None:
            return pb.PushReply()
        try:
            token = pb.PushSlice.FromString(first).token
        except DecodeError as error:
            raise ProtocolError(f"Expected a slice, got {len(first)} bytes that are none.") from error
        return await self._of(token).edge.push(_after(first, slices))

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        return await self._of(request.token).edge.status(request)

    async def _handle(self, visit: _Visit, message: pb.FromDevice) -> None:
        match message.WhichOneof("kind"):
            case "check_in":
                await self._check_in(visit, message.check_in)
            case "report":
                await self._to_run(visit, message.report.token, message)
            case "group":
                await self._to_run(visit, message.group.token, message)
            case "gave_up":
                await self._to_run(visit, message.gave_up.token, message)
            case "ping":
                visit.told.send(pb.FromEdge(ping=pb.Ping()))
            case _:
                raise ProtocolError("Expected check_in, report, group, gave_up or ping.")

    async def _check_in(self, visit: _Visit, check_in: pb.CheckIn) -> None:
        device = check_in.device_id
        check_device_id(device)
        if visit.device and visit.device != device:
            raise ProtocolError("A session serves one device.")
        reasons = {run.id: needs(check_in, run.manifest, population=run.population) for run in self._runs.values()}
        fitting = [run for run, why in reasons.items() if not why]
        if not fitting:
            told = "; or ".join(dict.fromkeys(reasons.values()))[:2000]
            return visit.told.send(pb.FromEdge(incompatible=pb.Incompatible(needs=told)))
        if self._entrance.admit is not None and (why := await self._entrance.admit(check_in)):
            return visit.told.send(pb.FromEdge(incompatible=pb.Incompatible(needs=why)))
        if all(run in self._over for run in fitting):
            return visit.told.send(pb.FromEdge(finished=pb.Finished(why=self._over[fitting[-1]])))
        self._replace(device, visit)
        self._leave(visit)
        visit.told.device, visit.told.stays, visit.told.is_known = device, check_in.stay, True
        visit.told.shown = None if self._entrance.admit is None else shown(check_in)
        visit.runs = frozenset(fitting).difference(visit.refused) or frozenset(fitting)
        visit.check_in = essence(check_in)  # without `stay`: when it is through it is dealt out anew
        if not visit.told.has_arrived:
            visit.told.has_arrived = True
            self._pace.arrived(1, self._clock.now_s())
        if not check_in.stay and self._machine.num_idle >= self._pace.pool:
            self._say(t.Left(device))  # it may have waited, as one that stays
            low, high = self._pace.window(self._clock.now_s())
            return visit.told.send(pb.FromEdge(later=_later(low, high, "enough devices wait for now")))
        self._enter(visit)

    def _replace(self, device: str, visit: _Visit) -> None:
        old = self._visits.get(device)
        self._visits[device] = visit
        if old is None or old is visit:
            return
        log.warning("device %r checked in on another stream; the old one is ended", device)
        detail = f"Another device has checked in as {device!r}. Give each an --id of its own."
        old.told.send(pb.FromEdge(refused=pb.Refused(reason="replaced", detail=detail)))
        old.told.end()
        self._leave(old)

    def _enter(self, visit: _Visit) -> None:
        """The device waits to be dealt out."""
        visit.token = None
        runs = visit.runs.difference(self._over)
        expected = [run for run in sorted(runs) if self._runs[run].coordinator.machine.expects(visit.device)]
        self._say(t.Entered(visit.device, runs, next(iter(expected), "")))

    def _of(self, token: pb.Token) -> Served:
        """The run that a token says it is of; its Edge verifies that."""
        try:
            run = self._runs.get(pb.Assignment.FromString(token.signed).run)
        except DecodeError:
            run = None
        if run is None:
            raise ProtocolError("The token is of no run of this host; check in again.")
        return run

    async def _to_run(self, visit: _Visit, token: pb.Token, message: pb.FromDevice) -> None:
        run = self._of(token)
        visit.told.is_known = True  # whether the token is good its Edge will say
        if visit.inner is None or visit.inner.run is not run:
            if visit.device:
                self._say(t.Left(visit.device))  # it has work: it does not wait
            self._begin_inner(visit, run)
            visit.token = token
        assert visit.inner is not None
        await visit.inner.said.put(message)

    # Between a device and the Edge of its run.

    def _begin_inner(self, visit: _Visit, run: Served) -> _Inner:
        self._leave(visit)
        visit.inner = inner = _Inner(run)
        inner.pump = asyncio.create_task(self._pump(visit, inner))
        return inner

    def _leave(self, visit: _Visit) -> None:
        """Ends its session with the Edge."""
        inner, visit.inner, visit.token = visit.inner, None, None
        if inner is not None and inner.pump is not None and not inner.pump.done():
            inner.pump.cancel()
            self._closing.add(inner.pump)
            inner.pump.add_done_callback(self._closing.discard)

    async def _pump(self, visit: _Visit, inner: _Inner) -> None:
        try:
            await self._hear_all(visit, inner)
        except Exception:  # a bug of shoal; it ends this device's stream and nothing else
            log.exception("the session of a device with its run has failed")
            visit.told.end()

    async def _hear_all(self, visit: _Visit, inner: _Inner) -> None:
        async with aclosing(inner.run.edge.session(inner.messages())) as answers:
            async for message in answers:
                if visit.inner is not inner:
                    return
                self._hear(visit, message)
        # The Edge has ended it: with its run, or because of something that the device has said.
        if visit.inner is not inner:
            return
        visit.inner = None
        at_end = inner.run.coordinator.finished.is_set() or inner.run is not self._runs.get(inner.run.id)
        if at_end and visit.check_in is not None and visit.told.stays:
            self._enter(visit)
        else:
            visit.told.end()

    def _hear(self, visit: _Visit, message: pb.FromEdge) -> None:
        kind = message.WhichOneof("kind")
        if kind == "finished":
            return self._run_finished(visit, message.finished.why)
        visit.told.send(message)
        if kind == "assigned":
            visit.token = message.assigned.token
            visit.told.has_arrived = False
            self._say(t.Taken(visit.device))
        elif kind in ("counted", "refused", "released"):
            answer: pb.Counted | pb.Refused | pb.Released = getattr(message, kind)
            if visit.token is not None and answer.token.signed in (visit.token.signed, b""):
                self._through(visit, message)

    def _run_finished(self, visit: _Visit, why: str) -> None:
        """That run is; the device is told so when there is nothing else for it."""
        if visit.token is not None:
            visit.told.send(pb.FromEdge(released=pb.Released(why=why, token=visit.token)))
        self._leave(visit)
        if visit.check_in is not None:
            self._enter(visit)

    def _through(self, visit: _Visit, message: pb.FromEdge) -> None:
        """The device is through with its assignment."""
        assert visit.inner is not None
        if message.WhichOneof("kind") == "refused" and message.refused.reason not in NOT_ITS_FAULT:
            visit.refused.add(visit.inner.run.id)
            visit.runs = visit.runs.difference(visit.refused)
        visit.token = None
        if visit.check_in is not None and visit.told.stays and visit.runs:
            self._enter(visit)

    # The machine.

    def _may_take(self, run: str, device: str) -> bool:
        return self._runs[run].coordinator.machine.may_take(device)

    def _say(self, event: t.Event) -> None:
        self._events.append(event)
        self._changed()

    def _changed(self) -> None:
        """Something has happened: once all that happens now has, devices are dealt out."""
        if self._pending is None:
            self._pending = asyncio.get_running_loop().call_soon(self._deal)

    def _deal(self) -> None:
        self._pending = None
        self._hear_of_rounds()
        events, self._events = self._events, []
        given = self._machine.given()
        asks = [self._asks(run, given.get(run.id, [])) for run in self._runs.values() if run.id not in self._over]
        opened = [event for event in events if isinstance(event, t.Opened)]
        rest = [event for event in events if not isinstance(event, t.Opened)]
        for command in self._machine.step([*opened, *asks, *rest], self._clock.now_s()):
            self._carry_out(command)

    def _hear_of_rounds(self) -> None:
        """What the runs take together is taken once in as many rounds as there are runs at work."""
        at_work = len(self._runs.keys() - self._over.keys() - self._resting)
        if (versions := self._versions_now()) - self._versions >= max(1, at_work):
            self._pace.opened(self._clock.now_s())
            self._versions = versions

    def _versions_now(self) -> int:
        return sum(run.coordinator.machine.snapshot().version for run in self._runs.values())

    def _asks(self, run: Served, given: list[str]) -> t.Asks:
        machine = run.coordinator.machine
        waiting = frozenset(filter(machine.waits, given))
        if run.id in self._resting:
            return t.Asks(run.id, -len(waiting), waiting, rests=True)
        return t.Asks(run.id, machine.demand(), waiting)

    def _carry_out(self, command: t.Command) -> None:
        match command:
            case t.Give(run, devices):
                for device in devices:
                    self._give(run, device)
            case t.TakeBack(_, devices):
                for device in devices:
                    if visit := self._visits.get(device):
                        self._leave(visit)
            case t.Dismiss(devices):
                for device in devices:
                    if visit := self._visits.get(device):
                        why = next((self._over[run] for run in visit.runs if run in self._over), "the run is over")
                        visit.told.send(pb.FromEdge(finished=pb.Finished(why=why)))
            case t.WakeAt(time_s):
                if self._waking is not None:
                    self._waking.cancel()
                delay_s = max(0.0, time_s - self._clock.now_s())
                self._waking = asyncio.get_running_loop().call_later(delay_s, self._say, t.Tick())

    def _give(self, run_id: str, device: str) -> None:
        visit = self._visits.get(device)
        if visit is None or visit.check_in is None:
            return self._say(t.Left(device))
        run, inner = self._runs[run_id], visit.inner
        if inner is None or inner.run is not run:
            inner = self._begin_inner(visit, run)
        try:
            inner.said.put_nowait(pb.FromDevice(check_in=visit.check_in))
        except asyncio.QueueFull:  # it talks more than its Edge reads
            visit.told.end()


async def _after(first: bytes, slices: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for part in slices:
        yield part


def _later(low: float, high: float, why: str) -> pb.Later:
    return pb.Later(delay_min_s=low, delay_max_s=high, why=why)
