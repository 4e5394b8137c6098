"""Where a command's words go: progress to standard error; what it made to standard output, as text or as JSON."""

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final


@final
class Screen:
    """The two streams of one command."""

    def __init__(self, *, json: bool) -> None:
        """`json`: the result is one JSON document instead of text."""
        self.json = json
        self._is_live = False

    def say(self, text: str) -> None:
        """A line of progress."""
        self._end_live()
        print(text, file=sys.stderr, flush=True)

    def live(self, text: str) -> None:
        """A line that the next one replaces, where a person looks on; elsewhere nothing."""
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._is_live = True

    def line(self, text: str = "") -> None:
        """A line of the result, where it is text."""
        self._end_live()
        if not self.json:
            print(text, flush=True)

    def document(self, made: Mapping[str, Any] | Sequence[Any]) -> None:
        """The result, where it is JSON."""
        self._end_live()
        if self.json:
            print(json.dumps(_plain(made), indent=2), flush=True)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
        """Rows under their columns, as wide as they are; a pipe gets every character."""
        widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
        for row in (columns, *rows):
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            self.line((indent + "  ".join(cells)).rstrip())

    @contextmanager
    def hearing(self, logger: str) -> Iterator[None]:
        """What is logged there meanwhile, from `info` upwards, is a line of progress."""
        heard, handler = logging.getLogger(logger), logging.Handler()
        handler.emit = lambda record: self.say(record.getMessage())  # type: ignore[method-assign]
        before = heard.level
        heard.addHandler(handler)
        heard.setLevel(logging.INFO)
        try:
            yield
        finally:
            heard.removeHandler(handler)
            heard.setLevel(before)

    def _end_live(self) -> None:
        if self._is_live:
            sys.stderr.write("\r\x1b[2K")
            self._is_live = False


@final
class Stopwatch:
    """What the parts of a command took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started_s = self._lap_s = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._started_s

    def lap(self, phase: str) -> None:
        """The time since the last lap went into `phase`."""
        now_s = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now_s - self._lap_s
        self._lap_s = now_s


def _plain(made: Any) -> Any:
    """JSON has no NaN: what is no number becomes null."""
    if isinstance(made, Mapping):
        return {str(name): _plain(value) for name, value in made.items()}
    if isinstance(made, list | tuple):
        return [_plain(value) for value in made]
    if isinstance(made, float) and not math.isfinite(made):
        return None
    return made
