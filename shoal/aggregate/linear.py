"""A mean of updates that came through a linear map, as the mean of the updates themselves: piece by piece."""

from collections.abc import Callable

import numpy as np

from shoal.codec.linear import VERSION, chosen, rotate_back, seed_of, seed_of_version
from shoal.fixed import CHUNK, SumSpec
from shoal.record.store import Blobs
from shoal.tensors import Index


def version_of(model: Index, blobs: Blobs) -> int:
    """What elements were drawn by in updates from this version; 0 where none are."""
    entry = next((entry for entry in model if entry.spec.name == VERSION), None)
    return 0 if entry is None else int(blobs.view(entry.hash, entry.spec)[0])


class Linear:
    """The map of one sum; none, for most."""

    def __init__(self, spec: SumSpec, size: int, *, version: int) -> None:
        """
        Args:
            spec: of the sum.
            size: elements of the tensor.
            version: what `codec.linear.VERSION` was in the version that the updates were made from.
        """
        self._spec, self._size = spec, size
        self._name, self._version = spec.tensor.name.removeprefix("delta/"), np.array([version], np.uint32)

    def undone_whole(self, mean: np.ndarray) -> np.ndarray:
        """(n,): the mean of the updates, of the whole mean of what was sent."""
        flat = mean.reshape(-1)
        pieces = (slice(start, start + CHUNK) for start in range(0, max(self._size, 1), CHUNK))
        return np.concatenate([self.undone(lambda part: flat[part], piece) for piece in pieces])

    def undone(self, mean: Callable[[slice], np.ndarray], piece: slice) -> np.ndarray:
        """Elements of the mean of the updates, float64.

        Args:
            mean: slice of the sum's elements -> their mean.
            piece: which elements of the tensor; of `fixed.CHUNK`, from a multiple of it on.
        """
        start, stop = piece.start, min(piece.stop, self._size)
        if self._spec.rotated:
            block = self._spec.rotated
            turned = mean(slice(start, start + -(-(stop - start) // block) * block))
            return rotate_back(turned, block, seed=seed_of(self._name), start=start)[: stop - start]
        if (one_of := self._spec.one_of) > 1:
            made = np.zeros(stop - start)
            groups = slice(start // one_of, start // one_of + -(-(stop - start) // one_of))
            seed = seed_of_version(self._version, self._name, np)
            places = chosen(stop - start, one_of, seed=seed, xp=np, start=groups.start).astype(np.int64) - start
            is_there = places < stop - start  # the last group may be of fewer
            made[places[is_there]] = mean(groups)[is_there]
            return made
        return mean(piece)
