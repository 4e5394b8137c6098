"""The control streams of a door: bounded in number and in what they may send; whatever comes ends in an answer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from itertools import cycle
from typing import Final

from shoal.errors import NetworkError, ProtocolError, StoreError
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
BUSY_DELAY_S: Final = (5.0, 15.0)


class Streams:
    """See the module's text."""

    def __init__(self, on_error: Callable[[str], None] = lambda kind: None) -> None:
        """`on_error`: told what kind of error a stream has ended with."""
        self._on_error = on_error
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
        if (crowded_out := self._strangers.come(session, stream.address)) is not None:
            crowded_out.end()
        try:
            try:
                await self._answered(session, stream, handle)
            except asyncio.CancelledError:
                if not session.is_ended:
                    raise  # by the device
            session.is_ended = True
            await session.until_told()
        finally:
            self.num -= 1
            self._strangers.gone(session, stream.address)
            session.drop()

    async def _answered(
        self, session: Session, stream: Stream, handle: Callable[[pb.FromDevice], Awaitable[None]]
    ) -> None:
        try:
            await self._read(session, stream, handle)
        except TimeoutError:
            session.send(pb.FromEdge(later=busy(f"nobody checked in within {CHECK_IN_WAIT_S:g} s")))
        except ProtocolError as error:
            self._on_error("protocol")
            session.send(pb.FromEdge(refused=pb.Refused(reason="protocol", detail=str(error))))
        except (NetworkError, StoreError) as error:
            self._on_error("server busy")
            log.warning("a device is told to come later: %s", error)
            session.send(pb.FromEdge(later=busy(str(error))))
        except Exception:
            self._on_error("server failed")
            log.exception("a message of a device could not be handled")
            session.send(pb.FromEdge(later=busy("the server has failed at this message; it was logged there")))

    async def _read(self, session: Session, stream: Stream, handle: Callable[[pb.FromDevice], Awaitable[None]]) -> None:
        if self.num > MAX_SESSIONS:
            later = busy("this server holds as many sessions as it may")
            later.other_edge = next(self._neighbours, "")
            return session.send(pb.FromEdge(later=later))
        async with asyncio.timeout(CHECK_IN_WAIT_S) as unknown:
            while not session.is_ended and (message := await stream.read()) is not None:
                if message.ByteSize() > MAX_CONTROL_BYTES:
                    raise ProtocolError(
                        f"Expected control messages of at most {MAX_CONTROL_BYTES} bytes, got {message.ByteSize()}. "
                        "Send a larger update with Push."
                    )
                await handle(message)
                if session.is_known and unknown.when() is not None:
                    unknown.reschedule(None)
                    self._strangers.gone(session, stream.address)


def busy(why: str) -> pb.Later:
    """An answer that is none: the device may try again soon."""
    low, high = BUSY_DELAY_S
    return pb.Later(delay_min_s=low, delay_max_s=high, why=why)
