"""What goes out over one line: transfers by rank, slice by slice, each as it was when it was put.

put --> SendQueue --a slice, when there is credit--> line          acknowledged --> credit
"""

import threading
from collections.abc import Callable
from typing import final

import numpy as np

from shoal.pod.servers.lines import Frame, Line
from shoal.schedule.sending import SendQueue


@final
class Outgoing:
    """Of one line. All but `send` is called with the condition held."""

    def __init__(
        self, line: Line, kind: int, changed: threading.Condition, *, slice_bytes: int, credit_bytes: int
    ) -> None:
        """
        Args:
            line: to the other side.
            kind: of the frames, SLICE or PUSH.
            changed: told whenever something was put or acknowledged, or is over.
            slice_bytes, credit_bytes: see `SendQueue`.
        """
        self._line, self._kind, self._changed = line, kind, changed
        self._queue = SendQueue(slice_bytes=slice_bytes, credit_bytes=credit_bytes)
        self._data: dict[int, tuple[int, np.ndarray]] = {}
        """Transfer -> (step, bytes)."""

    @property
    def is_empty(self) -> bool:
        """Whether all of it has been handed to the line."""
        return not self._data

    def put(self, transfer: int, step: int, data: np.ndarray, rank: int) -> None:
        """A transfer may go: (n,) bytes that nobody changes meanwhile."""
        self._data[transfer] = step, data
        self._queue.put(transfer, len(data), rank)
        self._changed.notify_all()

    def acknowledged(self, size: int) -> None:
        """The other side has so many bytes more. Raises ValueError for more than were sent."""
        self._queue.acknowledged(size)
        self._changed.notify_all()

    def send(self, is_open: Callable[[], bool]) -> None:
        """Sends until it is over, waiting for what is yet to be put.

        Args:
            is_open: asked with the condition held before each slice; it may put more.

        Raises:
            NetworkError: the line is broken.
        """
        while True:
            with self._changed:
                while True:
                    if not is_open():
                        return
                    part = self._queue.take()
                    if part is not None:
                        break
                    self._changed.wait()
                step, data = self._data[part.transfer]
                if part.offset + part.size == len(data):
                    del self._data[part.transfer]
            place = data.data[part.offset : part.offset + part.size]
            self._line.send(Frame(self._kind, part.transfer, step, part.offset), place)
