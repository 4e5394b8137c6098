"""What the benchmark of accuracy decides by: what is measured on devices, which claims are borne out."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from benchmarks.accuracy import verdict
from benchmarks.accuracy_algorithms import ALGORITHMS, FEDAVG
from benchmarks.accuracy_devices import measured
from benchmarks.accuracy_problems import HELD_OUT, PROBLEMS
from shoal.policy import RoundPolicy
from shoal.task import Sum, Task


def _evaluate(params: Any, state: Any, batch: Any) -> dict[str, Sum]:
    near = jnp.exp(-jnp.abs(params["w"] - batch["x"]))
    return {"near": Sum(near, jnp.ones_like(near), (0.0, 1.0))}


def mean() -> Task:
    """One parameter that is drawn to the examples."""
    return Task(
        name="mean", init=lambda key: {"w": jnp.zeros(())}, evaluate=_evaluate,
        loss=lambda params, state, batch, key: jnp.square(params["w"] - batch["x"]),
        batch={"x": ((), "float32"), HELD_OUT: ((), "int32")}, local=shoal.Local(batch_size=4, epochs=20),
        rounds=RoundPolicy(goal=2, over_selection=1.0, minimum_group=2),
    )  # fmt: skip


def test_what_is_held_out_is_measured_on_and_not_trained_on() -> None:
    """Devices train towards 2 and hold out a 5: the model goes to 2, and its quality on a 5 is told."""
    fields = {"x": np.array([2, 2, 2, 2, 5], np.float32), HELD_OUT: np.array([0, 0, 0, 0, 1], np.int32)}
    found = shoal.simulate(measured(mean(), "near"), {"a": fields, "b": fields}, rounds=2)
    assert float(found.model["params/w"]) == pytest.approx(2.0, abs=0.01)
    first, second = (result.metrics for result in found.history)
    assert first["train/sent"] == pytest.approx(np.exp(-5), rel=1e-4)
    assert first["train/reached"] == pytest.approx(np.exp(-3), rel=0.05)
    assert second["train/sent"] == pytest.approx(first["train/reached"], rel=1e-3)


@pytest.mark.parametrize(
    ("claims", "measure", "row", "beside", "said"),
    [
        ("better", "quality", [0.8, 0.81, 0.82], [0.7, 0.72, 0.71], "yes"),
        ("better", "quality", [0.6, 0.61, 0.62], [0.7, 0.72, 0.71], "no: worse by 0.1"),
        ("better", "quality", [0.70, 0.72, 0.68], [0.71, 0.70, 0.70], "no: as good"),
        ("better", "quality", [0.72, 0.73, 0.68], [0.71, 0.70, 0.70], "no: as good"),
        ("as good", "quality", [0.699, 0.719, 0.709], [0.7, 0.72, 0.71], "yes"),
        ("as good", "quality", [0.6, 0.61, 0.62], [0.7, 0.72, 0.71], "no: worse by 0.1"),
        ("better", "rounds", [20, 25, 20], [30, 40, 35], "yes"),
        ("better", "rounds", [20, 25, np.inf], [30, 40, 35], "no: it does not always reach the target"),
        ("better", "seconds", [20, 25, 20], [30, np.inf, 35], "yes"),
        ("better", "reached", [np.nan] * 3, [0.7, 0.72, 0.71], ""),
    ],
)
def test_a_claim_is_borne_out_or_what_was_found_is_said(
    claims: str, measure: str, row: Sequence[float], beside: Sequence[float], said: str
) -> None:
    assert verdict(claims, measure, np.array(row), np.array(beside)) == said


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.name)
def test_each_row_makes_a_task_of_each_problem_and_stands_beside_another_row(algorithm: Any) -> None:
    names = [each.name for each in ALGORITHMS]
    assert names[0] == FEDAVG and len(set(names)) == len(names)
    assert algorithm.beside in names
    for problem in PROBLEMS:
        assert algorithm.task(problem, algorithm.settings()[-1]).evaluate is not None
