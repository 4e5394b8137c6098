"""How a long-running process is told to end: Ctrl-C, SIGTERM, or the end of the process that started it."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from shoal.cli.failures import INTERRUPTED, TERMINATED, Stopped
from shoal.fleet.process import new_event_loop

T = TypeVar("T")

POLL_S: Final = 0.5
_PR_SET_PDEATHSIG: Final = 1


def end_with_parent() -> int:
    """From now on this process is told to end when its parent does; returns the parent's id, for `run_until_told`.

    On Linux the system tells it at once. It minds the *thread* that started this process, so start it from one that
    lives; everywhere `run_until_told` looks twice a second, too.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    return parent


def run_until_told(work: Coroutine[Any, Any, T], *, parent: int = 0) -> T:
    """Runs asyncio work; when told to end, cancels it, waits for it to clean up, and raises Stopped.

    Args:
        work: what is run.
        parent: end when this is the parent no more; 0: whatever becomes of the parent.
    """

    async def watched() -> T:
        told: list[int] = []
        task = asyncio.ensure_future(work)

        def tell(code: int) -> None:
            told.append(code)
            task.cancel()

        with _signals(tell):
            watch = asyncio.create_task(_watch_parent(parent, tell)) if parent else None
            try:
                return await task
            except asyncio.CancelledError:
                if not told:
                    raise
                raise Stopped("stopped.", code=told[0]) from None
            finally:
                if watch is not None:
                    watch.cancel()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(watched())


async def _watch_parent(parent: int, tell: Any) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(POLL_S)
    tell(TERMINATED)


@contextlib.contextmanager
def _signals(tell: Any) -> Any:
    loop, taken = asyncio.get_running_loop(), []
    for number, code in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)):
        # Not on Windows, and not outside the main thread: there Ctrl-C is a KeyboardInterrupt.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, tell, code)
            taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            loop.remove_signal_handler(number)
