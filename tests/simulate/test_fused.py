"""The fused engine: what the sequential one computes, whatever the layout, cohort, sizes and kind of population."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import shoal
from examples import one_task
from shoal.data.store import Examples, Population
from shoal.errors import DataError, PlanError
from shoal.policy import Privacy
from shoal.record.memory import MemoryStore
from shoal.simulate import engine, fused
from shoal.simulate.cohort import ladder, packed
from shoal.simulate.engine import Simulation, go_on, simulate
from shoal.simulate.fused import Fused, Layout
from shoal.simulate.layout import MOST_TOGETHER, candidates, choose, default
from tests.simulate.test_engine import population, task

LAYOUTS = [Layout(devices=d, together=t) for d, t in ((1, 1), (2, 1), (3, 1), (1, 2), (1, 3), (2, 2))]


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(engine, "cached", lambda key: None)
    monkeypatch.setattr(engine, "cache", lambda key, layout: None)
    yield


def use(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "cached", lambda key: layout)


def same(one: Simulation, other: Simulation, *, atol: float = 1e-6) -> None:
    assert [r.members for r in one.history] == [r.members for r in other.history]
    for name, value in one.model.items():
        np.testing.assert_allclose(other.model[name], value, rtol=1e-5, atol=atol, err_msg=name)
    for before, after in zip(one.history, other.history, strict=True):
        assert before.metrics.keys() == after.metrics.keys()
        for name, metric in before.metrics.items():
            assert after.metrics[name] == pytest.approx(metric, rel=1e-4, abs=1e-5), name


def run(chosen: shoal.Task, members: Population, backend: Any, *, rounds: int = 3, seed: int = 1) -> Simulation:
    return simulate(chosen, members, rounds=rounds, store=MemoryStore(), seed=seed, backend=backend)


def in_one_array(members: Population) -> Population:
    """The same users, as parts of one array."""
    whole = Examples.concatenate([members[user] for user in members])
    ends = np.cumsum(list(members.sizes().values()))
    return Population.from_split(
        whole, {user: np.arange(end - len(members[user]), end) for user, end in zip(members, ends, strict=True)}
    )


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fednova": {"local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, epochs=3, partial="fednova")},
    "few examples": {"local": shoal.Local(optimizer=optax.adam(0.1), batch_size=2, epochs=2, max_examples=6)},
    "uniform": {"local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=3, weighting="uniform")},
    "whole batches": {"local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, drop_remainder=True)},
    "held out": {"local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, holdout=0.3)},
    "noise on examples": {
        "local": shoal.Local(optimizer=optax.adam(0.1), batch_size=4, epochs=2, weighting="uniform"),
        "privacy": Privacy(examples=shoal.ExamplePrivacy(clip_norm=0.5, noise_multiplier=1.0)),
    },
    "private": {"leaves": {"params/b": "private"}},
    "frozen": {"leaves": {"params/b": "frozen"}},
}


@functools.cache
def sequential(case: str) -> Simulation:
    return run(task(**CASES[case]), population(), "sequential")


LONG = ("noise on examples",)
NUMBERED = [pytest.param(n, marks=[pytest.mark.slow] if c in LONG else []) for n, c in enumerate(CASES)]


@pytest.mark.parametrize("number", NUMBERED, ids=list(CASES))
def test_it_does_what_the_sequential_engine_does(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = list(CASES)[number]
    use(LAYOUTS[-1 - number % 2], monkeypatch)
    members = in_one_array(population()) if number % 3 else population()
    same(sequential(case), run(task(**CASES[case]), members, "fused"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_does_so_with_any_layout(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    use(layout, monkeypatch)
    same(sequential("plain"), run(task(), population(), "fused"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[4], LAYOUTS[5]], ids=str)
def test_a_cohort_in_parts_has_the_bits_of_one_that_is_not(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    use(layout, monkeypatch)
    chosen = shoal.compressed(task(rounds=shoal.RoundPolicy(goal=5, minimum_group=3)), "top_k", share=0.5)
    whole = run(chosen, population(), "fused")
    monkeypatch.setattr(fused, "CHUNKS", 1)
    parts = run(chosen, population(), "fused")
    assert [r.metrics for r in parts.history] == [r.metrics for r in whole.history]
    for name, value in whole.model.items():
        np.testing.assert_array_equal(parts.model[name], value, err_msg=name)


@pytest.mark.slow
def test_a_model_with_state_and_randomness(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = run(one_task.task, one_task.population(), "sequential", rounds=2)
    for layout in (Layout(devices=1, together=1), Layout(devices=2, together=2)):
        use(layout, monkeypatch)
        same(slow, run(one_task.task, one_task.population(), "fused", rounds=2), atol=1e-5)


@pytest.mark.slow
def test_noise_on_examples_of_a_model_whose_convolutions_and_products_take_other_forms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init(key: jax.Array) -> dict[str, jax.Array]:
        shapes = {"conv": (3, 3, 1, 8), "wide": (4 * 4 * 8, 128), "head": (128, 4)}
        return {name: 0.2 * jax.random.normal(key, shape) for name, shape in shapes.items()}

    def loss(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        image = batch["image"] + 0.1 * jax.random.normal(key, batch["image"].shape)
        seen = jax.lax.conv_general_dilated(image, params["conv"], (2, 2), "SAME", dimension_numbers=layout)
        hidden = jax.nn.relu(jax.nn.relu(seen).reshape(seen.shape[0], -1) @ params["wide"])
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ params["head"], batch["label"])

    chosen = shoal.Task(
        name="forms", init=init, loss=loss, batch={"image": ((8, 8, 1), "float32"), "label": ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, steps_per_block=1, weighting="uniform"),
        rounds=shoal.RoundPolicy(goal=3, minimum_group=3),
        privacy=Privacy(examples=shoal.ExamplePrivacy(clip_norm=0.1, noise_multiplier=0.5)),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    members = Population.from_arrays({
        f"member-{i}": {"image": rng.normal(size=(6, 8, 8, 1)).astype(np.float32), "label": rng.integers(0, 4, 6).astype(np.int32)}
        for i in range(3)
    })  # fmt: skip
    use(Layout(devices=1, together=3), monkeypatch)
    same(run(chosen, members, "sequential", rounds=1), run(chosen, members, "fused", rounds=1), atol=1e-5)


def test_a_run_taken_up_has_the_bits_and_the_layout_of_one_that_was_not_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use(Layout(devices=2, together=2), monkeypatch)
    whole = simulate(task(), population(), rounds=4, store=MemoryStore(), seed=3)
    halted = MemoryStore()

    def halt(result: Any) -> None:
        if result.version == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(task(), population(), rounds=4, store=halted, seed=3, on_round=halt)
    use(Layout(devices=1, together=1), monkeypatch)
    run_id = halted.runs()[0].id
    resumed = go_on(halted, run_id, population(), task=task())
    for name, value in whole.model.items():
        np.testing.assert_array_equal(resumed.model[name], value, err_msg=name)
    assert halted.run(run_id).config["engine"] == {"devices": 2, "together": 2}


def test_another_task_than_the_run_has_is_refused() -> None:
    store = MemoryStore()
    simulate(task(), population(), rounds=1, store=store)
    other = task(local=shoal.Local(optimizer=optax.sgd(0.2), batch_size=4, epochs=2, steps_per_block=2))
    with pytest.raises(PlanError, match="not the one that this run was begun with"):
        go_on(store, store.runs()[0].id, population(), rounds=2, task=other)


def nothing_finite(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
    return jnp.sum(batch["x"] * params["w"][:, 0][None, :], axis=1) / jnp.where(batch["y"] > 5, 0.0, 1.0)


def test_a_member_whose_update_is_of_no_use_is_named() -> None:
    users = {user: dict(examples.fields) for user, examples in population(4).items()}
    users["m2"]["y"] = np.full_like(users["m2"]["y"], 9)
    rounds = shoal.RoundPolicy(goal=4, minimum_group=3)
    with pytest.raises(DataError, match=r"'m2' cannot be used: .* NaN or infinity"):
        run(task(loss=nothing_finite, rounds=rounds), Population.from_arrays(users), "fused")


def test_an_update_above_the_bound_is_refused() -> None:
    local = shoal.Local(optimizer=optax.sgd(1e7), batch_size=4)
    for backend in ("fused", "sequential"):
        with pytest.raises(
            DataError, match=r"cannot be used.*: Expected \|delta/.*\| <= 256, got \d+.*\. Lower the learning rate"
        ):
            run(task(local=local), population(), backend)


def test_the_bound_is_no_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.1 as float32 is above 0.1: a fleet refuses it, and so does a cohort in one program."""

    def falls(params: Any, state: Any, batch: Any, key: Any) -> Any:
        return jnp.sum(params["w"]) * batch["x"][:, 0] + 0 * jnp.sum(params["b"])

    members = Population.from_arrays(
        {f"m{i}": {"x": np.full((1, 3), 0.1, np.float32), "y": np.zeros(1, np.int32)} for i in range(3)}
    )
    local = shoal.Local(optimizer=optax.sgd(1.0), batch_size=1)
    zeros = {"w": jnp.zeros(2), "b": jnp.zeros(2)}
    chosen = task(init=lambda key: zeros, loss=falls, local=local, bounds={"params/w": 0.1})
    for backend in ("fused", "sequential"):
        with pytest.raises(DataError, match=r"\|delta/params/w\| <= 0.1, got 0.1"):
            run(chosen, members, backend, rounds=1)


def test_who_computes_in_64_bits_may() -> None:
    """A user's own setting: parameters are then float64, in the plan's programs as here."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        slow, fast = (run(task(), population(), backend, rounds=1) for backend in ("sequential", "fused"))
    assert fast.model["params/b"].dtype == np.float64
    same(slow, fast)


def test_a_member_whose_examples_do_not_fit_is_named_also_when_it_is_made_ready_ahead() -> None:
    users = {user: dict(examples.fields) for user, examples in population().items()}
    users = {
        user: {**fields, "y": fields["y"].astype(np.int64) + (user == "m5") * (1 << 40)}
        for user, fields in users.items()
    }
    with pytest.raises(DataError, match=r"Member 'm5' cannot be used: Expected y to fit int32"):
        run(task(), Population.from_arrays(users), "fused", rounds=20)


def test_fields_that_do_not_fit_are_refused() -> None:
    members = Population.from_arrays({f"m{i}": {"x": np.zeros((3, 3), np.float32)} for i in range(4)})
    with pytest.raises(DataError, match="reads field 'y'"):
        run(task(), members, "fused")


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 7))
def test_members_are_packed_so_that_no_device_has_much_more_to_do(
    lengths: list[int], devices: int, together: int
) -> None:
    steps = np.array(lengths)
    rows = packed(steps, devices=devices, together=together)
    assert sorted(rows[rows >= 0]) == list(range(len(steps))) and rows.size < len(steps) + devices * together
    longest = np.where(rows >= 0, steps[rows], 0).max(axis=2)
    loads = longest.sum(axis=1)
    assert loads.max() - loads.min() <= longest.max()
    assert longest.sum() * together <= steps.sum() + max(steps) * together  # what waiting within chunks costs, at most


@given(st.integers(1, 1 << 40))
def test_sizes_are_rounded_up_by_a_quarter_at_most(size: int) -> None:
    assert size <= ladder(size) <= max(8, size * 1.25)
    assert ladder(ladder(size)) == ladder(size)


def test_there_are_few_sizes() -> None:
    assert len({ladder(size) for size in range(1, 5_000)}) < 50


def test_cohorts_of_other_lengths_are_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Fused] = []
    begin = Fused.__post_init__

    def made(self: Fused) -> None:
        engines.append(self)
        begin(self)

    monkeypatch.setattr(Fused, "__post_init__", made)
    use(Layout(devices=1, together=1), monkeypatch)
    rng = np.random.default_rng(0)
    users = {f"m{i}": {"x": rng.standard_normal((4 * i + 1, 3)).astype(np.float32)} for i in range(12)}
    for fields in users.values():
        fields["y"] = np.zeros(len(fields["x"]), np.int32)
    rounds = shoal.RoundPolicy(goal=3, minimum_group=3)
    run(task(rounds=rounds), Population.from_arrays(users), "fused", rounds=6)
    assert [len(each._compiled) for each in engines] == [1]


def test_no_layout_takes_more_memory_for_a_larger_cohort() -> None:
    together = {layout.together for layout in (default(10_000), *candidates(10_000))}
    assert together == {layout.together for layout in (default(1_000), *candidates(1_000))}
    assert max(together) <= MOST_TOGETHER


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    """The layouts with which cohorts are trained from now on."""
    layouts = list[Layout]()

    def count(self: Fused, *arguments: Any, **named: Any) -> Any:
        layouts.append(self.layout)
        return sums(self, *arguments, **named)

    sums = Fused.sums
    monkeypatch.setattr(Fused, "sums", count)
    return layouts


def test_no_cohort_is_trained_twice_where_a_trial_cannot_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts = counted(monkeypatch)
    run(task(), population(), "fused", rounds=2)
    assert len(layouts) == 2 and len(set(layouts)) == 1


def test_a_layout_is_tried_once_and_that_is_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, store = counted(monkeypatch), MemoryStore()
    monkeypatch.setattr(engine, "choose", lambda members, rounds, seconds_with: choose(members, 50, seconds_with))
    simulate(task(), population(), rounds=2, store=store)
    assert len(layouts) == 2 + engine.ATTEMPTS and len(set(layouts)) == 1
    assert {"compile", "trial", "compute"} <= {row.phase for row in store.usage(store.runs()[0].id)}


def test_a_layout_that_takes_too_much_memory_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, kept = Fused.sums, list[Layout]()

    def scarce(self: Fused, *arguments: Any, **named: Any) -> Any:
        if self.layout != default(3):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return sums(self, *arguments, **named)

    monkeypatch.setattr(Fused, "sums", scarce)
    monkeypatch.setattr(engine, "choose", lambda members, rounds, seconds_with: choose(members, 10**9, seconds_with))
    monkeypatch.setattr(engine, "cache", lambda key, layout: kept.append(layout))
    assert run(task(), population(), "fused", rounds=1).version == 1 and kept == [default(3)]


def test_a_large_cohort_takes_no_more_sums_than_fit() -> None:
    rounds = shoal.RoundPolicy(goal=30, minimum_group=3)
    chosen = task(rounds=rounds, local=dataclasses.replace(task().local, epochs=1))
    made = run(chosen, population(40), "fused", rounds=1)
    assert made.version == 1 and len(made.history[0].members) == 30


def test_updates_are_clipped_by_both_backends_and_a_round_moves_the_model_no_further() -> None:
    members = population()
    clipping = task(privacy=Privacy(clip_norm=0.01), server=shoal.server.sgd(1.0))
    fused_run, sequential = (run(clipping, members, backend, rounds=1) for backend in ("fused", "sequential"))
    same(fused_run, sequential)
    before = run(clipping, members, "fused", rounds=0).model
    moved = sum(float(np.sum(np.square(value - before[name]))) for name, value in fused_run.model.items()) ** 0.5
    assert 0.001 < moved <= 0.01
    assert fused_run.history[-1].metrics["train/clipped"] == 1.0
