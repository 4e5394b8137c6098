"""A fleet in virtual time, without sockets, threads or an event loop: a server that may die at any point, and devices.

The Coordinator is the real one: its coroutines are stepped by hand, and at each of its waits anything else may happen.
Round machine, group, accumulator, server rule and store are the real ones too. Only the Edge is a small one (`TinyEdge`,
which mirrors what `fleet/edge.py` does with the group's commands), and the devices are scripted: the update of device i
on version v is always the same, and its weight 2**i, so that a commit's weight says who is in it.

One seed is one history. `point` is where the server may die: before and after each command of a machine and each write.
Then all that it knew is gone, but for the store.
"""

import heapq
import random
from collections.abc import Callable, Coroutine, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.aggregate.commit import WeightedMean
from shoal.errors import LeaseLost
from shoal.fleet import group as g
from shoal.fleet.analytics import Seen
from shoal.fleet.configuration import Configuration
from shoal.fleet.coordinator import Coordinator
from shoal.fleet.edges import EdgeLost, Edges, Grants
from shoal.fleet.group_sums import GroupResult, GroupSums
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.plan.run_plan import write_initial_model
from shoal.policy import RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.record.store import CommitRow, RunRow, TokenRow
from shoal.tensors import Index
from tests.fleet import toy

RUN = "run"
TOKEN = toy.KEYS.token


class Crash(BaseException):
    """The server is killed."""


class Pause:
    """Awaited where the real server waits: control goes back to the world."""

    def __await__(self) -> Generator[None, None, None]:
        yield


@dataclass(frozen=True, kw_only=True)
class Faults:
    """How much goes wrong."""

    crash: float = 0.0
    """Chance at each point that the server dies."""
    crash_at: int = -1
    """The one point at which it surely dies."""
    broken: float = 0.0
    """Chance that a message breaks its stream instead of arriving."""
    amnesia: float = 0.0
    """Chance, with each message that it hears, that a device forgets all."""
    bad: float = 0.0
    """Chance that the check finds fault with an update."""
    stop: float = 0.0
    """Chance, with each step of the Coordinator, that the host is asked to stop; it is started again."""
    usurped: float = 0.0
    """Chance, with each step of the Coordinator, that another server takes the run over, and this one goes on as if nothing
    had been: it was taken for dead."""
    edge: float = 0.0
    """Chance, with each step of an Edge, that it dies, where there are several; another takes its place."""
    dead: tuple[str, ...] = ()
    """Devices that never answer an assignment."""


@dataclass
class TinyDevice:
    """Checks in, trains, reports, keeps its update until it is counted."""

    world: "World"
    name: str
    stream: int = 0
    edge: "TinyEdge | None" = None
    goes_to: str = ""
    nonce: bytes = b""
    version: int = -1
    trained: bool = False
    told_counted: list[tuple[bytes, int]] = field(default_factory=list)
    finished: bool = False

    def connect(self) -> None:
        world = self.world
        if world.server is None:
            return world.later(self.connect, 3.0)
        world.num_streams += 1
        self.stream = world.num_streams
        number = world.rng.randrange(world.num_edges) if world.num_edges > 1 else 0
        self.edge = world.server.edges[int(self.goes_to) if self.goes_to else number]
        self.goes_to = ""
        self.say("status" if self.trained else "check_in")

    def say(self, what: str) -> None:
        stream, nonce, version = self.stream, self.nonce, self.version
        self.world.send(self, lambda edge: edge.hear(self.name, stream, what, nonce, version))

    def broke(self, stream: int) -> None:
        if stream and stream == self.stream and not self.finished:
            self.stream = 0
            self.world.later(self.connect, 2.0)

    def hear(self, stream: int, what: str, nonce: bytes, version: int) -> None:
        if stream != self.stream or self.finished:
            return
        if self.world.chance(self.world.faults.amnesia):
            self.nonce, self.version, self.trained = b"", -1, False
            return self.broke(stream)
        if what == "counted":
            self.told_counted.append((nonce, version))
        match what:
            case "assigned" if nonce != self.nonce:
                self.nonce, self.version, self.trained = nonce, version, False
                self.world.later(lambda: self.train(nonce), 5.0)
            case "finished":
                self.finished = True
                self.world.later(self.come_back, 10.0)  # the host may have stopped before the last version
            case "again":
                self.broke(stream)
            case "moved":
                self.goes_to = str(version)
                self.broke(stream)
            case "unknown":
                self.say("report")
            case "counted" | "refused" | "released" if nonce == self.nonce:
                self.nonce, self.version, self.trained = b"", -1, False
                self.say("check_in")

    def come_back(self) -> None:
        self.finished = False
        self.connect()

    def train(self, nonce: bytes) -> None:
        if nonce == self.nonce and self.name not in self.world.faults.dead:
            self.trained = True
            if self.stream:
                self.say("report")


class TinyEdge:
    """What `fleet.edge.Edge` does between the group and the rest, without bytes."""

    def __init__(self, world: "World", name: str = "") -> None:
        self.world, self.name = world, name
        self.is_dead = False
        self.coordinator: Any = None
        self.sums = GroupSums(world.plan.manifest, self, world.now_s)
        self.groups = self.sums.groups
        self.is_closed = False
        self.is_open = False
        self.sessions: dict[str, int] = {}
        self.of_nonce: dict[bytes, tuple[str, int, int]] = {}  # device, stream, version
        self.work: list[Callable[[], None]] = []  # checks and additions under way
        self.finished = False
        self.asked: dict[object, bytes] = {}
        """What the Coordinator was asked of, by what asked."""

    def connect(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self.sums.connect(coordinator)

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        self.world.point()
        self.is_open = True
        self.sums.configuration = configuration
        self.do(g.Open(configuration.base_version, tuple(taken.items())))

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        self.world.point()
        if device not in self.sessions and self.groups.state(assignment.nonce) is not None:
            self.coordinator.away(assignment.nonce)
            return True
        if device not in self.sessions:
            return False
        self.of_nonce[assignment.nonce] = (device, self.sessions[device], assignment.base_version)
        self.do(g.Joined(assignment.nonce, assignment.base_version))
        self.say(assignment.nonce, "assigned", assignment.base_version)
        return True

    async def close_groups(self, *, final: bool = True) -> list[GroupResult]:
        self.close(final)
        while not self.is_closed:
            await Pause()
        return self.results()

    def close(self, final: bool) -> None:
        self.is_closed = False
        if final:
            self.is_open = False
        self.do(g.Close(final))

    def results(self) -> list[GroupResult]:
        return self.sums.take_closed(lambda nonce: 1e9)

    def take_analytics(self) -> Seen:
        return self.sums.analytics.take()

    def on_closed(self) -> None:
        """Nobody but `close_groups` waits for it; see `FarEdge`."""

    def withdraw(self, nonce: bytes) -> bool:
        for ask in [ask for ask, of in self.asked.items() if of == nonce]:
            del self.asked[ask]
        self.do(g.Gone(nonce, "it went elsewhere"))
        return self.groups.state(nonce) is None

    def gather(self) -> None:
        raise AssertionError("there is nowhere else")

    def dissolve(self, address: str) -> None:
        self.goes_to = address
        self.do(g.Dissolve())

    def send_away(self, device: str) -> None:
        if device in self.sessions:
            self.world.reply(device, self.sessions[device], "again", b"", 0)

    def stored(self) -> None:
        self.do(g.Stored())

    def committed(self, version: int) -> None:
        self.do(g.Committed(version))

    def failed(self, why: str) -> None:
        if self.world.plan.manifest.server.rounds.min_separation > 1 and "has room for" in why:
            self.world.was_full = True
        assert self.world.edge_crashes or self.world.was_full, why
        self.do(g.Failed(why))

    def finish(self, why: str) -> None:
        self.world.point()
        self.finished = True
        for device, stream in self.sessions.items():
            self.world.reply(device, stream, "finished", b"", 0)

    def do(self, event: Any) -> None:
        for command in self.groups.step(event, self.world.now_s()):
            self.world.point()
            self.world.merges += isinstance(command, g.Merge)
            self.sums.carry_out(command)
            self.world.point()

    def check(self, nonce: bytes) -> None:
        bad = "bad" if self.world.chance(self.world.faults.bad) else ""
        self.work.append(lambda: self.do(g.Checked(nonce, bad)))

    def add(self, nonce: bytes, group: int, discount: float) -> None:
        self.work.append(lambda: self.add_now(nonce, group, discount))

    def add_now(self, nonce: bytes, group: int, discount: float) -> None:
        device, _, version = self.of_nonce[nonce]
        value, weight = self.world.update(int(device), version)
        pieces = [("delta/params/w", 0, np.full(1, value, np.float32))]
        self.sums.begin_adding(group, pb.Costs())
        self.sums.add(group, pieces, weight=weight, discount=discount)
        if self.world.server is not None and self in self.world.server.edges:
            self.world.discounts[nonce] = discount
        self.do(g.Added(nonce))

    def tell(self, tell: g.Tell) -> None:
        self.say(tell.nonce, tell.outcome, int(self.goes_to) if tell.outcome == "moved" else tell.version)

    def closed(self) -> None:
        self.is_closed = True
        self.on_closed()

    def say(self, nonce: bytes, what: str, version: int) -> None:
        device, stream, _ = self.of_nonce[nonce]
        self.world.reply(device, stream, what, nonce, version)

    def left(self, device: str, stream: int) -> None:
        if self.sessions.get(device) == stream:
            del self.sessions[device]
            self.coordinator.left(device)
            for nonce, (name, _, _) in self.of_nonce.items():
                if name == device and self.groups.state(nonce) is g.Member.JOINED:
                    self.coordinator.away(nonce)

    def hear(self, device: str, stream: int, what: str, nonce: bytes, version: int) -> None:
        if what == "check_in":
            old, self.sessions[device] = self.sessions.get(device, 0), stream
            if old and old != stream:
                self.world.end_stream(device, old)  # a device has one session
            if self.finished:
                return self.world.reply(device, stream, "finished", b"", 0)
            return self.coordinator.arrived(device)  # type: ignore[no-any-return]
        if not self.is_open and not self.finished:
            return self.world.reply(device, stream, "again", nonce, 0)
        present = self.sums.configuration

        def settled(is_free: bool, row: TokenRow | None) -> None:
            if not is_free or not self.is_open or self.sums.configuration is not present:
                return self.world.reply(device, stream, "again", nonce, 0)
            if row is not None:
                return self.world.reply(device, stream, row.state, nonce, row.version or 0)
            if not self.groups.takes(version):
                return self.world.reply(device, stream, "refused", nonce, 0)
            if what == "status":
                return self.world.reply(device, stream, "unknown", nonce, 0)
            self.of_nonce[nonce] = (device, stream, version)
            self.do(g.Joined(nonce, version))
            if self.groups.state(nonce) is not None:
                self.do(g.Offered(nonce))

        if isinstance(self.coordinator, FarCoordinator) and self.groups.state(nonce) is None:
            self.coordinator.look_up(nonce, settled)
        else:
            settled(True, self.world.store.token(RUN, nonce))


class FarEdge:
    """A TinyEdge of another process, as the Coordinator sees it: what is said arrives later, in order, or not at all."""

    def __init__(self, world: "World", edge: TinyEdge) -> None:
        self.world, self.edge, self.is_lost = world, edge, False
        self.asked: dict[bytes, list[Callable[[bool], None]]] = {}
        self.answer: list[GroupResult] | None = None
        self.grants, self.num_heard = Grants(), 0
        edge.on_closed = lambda: self.say_back(self.closed(edge.results()))  # type: ignore[method-assign]

    def say(self, work: Callable[[], None], *, gives: bytes | None = None) -> None:
        self.grants.said(gives)

        def hear() -> None:
            self.num_heard += 1
            work()

        self.world.in_order(("to", id(self)), lambda: None if self.edge.is_dead else hear())

    def say_back(self, work: Callable[[], None]) -> None:
        self.world.in_order(("from", id(self)), lambda: None if self.is_lost else work())

    def connect(self, coordinator: Any) -> None:
        self.coordinator = coordinator
        self.edge.connect(FarCoordinator(self, coordinator))

    def open_groups(self, configuration: Configuration, model: Index, *, taken: Mapping[int, int]) -> None:
        taken = dict(taken)
        self.say(lambda: self.edge.open_groups(configuration, model, taken=taken))

    def assign(self, device: str, token: pb.Token, assignment: pb.Assignment) -> bool:
        def assign() -> None:
            if not self.edge.assign(device, token, assignment):
                self.edge.coordinator.released(assignment.nonce)

        self.say(assign, gives=assignment.nonce)
        return True

    def close_groups(self, *, final: bool = True) -> Coroutine[Any, Any, list[GroupResult]]:
        self.answer = None
        self.say(lambda: self.edge.close(final))
        return self.until_closed()

    async def until_closed(self) -> list[GroupResult]:
        while self.answer is None and not self.is_lost:
            await Pause()
        if self.is_lost or self.answer is None:
            raise EdgeLost("it died")
        return self.answer

    def closed(self, groups: list[GroupResult]) -> Callable[[], None]:
        def arrive() -> None:
            self.answer = groups

        return arrive

    def withdraw(self, nonce: bytes, answer: Callable[[bool], None]) -> None:
        def withdraw() -> None:
            is_gone = self.edge.withdraw(nonce)
            self.say_back(lambda: self.withdrawn(nonce, is_gone))

        self.asked.setdefault(nonce, []).append(answer)
        self.say(withdraw)

    def withdrawn(self, nonce: bytes, is_gone: bool) -> None:
        if self.asked.get(nonce):
            self.asked[nonce].pop(0)(is_gone)

    def gather(self) -> None:
        raise AssertionError("it is one of several")

    def neighbours(self, addresses: Sequence[str]) -> None:
        """Nobody is full."""

    def take_analytics(self) -> Seen:
        return self.edge.take_analytics()

    def dissolve(self, address: str) -> None:
        self.say(lambda: self.edge.dissolve(address))

    def send_away(self, device: str) -> None:
        self.say(lambda: self.edge.send_away(device))

    def stored(self) -> None:
        self.say(self.edge.stored)

    def committed(self, version: int) -> None:
        self.say(lambda: self.edge.committed(version))

    def failed(self, why: str) -> None:
        self.say(lambda: self.edge.failed(why))

    def finish(self, why: str) -> None:
        self.say(lambda: self.edge.finish(why))

    def lose(self, why: str) -> None:
        self.is_lost = True
        for nonce, answers in self.asked.items():
            for _ in list(answers):
                self.withdrawn(nonce, True)


class FarCoordinator:
    """The Coordinator as an Edge of another process sees it."""

    def __init__(self, far: FarEdge, seat: Any) -> None:
        self.far, self.seat = far, seat

    def look_up(self, nonce: bytes, answer: Callable[[bool, TokenRow | None], None]) -> None:
        world, asked, seat, me = self.far.world, self.far.edge.asked, self.seat, object()
        asked[me] = nonce

        def heard(is_free: bool, row: TokenRow | None) -> None:
            is_here = asked.pop(me, None) is not None
            answer(is_free and is_here, row)

        def claimed(is_free: bool) -> None:
            row = world.store.token(RUN, nonce)  # a thread reads it: others may ask meanwhile

            def found() -> None:
                is_here = is_free and seat._edges.is_at(seat, nonce)
                self.far.say(lambda: heard(is_here, row), gives=nonce if is_here and row is None else None)

            world.later(found, 0.5)

        self.far.say_back(lambda: seat._edges.claim(seat, nonce, claimed))

    def released(self, nonce: bytes) -> None:
        heard = self.far.num_heard
        self.far.say_back(lambda: self.seat.released(nonce) if self.far.grants.knew(nonce, heard) else None)

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self.seat, name)
        return lambda *args: self.far.say_back(lambda: method(*args))


class Beside:
    """What the Coordinator has begun and will wait for later: it goes on whenever the world lets it."""

    def __init__(self, work: Coroutine[Any, Any, None]) -> None:
        self.work, self.done = work, False
        self.advance()

    def advance(self) -> None:
        try:
            self.work.send(None)
        except StopIteration:
            self.done = True

    def __await__(self) -> Generator[None, None, None]:
        while not self.done:
            yield


class Server:
    """One life of the server."""

    def __init__(self, world: "World") -> None:
        self.world, self.store = world, world.store.opened_again()
        self.store.take_lease(
            RUN, holder=f"life {world.points}", now_s=world.time_s, life_s=30.0, instead_of=self.store.lease(RUN)
        )
        manifest = world.plan.manifest
        self.edges = [TinyEdge(world, str(i)) for i in range(world.num_edges)]
        self.together = Edges(manifest.server.rounds) if world.num_edges > 1 else None
        self.coordinator = Coordinator(
            store=self.store, run=RUN, manifest=manifest, edge=self.together or self.edges[0], aggregator=WeightedMean(manifest.server.rule),
            token_key=TOKEN, run_seed=bytes(32), last_version=world.rounds, clock=world,
            rng=np.random.default_rng(world.rng.getrandbits(32)), in_thread=self.in_thread, beside=self.start_beside,
        )  # fmt: skip
        self.far: dict[str, FarEdge] = {}
        if self.together is not None:
            for edge in self.edges:
                self.join(edge)
        self.beside: list[Beside] = []
        self.running: Any = self.coordinator.take_up()

    def join(self, edge: TinyEdge) -> None:
        assert self.together is not None
        self.far[edge.name] = FarEdge(self.world, edge)
        self.together.join(edge.name, self.far[edge.name], address=edge.name)

    def kill(self, edge: TinyEdge) -> None:
        """An Edge dies; the Coordinator hears of it some time after, and another takes its place."""
        edge.is_dead = True
        self.world.edge_crashes += 1
        self.world.break_streams(edge)

        def lost() -> None:
            if self.world.server is self and self.together is not None:
                self.together.lost(edge.name, why="it died")
                self.edges = [TinyEdge(self.world, e.name) if e is edge else e for e in self.edges]
                self.join(next(e for e in self.edges if e.name == edge.name))

        self.world.later(lost, 3.0)

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        self.world.point()
        await Pause()
        result = work()
        self.world.point()
        await Pause()
        return result

    def start_beside(self, work: Coroutine[Any, Any, None]) -> "Beside":
        self.beside.append(Beside(work))
        return self.beside[-1]

    def ready(self) -> list[Callable[[], None]]:
        self.beside = [work for work in self.beside if not work.done]
        busy = self.running is not None or not self.coordinator._events.empty()
        due = self.coordinator.wake_s is not None and self.coordinator.wake_s <= self.world.now_s()
        return [
            *([self.advance] if busy or due else []),
            *((lambda e=edge: self.work(e)) for edge in self.edges if edge.work and not edge.is_dead),  # type: ignore[misc]
            *(w.advance for w in self.beside),
        ]

    def work(self, edge: TinyEdge) -> None:
        if self.together is not None and self.world.chance(self.world.faults.edge):
            return self.kill(edge)
        edge.work.pop(self.world.rng.randrange(len(edge.work)))()

    def advance(self) -> None:
        if self.world.chance(self.world.faults.stop):
            self.coordinator.stop()
        if self.world.server is self and self.world.chance(self.world.faults.usurped):
            return self.world.usurp()
        if self.running is None:
            event = self.coordinator.pending()
            assert event is not None
            self.running = self.coordinator.step(event)
        try:
            self.running.send(None)
        except StopIteration:
            self.running = None


class World:
    """See the module's text."""

    def __init__(
        self, seed: int, plan: Plan, *, rounds: int, num_devices: int, faults: Faults, num_edges: int = 1
    ) -> None:
        self.rng, self.plan, self.rounds, self.faults = random.Random(seed), plan, rounds, faults
        self.num_edges = num_edges
        self.time_s, self.count, self.points, self.num_streams, self.crashes = 0.0, 0, 0, 0, 0
        self.was_full = False
        """More was counted at several Edges together than a version has room for, and may be in no other."""
        self.edge_crashes = self.merges = self.shut_out = 0
        self.stale: list[Server] = []  # lives that another has followed, and that go on
        self.discounts: dict[bytes, float] = {}  # at which each update was last added
        self.soon: list[tuple[float, int, Callable[[], None]]] = []
        self.arrival_s: dict[object, float] = {}
        self.store = MemoryStore()
        self.store.create_run(
            RunRow(id=RUN, name="toy", kind="host", plan_hash="", config={}, provenance={}, status="running", created_s=0.0)
        )  # fmt: skip
        write_initial_model(self.store, RUN, plan, {"params/w": np.zeros(1, np.float32)}, time_s=0.0)
        self.devices = {str(i): TinyDevice(self, str(i)) for i in range(num_devices)}
        self.server: Server | None = Server(self)
        for device in self.devices.values():
            self.later(device.connect, 1.0)

    # The clock.

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return self.time_s

    async def sleep_until(self, deadline_s: float) -> None:
        while self.time_s < deadline_s:
            await Pause()

    # Updates.

    def update(self, number: int, version: int) -> tuple[float, int]:
        """What a device makes of a version: value and weight; of a commit's weight can be told who is in it."""
        policy = self.plan.manifest.server.rounds
        has_own = self.num_edges == 1 or policy.min_separation > 1  # each version's members trained from the one before
        spread = version % (1 + policy.max_staleness) if has_own else version
        return float((number + 1) * (version + 1)), 1 << (number + spread * len(self.devices))

    # Chance.

    def chance(self, rate: float) -> bool:
        return rate > 0 and self.rng.random() < rate

    def point(self) -> None:
        self.points += 1
        if self.points == self.faults.crash_at or self.chance(self.faults.crash):
            raise Crash

    # What happens when.

    def later(self, work: Callable[[], None], most_s: float) -> None:
        self._at(self.time_s + self.rng.uniform(0.0, most_s), work)

    def _at(self, time_s: float, work: Callable[[], None]) -> None:
        self.count += 1
        heapq.heappush(self.soon, (time_s, self.count, work))

    def in_order(self, way: object, work: Callable[[], None]) -> None:
        arrives_s = max(self.time_s + self.rng.uniform(0.0, 0.5), self.arrival_s.get(way, 0.0))
        self.arrival_s[way] = arrives_s
        self._at(arrives_s, work)

    def send(self, device: TinyDevice, work: Callable[[TinyEdge], None]) -> None:
        edge, stream = device.edge, device.stream
        assert edge is not None

        def deliver() -> None:
            is_there = any(edge in server.edges for server in self.servers) and not edge.is_dead
            if not is_there or self.chance(self.faults.broken):
                if is_there:
                    edge.left(device.name, stream)
                return device.broke(stream)
            server = next(server for server in self.servers if edge in server.edges)
            (self.of_stale(server, lambda: work(edge)) if server in self.stale else lambda: work(edge))()
            if self.chance(self.faults.broken):  # the device notices before the Edge does
                device.broke(stream)
                self.later(lambda: None if edge.is_dead else edge.left(device.name, stream), 5.0)

        self.in_order(("up", stream), deliver)

    def reply(self, name: str, stream: int, what: str, nonce: bytes, version: int) -> None:
        device = self.devices[name]
        self.in_order(("down", stream), lambda: device.hear(stream, what, nonce, version))

    def end_stream(self, name: str, stream: int) -> None:
        self.in_order(("down", stream), lambda: self.devices[name].broke(stream))

    def break_streams(self, edge: TinyEdge) -> None:
        for device in self.devices.values():
            if device.edge is edge:
                self.later(lambda d=device, s=device.stream: d.broke(s), 2.0)  # type: ignore[misc]

    @property
    def servers(self) -> "list[Server]":
        return [*([] if self.server is None else [self.server]), *self.stale]

    def crash(self) -> None:
        assert self.server is not None
        self.crashes += 1
        if self.server.running is not None:
            self.server.running.close()
        self.stop_server()

    def stop_server(self) -> None:
        assert self.server is not None
        self.end(self.server)
        self.server = None
        self.later(self.start, 5.0)

    def end(self, server: Server) -> None:
        for far in server.far.values():
            far.is_lost = True
        for edge in server.edges:
            edge.is_dead = True
            self.break_streams(edge)  # each hears of it when it does; what is on its way may still arrive

    def usurp(self) -> None:
        assert self.server is not None
        stale = self.server
        self.stale.append(stale)
        self.later(lambda: self.end_stale(stale), 20.0)  # when it would renew its lease
        self.start()

    def of_stale(self, server: Server, work: Callable[[], None]) -> Callable[[], None]:
        def go_on() -> None:
            try:
                work()
            except (LeaseLost, Crash) as error:
                self.shut_out += isinstance(error, LeaseLost)
                self.end_stale(server)

        return go_on

    def end_stale(self, server: Server) -> None:
        if server in self.stale:
            self.stale.remove(server)
            self.end(server)

    def start(self) -> None:
        self.server = Server(self)

    def run(self, *, most_steps: int = 20_000) -> int:
        """Runs the history to the last version; returns the number of steps."""
        for step in range(most_steps):
            server = self.server
            if server is not None and server.running is None and server.coordinator.finished.is_set():
                if self.store.last_version(RUN) == self.rounds:
                    return step
                self.stop_server()  # it was asked to stop; it is started again
                continue
            try:
                self.rng.choice(self._next())()
            except Crash:
                self.crash()
            self.time_s += self.rng.uniform(0.0, 0.05)
        raise AssertionError(f"the history does not end: {self}")

    def _next(self) -> list[Callable[[], None]]:
        while True:
            ready = self.server.ready() if self.server is not None else []
            ready += [self.of_stale(server, work) for server in self.stale for work in server.ready()]
            due = [self._pop] if self.soon and self.soon[0][0] <= self.time_s else []
            if ready or due:
                return [*ready, *due]
            wakes = [server.coordinator.wake_s for server in self.servers]
            times = ([self.soon[0][0]] if self.soon else []) + [wake_s for wake_s in wakes if wake_s is not None]
            assert times, f"nothing will ever happen again: {self}"
            self.time_s = max(self.time_s, min(times))

    def __repr__(self) -> str:
        server = self.server.coordinator.snapshot() if self.server is not None else "no server"
        devices = [(d.name, d.stream, d.version, d.trained, d.finished) for d in self.devices.values()]
        return f"at {self.time_s:.1f} s: {server}, {devices}"

    def _pop(self) -> None:
        heapq.heappop(self.soon)[2]()

    # What is to hold.

    def counted(self, version: int) -> set[tuple[int, int]]:
        """(device, version trained on) of the updates in a commit, by the store's tokens."""
        found = set()
        policy = self.plan.manifest.server.rounds
        oldest = 0 if self.num_edges > 1 else version - 1 - 2 * policy.max_staleness
        for base in range(max(0, oldest), version):
            for number in range(len(self.devices)):
                row = self.store.token(RUN, TOKEN.nonce(RUN, base, str(number)))
                if row is not None and row.state == "counted" and row.version == version:
                    found.add((number, base))
        return found

    def check(self, policy: RoundPolicy) -> None:
        """Asserts what must hold after any history."""
        commits = list(self.store.commits(RUN))
        assert [commit.version for commit in commits] == list(range(self.rounds + 1)), "a line without a gap"
        for commit in commits[1:]:
            members = self.counted(commit.version)
            assert commit.weight == sum(self.update(*member)[1] for member in members), "each once, and nobody else"
            minimum = 1 if self.edge_crashes else policy.minimum
            assert minimum <= commit.members == len(members) <= policy.max_members
            if policy.selection.ids:
                assert members == {(int(device), commit.version - 1) for device in policy.selection.ids}
            if policy.late.kind != "patch":
                self.check_model(commit, commits[commit.version - 1], members)
            else:
                self.check_patched(commit)
        for commit in commits[1:]:
            rested = {number for number, _ in self.counted(commit.version)}
            for later in range(commit.version + 1, min(commit.version + policy.min_separation, self.rounds + 1)):
                assert not rested & {number for number, _ in self.counted(later)}, "nobody comes again too soon"
        for device in self.devices.values():
            for nonce, version in device.told_counted:
                row = self.store.token(RUN, nonce)
                assert row is not None and row.state == "counted", "told is durable"
                assert row.version is None or version in (0, row.version)
        rounds = self.store.rounds(RUN)
        assert [row.number for row in rounds] == list(range(1, len(rounds) + 1))

    def check_model(self, commit: CommitRow, before: CommitRow, members: set[tuple[int, int]]) -> None:
        """The model is the one before plus the mean of the members' updates, each at its discount."""
        mean = 0.0
        for number, base in members:
            value, weight = self.update(number, base)
            mean += value * weight * self.discounts[TOKEN.nonce(RUN, base, str(number))] / commit.weight
        assert abs(self.model(commit) - self.model(before) - mean) < 1e-5 * max(1.0, mean)

    def check_patched(self, commit: CommitRow) -> None:
        """The model is that of a run in which everything that it has taken in came in time."""
        taken = [member for version in range(1, commit.version + 1) for member in self.counted(version)]
        if self.merges:
            return  # a late group below the minimum became part of a later sum
        total = 0.0
        for base in range(commit.version):
            members = [self.update(*member) for member in taken if member[1] == base]
            total += sum(value * weight for value, weight in members) / max(1, sum(weight for _, weight in members))
        assert abs(self.model(commit) - total) < 1e-5 * max(1.0, total)

    def model(self, commit: CommitRow) -> float:
        (entry,) = commit.model
        return float(self.store.blobs.view(entry.hash, entry.spec)[0])

    @property
    def final(self) -> str:
        """The root of the last model."""
        commit = self.store.last_commit(RUN)
        assert commit is not None
        return commit.model.root
