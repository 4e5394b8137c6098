"""A virtual run as a PNG: accuracy (or versions) over virtual time, check-ins over the day, what became of the work."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from shoal.report.curves import BLUE, GREEN, INK, PALE, VERMILION
from shoal.simulate.virtual import SLOT_S, Tally

FATES: Final = {
    "used": ("in a commit", GREEN),
    "dropped": ("lost with its device", PALE),
    "aborted": ("aborted by the server", VERMILION),
    "unused": ("discounted or refused", BLUE),
}


def draw_virtual(tally: Tally, curve: Sequence[tuple[float, float]], path: Path, *, until_s: float) -> Path:
    """Draws a virtual run.

    Args:
        tally: what it came to.
        curve: (virtual seconds, accuracy); empty where nothing was trained: then versions are drawn.
        path: the PNG to write.
        until_s: its length in virtual seconds.
    """
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    progress, day, fates = figure.subplots(1, 3, width_ratios=(5, 5, 4))
    unit_s, unit = (3600.0, "hours") if until_s > 7200.0 else (60.0, "minutes")
    if curve:
        progress.plot([time_s / unit_s for time_s, _ in curve], [value for _, value in curve], color=BLUE)
        progress.yaxis.set_major_formatter(PercentFormatter(1.0))
        progress.set_title("accuracy over virtual time", loc="left", color=INK)
    else:
        times = [time_s / unit_s for time_s, _, _ in tally.commits]
        progress.plot(times, range(1, len(times) + 1), color=BLUE)
        progress.set_title("versions over virtual time", loc="left", color=INK)
    progress.set_xlabel(unit)
    slots = sorted(tally.check_ins)
    counts = [tally.check_ins[slot] for slot in slots]
    day.bar([slot / unit_s for slot in slots], counts, width=SLOT_S / unit_s, color=PALE, align="edge")
    day.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    day.set_xlabel(unit)
    day.set_title(f"check-ins in {SLOT_S // 60} minutes", loc="left", color=INK)
    _draw_fates(fates, tally.seconds)
    for axes in (progress, day, fates):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    return path


def _draw_fates(axes: Axes, seconds: dict[str, float]) -> None:
    trained = sum(seconds[fate] for fate in FATES) or 1.0
    for row, (fate, (label, color)) in enumerate(reversed(FATES.items())):
        share = seconds[fate] / trained
        axes.barh(row, share, height=0.45, color=color, edgecolor=INK)
        axes.text(share + 0.02, row, f"{share:.1%}", va="center", color=INK)
        axes.text(0.015, row + 0.27, label, va="bottom", color=INK, fontsize=9)
    axes.set_xlim(0.0, 1.2)
    axes.set_ylim(-0.4, len(FATES) - 0.3)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title("device time trained", loc="left", color=INK)
