"""What was spent of privacy, release by release, as a PNG."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shoal.report.curves import BLUE, INK, PALE, VERMILION
from shoal.report.privacy_spent import Spent


def draw_spent(spent: Spent, path: Path) -> Path:
    """Epsilon over releases, with the budget where there is one, as a PNG."""
    values = spent.curve()
    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.step([0, *range(1, len(values) + 1)], [0.0, *values], where="post", color=BLUE, linewidth=2)
    if spent.privacy.epsilon is not None:
        axes.axhline(spent.privacy.epsilon, color=VERMILION, linestyle=(0, (6, 3)), linewidth=1.5)
        axes.annotate(
            f"budget {spent.privacy.epsilon:g}",
            (0, spent.privacy.epsilon),
            xytext=(4, 4),
            textcoords="offset points",
            color=VERMILION,
        )
    axes.set_title(
        f"Privacy spent: epsilon {spent.epsilon:.3g} at delta {spent.privacy.delta:g}", loc="left", color=INK
    )
    axes.set_xlabel("releases", color=INK)
    axes.set_ylabel("epsilon", color=INK)
    axes.set_ylim(bottom=0)
    axes.margins(x=0.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=PALE, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
