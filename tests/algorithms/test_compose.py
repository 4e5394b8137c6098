"""Algorithms that go together are each what they are alone; those that do not are refused."""

from pathlib import Path

import pytest

import shoal
from shoal.simulate import engine
from shoal.simulate.fused import Layout
from shoal.task import Task
from tests.algorithms.problem import MEMBERS, task
from tests.algorithms.ways import Ways, close, same_bits


def all_together(*, mu: float, share: float) -> Task:
    corrected = shoal.scaffold(shoal.fedprox(task(), mu=mu), devices=len(MEMBERS))
    return shoal.compressed(corrected, "top_k", share=share)


@pytest.fixture(scope="module")
def ways() -> Ways:
    return Ways(all_together(mu=0.2, share=0.4))


@pytest.mark.slow
def test_with_neutral_settings_they_are_the_one_that_is_left() -> None:
    made = Ways(all_together(mu=0.0, share=1.0)).simulate(rounds=3).model
    same_bits(made, Ways(shoal.scaffold(task(), devices=len(MEMBERS))).simulate(rounds=3).model)


@pytest.mark.slow
def test_on_a_fleet_in_one_program_and_resumed(ways: Ways, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cached", lambda key: Layout(devices=1, together=3))
    whole = ways.simulate(rounds=4).model
    close(ways.fused(rounds=4).model, whole)
    same_bits(ways.taken_up(tmp_path, rounds=4, halts_after=3).model, whole)
    same_bits(ways.on_a_fleet(rounds=2), ways.simulate(rounds=2, exactly=True).model)
