"""The progress of a training on a mesh: steps, metrics so far, rate, time left."""

import time
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, final

from shoal.cli import words
from shoal.cli.round_lines import LINES_S
from shoal.cli.screen import Screen

if TYPE_CHECKING:
    from shoal.pod.training import Progress, Version


@final
class TrainLines:
    """Is told of each call and each version."""

    def __init__(
        self, batch_size: int, versions: int, screen: Screen, *, now_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._batch_size, self._versions, self._screen, self._now_s = batch_size, versions, screen, now_s
        self._line_s, self._rate = float("-inf"), ""
        self._slow: Set[int] = set()

    def call(self, progress: "Progress") -> None:
        """A call of the compiled program."""
        if progress.steps_per_s:
            rate = words.count(progress.steps_per_s * self._batch_size, "example")
            self._rate = f"  {rate}/s  {words.duration(progress.left_s)} left"
        width = len(str(progress.last))
        self._screen.live(f"step {progress.step:{width}}/{progress.last}  {words.values(progress.metrics)}{self._rate}")

    def version(self, version: "Version") -> None:
        """A version that was committed."""
        now_s, width = self._now_s(), len(str(self._versions))
        training = {f"train/{name}": value for name, value in version.training.items()}
        line = f"version {version.version:{width}}/{self._versions}  {words.values({**version.metrics, **training})}{self._rate}"
        if now_s - self._line_s >= LINES_S or version.version == self._versions:
            self._screen.say(line)
            self._line_s = now_s
        else:
            self._screen.live(line)
        self._tell_of_slow_ones(version)

    def _tell_of_slow_ones(self, version: "Version") -> None:
        """When a process begins to be slow, and when it is no more."""
        from shoal.pod.seen import slow

        found = slow(version.members)
        for process in sorted(found.keys() - self._slow):
            self._screen.say(f"process {process} is slow: {found[process]}")
        for process in sorted(self._slow - found.keys()):
            self._screen.say(f"process {process} is not slow any more")
        self._slow = found.keys()
