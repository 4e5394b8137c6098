"""Late updates as if they had come in time: the sum of their round is made whole, and what followed is replayed.

A late group u of version v enters as the change that its commit would have had, server(S_v + u) - server(S_v), where S_v is
the sum that made version v + 1; the steps after it are taken again with their own sums. Since sums are integers and the
server's step is the same on every machine, the model has the bits of the run in which u was in time (what the devices of
later rounds would then have made of their updates, nobody can know: theirs stay as they are).

The versions that were committed meanwhile lack what came late for those before them, so they are no place to begin from.
Replays begin at the oldest version that something may still be late for, in its *final* form, which nothing can change any
more; it moves on by one step with each commit. Cost: one step for each commit, and one for each version since that one
when a commit takes in late groups; two versions are in memory.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.commit import Aggregator
from shoal.record.memory import MemoryBlobs
from shoal.record.store import Blobs, BlobWriter
from shoal.tensors import Index, TensorSpec

State = tuple[Index, Index]
"""A model and the server rule's state."""


def replay(aggregator: Aggregator, begin: State, sums: Iterable[Accumulator], blobs: Blobs) -> State:
    """The state after the server's steps along these sums, one after another.

    Args:
        aggregator: the server's rule.
        begin: the state to begin with.
        sums: of versions that follow one another; each is asked for when its turn has come.
        blobs: of the record; the last state is written there.
    """
    state, before = begin, MemoryBlobs()
    waiting: Accumulator | None = None
    for each in sums:
        if waiting is not None:
            after = MemoryBlobs()
            state = aggregator.commit(waiting, *state, _Layers(before, blobs, writes_to=after))
            before = after
        waiting = each
    if waiting is None:
        return state
    return aggregator.commit(waiting, *state, _Layers(before, blobs, writes_to=blobs))


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
