"""What a fleet at work looks like: one live panel in a terminal, a line every few rounds elsewhere.

`View` is what is known; whoever hears the processes changes it. `Watch` shows it.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Final, Self, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from shoal.cli.words import duration, size, sparkline

STAGES: Final = (
    *("connecting", "reconnecting", "waiting", "fetching", "queued", "training", "reporting", "reported"),
    *("finished", "other"),
)
"""Of a device, in order. `reported`: its update is at the server, which has not committed yet."""
LINE_EVERY: Final = 5
"""Rounds between two lines where there is no terminal."""
_ASCII_BARS: Final = "_.:-=+*#"
_BARS: Final = "▁▂▃▄▅▆▇█"


@dataclass
class View:
    """What is known of a fleet at work. Counters only rise."""

    title: str
    rounds: int
    goal_accuracy: float = 0.8
    stage: str = "starting"
    """What goes on, in a few words."""
    share: float | None = None
    """How much of that is done, where it is not the rounds."""
    phase: str = ""
    """Of the round."""
    version: int = 0
    counted: int = 0
    goal: int = 0
    devices: dict[str, dict[str, int]] = field(default_factory=dict)
    """Process -> stage -> devices."""
    moved: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Who -> bytes (down, up)."""
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    """(version, accuracy)."""
    round_s: list[float] = field(default_factory=list)
    """What the rounds took."""
    trouble: str = ""
    """The last thing that went wrong and was borne."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the last version, by the latest rounds; None while nothing is known."""
        latest = self.round_s[-8:]
        return median(latest) * (self.rounds - self.version) if latest else None

    def stages(self) -> Counter[str]:
        """Devices by stage, over all processes."""
        total: Counter[str] = Counter()
        for stages in self.devices.values():
            for stage, count in stages.items():
                total[stage if stage in STAGES else "other"] += count
        return total

    def bytes_moved(self) -> tuple[int, int]:
        """Bytes to the devices and from them."""
        return sum(down for down, _ in self.moved.values()), sum(up for _, up in self.moved.values())


@final
class Watch:
    """Shows a view while a block runs; in a terminal live, else by lines."""

    def __init__(self, view: View, console: Console) -> None:
        self.view, self._console = view, console
        self._started_s = time.monotonic()
        self._told = (-1, "")
        self._spinner = Spinner("dots" if self._unicode else "line")
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, refresh_per_second=8, transient=True, get_renderable=self._panel)

    def changed(self) -> None:
        """Where nobody sees a panel: says a line, now and then."""
        view = self.view
        if self._live is not None:
            return
        at = (view.version // LINE_EVERY, view.stage)
        if at != self._told:
            is_new_stage = at[1] != self._told[1]
            self._told = at
            if is_new_stage or view.version:
                self._console.print(self._line(), highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self) -> str:
        view = self.view
        parts = [f"[{time.monotonic() - self._started_s:5.1f} s] {view.stage}"]
        if view.version:
            parts.append(f"version {view.version} of {view.rounds}")
            if view.accuracy:
                measured, accuracy = view.accuracy[-1]
                of = "" if measured == view.version else f" of version {measured}"
                parts.append(f"accuracy{of} {accuracy:.1%}")
            down, up = view.bytes_moved()
            parts.append(f"{size(down)} down, {size(up)} up")
        if view.trouble:
            parts.append(view.trouble)
        return ", ".join(parts)

    def _panel(self) -> RenderableType:
        view = self.view
        elapsed = duration(time.monotonic() - self._started_s)
        rows: list[RenderableType] = [self._head(), self._bar(), self._facts()]
        if view.trouble:
            rows.append(Text(view.trouble, "yellow", overflow="ellipsis", no_wrap=True))
        return Panel(Group(*rows), title=view.title, subtitle=elapsed, border_style="cyan", width=self._width())

    def _head(self) -> RenderableType:
        view = self.view
        text = Text.assemble((view.stage, "bold"))
        if view.phase:
            text.append(f"   round {min(view.version + 1, view.rounds)} of {view.rounds}: {view.phase}")
            text.append(f"   {view.counted}/{view.goal} updates")
        if view.phase and view.left_s is not None:
            text.append(f"   about {duration(view.left_s)} left", "dim")
        self._spinner.update(text=text)
        return self._spinner

    def _bar(self) -> RenderableType:
        share = self.view.version / self.view.rounds if self.view.share is None else self.view.share
        width = self._width() - 4
        done = round(min(1.0, share) * width)
        full, empty = ("━", "─") if self._unicode else ("#", ".")
        return Text.assemble((full * done, "cyan"), (empty * (width - done), "dim"))

    def _facts(self) -> RenderableType:
        view = self.view
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_row("accuracy", self._curve())
        stages = view.stages()
        told = [f"{stages[stage]} {stage}" for stage in STAGES if stages[stage]]
        table.add_row("devices", ", ".join(told) or "none yet")
        down, up = view.bytes_moved()
        table.add_row("moved", f"{size(down)} to devices, {size(up)} from them")
        return table

    def _curve(self) -> Text:
        view = self.view
        if not view.accuracy:
            return Text("not measured yet", "dim")
        bars = sparkline([value for _, value in view.accuracy], width=max(10, self._width() - 50))
        if not self._unicode:
            bars = bars.translate(str.maketrans(_BARS, _ASCII_BARS))
        reached = view.accuracy[-1][1] >= view.goal_accuracy
        text = Text.assemble((bars, "green" if reached else "cyan"), f" {view.accuracy[-1][1]:.1%}")
        return text.append(f" (version {view.accuracy[-1][0]})", "dim")

    @property
    def _unicode(self) -> bool:
        return (self._console.encoding or "").lower().startswith("utf")

    def _width(self) -> int:
        return min(self._console.width, 100)


def time_table(rows: Sequence[tuple[str, float, str]], *, title: str) -> Table:
    """(what, seconds, note) as a table with bars' lengths by share."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("", style="dim")
    for what, seconds, note in rows:
        table.add_row(what, f"{seconds:.1f}", note)
    return table
