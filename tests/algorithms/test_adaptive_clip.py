"""The clip norm that follows a quantile: it finds it, no algorithm or server rule sees it, and only the model leaves a run."""

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.aggregate.commit import scale_of
from shoal.clip_norm import LOG_SCALE
from shoal.fleet.host import Host
from shoal.plan.build import build
from shoal.policy import Late, Privacy, ServerRule
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import put_tensors, view_tensors
from shoal.report.facts import read_facts
from shoal.simulate.engine import simulate
from shoal.task import Task
from shoal.tensors import Index
from tests.algorithms.problem import MEMBERS, held_out, task
from tests.algorithms.ways import KEYS, Ways, close, simulated
from tests.test_one_task import in_one_process

UNREACHED = Privacy(clip_norm=shoal.AdaptiveClip(initial=40.0, learning_rate=0.9))


@pytest.mark.parametrize(
    "make",
    [
        lambda privacy: shoal.scaffold(task(privacy=privacy), devices=len(MEMBERS)),
        lambda privacy: task(privacy=privacy, local=replace(task().local, partial="fednova")),
        lambda privacy: task(privacy=privacy, server=ServerRule(kind="sgd", momentum=0.9)),
        lambda privacy: task(privacy=privacy, server=optax.adam(0.05)),
    ],
    ids=["scaffold", "fednova", "momentum", "a program"],
)
def test_a_norm_that_nothing_reaches_changes_nothing_though_it_moves(make: Callable[[Privacy], Task]) -> None:
    made, known = simulated(make(UNREACHED), rounds=3), simulated(make(Privacy()), rounds=3)
    assert made.pop(LOG_SCALE) == pytest.approx(-0.45 * 3)
    close(made, known, rtol=1e-5)


def test_the_scale_is_rounded_alike_on_every_machine() -> None:
    blobs = MemoryStore().blobs
    for value, exact in ((0.0, 1.0), (1.0, math.e), (-2.5, 0.0820849986238988), (10.0, 22026.465794806718)):
        index = put_tensors(blobs, {LOG_SCALE: np.asarray(value, np.float32)})
        assert scale_of(index, blobs) == exact
    assert scale_of(Index(()), blobs) == 1.0


def of_norms(norms: np.ndarray, clip: shoal.AdaptiveClip, *, goal: int, noise: float = 0.0) -> tuple[Task, Any]:
    """A task whose devices have updates of just these norms, in directions that nearly cancel."""

    def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return batch["x"] @ params["w"]

    angles = np.linspace(0.0, 2 * np.pi, len(norms), endpoint=False)
    sent = (norms * np.stack([np.cos(angles), np.sin(angles)])).T.astype(np.float32)
    made = Task(
        name="norms", init=lambda key: {"w": jnp.zeros((2,))}, loss=loss, batch={"x": ((2,), "float32")},
        local=shoal.Local(optimizer=optax.sgd(1.0), batch_size=1, steps_per_block=1, weighting="uniform"),
        rounds=shoal.RoundPolicy(goal=goal, over_selection=1.0),
        privacy=Privacy(clip_norm=clip, noise_multiplier=noise),
    )  # fmt: skip
    return made, {f"d{at:03d}": {"x": row[None]} for at, row in enumerate(sent)}


@pytest.mark.parametrize(
    ("initial", "quantile", "noise"),
    [
        pytest.param(0.1, 0.5, 0.0, id="from below", marks=pytest.mark.slow),
        pytest.param(60.0, 0.2, 0.0, id="from above", marks=pytest.mark.slow),
        pytest.param(2.0, 0.8, 1.0, id="through noise"),
    ],
)
def test_the_norm_finds_its_quantile(initial: float, quantile: float, noise: float) -> None:
    norms = np.random.default_rng(0).lognormal(1.0, 0.5, 120)
    chosen, users = of_norms(norms, shoal.AdaptiveClip(initial=initial, quantile=quantile), goal=60, noise=noise)
    store = MemoryStore()
    done = simulate(chosen, shoal.data.Population.from_arrays(users), rounds=90, store=store)
    found = [row.value for row in store.metrics(done.run_id) if row.name == "train/clip_norm"]
    assert len(found) == 90 and found[0] == pytest.approx(initial)
    assert np.mean(norms <= np.median(found[-30:])) == pytest.approx(quantile, abs=0.08)
    steps = np.abs(np.diff(np.log(found)))
    assert noise or np.max(steps) <= 0.2 * max(quantile, 1 - quantile) * (1 + 1e-5)


@pytest.mark.parametrize(("norm", "end"), [(0.0, 0.5), (1e30, 2.0)], ids=["zero", "huge"])
def test_the_norm_stays_within_what_is_said_whatever_devices_send(norm: float, end: float) -> None:
    clip = shoal.AdaptiveClip(initial=1.0, learning_rate=1.0, lowest=0.5, highest=2.0)
    chosen, users = of_norms(np.full(8, norm), clip, goal=8)
    store = MemoryStore()
    done = simulate(chosen, shoal.data.Population.from_arrays(users), rounds=6, store=store)
    found = [row.value for row in store.metrics(done.run_id) if row.name == "train/clip_norm"]
    assert found[-1] == pytest.approx(end, rel=1e-5)
    assert np.all(np.isfinite(done.model["params/w"]))


def test_a_fleet_tells_the_norm_of_each_version_too() -> None:
    ways = Ways(task(privacy=Privacy(clip_norm=shoal.AdaptiveClip(initial=0.3))))
    store, run_id = ways._begin(ways._built(True), 2)
    asyncio.run(ways._serve(Host(store, run_id, KEYS, call_program=ways.runner.call), in_one_process))
    told = {row.version: row.value for row in store.metrics(run_id) if row.name == "train/clip_norm"}
    first = store.get_commit(run_id, 1).model
    scale = view_tensors(store.blobs, first)[LOG_SCALE]
    assert told == {0: 0.3, 1: pytest.approx(0.3 * np.exp(scale))} and scale > 0


def test_only_the_model_leaves_a_run(tmp_path: Path) -> None:
    chosen = task(privacy=Privacy(clip_norm=shoal.AdaptiveClip(initial=0.3)))
    users = {f"u{at}": {"x": np.full((4, 3), at, np.float32), "y": np.ones((4, 2), np.float32)} for at in range(3)}
    done = shoal.simulate(chosen, users, rounds=2, folder=tmp_path / "run", held_out=users["u1"], progress=False)
    model = shoal.load(tmp_path / "run")
    assert set(done.model) == set(model.tensors) == {"params/w", "params/b"}
    assert read_facts(tmp_path / "run").parameters == 8
    x = users["u2"]["x"]
    expected = x @ model.tensors["params/w"] + model.tensors["params/b"]
    np.testing.assert_allclose(model.predict({"x": x}), expected, rtol=1e-5)
    model.save(tmp_path / "model.safetensors")
    assert set(shoal.weights.read_safetensors(tmp_path / "model.safetensors")) == {"params/w", "params/b"}


def test_versions_are_evaluated_on_devices_with_what_is_in_their_line() -> None:
    trained = task(local=held_out(), privacy=Privacy(clip_norm=shoal.AdaptiveClip(initial=0.3)))
    for measure in (shoal.evaluation(trained), shoal.evaluation(trained, steps=2)):
        made = build(measure, seed=0).plan.manifest
        assert made.broadcast == build(trained, seed=0).plan.manifest.broadcast
        assert all(spec.tensor.name.startswith("metric/") for spec in made.sums)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: task(privacy=p, rounds=replace(task().rounds, late=Late.discount(0.5, max_staleness=2))), "late=Late.. and buffer=0"),
        (lambda p: task(privacy=p, rounds=replace(task().rounds, late=Late.patch(max_staleness=2))), "a later version has another"),
        (lambda p: Ways(task(privacy=replace(p, delta_bound=0.1))), "element's bound below the initial norm .* got 0.1 for delta/params/b"),
        (lambda p: replace(p, noise_multiplier=4.0, clip_norm=replace(p.clip_norm, bit_stddev=2.0)), "bit_stddev > 2 .* the bit alone"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Callable[[Privacy], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(Privacy(clip_norm=shoal.AdaptiveClip(initial=0.3)))
