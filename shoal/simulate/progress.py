"""The progress of a simulation on a terminal: rounds done, the newest metrics, rate, time left."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shoal.metric_names import without_tails

if TYPE_CHECKING:
    from shoal.simulate.engine import RoundResult

_SHOWN = 2


@contextmanager
def progress_bar(name: str, rounds: int, *, shown: bool) -> Iterator[Callable[["RoundResult"], None]]:
    """A bar on standard error while rounds go on; where that is no terminal, nothing.

    Yields:
        What is told of each round.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TextColumn("{task.fields[told]}")
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown or not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(name, total=rounds, told="compiling")

        def tell(result: "RoundResult") -> None:
            plain = sorted(without_tails(result.metrics).items(), key=lambda item: "/" in item[0])
            metrics = [f"{name} {value:.4g}" for name, value in plain[:_SHOWN]]
            rate = f"{1 / max(result.seconds, 1e-9):.3g} rounds/s"
            bar.update(task, completed=result.version, told=", ".join([*metrics, rate]))

        yield tell
