"""A run's metric over rounds and over seconds, as a PNG. Matplotlib's Agg and its objects alone: no pyplot, no state.

The colours are Okabe and Ito's (2008), which people who see fewer colours tell apart; the lines differ in their dashes
too, and are named where they are rather than in a legend.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shoal.errors import DataError
from shoal.report.facts import Facts

BLUE: Final = "#0072B2"
VERMILION: Final = "#D55E00"
GREEN: Final = "#009E73"
INK: Final = "#333333"
PALE: Final = "#D9D9D9"
_STYLES: Final = ((VERMILION, (0, (6, 3))), (GREEN, (0, (1.5, 2))), (INK, (0, (4, 2, 1, 2))))
_CLOSE: Final = 0.06
"""Share of the axis within which two labels would touch."""


@dataclass(frozen=True, slots=True)
class Line:
    """A level to compare with."""

    label: str
    value: float


@dataclass(frozen=True, slots=True)
class Mark:
    """A version of note: ringed in both pictures, named in the right one."""

    version: int
    label: str


def draw_curves(
    facts: Facts,
    path: Path,
    *,
    metric: str = "accuracy",
    title: str = "",
    label: str = "federated",
    lines: Sequence[Line] = (),
    mark: Mark | None = None,
    as_percent: bool | None = None,
) -> Path:
    """Draws a metric over rounds (left) and over seconds at work (right).

    Args:
        facts: of the run.
        path: the PNG to write.
        metric: its name; the server's by plain name, a cohort's as `train/…`.
        title: above the picture; the task's name if empty.
        label: of the curve.
        lines: levels to compare with, drawn across; at most three.
        mark: a version of note.
        as_percent: the values are shares; None: if the metric is called an accuracy.

    Raises:
        DataError: the run has no such metric.
    """
    points = [point for point in facts.metrics.get(metric, ()) if point.version in facts.seconds]
    if not points:
        raise DataError(
            f"Expected a metric of run {facts.run.id} ({', '.join(facts.metrics) or 'it has none'}), got {metric!r}."
        )
    percent = metric.rpartition("/")[2] == "accuracy" if as_percent is None else as_percent
    figure = Figure(figsize=(9.6, 4.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    values = [point.value for point in points]
    panels = (
        (left, [float(point.version) for point in points], "round"),
        (right, [facts.seconds[point.version] for point in points], "seconds from the start"),
    )
    for axes, places, what in panels:
        _panel(axes, places, values, what, lines)
    _scale(left, values, lines, percent=percent)
    left.set_ylabel(metric.replace("/", ", "), color=INK)
    _write_under(left, panels[0][1], values, label, at=len(values) // 3)
    _name_lines(right, lines, percent=percent)
    if mark is not None and mark.version in (versions := [point.version for point in points]):
        at = versions.index(mark.version)
        for axes, places, _ in panels:
            axes.plot(places[at], values[at], "o", markersize=9, markerfacecolor="none", color=INK, zorder=4)
        _write_under(right, panels[1][1], values, mark.label, at=at, colour=INK)
    figure.suptitle(title or f"{facts.run.name}: {metric}", color=INK, fontsize=13, x=0.01, ha="left")
    figure.savefig(path)
    return path


def _panel(axes: Any, places: Sequence[float], values: Sequence[float], what: str, lines: Sequence[Line]) -> None:
    for line, (colour, dashes) in zip(lines, _STYLES, strict=False):
        axes.axhline(line.value, color=colour, linestyle=dashes, linewidth=1.6, zorder=1)
    few = len(values) < 40
    axes.plot(places, values, color=BLUE, linewidth=2, marker="o" if few else "", markersize=3.5, zorder=3)
    axes.set_xlim(0, max(places) * 1.02)
    axes.set_xlabel(what, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    plain(axes)


def plain(axes: Any) -> None:
    """Pale lines across, and no box around."""
    axes.grid(axis="y", color=PALE, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(PALE)
    axes.tick_params(colors=INK, length=0)


def _scale(axes: Any, values: Sequence[float], lines: Sequence[Line], *, percent: bool) -> None:
    everything = [*values, *(line.value for line in lines)]
    low, high = min(everything), max(everything)
    margin = (high - low) * 0.08 or abs(high) * 0.1 or 1.0
    low, high = low - margin, high + margin
    if percent:
        low, high = max(0.0, low), min(1.0, high)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_ylim(low, high)


def _write_under(
    axes: Any, places: Sequence[float], values: Sequence[float], text: str, *, at: int, colour: str = BLUE
) -> None:
    """Writes from a point to the right, below all of the curve that the text passes under."""
    reach = places[at] + (max(places) or 1.0) * 0.02 * (len(text) + 2)
    lowest = min(value for place, value in zip(places, values, strict=True) if places[at] <= place <= reach)
    axes.annotate(
        text, (places[at], lowest), xytext=(4, -9), textcoords="offset points", color=colour, va="top",
        weight="bold" if colour == BLUE else "normal", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def _name_lines(axes: Any, lines: Sequence[Line], *, percent: bool) -> None:
    """At the right end, above each line, or below it where another is close above."""
    low, high = axes.get_ylim()
    for line, (colour, _) in zip(lines, _STYLES, strict=False):
        crowded = any(0 < other.value - line.value < _CLOSE * (high - low) for other in lines)
        value = f"{line.value:.1%}" if percent else f"{line.value:.4g}"
        axes.annotate(
            f"{line.label} {value}", (1.0, line.value), xycoords=("axes fraction", "data"),
            xytext=(-2, -4 if crowded else 4), textcoords="offset points", ha="right", va="top" if crowded else "bottom",
            color=colour,
        )  # fmt: skip
