"""One control stream of a device, as the Edge sees it: who is there, and what it is still to be told.

A session that waits costs one task (the one that reads) and this object: what is written is written by a task that
lives only while there is something to write.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, runtime_checkable

from shoal.errors import NetworkError
from shoal.fleet.wire import fleet_pb2 as pb

MAX_OUTGOING: Final = 64
LAST_WORD_S: Final = 10.0
"""How long a session that ends waits for the device to take what it is still to be told."""


@runtime_checkable
class Stream(Protocol):
    """The server's end of a control stream."""

    @property
    def address(self) -> str:
        """Of the peer, without its port; empty where it has none."""
        ...

    async def read(self) -> pb.FromDevice | None:
        """The next message; None at the end. Raises ProtocolError for bytes that are none."""
        ...

    async def write(self, message: pb.FromEdge) -> None:
        """Returns when there is room for more. Raises NetworkError where the stream is broken."""
        ...


class Session:
    """Bounded: a device that does not read loses its session, never the Edge its memory. The token lives on.

    Made by the task that reads its stream; `end` wakes that task by cancelling it.
    """

    __slots__ = (
        "_holding",
        "_outgoing",
        "_stream",
        "_writing",
        "device",
        "has_arrived",
        "is_ended",
        "is_known",
        "shown",
        "stays",
        "waiting",
        "waiting_since_s",
    )  # fmt: skip

    def __init__(self, stream: Stream) -> None:
        self.device = ""
        """Its id; empty before it has checked in."""
        self.has_arrived = False
        """Its coming was counted for the pace, and it has had no work since: whoever checks in again and again is one device."""
        self.is_known = False
        """It has checked in, or holds an assignment."""
        self.shown: pb.CheckIn | None = None
        """What let it in, of a host that does not serve whoever comes."""
        self.is_ended = False
        """By this side: it hears no more than what is queued."""
        self.waiting = False
        """It has checked in, and is to be assigned."""
        self.waiting_since_s = 0.0
        """When it began to."""
        self.stays = False
        """When it is through with an assignment it waits for the next."""
        self._stream, self._holding = stream, asyncio.current_task()
        self._outgoing: list[pb.FromEdge] = []
        self._writing: asyncio.Task[None] | None = None

    @property
    def num_outgoing(self) -> int:
        """Messages that the device has not taken yet."""
        return len(self._outgoing)

    def send(self, message: pb.FromEdge) -> None:
        """Queues a message; ends the session where too many wait."""
        if self.is_ended:
            return
        if len(self._outgoing) >= MAX_OUTGOING:
            self.drop()
            return self.end()
        self._outgoing.append(message)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def end(self) -> None:
        """Ends the session after what is queued."""
        if not self.is_ended:
            self.is_ended = True
            if self._holding is not None and self._holding is not asyncio.current_task():
                self._holding.cancel()

    async def _write(self) -> None:
        try:
            while self._outgoing:
                await self._stream.write(self._outgoing.pop(0))
        except NetworkError:
            self._outgoing.clear()
            self.end()
        finally:
            self._writing = None

    async def until_told(self) -> None:
        """Waits until the device has taken what is queued, but not for long."""
        if (writing := self._writing) is not None:
            await asyncio.wait([writing], timeout=LAST_WORD_S)

    def drop(self) -> None:
        """Nothing is written any more."""
        self._outgoing.clear()
        if self._writing is not None:
            self._writing.cancel()


async def piped(
    hold: Callable[[Stream], Awaitable[None]], messages: AsyncIterator[pb.FromDevice]
) -> AsyncGenerator[pb.FromEdge, None]:
    """A control stream within the process: yields what is said to who sends these messages."""
    pipe = _Pipe(messages)
    holding = asyncio.ensure_future(hold(pipe))
    holding.add_done_callback(lambda _: pipe.close())
    try:
        while (message := await pipe.next()) is not None:
            yield message
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)


class _Pipe:
    """A stream: messages from an iterator, answers one by one with `next`."""

    address = ""

    def __init__(self, messages: AsyncIterator[pb.FromDevice]) -> None:
        self._messages = messages
        self._answers: asyncio.Queue[pb.FromEdge | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(1)

    async def read(self) -> pb.FromDevice | None:
        return await anext(self._messages, None)

    async def write(self, message: pb.FromEdge) -> None:
        await self._room.acquire()
        self._answers.put_nowait(message)

    async def next(self) -> pb.FromEdge | None:
        """The next answer; None at the end."""
        answer = await self._answers.get()
        self._room.release()
        return answer

    def close(self) -> None:
        self._answers.put_nowait(None)
