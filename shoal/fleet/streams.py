"""The control streams of a door: bounded in number and in what they may send; whatever comes ends in an answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from typing import Final

from shoal.clock import Clock
from shoal.errors import NetworkError, ProtocolError, StoreError
from shoal.fleet.entrance import MESSAGES_AT_ONCE, MESSAGES_PER_S, OPEN, Admit, Allowance, Crowds, Entrance
from shoal.fleet.session import Session, Stream
from shoal.fleet.strangers import Strangers
from shoal.fleet.wire import fleet_pb2 as pb

log = logging.getLogger("shoal.edge")

MAX_CONTROL_BYTES: Final = 64 << 10
MAX_SESSIONS: Final = 20_000
"""Streams at once, whoever they are of."""
MAX_STRANGERS: Final = 10_000
"""Of them, those that have not said who they are."""
CHECK_IN_WAIT_S: Final = 30.0
"""How long a stream may take to say who it is."""
LOOK_AGAIN_S: Final = 300.0
"""How long a stream may be of one who may come in no more: so often who has checked in is looked at again."""
BUSY_DELAY_S: Final = (5.0, 15.0)


class Streams:
    """See the module's text."""

    def __init__(
        self, clock: Clock, on_error: Callable[[str], None] = lambda kind: None, *, entrance: Entrance = OPEN
    ) -> None:
        """
        Args:
            clock: time.
            on_error: told what kind of error a stream has ended with.
            entrance: who may come in; one who was let in is looked at again now and then.
        """
        self._clock, self._on_error, self._admit = clock, on_error, entrance.admit
        self._crowds = Crowds(entrance.per_address)
        self.num = 0
        """That are open."""
        self._strangers: Strangers[Session] = Strangers(MAX_STRANGERS)
        self._neighbours: Iterator[str] = iter(())

    def neighbours(self, addresses: Sequence[str]) -> None:
        """Other Edges, which are named in turn to those that there is no room for here."""
        self._neighbours = cycle(addresses)

    async def hold(self, session: Session, stream: Stream, handle: Callable[[pb.FromDevice], Awaitable[None]]) -> None:
        """Hands message by message to `handle`, until either side ends the stream and the device has heard its last word.

        `handle` sets `session.is_known` once the device has checked in or shown a token. Its ProtocolError, NetworkError and
        StoreError are answers to the device; whatever else it raises is our bug, and ends this stream alone.
        """
        self.num += 1
        too_many = self._crowds.come(stream.address, self._clock.now_s())
        words = Allowance(MESSAGES_AT_ONCE, MESSAGES_PER_S, now_s=self._clock.now_s())
        if (crowded_out := self._strangers.come(session, stream.address)) is not None:
            crowded_out.end()
        looking: asyncio.Task[None] | None = None
        # One coroutine, not three in one another: ten thousand of them wait here.
        try:
            try:
                if self.num > MAX_SESSIONS:
                    self._send_away(session, "this server holds as many sessions as it may")
                elif too_many:
                    self._send_away(session, too_many)
                async with asyncio.timeout(CHECK_IN_WAIT_S) as unknown:
                    while not session.is_ended and (message := await stream.read()) is not None:
                        _check_size(message)
                        if wait_s := words.take(now_s := self._clock.now_s()):
                            await self._clock.sleep_until(now_s + wait_s)
                        await handle(message)
                        if session.is_known and unknown.when() is not None:
                            unknown.reschedule(None)
                            self._strangers.gone(session, stream.address)
                            if self._admit is not None:
                                looking = asyncio.create_task(self._look_again(session, self._admit))
            except asyncio.CancelledError:
                if not session.is_ended:
                    raise  # by the device
            except Exception as error:
                session.send(self._answer(error))
            session.is_ended = True
            await session.until_told()
        finally:
            if looking is not None:
                looking.cancel()
            self.num -= 1
            self._strangers.gone(session, stream.address)
            self._crowds.gone(stream.address)
            session.drop()

    async def _look_again(self, session: Session, admit: Admit) -> None:
        """Ends the session of one who may come in no more; of all others no stream ends, and nobody's work is disturbed."""
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            if session.shown is None:
                continue  # it has shown a token, and is given no work before it checks in
            try:
                why = await admit(session.shown)
            except (NetworkError, StoreError, OSError) as error:
                log.warning("whether a device may still come in is not known: %s", error)
                continue
            if why:
                session.send(pb.FromEdge(incompatible=pb.Incompatible(needs=why)))
                return session.end()

    def _send_away(self, session: Session, why: str) -> None:
        self._on_error("server busy")
        later = busy(why)
        later.other_edge = next(self._neighbours, "")
        session.send(pb.FromEdge(later=later))
        session.is_ended = True

    def _answer(self, error: Exception) -> pb.FromEdge:
        """What a device is told of what went wrong."""
        match error:
            case TimeoutError():
                return pb.FromEdge(later=busy(f"nobody checked in within {CHECK_IN_WAIT_S:g} s"))
            case ProtocolError():
                self._on_error("protocol")
                return pb.FromEdge(refused=pb.Refused(reason="protocol", detail=str(error)))
            case NetworkError() | StoreError():
                self._on_error("server busy")
                log.warning("a device is told to come later: %s", error)
                return pb.FromEdge(later=busy(str(error)))
            case _:
                self._on_error("server failed")
                log.error("a message of a device could not be handled", exc_info=error)
                return pb.FromEdge(later=busy("the server has failed at this message; it was logged there"))


def busy(why: str) -> pb.Later:
    """An answer that is none: the device may try again soon."""
    low, high = BUSY_DELAY_S
    return pb.Later(delay_min_s=low, delay_max_s=high, why=why)


def _check_size(message: pb.FromDevice) -> None:
    if (size := message.ByteSize()) > MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"Expected control messages of at most {MAX_CONTROL_BYTES} bytes, got {size}. Send a larger update with Push."
        )
