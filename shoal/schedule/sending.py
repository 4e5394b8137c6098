"""What goes over a link next: slices by rank, so that an urgent tensor overtakes one that is not; a machine without I/O.

    put(transfer, rank) --> ready, by rank --take--> in flight, at most `credit_bytes` --acknowledged--> gone

Invariants:
    1. What is in flight is at most `credit_bytes`, or one slice where that is larger: a tensor larger than the window still goes.
    2. Of two transfers that are ready the one with the lower rank goes first, from the next slice on; of equal ranks the one that was put first.
    3. Each byte of a transfer is taken once, in order of offsets.
"""

import heapq
from dataclasses import dataclass
from typing import Final, final

from shoal import validate

SLICE_BYTES: Final = 256 << 10
CREDIT_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a transfer."""

    transfer: int
    offset: int
    size: int


@final
class SendQueue:
    """Of one direction of one connection."""

    def __init__(self, *, slice_bytes: int = SLICE_BYTES, credit_bytes: int = CREDIT_BYTES) -> None:
        """
        Args:
            slice_bytes: largest part that is sent at a time.
            credit_bytes: what may be on its way unacknowledged; less gives way sooner, more fills a longer line.
        """
        validate.positive(slice_bytes=slice_bytes, credit_bytes=credit_bytes)
        self._slice_bytes, self._credit_bytes = slice_bytes, credit_bytes
        self._ready: list[tuple[int, int, int, int, int]] = []
        """(rank, number, transfer, offset, size of all)."""
        self._num_put = 0
        self.in_flight_bytes = 0

    def put(self, transfer: int, size: int, rank: int) -> None:
        """A transfer may go."""
        validate.positive(size=size)
        heapq.heappush(self._ready, (rank, self._num_put, transfer, 0, size))
        self._num_put += 1

    def take(self) -> Slice | None:
        """The next slice, if one may go now."""
        if not self._ready:
            return None
        rank, number, transfer, offset, size = self._ready[0]
        part = min(self._slice_bytes, size - offset)
        if self.in_flight_bytes and self.in_flight_bytes + part > self._credit_bytes:
            return None
        if offset + part == size:
            heapq.heappop(self._ready)
        else:
            heapq.heapreplace(self._ready, (rank, number, transfer, offset + part, size))
        self.in_flight_bytes += part
        return Slice(transfer, offset, part)

    def acknowledged(self, size: int) -> None:
        """The other side has so many bytes more.

        Raises:
            ValueError: more than were on their way.
        """
        if not 0 <= size <= self.in_flight_bytes:
            raise ValueError(f"Expected at most {self.in_flight_bytes} bytes to be acknowledged, got {size}.")
        self.in_flight_bytes -= size

    def statistics(self) -> dict[str, int]:
        return {"ready": len(self._ready), "in_flight_bytes": self.in_flight_bytes}
