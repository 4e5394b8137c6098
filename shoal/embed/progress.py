"""How far long work has come: told as values, shown as a bar or however the caller likes.

Nothing here looks at a clock: rates and time left are for whoever is told.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Final, final

from shoal import validate

_TELLS: Final = 200
"""How often a piece of work is told of, at most."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far one piece of work has come."""

    what: str
    """What is being done, for example `items: writing`."""
    done: float
    total: float
    unit: str
    """Of both, for example `blocks`."""

    @property
    def share(self) -> float:
        """Of the work that is done, 0 to 1."""
        return self.done / max(self.total, 1)

    def __str__(self) -> str:
        return f"{self.what}: {100 * self.share:.0f} % of {self.total:,.0f} {self.unit}"


Tell = Callable[[Progress], None]
Share = Callable[[float], None]
"""Is told which part of a piece of work is done, 0 to 1."""


def nobody(told: object) -> None:
    """Who is told where nobody asked."""


def parts(progress: Share, costs: Sequence[float]) -> list[Share]:
    """For pieces that are done one after another: each is told its own part, and `progress` that of them all."""
    whole = sum(costs)

    def part(number: int) -> Share:
        before, cost = sum(costs[:number]), costs[number]
        return lambda share: progress((before + cost * share) / whole)

    return [part(number) for number in range(len(costs))]


def at_rate(per_s: float, unit: str) -> str:
    """A rate as people read it.

    >>> at_rate(1234567.8, "rows"), at_rate(0.12345, "blocks")
    ('1,234,568 rows/s', '0.123 blocks/s')
    """
    return f"{per_s:,.0f} {unit}/s" if per_s >= 100 else f"{per_s:.3g} {unit}/s"


@final
class Meter:
    """One piece of work that tells how far it has come: when it begins, now and then, and when it is done."""

    def __init__(self, tell: Tell, what: str, total: int, unit: str) -> None:
        self._tell, self._what, self._total, self._unit = tell, what, total, unit
        self._done, self._next = 0.0, 0.0
        self.advance(0)

    def reach(self, share: float) -> None:
        """So much of the work is done, 0 to 1."""
        self._reach(share * self._total)

    def advance(self, count: int = 1) -> None:
        """So many units more are done."""
        self._reach(self._done + count)

    def _reach(self, done: float) -> None:
        self._done = done
        if done >= self._next:
            self._next = inf if done >= self._total else min(done + self._total / _TELLS, self._total)
            self._tell(Progress(what=self._what, done=done, total=self._total, unit=self._unit))


@contextmanager
def shown(progress: bool | Tell) -> Iterator[Tell]:
    """What is to be told: a function of the caller's; a bar on standard error while work goes on, where that is a terminal; nothing."""
    validate.of_kind(bool | Callable, "True (a bar), False, or a function of a Progress", progress=progress)
    if not isinstance(progress, bool):
        yield progress
    elif progress and sys.stderr.isatty():
        with _bar() as tell:
            yield tell
    else:
        yield nobody


@contextmanager
def _bar() -> Iterator[Tell]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(16),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[rate]}"),
    )
    with Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, rate="")

        def tell(told: Progress) -> None:
            if bar.tasks[task].description != told.what:
                bar.reset(task, total=told.total, description=told.what, rate="")
            speed = bar.tasks[task].speed
            rate = at_rate(speed, told.unit) if speed else ""
            bar.update(task, completed=told.done, rate=rate)

        yield tell
