"""Equinox modules as tasks: their numbers, their noise, their state."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.errors import MissingExtra
from shoal.local import model_specs
from shoal.plan.build import build

eqx = pytest.importorskip("equinox", reason="the extra equinox is not installed")

FIELDS: dict[str, tuple[tuple[int, ...], str]] = {"x": ((3,), "float32"), "label": ((), "int32")}
KEY = jax.random.key(1)


def task(module: Any, **settings: Any) -> shoal.Task:
    settings = {"loss": "softmax_cross_entropy", "batch": FIELDS, "name": "equinox", **settings}
    return shoal.Task.from_equinox(module, local=shoal.Local(batch_size=4, steps_per_block=1), **settings)


def examples() -> dict[str, Any]:
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return {"x": jnp.asarray(x), "label": jnp.array([0, 1, 0, 1], jnp.int32), "mask": jnp.ones(4, bool)}


class Dropped(eqx.Module):
    first: Any
    dropout: Any
    order: jax.Array

    def __init__(self, key: Any) -> None:
        self.first = eqx.nn.Linear(3, 2, key=key)
        self.dropout = eqx.nn.Dropout(0.5)
        self.order = jnp.array([2, 0, 1])

    def __call__(self, x: Any, *, key: Any = None) -> Any:
        return self.first(self.dropout(x[self.order], key=key))


class Normed(eqx.Module):
    norm: Any
    out: Any

    def __init__(self, key: Any, mode: str) -> None:
        self.norm = eqx.nn.BatchNorm(3, "batch", momentum=0.5, mode=mode)
        self.out = eqx.nn.Linear(3, 2, key=key)

    def __call__(self, x: Any, state: Any) -> Any:
        x, state = self.norm(x, state)
        return self.out(x), state


def test_a_made_module_keeps_its_weights_and_a_function_makes_new_ones() -> None:
    module = Dropped(KEY)
    kept, made = task(module), task(Dropped)
    for one, seed, same in ((kept, 0, True), (kept, 2, True), (made, 1, True), (made, 2, False)):
        weight = one.variables(jax.random.key(seed)).params["first/weight"]
        assert np.array_equal(weight, module.first.weight) == same
    assert [spec.name for spec in model_specs(kept)] == [
        "params/first/bias",
        "params/first/weight",
        "state/fixed/order",
    ]


def test_predictions_are_the_module_s() -> None:
    module, batch = Dropped(KEY), examples()
    made = task(module)
    assert made.predict is not None
    found = made.predict(*made.variables(KEY), batch)
    expected = jax.vmap(eqx.nn.inference_mode(module))(batch["x"])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_noise_comes_from_the_key_and_differs_between_examples() -> None:
    made = task(Dropped, loss=lambda outputs, labels: outputs[:, 0])
    batch = {**examples(), "x": jnp.ones((4, 3))}
    one, same, other = (made.losses(*made.variables(KEY), batch, jax.random.key(k)).per_example for k in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other) and len(set(np.asarray(one).tolist())) > 1


@pytest.mark.parametrize("mode", ["ema", "batch"])
def test_statistics_are_state_and_counters_can_be_averaged(mode: str) -> None:
    made, batch = task(eqx.nn.make_with_state(lambda key: Normed(key, mode))), examples()
    assert not made.heeds_mask, "eqx.nn.BatchNorm takes no mask"
    assert all(s.dtype == "float32" for s in model_specs(made)) and made.bound(f"state/kept/{COUNTERS[mode]}") == 2**20
    params, state = made.variables(KEY)
    model, expected = eqx.nn.make_with_state(lambda key: Normed(key, mode))(KEY)
    for step in range(2):
        mapped = jax.vmap(model, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        _, expected = mapped(batch["x"] + step, expected)
        state = made.losses(params, state, {**batch, "x": batch["x"] + step}, KEY).state
    index = model.norm.ema_state_index if mode == "ema" else model.norm.batch_state_index
    name = "norm/ema_state_index" if mode == "ema" else "norm/batch_state_index"
    for found, value in zip(state["kept"][name], expected.get(index), strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5)
    assert float(state["kept"][COUNTERS[mode]]) == (0 if mode == "ema" else 2)


COUNTERS = {"ema": "norm/ema_first_time_index", "batch": "norm/batch_counter"}


@pytest.mark.slow
def test_it_trains_through_its_plan() -> None:
    made = task(Dropped).replace(rounds=shoal.RoundPolicy(goal=2, minimum_group=2, over_selection=1.0))
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 40, 3)).astype(np.float32)
    members = {f"m{i}": {"x": x[i], "label": (x[i, :, 0] > 0).astype(np.int32)} for i in range(4)}
    seen = shoal.simulate(made, members, rounds=8, held_out=members["m0"]).history
    assert seen[-1].metrics["loss"] < seen[0].metrics["loss"]
    assert build(made).plan.manifest.training.whole_batches is False


def test_what_is_no_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({}, lambda key: 3, (Dropped(KEY), 4)):
        with pytest.raises(ValueError, match=r"Expected an eqx\.Module"):
            task(wrong)
    with pytest.raises(
        ValueError, match=r"Expected the state of Normed to come with it: eqx\.nn\.make_with_state\(Normed\)"
    ):
        task(lambda key: Normed(key, "batch"))
    monkeypatch.setitem(sys.modules, "equinox", None)
    with pytest.raises(MissingExtra, match=r"Task\.from_equinox needs equinox.*shoal\[equinox\]"):
        task(Dropped)
