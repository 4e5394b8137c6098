"""An update as it goes up: small, within the report; else in slices, from where the Edge has it."""

from collections.abc import AsyncIterator, Mapping
from typing import Final

import numpy as np

from shoal.codec.packed import PACKED, pack
from shoal.fleet.progress import Progress
from shoal.fleet.secure_phases import MASKED
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.fleet.work import Work
from shoal.plan.runner import Update
from shoal.tensors import dtype_name, to_bytes

SLICE_BYTES: Final = 64 << 10  # four of them are in the memory of the server for each device that sends
MAX_INLINE_BYTES: Final = 24 << 10


def inline(update: Update, progress: Progress) -> list[pb.PushSlice]:
    """A small update, which goes with its report; of a larger one nothing."""
    if sum(value.nbytes + len(name) + 32 for name, value in update.sums.items()) > MAX_INLINE_BYTES:
        return []
    progress.up_bytes += sum(value.nbytes for value in update.sums.values())
    return [pb.PushSlice(tensor=name, data=to_bytes(value)) for name, value in update.sums.items()]


async def slices(work: Work, received: Mapping[str, int], progress: Progress) -> AsyncIterator[pb.PushSlice]:
    """What is left to send of an update with a report.

    Args:
        received: tensor -> bytes that the Edge has of it.
        progress: where the bytes that went up are counted.
    """
    assert work.report is not None
    token: pb.Token | None = work.assigned.token
    # What is under a mask is as random as can be.
    is_packed = work.assigned.configuration.codec_up == PACKED and MASKED not in work.sends
    for name, value in work.sends.items():
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        for offset in range(received.get(name, 0), data.size, SLICE_BYTES):
            if work.stopped:
                return
            piece = data[offset : offset + SLICE_BYTES].tobytes()
            part = pb.PushSlice(token=token, tensor=name, offset=offset, root=work.report.root)
            if is_packed:
                part.data, part.unpacked = pack(piece, dtype_name(value.dtype)), len(piece)
            else:
                part.data = piece
            yield part
            progress.up_bytes += len(part.data)
            token = None
