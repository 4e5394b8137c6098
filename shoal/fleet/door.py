"""What a device reaches: one Edge, or the front door of several runs."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol, runtime_checkable

from shoal.fleet.wire import fleet_pb2 as pb


@runtime_checkable
class Door(Protocol):
    """One control stream, and three calls; see `fleet.proto`."""

    def session(self, messages: AsyncIterator[pb.FromDevice]) -> AsyncGenerator[pb.FromEdge, None]: ...
    def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]: ...
    async def push(self, slices: AsyncIterator[bytes]) -> pb.PushReply: ...
    async def status(self, request: pb.StatusRequest) -> pb.StatusReply: ...
    async def close(self) -> None: ...
