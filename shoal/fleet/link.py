"""A device's way to an Edge: one control stream and three calls. Over gRPC in `grpc_link.py`, in one process here."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol, runtime_checkable

from shoal.errors import NetworkError
from shoal.fleet.door import Door
from shoal.fleet.wire import fleet_pb2 as pb


@runtime_checkable
class Stream(Protocol):
    """One control stream."""

    async def send(self, message: pb.FromDevice) -> None:
        """Raises NetworkError where the stream is broken."""
        ...

    async def receive(self) -> pb.FromEdge:
        """The next message. Raises NetworkError where the stream has ended."""
        ...


@runtime_checkable
class Link(Protocol):
    """What a device can ask of an Edge. Every call may raise NetworkError (try again) or ProtocolError (do not)."""

    def session(self) -> AbstractAsyncContextManager[Stream]: ...
    def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]: ...
    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply: ...
    async def status(self, request: pb.StatusRequest) -> pb.StatusReply: ...
    def elsewhere(self, address: str) -> "Link":
        """The way to another Edge of the same host, which this one has named."""
        ...


STALLED_S: Final = 120.0
"""How long a host may take for a slice; longer than hosts wait for devices, so that their word comes first."""
SLOWEST_BYTES_PER_S: Final = 1024
"""A slower line is none."""
MAX_WANTED: Final = 1024
"""Blobs that a call may ask for, beside the first."""


def longest_s(size_bytes: int) -> float:
    """How long so much may take on the slowest line: who sends a byte a minute does not keep a device for ever."""
    return STALLED_S + size_bytes / SLOWEST_BYTES_PER_S


class LocalLink:
    """An Edge in the same process: the same messages, without a socket."""

    def __init__(self, edge: Door) -> None:
        self._edge = edge

    @asynccontextmanager
    async def session(self) -> AsyncGenerator[Stream, None]:
        stream = _LocalStream(self._edge)
        try:
            yield stream
        finally:
            await stream.close()

    def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        return self._edge.pull(request)

    async def push(self, slices: AsyncIterator[pb.PushSlice]) -> pb.PushReply:
        return await self._edge.push(_serialized(slices))

    async def status(self, request: pb.StatusRequest) -> pb.StatusReply:
        return await self._edge.status(request)

    def elsewhere(self, address: str) -> Link:
        return self  # there is no other in this process


class _LocalStream:
    def __init__(self, edge: Door) -> None:
        self._outgoing: asyncio.Queue[pb.FromDevice] = asyncio.Queue()
        self._incoming = edge.session(self._sent())

    async def _sent(self) -> AsyncIterator[pb.FromDevice]:
        while True:
            yield await self._outgoing.get()

    async def send(self, message: pb.FromDevice) -> None:
        await self._outgoing.put(message)

    async def receive(self) -> pb.FromEdge:
        try:
            return await anext(self._incoming)
        except StopAsyncIteration:
            raise NetworkError("The Edge ended the session.") from None

    async def close(self) -> None:
        if isinstance(self._incoming, AsyncGenerator):
            await self._incoming.aclose()


async def _serialized(slices: AsyncIterator[pb.PushSlice]) -> AsyncIterator[bytes]:
    async for part in slices:
        yield part.SerializeToString()
