"""A mean of updates that came through a linear map, as the mean of the updates themselves: piece by piece."""

from collections.abc import Callable

import numpy as np

from shoal.codec.linear import chosen, rotate_back, seed_of, seed_of_words
from shoal.fixed import CHUNK, SumSpec


class Linear:
    """The map of one sum; none, for most."""

    def __init__(self, spec: SumSpec, before: np.ndarray) -> None:
        """
        Args:
            spec: of the sum.
            before: (n,) the tensor of the version that the updates were made from.
        """
        self._spec, self._size = spec, before.size
        name = spec.tensor.name.removeprefix("delta/")
        self._seed = seed_of(name)
        if spec.one_of > 1:
            self._seed = seed_of_words(before.view(np.uint32), name, np)

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
            return rotate_back(turned, block, seed=int(self._seed), start=start)[: stop - start]
        if (one_of := self._spec.one_of) > 1:
            made = np.zeros(stop - start)
            groups = slice(start // one_of, start // one_of + -(-(stop - start) // one_of))
            places = chosen(stop - start, one_of, seed=self._seed, xp=np, start=groups.start).astype(np.int64) - start
            is_there = places < stop - start  # the last group may be of fewer
            made[places[is_there]] = mean(groups)[is_there]
            return made
        return mean(piece)
