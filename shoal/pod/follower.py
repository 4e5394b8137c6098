"""The supervisor of a pod's other machine: dials the first (`supervisor.py`), and does as that says.

When it does not hear from the first one any more it ends its workers, and only then dials again: a host that joins has no worker.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final, final

from shoal import validate
from shoal.clock import Clock, SystemClock
from shoal.errors import NetworkError, PodGaveUp, ProtocolError, TransportError
from shoal.pod.link import Link
from shoal.pod.membership_events import Event, Exited, Marked, StartWorker
from shoal.pod.place import Place, WorkerCommand
from shoal.pod.supervisor import SILENCE_S, print_line
from shoal.pod.worker_process import Guard

REDIAL_S: Final = 1.0
_MOST_WHY: Final = 2000


@final
class Follower:
    """See the module's text. `run` once."""

    def __init__(
        self,
        how: WorkerCommand,
        *,
        first: tuple[str, int],
        secret: bytes,
        workers: int = 1,
        name: str = "",
        address: str = "",
        patience_s: float = 300.0,
        clock: Clock | None = None,
        output: Callable[[str, str], None] = print_line,
    ) -> None:
        """
        Args:
            how: workers of this machine are started.
            first: host and port of the first supervisor.
            secret: of `link.read_secret`, the same everywhere.
            workers: places on this machine.
            name: of this machine, its own in the pod; empty: its host name and this process's number.
            address: under which the others reach it; empty: the one by which it reaches the first.
            patience_s: so long it dials where nobody answers.
            clock: of the machine.
            output: (host, line) that a worker writes.
        """
        validate.whole(1, workers=workers)
        validate.positive(patience_s=patience_s)
        self._how, self._first, self._secret, self._workers = how, first, secret, workers
        self._name, self._address = name or f"{socket.gethostname()}-{os.getpid()}", address
        self._patience_s, self._clock, self._output = patience_s, clock or SystemClock(), output
        self._link: Link | None = None
        self._places: dict[str, Place] = {}

    async def run(self) -> bool:
        """Until the first says that it is over: whether the training is finished, or was stopped. When it is cancelled its workers are ended first.

        Raises:
            PodGaveUp: the first has given up.
            ProtocolError: the first has another secret, or refuses this host.
            NetworkError: it could not be reached for `patience_s`.
        """
        guard = Guard()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(self._workers):
                    name = f"{self._name}/{number}"
                    self._places[name] = Place(
                        name, self._how, guard=guard, tasks=tasks, say=self._say, output=self._output
                    )
                over = await self._serve()
        except* TransportError as group:
            raise group.exceptions[0] from None
        finally:
            for place in self._places.values():
                await place.close()
            guard.close()
        if "why" in over:
            raise PodGaveUp(str(over["why"]))
        return bool(over.get("finished"))

    async def _serve(self) -> Mapping[str, Any]:
        """Dials until it is over."""
        while True:
            self._link = await self._dial()
            alive = asyncio.create_task(self._link.keep_alive())
            try:
                return await self._follow(self._link)
            except ProtocolError:
                raise
            except TransportError:
                await self._clock.sleep_until(self._clock.now_s() + REDIAL_S)
            finally:
                await self._leave(self._link, alive)

    async def _leave(self, link: Link, alive: asyncio.Task[None]) -> None:
        """Ends all workers, of which the first hears if it still can."""
        for place in self._places.values():
            link.send({"leaves": place.name})
            place.stop()
        for place in self._places.values():
            await place.is_free.wait()
        self._link = None
        alive.cancel()
        with suppress(TransportError, asyncio.CancelledError):
            await alive
        await link.close()

    async def _dial(self) -> Link:
        until_s = self._clock.now_s() + self._patience_s
        while True:
            try:
                return await Link.dialled(*self._first, self._secret, silence_s=SILENCE_S)
            except NetworkError as error:
                if self._clock.now_s() >= until_s:
                    host, port = self._first
                    raise NetworkError(f"Nobody answered at {host}:{port} for {self._patience_s:g} s.") from error
            await self._clock.sleep_until(self._clock.now_s() + REDIAL_S)

    async def _follow(self, link: Link) -> Mapping[str, Any]:
        for place in self._places.values():
            joined = place.joined(self._address or link.own_address)
            link.send({"joined": asdict(joined)})
        while True:
            match await link.receive():
                case {"start": dict(fields)} if fields.get("host") in self._places:
                    wanted = _checked(fields)
                    self._places[wanted.host].start(wanted)
                case {"ask": str(name)} if name in self._places:
                    self._places[name].ask()
                case {"stop": str(name), "is_stuck": bool(is_stuck)} if name in self._places:
                    self._places[name].stop(is_stuck=is_stuck)
                case {"over": dict(over)}:
                    return over
                case {"refused": str(why)}:
                    raise ProtocolError(f"The first supervisor refuses this host: {why}")
                case other:
                    raise ProtocolError(
                        f"The first supervisor says what this version does not know: {str(other)[:80]}."
                    )

    def _say(self, event: Event) -> None:
        if self._link is None:
            return  # the first has given this host up: who joins again has no worker
        if isinstance(event, Marked):
            self._link.send({"marked": [event.host, event.life, asdict(event.mark)]})
        elif isinstance(event, Exited):
            self._link.send({"exited": asdict(event) | {"why": event.why[:_MOST_WHY]}})


def _checked(fields: Mapping[str, Any]) -> StartWorker:
    try:
        wanted = StartWorker(**fields)
        validate.types(wanted)
    except TypeError as error:
        raise ProtocolError(f"The first supervisor says what this version does not know: {error}") from error
    return wanted
