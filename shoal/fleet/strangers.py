"""Streams that have opened and not said who they are: bounded together, and so that no address keeps others out.

A stranger costs an Edge what a session costs. Each has a limited time (the Edge's `CHECK_IN_WAIT_S`); where there are too
many at once, the oldest of the address that has most of them goes first, so that a flood from one place ends its own
streams.
"""

from typing import Generic, TypeVar

K = TypeVar("K")


class Strangers(Generic[K]):
    """See the module's text. Costs a dictionary entry each."""

    def __init__(self, most: int) -> None:
        """`most`: at once."""
        self._most = most
        self._num = 0
        self._of: dict[str, dict[K, None]] = {}  # address -> its strangers, oldest first

    def __len__(self) -> int:
        return self._num

    def come(self, key: K, address: str) -> K | None:
        """One more; returns who has to go for it."""
        self._of.setdefault(address, {})[key] = None
        self._num += 1
        if self._num <= self._most:
            return None
        crowded = max(self._of, key=lambda address: len(self._of[address]))
        oldest = next(iter(self._of[crowded]))
        self.gone(oldest, crowded)
        return oldest

    def gone(self, key: K, address: str) -> None:
        """It is no stranger any more, or has left; said again it changes nothing."""
        here = self._of.get(address, {})
        if key in here:
            del here[key]
            self._num -= 1
            if not here:
                del self._of[address]
