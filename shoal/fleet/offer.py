"""What an Edge sends in a round: the plan and one version's model, by hash; and the part of an assignment that all share."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Final

from shoal.codec.packed import pack
from shoal.errors import ProtocolError
from shoal.fleet.configuration import Configuration
from shoal.fleet.link import MAX_WANTED
from shoal.fleet.packed_slices import SLICE_BYTES, PackedSlices, Readable
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.plan import Plan
from shoal.tensors import Index

MAX_INLINE_BYTES: Final = 32 << 10
"""A model up to this size travels inside the assignment and saves two calls."""


class Offer:
    """One version's model and the plan. Nothing else of the record can be pulled."""

    def __init__(
        self, plan: Plan, model: Index, blobs: Readable, packed: PackedSlices, *, bases: Mapping[str, str]
    ) -> None:
        """
        Args:
            plan, model: what is offered.
            blobs, packed: where their bytes are.
            bases: hash -> name of tensors of the versions before, that a device may hold.
        """
        self._plan, self._model, self._blobs, self._packed, self._bases = plan, model, blobs, packed, bases
        manifest = plan.manifest
        self._sizes = {manifest.hash: len(manifest.data), model.root: len(model.data)}
        self._sizes |= {program.hash: program.size_bytes for program in manifest.programs}
        self._sizes |= {entry.hash: entry.spec.size_bytes for entry in model}
        self._specs = {entry.hash: entry.spec for entry in model}
        self._unclear = {entry.hash for entry in model if entry.spec.dtype != self._specs[entry.hash].dtype}
        """Bytes that stand for tensors of several types: packed as one of them they could not be read as another."""
        self._index_slices: dict[int, bytes] = {}
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
        """The bytes of one blob, and of those that are wanted then, as far as the credit goes. Raises ProtocolError for what is not offered."""
        if len(request.then) > MAX_WANTED:
            raise ProtocolError(f"Expected at most {MAX_WANTED} blobs in a call, got {len(request.then)}.")
        left = sum(self._sizes.values())
        left = min(left, request.credit or left)
        wanted = [(request.hash, request.base, request.offset), *((each.hash, each.base, 0) for each in request.then)]
        for number, (hash, base, offset) in enumerate(wanted):
            if number and self._sizes.get(hash, 0) > left < SLICE_BYTES:
                break
            part = pb.PullRequest(
                hash=hash, base=base, offset=offset, credit=left, packed=request.packed, ids=request.ids
            )
            async for piece in self._blob(part):
                left -= piece.unpacked or len(piece.data)
                yield piece
            if left <= 0:
                break

    async def _blob(self, request: pb.PullRequest) -> AsyncIterator[pb.Slice]:
        total = self._sizes.get(request.hash)
        if total is None:
            raise ProtocolError(f"Blob {request.hash[:12]!r} is no part of the plan or of the open round's model.")
        if request.ids:
            raise ProtocolError("Pulling single rows of a table is not served by this version; pull the whole tensor.")
        if request.offset > total:
            raise ProtocolError(f"Expected an offset of at most {total}, got {request.offset}.")
        end = min(total, request.offset + request.credit)
        if end < total and end - end % SLICE_BYTES > request.offset:
            end -= end % SLICE_BYTES  # so that the next call begins where slices do
        offset = request.offset
        while offset < end or offset == request.offset:
            size = min(SLICE_BYTES, end - offset)
            # Slices that begin and end where another's would are the same for all who ask.
            is_packed = request.packed and size and request.hash not in self._unclear
            if is_packed and not offset % SLICE_BYTES and (size == SLICE_BYTES or offset + size == total):
                yield await self._packed_slice(request, offset, size, total)
            else:
                size = len(data := await self._read(request.hash, offset, size))
                yield pb.Slice(offset=offset, data=data, total=total)
            offset += size
            if not size:
                break

    async def _packed_slice(self, request: pb.PullRequest, offset: int, size: int, total: int) -> pb.Slice:
        if request.hash == self._model.root:
            if offset not in self._index_slices:
                self._index_slices[offset] = pack(self._model.data[offset : offset + size], "uint8")
            data, is_delta = self._index_slices[offset], False
        else:
            spec = self._specs.get(request.hash)
            base = request.base if spec is not None and self._bases.get(request.base) == spec.name else ""
            dtype = "uint8" if spec is None else spec.dtype
            data, is_delta = await self._packed.get(request.hash, dtype, offset, size, base=base)
        return pb.Slice(offset=offset, data=data, total=total, unpacked=size, is_delta=is_delta)

    async def _read(self, hash: str, offset: int, size: int) -> bytes:
        if hash == self._model.root:  # an index is a row of the record, not a blob
            return self._model.data[offset : offset + size]
        return await asyncio.to_thread(self._blobs.read, hash, offset, size)
