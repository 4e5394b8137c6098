"""The progress of long work on an embedding store, line by line: how much is done, the rate, the time left."""

import time
from collections.abc import Callable
from typing import Final, final

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.embed.progress import Progress, at_rate

LINES_S: Final = 10.0
"""Least time between two lines of one piece of work that stay; on a terminal those between are seen too."""


@final
class WorkLines:
    """Is told of each piece of work."""

    def __init__(self, screen: Screen, *, now_s: Callable[[], float] = time.perf_counter) -> None:
        """`now_s`: seconds of any clock."""
        self._screen, self._now_s = screen, now_s
        self._what, self._began_s, self._line_s = "", 0.0, 0.0

    def __call__(self, told: Progress) -> None:
        now_s = self._now_s()
        if told.what != self._what:
            self._what, self._began_s, self._line_s = told.what, now_s, now_s
            self._screen.say(f"{told.what}: {told.total:,.0f} {told.unit}")
        took_s = now_s - self._began_s
        if not told.done or took_s <= 0:
            return
        line = (
            f"{told.what}: {100 * told.share:3.0f} %  {at_rate(told.done / took_s, told.unit)}  "
            f"{words.duration(took_s * (1 / told.share - 1))} left"
        )
        if now_s - self._line_s >= LINES_S:
            self._screen.say(line)
            self._line_s = now_s
        else:
            self._screen.live(line)
