"""Whether an order pays, and how long its parts take."""

from pathlib import Path

import numpy as np
import pytest

from shoal.schedule.graph import Graph, Stage, Transfer
from shoal.schedule.guard import Guard
from shoal.schedule.oracle import Cost, DecayedMedian, Oracle, kept_as, read, write

GRAPH = Graph(
    transfers=(Transfer(name="a", size_bytes=1000), Transfer(name="b", size_bytes=3000)),
    stages=(Stage(name="one", needs=(0,)), Stage(name="two", after=(0,), needs=(1,))),
)
COSTS = (Cost(5e7, 1e6), Cost(1e8, 1e6))


def run(guard: Guard, ours_s: float, layer_s: float, steps: int, *, noise: float = 0.01, seed: int = 0) -> list[str]:
    rng, asked = np.random.default_rng(seed), []
    for _ in range(steps):
        which = guard.next()
        asked.append(which)
        guard.took(which, (ours_s if which == "ours" else layer_s) * float(1 + noise * rng.normal()))
    return asked


def test_what_is_not_foretold_to_pay_is_not_tried() -> None:
    guard = Guard(0.001, spent_s=1.0)
    assert guard.verdict.state == "off"
    assert set(run(guard, 1.0, 1.0, 30)) == {"layer"}
    assert "less than 1.0%" in guard.verdict.why


def test_what_pays_stays_on_and_says_when_it_has_paid() -> None:
    guard = Guard(0.1, spent_s=2.0, num_pairs=10)
    asked = run(guard, 0.9, 1.0, 60)
    assert asked[:4] == ["ours", "layer", "layer", "ours"]
    assert guard.verdict.state == "on"
    assert guard.verdict.gain == pytest.approx(0.11, abs=0.02)
    assert guard.verdict.breaks_even_at is not None
    assert 30 <= guard.verdict.breaks_even_at <= 55
    assert set(asked[21:]) == {"ours"}


@pytest.mark.parametrize("seed", range(5))
def test_what_does_not_pay_is_given_up(seed: int) -> None:
    guard = Guard(0.1, spent_s=0.0, num_pairs=20)
    asked = run(guard, 1.0, 1.0, 100, noise=0.02, seed=seed)
    assert guard.verdict.state == "off" or abs(guard.verdict.gain or 0) < 0.03
    assert len(asked) == 100


def test_what_slows_down_is_never_on() -> None:
    guard = Guard(0.1, spent_s=0.0)
    run(guard, 1.1, 1.0, 100)
    assert guard.verdict.state == "off"
    assert "not surely a gain" in guard.verdict.why


def test_it_is_measured_again() -> None:
    guard = Guard(0.1, spent_s=0.0, num_pairs=5, again_after=20)
    run(guard, 0.8, 1.0, 12)
    assert guard.verdict.state == "on"
    run(guard, 1.2, 1.0, 60)
    assert guard.verdict.state == "off"


def test_a_step_may_be_asked_for_before_the_last_is_done() -> None:
    guard = Guard(0.1, spent_s=0.0, num_pairs=5)
    ahead = [guard.next()]
    for _ in range(20):
        ahead.append(guard.next())
        which = ahead.pop(0)
        guard.took(which, 0.8 if which == "ours" else 1.0)
    assert guard.verdict.state == "on"


def test_the_median_follows_what_changes() -> None:
    median = DecayedMedian()
    assert median.value() is None
    for _ in range(20):
        median.add(1.0)
    median.add(50.0)
    assert median.value() == 1.0  # one that is off says nothing
    for _ in range(10):
        median.add(2.0)
    assert median.value() == 2.0


def test_estimates_give_way_to_measurements() -> None:
    oracle = Oracle(COSTS)
    first = oracle.times(GRAPH)
    assert first.stages.tolist() == [1_100_000, 2_100_000]
    assert not oracle.is_measured
    for stage in range(2):
        oracle.saw_stage(stage, 0.5)
    oracle.saw_sent(100, 1.0)  # too few bytes to say anything
    assert not oracle.is_measured
    oracle.saw_sent(1 << 20, 1.0)
    assert oracle.is_measured
    times = oracle.times(GRAPH)
    assert times.stages.tolist() == [500_000_000] * 2
    assert times.transfers.tolist() == [round(1e9 * 1000 / (1 << 20)), round(1e9 * 3000 / (1 << 20))]
    oracle.saw_step(0.8, 1.0)
    assert oracle.error() == pytest.approx(0.2)
    assert oracle.foretold(0.8) == pytest.approx(1.0)
    for _ in range(5):
        oracle.saw_step(0.8, 1.0)
    assert oracle.error() == pytest.approx(0.0)


def test_what_was_learned_is_kept_for_the_same_program_on_the_same_hardware(tmp_path: Path) -> None:
    oracle = Oracle(COSTS)
    oracle.saw_stage(0, 0.25)
    oracle.saw_sent(1 << 20, 0.5)
    name = kept_as(GRAPH, COSTS, {"platform": "cpu"})
    assert name != kept_as(GRAPH, COSTS, {"platform": "gpu"})
    assert name != kept_as(GRAPH, COSTS[::-1], {"platform": "cpu"})
    write(tmp_path / "deep" / name, oracle)
    again = read(tmp_path / "deep" / name, COSTS)
    assert again.to_json() == oracle.to_json()
    assert read(tmp_path / "deep" / name, COSTS[:1]).to_json() == Oracle(COSTS[:1]).to_json()
    (tmp_path / "broken").write_text("{")
    assert not read(tmp_path / "broken", COSTS).is_measured
    assert not read(tmp_path / "missing", COSTS).is_measured
