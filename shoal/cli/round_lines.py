"""The progress of a simulation, line by line: what a round came to, the rate, the time left."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, final

from shoal.cli import words
from shoal.cli.screen import Screen
from shoal.metric_names import without_tails

if TYPE_CHECKING:
    from shoal.simulate.engine import RoundResult

LINES_S: Final = 0.5
"""Least time between two lines that stay; on a terminal the rounds between are seen too."""


@final
class RoundLines:
    """Is told of each round."""

    def __init__(
        self, first: int, last: int, screen: Screen, *, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        """
        Args:
            first: the version that the session begins with.
            last: the one that it is to end with.
            screen: where lines go.
            now_s: seconds of any clock.
        """
        self._first, self._last, self._screen, self._now_s = first, last, screen, now_s
        self._began_s = now_s()
        self._slow_s = 0.0  # the first round, with what is done once before it
        self._line_s = float("-inf")
        if first >= last:
            screen.say(
                f"the run has version {first} of {last} already; --rounds counts from its beginning: ask for more"
            )
        elif first:
            screen.say(f"going on from version {first}")

    def __call__(self, result: "RoundResult") -> None:
        done, took_s = result.version - self._first, self._now_s() - self._began_s
        self._slow_s = self._slow_s or took_s
        each = (took_s - self._slow_s) / max(done - 1, 1)
        width = len(str(self._last))
        line = (
            f"round {result.version:{width}}/{self._last}  {words.values(without_tails(result.metrics))}  "
            f"{words.duration(result.seconds)}"
        )
        if done > 1:  # the first round has what is done once in it: it says nothing of the others
            line += (
                f"  {1 / max(each, 1e-9):.3g} rounds/s  {1000 * each / max(len(result.members), 1):.3g} ms a member  "
                f"{words.duration((self._last - result.version) * each)} left"
            )
        if took_s - self._line_s >= LINES_S or result.version == self._last:
            self._screen.say(line)
            self._line_s = took_s
        else:
            self._screen.live(line)
