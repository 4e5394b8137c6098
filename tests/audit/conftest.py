"""What the noise of audits is held against."""

from collections.abc import Mapping

import numpy as np
import pytest

import shoal
from shoal.aggregate import correlated_noise
from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.correlated_noise import schedule_of
from shoal.privacy.correlated import tree_sensitivity


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Standard deviations of the correlated noise that sums get, sum by sum."""
    found, inner = list[float](), correlated_noise.with_noise

    def look(sums: Accumulator, noise: Mapping[str, np.ndarray], *, divisor: int) -> Accumulator:
        found.append(float(np.std(np.concatenate([noise[name] * sums.fixed[name].unit for name in noise]))))
        return inner(sums, noise, divisor=divisor)

    monkeypatch.setattr(correlated_noise, "with_noise", look)
    return found


def stddev_of(task: shoal.Task) -> float:
    """Of a round's noise by the tree, as the task itself has it."""
    correlated, clip_norm = task.privacy.correlated, task.privacy.norm_bound
    assert correlated is not None and clip_norm is not None
    schedule = schedule_of(correlated, task.rounds.min_separation)
    return task.privacy.noise_multiplier * clip_norm * tree_sensitivity(schedule)
