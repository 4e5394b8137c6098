"""Ctrl-C and SIGTERM in work that takes long: heard even where a library swallows the exception."""

import signal
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self, final


@final
class Told:
    """The first signal is a KeyboardInterrupt, further ones do not disturb the end.

    A library may swallow the exception (one raised in the middle of an import, or where Python calls back); therefore
    `check`, in every loop that waits. Outside the main thread nothing is changed.
    """

    def __init__(
        self,
        numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM),
        *,
        from_anybody: bool = True,
        is_patient: bool = False,
    ) -> None:
        """
        Args:
            numbers: the signals.
            from_anybody: whoever heard them before; else only where nobody did.
            is_patient: the first one is told by `number` alone, for work that looks there; the second is the KeyboardInterrupt.
        """
        self.number = 0
        self._numbers, self._from_anybody, self._heard, self._raises_at = (
            numbers,
            from_anybody,
            0,
            2 if is_patient else 1,
        )
        self._before: dict[int, Any] = {}

    @property
    def code(self) -> int:
        """The exit code of a command that was told so, as shells have it: 130 or 143."""
        return 128 + (self.number or signal.SIGINT)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self.number:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                if self._from_anybody or signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                    self._before[number] = signal.signal(number, self._tell)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.number and isinstance(error, ImportError):  # how some compiled modules take what is raised in them
            raise KeyboardInterrupt from None

    def _tell(self, number: int, _: object) -> None:
        self._heard, self.number = self._heard + 1, number
        if self._heard == self._raises_at:
            raise KeyboardInterrupt
