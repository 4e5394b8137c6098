"""What a run is like, for people: its card, its curves, its pictures. All of it is read from the record."""

from shoal.report.card import write_card
from shoal.report.comparison import Comparison, Result, compare
from shoal.report.curves import Line, Mark, draw_curves
from shoal.report.facts import Facts, Point, Usage, read_facts
from shoal.report.pictures import Shown, draw_pictures, terminal_pictures
from shoal.report.run_curves import draw_runs

__all__ = [
    "Comparison",
    "Facts",
    "Line",
    "Mark",
    "Point",
    "Result",
    "Shown",
    "Usage",
    "compare",
    "draw_curves",
    "draw_pictures",
    "draw_runs",
    "read_facts",
    "terminal_pictures",
    "write_card",
]
