"""The supervisor of a pod: starts workers, watches them, and begins anew with those that are left. The shell around `membership.py`.

One process on each machine. The first decides; it has places for workers of its own, and listens for the others (`follower.py`), which dial it. A pod
on one machine is a supervisor with so many local workers, and listens to nobody. It imports no JAX.

    Supervisor ──starts, kills──> worker   worker    (and a warm spare for each)
      │   ^──────── marks ────────┘        a pipe each
      │ lines of JSON, each with a MAC (link.py)
    Follower ──starts, kills──> worker   worker      on another machine

Guarantees:
    * No worker outlives its supervisor, however that ends: a guard process kills what is left (`guard.py`), and a worker whose standard input ends
      kills itself.
    * No life begins while a worker of the last one runs, on any machine that keeps time within a few seconds (`membership.py`, invariant 1): one that
      does not hear from the first within `SILENCE_S` ends its workers.
    * The end of the first supervisor ends the pod; started again, its workers go on from their last checkpoint.
"""

import asyncio
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Protocol, final

from shoal import validate
from shoal.clock import Clock, SystemClock
from shoal.errors import NetworkError, PodGaveUp, TransportError
from shoal.pod.link import LINE_BYTES, Link
from shoal.pod.membership import MembershipMachine, PodPolicy
from shoal.pod.membership_events import (
    AskToStop,
    Command,
    Done,
    Event,
    Exited,
    GiveUp,
    Joined,
    Leaves,
    LifeEnded,
    Lost,
    Marked,
    Snapshot,
    StartWorker,
    Stop,
    StopWorkers,
    Tick,
)
from shoal.pod.place import Place, WorkerCommand
from shoal.pod.worker_process import Guard, parsed

TICK_S: Final = 0.25
SILENCE_S: Final = 5.0
"""A peer that says nothing for so long is lost."""
MOST_STRANGERS: Final = 32
"""Connections that have yet to show that they know the secret."""
MOST_HOSTS: Final = 1024
_MOST_LIVES: Final = 1000
_MOST_CHARACTERS: Final = 300


class Host(Protocol):
    """A place for a worker, here (`Place`) or on another machine."""

    def start(self, wanted: StartWorker) -> None: ...

    def ask(self) -> None: ...

    def stop(self, *, is_stuck: bool = False) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Listen:
    """Where the first supervisor waits for the others."""

    host: str
    """As they reach it: a coordinator may be here."""
    port: int
    secret: bytes = field(repr=False)
    """Of `link.read_secret`."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a pod ended."""

    is_finished: bool
    """False: it was stopped."""
    num_lives: int
    ended: tuple[LifeEnded, ...]
    """The lives that ended before their time, the last ones."""


def print_line(name: str, line: str) -> None:
    """A line that a worker wrote, on standard error."""
    print(f"[{name}] {line}", file=sys.stderr, flush=True)


@final
class Supervisor:
    """See the module's text. `run` once."""

    def __init__(
        self,
        how: WorkerCommand,
        *,
        local_workers: int,
        policy: PodPolicy | None = None,
        listen: Listen | None = None,
        clock: Clock | None = None,
        watch: Callable[[Command], None] = lambda command: None,
        output: Callable[[str, str], None] = print_line,
    ) -> None:
        """
        Args:
            how: workers of this machine are started.
            local_workers: so many.
            policy: how long it waits for whom; None: for its own workers.
            listen: for supervisors of other machines; None: there are none.
            clock: of the machine.
            watch: is told all that is decided, for a screen or the record.
            output: (host, line) that a worker of this machine writes.

        Raises:
            ValueError: the policy waits for hosts that cannot come, or trusts that a lost host's worker is gone too soon.
        """
        validate.whole(0 if listen else 1, local_workers=local_workers)
        self.policy = policy or PodPolicy(hosts=max(1, local_workers))
        if self.policy.hosts > local_workers and listen is None:
            raise ValueError(
                f"Expected at most {local_workers} hosts, which is how many workers this machine has, got hosts={self.policy.hosts}. For "
                "workers of other machines give listen=Listen(…)."
            )
        if listen and self.policy.lost_s < SILENCE_S + how.grace_s:
            raise ValueError(
                f"Expected lost_s >= {SILENCE_S + how.grace_s:g}, the {SILENCE_S:g} s after which a host that hears nothing ends its worker and the "
                f"{how.grace_s:g} s that this may take, got lost_s={self.policy.lost_s:g}."
            )
        self._how, self._local_workers, self._listen = how, local_workers, listen
        self._clock, self._watch, self._output = clock or SystemClock(), watch, output
        self._machine = MembershipMachine(self.policy)
        self._hosts: dict[str, Host] = {}
        self._members: tuple[str, ...] = ()
        self._ended: deque[LifeEnded] = deque(maxlen=_MOST_LIVES)
        self._last: asyncio.Future[Done | GiveUp]
        self._tasks: asyncio.TaskGroup
        self._events: deque[Event] = deque()  # that wait while one is carried out
        self._is_feeding = False
        self._num_strangers = 0
        self._links: set[Link] = set()
        self._greetings: set[asyncio.Task[None]] = set()

    def snapshot(self) -> Snapshot:
        """Where the pod stands."""
        return self._machine.snapshot()

    def stop(self) -> None:
        """Ends the workers, and then `run`, while that runs."""
        self._feed(Stop())

    async def run(self) -> Outcome:
        """Until the training is over. When it is cancelled the workers are ended first.

        Raises:
            PodGaveUp: there was no progress, or there were too few hosts.
            NetworkError: another process listens at the port.
        """
        self._last = asyncio.get_running_loop().create_future()
        server = await self._bind(self._listen) if self._listen else None
        guard, places = Guard(), list[Place]()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self._local_workers):
                    places.append(self._place(f"{_host_name()}/{number}", guard, tasks))
                self._tasks = tasks
                if server is not None:
                    await server.start_serving()
                ticks = tasks.create_task(self._tick())
                for place in places:
                    self._hosts[place.name] = place
                    self._feed(place.joined(self._listen.host if self._listen else "127.0.0.1"))
                last: Done | GiveUp = Done(finished=False)  # where it is cancelled
                try:
                    last = await asyncio.shield(self._last)
                finally:
                    ticks.cancel()
                    if server is not None:
                        server.close()
                    self._say_good_bye(last)
        finally:
            for place in places:
                await place.close()
            guard.close()
        if isinstance(last, GiveUp):
            raise PodGaveUp(last.why)
        return Outcome(is_finished=last.finished, num_lives=self.snapshot().life, ended=tuple(self._ended))

    def _place(self, name: str, guard: Guard, tasks: asyncio.TaskGroup) -> Place:
        return Place(name, self._how, guard=guard, tasks=tasks, say=self._feed, output=self._output)

    async def _tick(self) -> None:
        while True:
            self._feed(Tick())
            await self._clock.sleep_until(self._clock.now_s() + TICK_S)

    # The machine.

    def _feed(self, event: Event) -> None:
        self._events.append(event)
        if self._is_feeding:
            return  # what follows from one event is carried out before the next
        self._is_feeding = True
        try:
            while self._events:
                for command in self._machine.step(self._events.popleft(), self._clock.now_s()):
                    self._watch(command)
                    self._carry_out(command)
        finally:
            self._is_feeding = False

    def _carry_out(self, command: Command) -> None:
        match command:
            case StartWorker(host):
                self._members = (host,) if command.process_id == 0 else (*self._members, host)
                self._hosts[host].start(command)
            case AskToStop():
                for host in self._present():
                    self._hosts[host].ask()
            case StopWorkers(_, stuck):
                for host in self._present():
                    self._hosts[host].stop(is_stuck=host in stuck)
            case LifeEnded():
                self._ended.append(command)
            case Done() | GiveUp():
                self._last.set_result(command)

    def _present(self) -> list[str]:
        return [host for host in self._members if host in self._hosts]

    # Other machines.

    async def _bind(self, listen: Listen) -> asyncio.Server:
        def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._num_strangers >= MOST_STRANGERS:
                writer.transport.abort()
                return
            greeting = self._tasks.create_task(self._greet(reader, writer, listen.secret))
            self._greetings.add(greeting)
            greeting.add_done_callback(self._greetings.discard)

        try:
            return await asyncio.start_server(come, port=listen.port, limit=LINE_BYTES, start_serving=False)
        except OSError as error:
            raise NetworkError(f"Expected a port to listen at, got port={listen.port}: {error.strerror}.") from error

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: bytes) -> None:
        self._num_strangers += 1
        try:
            link = await Link.accepted(reader, writer, secret, silence_s=SILENCE_S)
        except TransportError:
            writer.transport.abort()  # whoever does not know the secret is told nothing
            return
        finally:
            self._num_strangers -= 1
        self._links.add(link)
        alive = asyncio.create_task(link.keep_alive())
        names: list[str] = []
        try:
            while True:
                self._heard(link, await link.receive(), names)
        except (TransportError, TypeError, ValueError) as error:
            if not isinstance(error, TransportError):
                link.send({"refused": str(error)[:_MOST_CHARACTERS]})
        finally:
            self._links.discard(link)
            alive.cancel()
            with suppress(TransportError, asyncio.CancelledError):
                await alive
            await link.close()
            for name in names:
                del self._hosts[name]
                self._feed(Lost(name))

    def _heard(self, link: Link, said: Mapping[str, Any], names: list[str]) -> None:
        """One thing that another supervisor said. Raises TypeError or ValueError where it is nonsense."""
        match said:
            case {"joined": dict(fields)}:
                event = Joined(**{**fields, "ports": tuple(fields.get("ports", ()))})
                self._admit(event)
                names.append(event.host)
                self._hosts[event.host] = RemoteHost(link, event.host)
                self._feed(event)
            case {"leaves": str(host)} if host in names:
                self._feed(Leaves(host))
            case {"marked": [str(host), int(life), mark]} if host in names:
                self._feed(Marked(host, life, parsed(mark)))
            case {"exited": dict(fields)} if fields.get("host") in names:
                ended = Exited(**fields)
                validate.types(ended)
                self._feed(ended)
            case _:
                raise ValueError(
                    f"Expected joined, leaves, marked or exited of a host of its own, got {str(said)[:80]}."
                )

    def _admit(self, event: Joined) -> None:
        validate.types(event)
        validate.whole(1, devices=event.devices)
        if not event.ports or not all(0 < port < 65536 for port in event.ports) or len(event.ports) > 64:
            raise ValueError(f"Expected 1 to 64 ports, got {str(event.ports)[:80]}.")
        for what, text in (("name", event.host), ("address", event.address)):
            if not 0 < len(text) <= _MOST_CHARACTERS or not text.isprintable() or " " in text:
                raise ValueError(
                    f"Expected a host's {what} of at most {_MOST_CHARACTERS} characters, got {text[:80]!r}."
                )
        if event.host in self._hosts:
            raise ValueError(f"There is a host {event.host!r} already. Give this one another name.")
        if len(self._hosts) >= MOST_HOSTS:
            raise ValueError(f"Expected at most {MOST_HOSTS} hosts, and so many are there.")

    def _say_good_bye(self, last: Done | GiveUp) -> None:
        for link in self._links:
            link.send({"over": asdict(last)})
        for greeting in list(self._greetings):
            greeting.cancel()  # what was said is sent before it closes


@final
class RemoteHost:
    """A place on another machine."""

    def __init__(self, link: Link, name: str) -> None:
        self._link, self._name = link, name

    def start(self, wanted: StartWorker) -> None:
        self._link.send({"start": asdict(wanted)})

    def ask(self) -> None:
        self._link.send({"ask": self._name})

    def stop(self, *, is_stuck: bool = False) -> None:
        self._link.send({"stop": self._name, "is_stuck": is_stuck})


def _host_name() -> str:
    return socket.gethostname() or "host"
