"""Writes to the record that must not be given up: while the disk does not let them, they are tried again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from shoal.clock import Clock
from shoal.errors import StoreUnavailable
from shoal.record.store import Store

log = logging.getLogger("shoal.host")

RETRY_S: Final = (0.5, 30.0)
"""First pause, and the longest: each is twice the one before."""

T = TypeVar("T")


async def durably(
    store: Store,
    clock: Clock,
    write: Callable[[], T],
    *,
    in_thread: Callable[[Callable[[], Any]], Awaitable[Any]] = asyncio.to_thread,
) -> T:
    """What `write` returns, once the record has taken it; `write` holds `store.settling`, and bears being called again."""
    delay_s, longest_s = RETRY_S

    def settle() -> T:
        with store.settling:
            return write()

    while True:
        try:
            made: T = await in_thread(settle)
            return made
        except StoreUnavailable as error:
            log.error("the record cannot be written, trying again in %.1f s: %s", delay_s, error)
            await clock.sleep_until(clock.now_s() + delay_s)
            delay_s = min(2 * delay_s, longest_s)
