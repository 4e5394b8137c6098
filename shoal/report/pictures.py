"""A few examples as pictures, with what the model says and what is true: in the terminal, and as a PNG.

In the terminal a character is two pixels high: the upper half block, its ink the upper pixel, its ground the lower one.
Where there is no colour, five shades of a character do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.text import Text

from shoal.report.curves import BLUE, INK, VERMILION

CELLS: Final = 14
"""Width of a picture in the terminal, in characters; its height is half."""
_SHADES: Final = " ░▒▓█"


@dataclass(frozen=True, eq=False)
class Shown:
    """One picture."""

    image: np.ndarray
    """(height, width) or (height, width, 1), uint8."""
    said: str
    """What the model says."""
    truth: str

    @property
    def is_right(self) -> bool:
        return self.said == self.truth


def terminal_pictures(shown: Sequence[Shown], *, columns: int = 5, colour: bool = True) -> list[Text]:
    """Lines for rich: rows of pictures, each with its prediction and, where that is wrong, the truth.

    Args:
        shown: the pictures.
        columns: pictures side by side; five are 74 characters wide.
        colour: draw with colours; else with shades of one character.
    """
    lines = []
    for start in range(0, len(shown), columns):
        row = shown[start : start + columns]
        drawn = [_drawn(one.image, colour=colour) for one in row]
        lines += [Text(" ").join(cells) for cells in zip(*drawn, strict=True)]
        lines.append(Text(" ").join(_told(one) for one in row))
        lines.append(Text(" ").join(_truth(one) for one in row))
    return lines


def draw_pictures(shown: Sequence[Shown], path: Path, *, columns: int = 5) -> Path:
    """Writes the pictures as a PNG, prediction above each, the truth below where that is wrong."""
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.75 * columns, 2.15 * rows), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, one in zip(figure.subplots(rows, columns, squeeze=False).flat, shown, strict=False):
        axes.imshow(one.image.reshape(one.image.shape[:2]), cmap="gray", vmin=0, vmax=255)
        axes.set_title(one.said, color=BLUE if one.is_right else VERMILION, fontsize=11)
        axes.set_xlabel("right" if one.is_right else f"is: {one.truth}", color=INK, fontsize=9)
    for axes in figure.axes:
        axes.set_xticks([])
        axes.set_yticks([])
    figure.savefig(path)
    return path


def _drawn(image: np.ndarray, *, colour: bool) -> list[Text]:
    """A picture in CELLS / 2 lines of CELLS characters."""
    pixels = _shrunk(image, CELLS)
    lines = []
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        line = Text()
        for up, down in zip(upper.tolist(), lower.tolist(), strict=True):
            if colour:
                line.append("▀", f"rgb({up},{up},{up}) on rgb({down},{down},{down})")
            else:
                line.append(_SHADES[(up + down) // 2 * len(_SHADES) // 256])
        lines.append(line)
    return lines


def _shrunk(image: np.ndarray, side: int) -> np.ndarray:
    """A grey picture as (side, side) uint8: the mean of what falls into each cell, or the nearest pixel."""
    height, width = image.shape[:2]
    grey = image.reshape(height, width)
    if height % side == 0 and width % side == 0:
        made: np.ndarray = grey.reshape(side, height // side, side, width // side).mean((1, 3)).astype(np.uint8)
        return made
    rows, columns = np.arange(side) * height // side, np.arange(side) * width // side
    nearest: np.ndarray = grey[rows][:, columns]
    return nearest


def _told(one: Shown) -> Text:
    mark, style = ("✓", "green") if one.is_right else ("✗", "red")
    return Text(f"{mark} {one.said}"[:CELLS].ljust(CELLS), style)


def _truth(one: Shown) -> Text:
    return Text(("" if one.is_right else f"is {one.truth}")[:CELLS].ljust(CELLS), "dim")
