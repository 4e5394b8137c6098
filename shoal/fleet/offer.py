"""What an Edge sends in a round: the plan and one version's model, by hash; and the part of an assignment that all share."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from shoal.errors import ProtocolError
from shoal.fleet.configuration import Configuration
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.record.store import Blobs
from shoal.tensors import Index

MAX_INLINE_BYTES: Final = 32 << 10
"""A model up to this size travels inside the assignment and saves a call for each tensor."""
SLICE_BYTES: Final = 256 << 10


class Offer:
    """One version's model and the plan. Nothing else of the record can be pulled."""

    def __init__(self, plan: Plan, model: Index, blobs: Blobs) -> None:
        self._plan, self._model, self._blobs = plan, model, blobs
        manifest = plan.manifest
        self._sizes = {manifest.hash: len(manifest.data), model.root: len(model.data)}
        self._sizes |= {program.hash: program.size_bytes for program in manifest.programs}
        self._sizes |= {entry.hash: entry.spec.size_bytes for entry in model}
        self._inline: list[pb.Blob] = []
        if len(model.data) + model.size_bytes <= MAX_INLINE_BYTES:
            whole = {model.root: model.data} | {entry.hash: blobs.get(entry.hash) for entry in model}
            self._inline = [pb.Blob(hash=hash, data=data) for hash, data in whole.items()]
        self.inline_bytes = sum(len(blob.data) for blob in self._inline)

    def assigned(self, configuration: Configuration, *, run: str) -> pb.Assigned:
        """What all the devices of a round are sent alike."""
        return pb.Assigned(
            configuration=configuration.to_proto(),
            plan=self._plan.hash,
            plan_signature=self._plan.signature,
            plan_public_key=self._plan.public_key,
            model=self._model.root,
            inline=self._inline,
            group=self._plan.manifest.promises.group,
            run=run,
        )

    async def pull(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        """The bytes of one blob. Raises ProtocolError for what is not offered."""
        total = self._sizes.get(request.hash)
        if total is None:
            raise ProtocolError(f"Blob {request.hash[:12]!r} is no part of the plan or of the open round's model.")
        if request.ids:
            raise ProtocolError("Pulling single rows of a table is not served by this version; pull the whole tensor.")
        if request.offset > total:
            raise ProtocolError(f"Expected an offset of at most {total}, got {request.offset}.")
        end = min(total, request.offset + request.credit) if request.credit else total
        offset = request.offset
        while offset < end or offset == request.offset:
            data = await self._read(request.hash, offset, min(SLICE_BYTES, end - offset))
            yield pb.Slice(offset=offset, data=data, total=total)
            offset += len(data)
            if not data:
                break

    async def _read(self, hash: str, offset: int, size: int) -> bytes:
        if hash == self._model.root:  # an index is a row of the record, not a blob
            return self._model.data[offset : offset + size]
        return await asyncio.to_thread(self._blobs.read, hash, offset, size)
