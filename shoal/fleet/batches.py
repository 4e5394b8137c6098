"""A queue that hands out all that has gathered since it was last looked at: one message for many small ones."""

import asyncio
from collections.abc import AsyncIterator
from typing import Final, Generic, TypeVar

MOST_AT_ONCE: Final = 4096
"""Items of one message: many devices at once do not make it larger than a message may be."""

T = TypeVar("T")


class Batches(Generic[T]):
    """Belongs to one event loop; has one reader."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._is_ended = False
        self._changed, self._taken = asyncio.Event(), asyncio.Event()

    def put(self, item: T) -> None:
        """After `end`, does nothing."""
        if not self._is_ended:
            self._items.append(item)
            self._changed.set()

    def end(self) -> None:
        """The reader gets what there is, and then the end."""
        self._is_ended = True
        self._changed.set()
        self._taken.set()

    async def drained(self) -> None:
        """Returns when the reader has taken all, or there is none any more."""
        while self._items and not self._is_ended:
            self._taken.clear()
            await self._taken.wait()

    def __aiter__(self) -> AsyncIterator[list[T]]:
        return self

    async def __anext__(self) -> list[T]:
        while not self._items:
            if self._is_ended:
                raise StopAsyncIteration
            self._changed.clear()
            await self._changed.wait()
        items, self._items = self._items[:MOST_AT_ONCE], self._items[MOST_AT_ONCE:]
        self._taken.set()
        return items
