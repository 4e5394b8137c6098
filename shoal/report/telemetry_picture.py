"""When devices are there, by hour of the day, as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shoal.report.curves import BLUE, INK, PALE


def draw_hours(shares: Sequence[float], errors: Sequence[float], path: Path) -> Path:
    """Bars with their errors.

    Args:
        shares: of devices' days, one for each hour of UTC.
        errors: half the width of each one's interval.
        path: of the PNG.
    """
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(range(len(shares)), [100 * share for share in shares], color=BLUE)
    axes.errorbar(
        range(len(shares)),
        [100 * share for share in shares],
        yerr=[100 * error for error in errors],
        fmt="none",
        ecolor=INK,
        capsize=2,
    )
    axes.set_title("When devices are there", loc="left", color=INK)
    axes.set_xlabel("hour of the day, UTC", color=INK)
    axes.set_ylabel("% of devices' days", color=INK)
    axes.grid(color=PALE, linewidth=0.6, axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
