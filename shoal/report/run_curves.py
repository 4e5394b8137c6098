"""Metrics of one run or of several as one PNG: over rounds, over seconds at work, and over users where it was measured so.

Each metric is a row. A line is the metric; of a single run a shade reaches from the worst tenth of the users to the best. The
last column has the users in the newest version: of a single run how many are where, of several what share is at or below a
value, which keeps apart what bars would hide.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shoal.errors import DataError
from shoal.metric_names import HIGH_TAIL, LOW_TAIL, higher_is_better
from shoal.record.distribution import Distribution
from shoal.report.curves import BLUE, GREEN, INK, VERMILION, plain
from shoal.report.facts import Facts, Point

MOST_RUNS: Final = 8
_COLOURS: Final = (BLUE, VERMILION, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK, "#8C6D31")
Style = dict[str, Any]
_PERCENT: Final = FuncFormatter(lambda value, _: f"{value:.0%}")
_DASHES: Final = ("solid", (0, (6, 2)), (0, (1.5, 1.5)), (0, (5, 2, 1.5, 2)))


def draw_runs(runs: Sequence[tuple[str, Facts]], path: Path, *, metrics: Sequence[str], title: str = "") -> Path:
    """Draws metrics of runs.

    Args:
        runs: what each is called by, and its facts; at most `MOST_RUNS`.
        path: the PNG to write.
        metrics: a row each.
        title: above the picture; the tasks' names if empty.

    Raises:
        DataError: too many runs; or a metric that no run has.
    """
    if not 0 < len(runs) <= MOST_RUNS:
        raise DataError(f"Expected 1 to {MOST_RUNS} runs in a picture, got {len(runs)}. Choose some of them.")
    for metric in metrics:
        if not any(facts.metrics.get(metric) for _, facts in runs):
            known = sorted({name for _, facts in runs for name in facts.metrics})
            raise DataError(f"Expected a metric of the runs ({', '.join(known) or 'they have none'}), got {metric!r}.")
    with_users = any(facts.distributions.get(metric) for metric in metrics for _, facts in runs)
    columns = 3 if with_users else 2
    figure = Figure(figsize=(4.6 * columns + 0.4, 3.3 * len(metrics) + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(metrics), columns, squeeze=False)
    for metric, row in zip(metrics, grid, strict=True):
        _row(row, runs, metric)
    names = ", ".join(dict.fromkeys(facts.run.name for _, facts in runs))
    figure.suptitle(title or names, color=INK, fontsize=13, x=0.01, ha="left")
    if len(runs) > 1:
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(
            lines, labels, loc="outside upper right", ncols=min(4, len(runs)), frameon=False, labelcolor=INK, handlelength=3
        )  # fmt: skip
    figure.savefig(path)
    return path


def _row(row: Any, runs: Sequence[tuple[str, Facts]], metric: str) -> None:
    percent = metric.split("/")[-1] in ("accuracy", "hit_rate")
    is_only = len(runs) == 1
    newest: list[tuple[Distribution, Style]] = []
    for number, (label, facts) in enumerate(runs):
        style: Style = {"color": _COLOURS[number], "linestyle": _DASHES[number % len(_DASHES)]}
        points = [point for point in facts.metrics.get(metric, ()) if abs(point.value) < float("inf")]
        for axes, places in (
            (row[0], {p.version: float(p.version) for p in points}),
            (row[1], _seconds(facts, points)),
        ):
            _curve(axes, points, places, label, style)
            if is_only:
                _shade(axes, facts, metric, places, style)
        if found := facts.distributions.get(metric):
            newest.append((found[max(found)], style))
    for axes, what in zip(row, ("round", "seconds at work"), strict=False):
        axes.set_xlabel(what, color=INK)
        axes.set_xlim(left=0)
    row[0].set_ylabel(_spoken(metric), color=INK)
    row[0].xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    row[1].sharey(row[0])
    for axes in row:
        plain(axes)
    if percent:
        row[0].yaxis.set_major_formatter(_PERCENT)
    if len(row) == 3:
        _users(row[2], newest, metric, is_only=is_only, percent=percent)


def _curve(axes: Any, points: Sequence[Point], places: Mapping[int, float], label: str, style: Style) -> None:
    chosen = [point for point in points if point.version in places]
    axes.plot(
        [places[point.version] for point in chosen], [point.value for point in chosen], label=label, linewidth=1.8,
        marker="o" if len(chosen) < 40 else "", markersize=3, **style,
    )  # fmt: skip


def _shade(axes: Any, facts: Facts, metric: str, places: Mapping[int, float], style: Style) -> None:
    """From the low tenth of the users to the high one."""
    low, high = (
        {point.version: point.value for point in facts.metrics.get(metric + tail, ())} for tail in (LOW_TAIL, HIGH_TAIL)
    )
    shaded = [version for version in places if version in low and version in high]
    if shaded:
        axes.fill_between(
            [places[v] for v in shaded], [low[v] for v in shaded], [high[v] for v in shaded], color=style["color"], alpha=0.12,
            linewidth=0,
        )  # fmt: skip


def _users(
    axes: Any, newest: Sequence[tuple[Distribution, Style]], metric: str, *, is_only: bool, percent: bool
) -> None:
    """The users of the newest versions; nothing where they were not measured one by one."""
    if not newest:
        axes.set_axis_off()
        return
    for one, style in newest:
        shares = np.array(one.counts) / one.users
        if is_only:
            axes.bar(one.values, shares, width=one.step * 0.86, color=style["color"])
            worst = one.quantile(0.1 if higher_is_better(metric) else 0.9)
            axes.axvline(worst, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            axes.set_title(f"a tenth at {_value(worst, percent)} or worse", color=INK, fontsize=10, loc="left")
        else:
            axes.step(
                [one.values[0], *one.values, one.values[-1] + one.step],
                [0.0, *np.cumsum(shares), 1.0],
                where="post",
                linewidth=1.8,
                **style,
            )
    if not is_only:
        axes.axhline(0.1 if higher_is_better(metric) else 0.9, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_title("dashed: the worst tenth", color=INK, fontsize=10, loc="left")
    axes.set_ylabel("share of users" if is_only else "users at or below", color=INK)
    axes.set_xlabel(f"{metric.rpartition('/')[2]} of a user, newest version", color=INK)
    axes.yaxis.set_major_formatter(_PERCENT)
    if percent:
        axes.xaxis.set_major_formatter(_PERCENT)
    axes.set_ylim(bottom=0)


def _seconds(facts: Facts, points: Sequence[Point]) -> dict[int, float]:
    """A metric of version 0 was measured by the members of the first round, and known at the beginning."""
    return {p.version: facts.seconds.get(p.version, 0.0) for p in points if p.version in facts.seconds or not p.version}


def _value(value: float, percent: bool) -> str:
    return f"{value:.0%}" if percent else f"{value:.3g}"


def _spoken(metric: str) -> str:
    """A metric's name as people say it."""
    head, _, name = metric.rpartition("/")
    return {"": name, "left_out": f"{name}, users left out"}.get(head, f"{name}, {head}")
