"""Time as an argument: `SystemClock` in production, `ManualClock` in tests and simulation."""

import asyncio
import heapq
import time
from typing import Protocol, runtime_checkable


@runtime_checkable
class Clock(Protocol):
    """What a shell needs of time. Machines are handed `now_s` and never see a clock."""

    def now_s(self) -> float:
        """Monotonic seconds; the origin has no meaning."""
        ...

    def wall_s(self) -> float:
        """Seconds since the Unix epoch, for records and expiry."""
        ...

    async def sleep_until(self, deadline_s: float) -> None:
        """Returns when `now_s()` has reached the deadline."""
        ...


class SystemClock:
    """The machine's clock."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    async def sleep_until(self, deadline_s: float) -> None:
        await asyncio.sleep(max(0.0, deadline_s - self.now_s()))


class ManualClock:
    """A clock that moves only when told; sleepers wake in order of their deadlines."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._now_s

    async def sleep_until(self, deadline_s: float) -> None:
        if deadline_s <= self._now_s:
            return
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (deadline_s, self._count, woken))
        await woken

    def advance(self, seconds: float) -> None:
        """Moves time on and wakes every sleeper whose deadline has come."""
        self._now_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_s:
            _, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
