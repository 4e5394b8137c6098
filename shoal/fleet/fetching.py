"""Blobs fetched by hash: all of them in one call, where it went on after a break, and nothing that was not asked for is kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.clock import Clock
from shoal.codec.packed import PACKED
from shoal.codec.packed import unpack as unpacked
from shoal.errors import NetworkError, ProtocolError
from shoal.fleet.link import MAX_WANTED, Link, longest_s
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.tensors import sha256

PULL_CREDIT: Final = 64 << 20
"""Bytes that one call may bring."""


class OtherBytes(ProtocolError):
    """What was sent is not what was asked for."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A blob that is to be fetched."""

    hash: str
    most: int
    """Bytes that it may have."""
    dtype: str = "uint8"
    """Of its elements, where it is a tensor."""
    base: tuple[str, np.ndarray] | None = None
    """Hash and values of a tensor that is here, of the same size and type: the difference may come instead."""

    @property
    def base_hash(self) -> str:
        return "" if self.base is None else self.base[0]


class Fetching:
    """What the devices of one process fetch."""

    def __init__(self, clock: Clock) -> None:
        self.down_bytes = 0
        """That came, as they came: packed or not."""
        self._clock = clock

    async def fetch(self, assigned: pb.Assigned, wanted: Sequence[Wanted], link: Link) -> list[bytes]:
        """Blobs, inline or pulled: all in one call, where the Edge serves that. A broken pull goes on where it broke.

        Args:
            assigned: gives the right to them.
            wanted: in this order.
            link: to the Edge.

        Raises:
            ProtocolError: one is larger than it may be, or has not its hash.
        """
        inline = {blob.hash: blob.data for blob in assigned.inline}
        pulled = await self._pulled(assigned, [each for each in wanted if each.hash not in inline], link)
        made = iter(pulled)
        return [_checked(inline[each.hash], each.hash) if each.hash in inline else next(made) for each in wanted]

    async def _pulled(self, assigned: pb.Assigned, wanted: Sequence[Wanted], link: Link) -> list[bytes]:
        made, data, tries = list[bytes](), bytearray(), 0
        allowed_s = longest_s(sum(each.most for each in wanted))
        latest_s = self._clock.now_s() + allowed_s
        while len(made) < len(wanted):
            first, *then = wanted[len(made) : len(made) + 1 + MAX_WANTED]
            request = pb.PullRequest(
                token=assigned.token, hash=first.hash, offset=len(data), credit=PULL_CREDIT, base=first.base_hash,
                packed=assigned.configuration.codec_down == PACKED, then=[pb.Wanted(hash=each.hash, base=each.base_hash) for each in then],
            )  # fmt: skip
            before = len(made), len(data)
            try:
                async for piece in link.pull(request):
                    if len(made) == len(wanted):
                        raise OtherBytes(f"Expected {len(wanted)} blobs, got more.")
                    now = wanted[len(made)]
                    size = piece.unpacked or len(piece.data)
                    if self._clock.now_s() > latest_s:
                        raise ProtocolError(
                            f"Expected {len(wanted)} blobs within {allowed_s:.0f} s, got {len(made)} and {len(data)} bytes."
                        )
                    if piece.offset != len(data) or len(data) + size > piece.total or piece.total > now.most:
                        raise OtherBytes(
                            f"Expected at most {now.most} bytes of {now.hash[:12]}… in order, got {piece.total}."
                        )
                    self.down_bytes += len(piece.data)
                    data += _unpacked(piece, now) if piece.unpacked else piece.data
                    if len(data) == piece.total:
                        made.append(_checked(bytes(data), now.hash))
                        data = bytearray()
            except NetworkError:
                tries = tries + 1 if (len(made), len(data)) == before else 0
                if tries > 5:
                    raise
                await self._clock.sleep_until(self._clock.now_s() + 0.2 * 2**tries)
            else:
                if (len(made), len(data)) == before:
                    raise ProtocolError(f"Expected more of {first.hash[:12]}… after byte {len(data)}, got nothing.")
        return made


def _unpacked(piece: pb.Slice, wanted: Wanted) -> bytes:
    if not piece.is_delta:
        return unpacked(piece.data, wanted.dtype, piece.unpacked)
    held = (
        b"" if wanted.base is None else wanted.base[1].reshape(-1).view(np.uint8)[piece.offset : piece.offset + piece.unpacked].data
    )  # fmt: skip
    return unpacked(piece.data, wanted.dtype, piece.unpacked, held)


def _checked(data: bytes, hash: str) -> bytes:
    if sha256(data) != hash:
        raise OtherBytes(f"Expected bytes with hash {hash[:12]}…, got {sha256(data)[:12]}….")
    return data
