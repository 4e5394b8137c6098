"""Pictures in the terminal and as a PNG."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from shoal.report.pictures import CELLS, Shown, draw_pictures, terminal_pictures


def _half(side: int = 28) -> np.ndarray:
    """White above, black below."""
    image = np.zeros((side, side, 1), np.uint8)
    image[: side // 2] = 255
    return image


def _printed(shown: list[Shown], *, colour: bool) -> str:
    console = Console(width=100, color_system="truecolor" if colour else None, force_terminal=colour)
    with console.capture() as capture:
        for line in terminal_pictures(shown, colour=colour):
            console.print(line)
    return capture.get()


@pytest.mark.parametrize("side", [8, 13, 28])
def test_shades_follow_the_pixels(side: int) -> None:
    lines = _printed([Shown(_half(side), "Bag", "Bag")], colour=False).splitlines()
    assert lines[0].rstrip() == "█" * CELLS and lines[6].strip() == ""
    assert lines[7].startswith("✓ Bag")


def test_a_wrong_prediction_names_the_truth() -> None:
    text = _printed([Shown(_half(), "Coat", "Shirt"), Shown(_half(), "Bag", "Bag")], colour=False)
    assert "✗ Coat" in text and "is Shirt" in text and "is Bag" not in text


def test_colours_are_greys() -> None:
    assert "38;2;255;255;255" in _printed([Shown(_half(), "Bag", "Bag")], colour=True)


def test_rows_hold_five() -> None:
    lines = terminal_pictures([Shown(_half(), "Bag", "Bag")] * 7)
    assert len(lines) == 2 * (CELLS // 2 + 2)
    assert max(line.cell_len for line in lines) == 5 * CELLS + 4


def test_a_png_is_written(tmp_path: Path) -> None:
    path = draw_pictures([Shown(_half(), "Coat", "Shirt")] * 7, tmp_path / "pictures.png")
    assert path.stat().st_size > 1000
