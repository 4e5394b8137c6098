"""Batches on devices before they are needed: a thread takes each process's own rows of the next ones and sends them off.

    order --indices of (k, B)--> rows of this process --Examples.take--> arrays on devices, at most `ahead` calls of them

A batch that members cannot share evenly is filled up with masked rows, which change nothing: so any number of members trains on the same batches.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from queue import Empty, Full, Queue
from typing import Final, final

import jax
import numpy as np
from jax.sharding import NamedSharding

from shoal.data.store import Examples
from shoal.pod.order import Order

AHEAD: Final = 2


@dataclass(frozen=True)
class Call:
    """What one call of the compiled program takes."""

    first: int
    """Number of its first step."""
    batches: dict[str, jax.Array]
    """Field -> (k, B', …), B' at least B and a multiple of the members."""
    mask: jax.Array
    """(k, B')."""

    @property
    def num_steps(self) -> int:
        return int(self.mask.shape[0])


@final
class Feed:
    """An iterator over calls. Close it, or its thread stays."""

    def __init__(
        self,
        examples: Examples,
        order: Order,
        shardings: Mapping[str, NamedSharding],
        *,
        first: int,
        last: int,
        steps_per_call: int,
        ends: int = 0,
        multiple: int,
        ahead: int = AHEAD,
    ) -> None:
        """
        Args:
            examples: of the task's fields and types.
            order: which is taken when.
            shardings: field, `mask` too -> how (k, B', …) lies on the mesh.
            first: the first step.
            last: the step before which it ends.
            steps_per_call: k.
            ends: a call ends at each step that is a multiple of it; 0: at none.
            multiple: of which a batch has to be, to be shared evenly.
            ahead: calls that wait on devices.
        """
        self._examples, self._order, self._shardings, self._multiple = examples, order, shardings, multiple
        self._lengths = lengths(first, last, steps_per_call, ends)
        self._first, self.waited_s = first, 0.0
        self._ready: Queue[Call | BaseException | None] = Queue(maxsize=ahead)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="shoal-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Call]:
        while True:
            begun = time.perf_counter()
            found = self._ready.get()
            self.waited_s += time.perf_counter() - begun
            if found is None:
                return
            if isinstance(found, BaseException):
                raise found
            yield found

    def close(self) -> None:
        """Ends the thread."""
        self._is_over.set()
        while self._thread.is_alive():
            try:  # it may be waiting for room
                self._ready.get(timeout=0.01)
            except Empty:
                pass

    def _fill(self) -> None:
        try:
            steps, number = self._order.steps(self._first), self._first
            for length in self._lengths:
                if not self._put(self._call(number, list(islice(steps, length)))):
                    return
                number += length
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Call | BaseException | None) -> bool:
        while not self._is_over.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def _call(self, first: int, steps: list[tuple[np.ndarray, np.ndarray]]) -> Call:
        indices, mask = (np.stack(each) for each in zip(*steps, strict=True))
        indices, mask = filled_up(indices, mask, self._multiple)
        arrays = placed(self._examples, indices, mask, self._shardings)
        return Call(first, {name: array for name, array in arrays.items() if name != "mask"}, arrays["mask"])


def lengths(first: int, last: int, most: int, ends: int = 0) -> Iterator[int]:
    """Steps of each call from `first` to `last`: `most`, or fewer up to the next multiple of `ends` or the last."""
    while first < last:
        stop = min(last, first + most, (first // ends + 1) * ends if ends else last)
        yield stop - first
        first = stop


def filled_up(indices: np.ndarray, mask: np.ndarray, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """(…, B) twice, with masked rows added up to a multiple; they repeat the first example."""
    missing = -indices.shape[-1] % multiple
    if not missing:
        return indices, mask
    more = np.repeat(indices[..., :1], missing, axis=-1)
    return np.concatenate([indices, more], axis=-1), np.concatenate([mask, np.zeros(more.shape, bool)], axis=-1)


def placed(
    examples: Examples, indices: np.ndarray, mask: np.ndarray, shardings: Mapping[str, NamedSharding]
) -> dict[str, jax.Array]:
    """The examples at (…, B) and their mask as arrays on a mesh. A process reads what its devices hold, and each row once."""
    made: dict[str, jax.Array] = {"mask": jax.make_array_from_callback(mask.shape, shardings["mask"], mask.__getitem__)}
    for name, values in examples.fields.items():
        shape = (*indices.shape, *values.shape[1:])
        made[name] = jax.make_array_from_callback(shape, shardings[name], _Rows(values, indices))
    return made


@final
class _Rows:
    """Parts of a field's (…, B, …), of which devices often want the same rows."""

    def __init__(self, values: np.ndarray, indices: np.ndarray) -> None:
        self._values, self._indices, self._read = values, indices, dict[str, np.ndarray]()

    def __call__(self, part: tuple[slice, ...] | None) -> np.ndarray:
        assert part is not None
        ndim = self._indices.ndim
        rows = str(part[:ndim])
        if rows not in self._read:
            self._read[rows] = self._values[self._indices[part[:ndim]]]
        return self._read[rows][(slice(None),) * ndim + part[ndim:]]
