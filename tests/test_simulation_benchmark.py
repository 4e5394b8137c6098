"""What the benchmark of simulation decides by: which rounds count, which curves agree, what becomes of a rival that fails."""

import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import simulation_turns
from benchmarks.simulation import agreement
from benchmarks.simulation_common import CONFIGS, is_timed, rounds_for, weights
from benchmarks.simulation_turns import RIVALS, Running, SystemFailed

ROUNDS = (5, 10, 15)


def curve(rng: np.random.Generator, final: float = 0.5) -> list[tuple[int, float]]:
    fell = [final + 2.0 * 0.5**number for number in ROUNDS]
    return [
        (0, 2.5),
        *((n, float(loss * np.exp(0.01 * rng.standard_normal()))) for n, loss in zip(ROUNDS, fell, strict=True)),
    ]


def test_a_curve_that_differs_by_its_seed_agrees() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert agreement([curve(rng) for _ in range(4)], curve(rng)) == ""


def test_a_curve_that_learns_less_does_not_agree() -> None:
    rng = np.random.default_rng(0)
    assert "standard deviations" in agreement([curve(rng) for _ in range(4)], curve(rng, final=0.6))


def test_what_does_not_learn_never_counts() -> None:
    flat = [(0, 2.5), *((number, 2.5) for number in ROUNDS)]
    assert "does not fall" in agreement([flat, flat], flat)


def test_one_seed_says_nothing_of_noise() -> None:
    rng = np.random.default_rng(0)
    assert agreement([curve(rng)], curve(rng))


@pytest.mark.parametrize("timed", [1, 7, 20])
def test_rounds_hold_as_many_timed_ones_as_asked_and_end_with_an_evaluation(timed: int) -> None:
    rounds = rounds_for(timed, 5)
    assert rounds % 5 == 0
    assert sum(is_timed(number, 5) for number in range(1, rounds + 1)) >= timed


def test_the_nets_have_the_sizes_of_the_published_ones() -> None:
    sizes = {config: sum(array.size for array in weights(config).values()) for config in CONFIGS}
    assert sizes == {"cnn": 1_626_442, "lenet": 62_006, "mlp": 98_666, "no-op": 1}


def test_each_rival_has_a_recipe_and_a_program() -> None:
    recipes = (Path(simulation_turns.__file__).parent / "peers" / "setup.sh").read_text()
    for rival in RIVALS:
        assert f"  {rival.environment})" in recipes
        assert (simulation_turns.SCRIPTS / rival.script).exists()


def test_a_rival_that_fails_says_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "pfl" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'No module named pfl' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(simulation_turns, "PEERS", tmp_path)
    with pytest.raises(SystemFailed, match="No module named pfl"), Running(RIVALS[0], [], time.monotonic() + 30):
        pass
