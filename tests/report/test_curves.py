"""Curves: a picture is made of what there is, and what there is not is refused."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from shoal.errors import DataError
from shoal.report.curves import Line, Mark, draw_curves
from shoal.report.facts import Facts


@pytest.mark.filterwarnings("error")
def test_a_metric_is_drawn(facts: Facts, tmp_path: Path) -> None:
    lines = [Line("central", 0.95), Line("alone", 0.4)]
    path = draw_curves(facts, tmp_path / "curves.png", lines=lines, mark=Mark(2, "half"))
    pixels = imread(path)[..., :3]
    assert pixels.shape[1] > 2 * pixels.shape[0] > 1000
    blue = np.array([0, 0x72, 0xB2]) / 255
    assert (np.abs(pixels - blue).max(-1) < 0.02).sum() > 500, "the curve is there"


def test_a_metric_of_one_version_is_drawn(facts: Facts, tmp_path: Path) -> None:
    assert draw_curves(facts, tmp_path / "loss.png", metric="train/loss", mark=Mark(77, "no such version")).exists()


def test_a_metric_that_was_not_measured_is_refused(facts: Facts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"accuracy.*got 'f1'"):
        draw_curves(facts, tmp_path / "f1.png", metric="f1")
    assert not list(tmp_path.iterdir())


def test_pyplot_is_not_touched() -> None:
    import subprocess
    import sys

    code = "import sys, shoal.report; assert 'matplotlib.pyplot' not in sys.modules; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
