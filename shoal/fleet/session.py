"""One control stream of a device, as the Edge sees it: who is there, and what it is still to be told."""

import asyncio
from typing import Final

from shoal.fleet.wire import fleet_pb2 as pb

MAX_OUTGOING: Final = 64


class Session:
    """Bounded: a device that does not read loses its session, never the Edge its memory. The token lives on."""

    def __init__(self) -> None:
        self.device = ""
        """Its id; empty before it has checked in."""
        self.waiting = False
        """It has checked in, and is to be assigned."""
        self.waiting_since_s = 0.0
        """When it began to."""
        self.stays = False
        """When it is through with an assignment it waits for the next."""
        self._outgoing: asyncio.Queue[pb.FromEdge | None] = asyncio.Queue(MAX_OUTGOING)

    def send(self, message: pb.FromEdge) -> None:
        """Queues a message."""
        try:
            self._outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.end()

    def end(self) -> None:
        """Ends the session after what is queued, or at once where the queue is full."""
        while self._outgoing.full():
            self._outgoing.get_nowait()
        self._outgoing.put_nowait(None)

    async def next(self) -> pb.FromEdge | None:
        """The next message; None at the end."""
        return await self._outgoing.get()
