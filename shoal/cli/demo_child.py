"""A child process's side of its bond with the demo: orders on standard input, news on standard output.

The first line of standard input is the settings, as JSON; further lines are orders; its end means that the parent has
ended, however that happened, or wants the child to end. News is one JSON object a line. What libraries print goes to
standard error, which the parent keeps in a file.

Guarantees:
    A child does not outlive its parent by more than `GRACE_S`.
"""

import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, final

GRACE_S: Final = 1.5
"""Longest orderly end once the parent is gone."""


@final
class Parent:
    """The other end, as the child sees it."""

    def __init__(self) -> None:
        """Takes the pipes; Ctrl-C is the parent's affair."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        self._writing = threading.Lock()
        self._orders: queue.Queue[dict[str, Any]] = queue.Queue(100)
        self._on_end: Callable[[], None] = lambda: os._exit(1)
        threading.Thread(target=self._read, daemon=True, name="parent").start()

    def order(self) -> dict[str, Any]:
        """The next order; waits for it. If the parent ends first, so does this process."""
        return self._orders.get()

    def on_end(self, call: Callable[[], None]) -> None:
        """What to do, from another thread, when the parent ends: start an orderly end."""
        self._on_end = call

    def tell(self, **news: Any) -> None:
        """Tells the parent something."""
        with self._writing:
            try:
                self._out.write(json.dumps(news) + "\n")
            except (BrokenPipeError, ValueError):  # it has ended; the reader sees that too
                pass

    def _read(self) -> None:
        for line in sys.stdin:
            self._orders.put(json.loads(line))
        timer = threading.Timer(GRACE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()
        self._on_end()
