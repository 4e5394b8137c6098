"""Personal models, and what devices measure of what they are left with."""

from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal.data.split import held_out_part
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.train import train
from shoal.simulate import engine
from shoal.simulate.device_states import DeviceStates, states_folder
from shoal.simulate.fused import Layout
from tests.algorithms import reference
from tests.algorithms.problem import MEMBERS, RATE, held_out, population, task
from tests.algorithms.ways import Ways, close, cohorts, initial


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_personal_models_are_those_of_the_paper(lam: float, tmp_path: Path) -> None:
    """Without a pull (lam = 0) they are those of local training alone."""
    ways = Ways(shoal.ditto(task(), lam=lam))
    made = ways.taken_up(tmp_path, rounds=4, halts_after=2)
    everybody = [*_first(ways), *cohorts(made)]
    expected = reference.personal(initial(task()), everybody, lam=lam)
    states = DeviceStates(ways.built.plan.manifest.device_state, MEMBERS, states_folder(tmp_path, made.run_id))
    states.settle(4)
    assert len(expected) == len(MEMBERS)
    for member, model in expected.items():
        found = states.read(member)
        assert found is not None
        for name, value in model.items():
            np.testing.assert_allclose(found[f"personal/private/params/{name}"], value, rtol=1e-4, atol=1e-5)


def _first(ways: Ways) -> list[tuple[str, ...]]:
    """The cohorts of the first two rounds: those of a run that is not taken up."""
    return cohorts(ways.simulate(rounds=2))


def loss_of(model: reference.Model, member: str, *, is_held_out: bool) -> tuple[float, int]:
    examples = population()[member]
    where = held_out_part(len(examples), fraction=0.25, is_held_out=is_held_out)
    chosen = examples.take(where)
    rest = chosen["x"] @ model["w"] + model["b"] - chosen["y"]
    return float(0.5 * np.sum(np.square(rest))), len(where)


def test_devices_measure_what_they_hold_after_training() -> None:
    made = Ways(shoal.measured(task(local=held_out()))).simulate(rounds=1)
    model, total, count = initial(task()), 0.0, 0
    for member in made.history[0].members:
        reached = reference.sgd(model, reference.batches(0, member, holdout=0.25))
        value, number = loss_of(reached, member, is_held_out=True)
        total, count = total + value, count + number
    assert made.history[0].metrics["train/held_out/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("measured", [False, True])
def test_an_evaluation_measures_the_model_as_it_is_sent(measured: bool) -> None:
    train_on = task(local=held_out())
    built = build(shoal.evaluation(shoal.measured(train_on) if measured else train_on))
    runner, manifest = JaxRunner(built.plan), built.plan.manifest
    runner.set_model("m", built.model)
    update = train(runner, manifest, "m", population()["m4"], None, seed=bytes(32), member="m4")
    model = {name.removeprefix("params/"): value.astype(np.float64) for name, value in built.model.items()}
    value, number = loss_of(model, "m4", is_held_out=True)
    assert float(update.sums["metric/loss/denominator"]) == number
    assert float(update.sums["metric/loss/numerator"]) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("steps", [1, 3])
def test_an_evaluation_fine_tunes_before_it_measures(steps: int) -> None:
    built = build(shoal.evaluation(task(local=held_out()), steps=steps))
    runner, manifest = JaxRunner(built.plan), built.plan.manifest
    runner.set_model("m", built.model)
    update = train(runner, manifest, "m", population()["m4"], None, seed=bytes(32), member="m4")
    model = {name.removeprefix("params/"): value.astype(np.float64) for name, value in built.model.items()}
    for batch in _batches(bytes(32), "m4")[:steps]:
        model = reference.plus(model, reference.gradient(model, batch), -RATE)
    value, number = loss_of(model, "m4", is_held_out=True)
    assert update.weight == number and float(update.sums["metric/loss/denominator"]) == number
    assert float(update.sums["metric/loss/numerator"]) == pytest.approx(value, rel=1e-5)
    assert not any(name.startswith("delta/") for name in update.sums)


def _batches(seed: bytes, member: str) -> list[reference.Batch]:
    """As `reference.batches`, of a seed."""
    from shoal.plan.train import member_randomness

    examples, rng = population()[member], member_randomness(seed, member).rng
    chosen = examples.take(held_out_part(len(examples), fraction=0.25, is_held_out=False))
    order = rng.permutation(len(chosen["x"]))
    return [(chosen["x"][order[i : i + 4]], chosen["y"][order[i : i + 4]]) for i in range(0, len(order), 4)]


@pytest.mark.slow
def test_the_fused_engine_measures_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ways = Ways(shoal.measured(shoal.ditto(task(local=held_out()), lam=0.1)))
    expected = ways.simulate(rounds=3)
    assert {"train/loss", "train/personal/loss", "train/held_out/loss"} <= set(expected.history[-1].metrics)
    for layout in (Layout(devices=1, together=3), Layout(devices=2, together=1)):
        monkeypatch.setattr(engine, "cached", lambda key, layout=layout: layout)
        made = ways.fused(rounds=3)
        close(made.model, expected.model)
        for one, other in zip(made.history, expected.history, strict=True):
            for name, value in other.metrics.items():
                assert one.metrics[name] == pytest.approx(value, rel=1e-4), name


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="trains on all examples"):
        shoal.measured(task())
    with pytest.raises(ValueError, match="no `evaluate`"):
        shoal.measured(task(local=held_out(), evaluate=None))
    with pytest.raises(ValueError, match="ditto does not go with fedprox"):
        shoal.ditto(shoal.fedprox(task()))
    with pytest.raises(ValueError, match="plain local training for scaffold"):
        shoal.scaffold(shoal.ditto(task()), devices=5)
