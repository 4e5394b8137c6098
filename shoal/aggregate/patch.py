"""Late updates as if they had come in time: the sum of their round is made whole, and what followed is replayed.

A late group u of version v enters as the change that its commit would have had, server(S_v + u) - server(S_v), where S_v is
the sum that made version v + 1; the steps after it are taken again with their own sums. Since sums are integers and the
server's step is the same on every machine, the model has the bits of the run in which u was in time (what the devices of
later rounds would then have made of their updates, nobody can know: theirs stay as they are).

Cost: one server step for each version between v and the present; what lies between is kept in memory.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import Aggregator
from shoal.record.memory import MemoryBlobs
from shoal.record.store import Blobs, BlobWriter
from shoal.tensors import Index, TensorSpec


def commit_patched(
    aggregator: Aggregator,
    present: Accumulator,
    *,
    version: int,
    late: Mapping[int, Sequence[Callable[[Accumulator], None]]],
    begin_at: Callable[[int], tuple[Index, Index]],
    sums_of: Callable[[int], Accumulator],
    blobs: Blobs,
) -> tuple[Index, Index]:
    """The next model and server state, with late groups in their own versions' sums.

    Args:
        aggregator: the server's rule.
        present: the sum of the present version.
        version: the present one; the commit makes `version + 1`.
        late: version -> what adds each of its late groups to a sum; versions before the present one.
        begin_at: the model and the server state that a version's devices started from.
        sums_of: the sum that was committed of a version, in a new accumulator.
        blobs: of the record; only the last step is written there.
    """
    first = min(late, default=version)
    model, server_state = begin_at(first)
    between = MemoryBlobs()
    for past in range(first, version):
        sums = sums_of(past)
        for add in late.get(past, ()):
            add(sums)
        model, server_state = aggregator.commit(sums, model, server_state, _Layers(between, blobs, writes_to=between))
    return aggregator.commit(present, model, server_state, _Layers(between, blobs, writes_to=blobs))


class _Layers:
    """Blobs that are looked for in memory first, then in the record."""

    def __init__(self, upper: Blobs, lower: Blobs, *, writes_to: Blobs) -> None:
        self._upper, self._lower, self._to = upper, lower, writes_to

    def _of(self, hash: str) -> Blobs:
        return self._upper if self._upper.has(hash) else self._lower

    def put(self, data: bytes) -> str:
        return self._to.put(data)

    def put_all(self, pieces: Sequence[bytes]) -> Sequence[str]:
        return self._to.put_all(pieces)

    def writer(self) -> BlobWriter:
        return self._to.writer()

    def get(self, hash: str) -> bytes:
        return self._of(hash).get(hash)

    def view(self, hash: str, spec: TensorSpec) -> np.ndarray:
        return self._of(hash).view(hash, spec)

    def read(self, hash: str, offset: int, size: int) -> bytes:
        return self._of(hash).read(hash, offset, size)

    def size(self, hash: str) -> int:
        return self._of(hash).size(hash)

    def has(self, hash: str) -> bool:
        return self._of(hash).has(hash)

    def forget(self, hash: str) -> None:
        self._to.forget(hash)
