"""What versions are measured on: users held out, users left out, distributions; and when a run stops early."""

import builtins
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import shoal
from shoal.errors import DataError, MissingExtra, StoreError
from shoal.fleet.keys import HostKeys
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.record.distribution import Distribution, read_distributions
from shoal.record.memory import MemoryStore
from shoal.simulate import by_user
from shoal.simulate.engine import RoundResult, Simulation, go_on, own_config, simulate
from shoal.simulate.history import History
from shoal.simulate.stopping import keep_stop_when


def loss(params: Any, state: Any, batch: Any, key: Any) -> Any:
    return jnp.square(params["w"] - batch["x"])


def evaluate(params: Any, state: Any, batch: Any) -> dict[str, shoal.Sum]:
    error = jnp.abs(params["w"] - batch["x"])
    return {"error": shoal.Sum(error, jnp.ones_like(error), (0.0, 100.0))}


TASK = shoal.Task(
    name="mean", init=lambda key: {"w": jnp.zeros(())}, loss=loss, evaluate=evaluate, batch={"x": ((), "float32")},
    local=shoal.Local(batch_size=4, steps_per_block=1), rounds=shoal.RoundPolicy(goal=3, minimum_group=3),
)  # fmt: skip


def users(num: int, *, first: int = 0) -> shoal.data.Population:
    """User i has i + 1 examples, all of them i."""
    return shoal.data.Population.from_arrays(
        {f"u{i}": {"x": np.full(i + 1, i, np.float32)} for i in range(first, first + num)}
    )


@cache
def prepared() -> tuple[Plan, Any, JaxRunner]:
    """The task's plan, its first model, and a runner: compiled once for all tests."""
    built = build(TASK, seed=0)
    plan = built.plan.sign(HostKeys.make().signing)
    return plan, built.model, JaxRunner(plan)


def run(
    rounds: int = 2,
    store: MemoryStore | None = None,
    left_out: shoal.data.Population | None = None,
    stop_when: shoal.StopWhen | None = None,
    **changes: Any,
) -> tuple[Simulation, MemoryStore]:
    store, (plan, model, runner) = store or MemoryStore(), prepared()
    config = own_config(users(6), left_out, stop_when)
    run_id = begin_run(store, plan, model, kind="simulate", rounds=rounds, seed=0, config=config)
    return go_on(store, run_id, users(6), left_out=left_out, runner=runner, **changes), store


def taken_up(store: MemoryStore, run_id: str, **changes: Any) -> Simulation:
    return go_on(store, run_id, users(6), runner=prepared()[2], **changes)


def test_users_held_out_and_left_out_are_measured_one_by_one_and_only_counted_in_the_record() -> None:
    strangers = users(4, first=10)
    made, store = run(held_out=users(3), left_out=strangers)
    w, last = float(made.model["params/w"]), made.history[-1].metrics
    every = np.concatenate([examples.fields["x"] for _, examples in strangers.items()])
    assert last["left_out/error"] == pytest.approx(np.abs(every - w).mean(), rel=1e-5), "over all examples"
    each = np.array([10, 11, 12, 13]) - w
    found = read_distributions(store.events(made.run_id))
    assert set(found) == {"error", "left_out/error"} and set(found["error"]) == {1, 2}
    newest = found["left_out/error"][2]
    assert newest.users == 4 and abs(newest.quantile(0.1) - each[0]) <= newest.step / 2
    assert last["left_out/error/p90"] == newest.quantile(0.9) == pytest.approx(each[3], abs=newest.step / 2)
    assert {row.scope for row in store.metrics(made.run_id, "left_out/error/p10")} == {"server"}
    everything = repr([store.metrics(made.run_id), store.events(made.run_id), store.run(made.run_id).config])
    assert not any(f"u{number}" in everything for number in range(10, 14)), "nobody is named"


@pytest.mark.parametrize("batches_at_once", [1, 16])
def test_users_packed_into_batches_have_the_sums_of_one_by_one(
    batches_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_user, "_BATCHES_AT_ONCE", batches_at_once)
    rng = np.random.default_rng(0)
    sizes = [1, 0, 199, 1, 200, 350, 3]
    everybody = shoal.data.Population.from_arrays(
        {f"u{place}": {"x": rng.normal(size=size).astype(np.float32)} for place, size in enumerate(sizes)}
    )
    plan, model, runner = prepared()
    runner.set_model("root", model)
    one_by_one = list(by_user.OneByOne(runner, plan.manifest).sums("root", model, everybody))
    packed = list(by_user.Packed(TASK, plan.manifest).sums("root", model, everybody))
    assert len(one_by_one) == len(packed) == 6
    assert [sums["error/denominator"] for sums in packed] == [size for size in sizes if size]
    for each, other in zip(one_by_one, packed, strict=True):
        assert each == pytest.approx(other, rel=1e-5)


def test_fewer_users_than_the_smallest_group_have_no_distribution() -> None:
    made, store = run(left_out=users(2, first=10))
    assert "left_out/error" in made.history[-1].metrics
    assert not any("/p" in name for name in made.history[-1].metrics)
    assert read_distributions(store.events(made.run_id)) == {}


def test_who_was_left_out_stays_left_out() -> None:
    made, store = run(left_out=users(4, first=10))
    assert store.run(made.run_id).config["left_out"]["users"] == 4
    taken_up(store, made.run_id, rounds=3, left_out=users(4, first=10))
    for other in (None, users(4, first=9)):
        with pytest.raises(StoreError, match="began with 4 users left out of training"):
            taken_up(store, made.run_id, rounds=4, left_out=other)


def test_a_share_of_users_is_drawn_with_the_seed(tmp_path: Path) -> None:
    everybody = users(8)
    others, out = shoal.data.leave_out(everybody, 0.25, rng=np.random.default_rng(0))
    assert len(out) == 2 and sorted([*others, *out]) == sorted(everybody)
    assert shoal.data.leave_out(everybody, 0.25, rng=np.random.default_rng(0))[1].ids == out.ids
    assert len(shoal.data.leave_out(everybody, 0.001, rng=np.random.default_rng(0))[1]) == 1
    with pytest.raises(ValueError, match="a share of the users above 0 and below 1"):
        shoal.data.leave_out(everybody, 1.0, rng=np.random.default_rng(0))
    made = shoal.simulate(TASK, everybody, rounds=2, leave_out=0.4, folder=tmp_path / "run", backend="sequential")
    trained = {member for result in made.history for member in result.members}
    assert "left_out/error" in made.history[-1].metrics and len(trained) <= 5


def test_a_run_stops_when_a_metric_is_good_enough_or_no_longer_improves() -> None:
    full, _ = run(rounds=8, held_out=users(6))
    errors = [result.metrics["error"] for result in full.history]
    rule = shoal.StopWhen("error", reaches=errors[2])
    made, store = run(rounds=8, held_out=users(6), stop_when=rule)
    assert made.version == 3 and made.stopped_early.startswith("error has reached")
    assert store.run(made.run_id).status == "finished" and store.run(made.run_id).config["stop_when"] == rule.to_json()
    made, _ = run(rounds=8, held_out=users(6), stop_when=shoal.StopWhen("error", patience=2, least=1000.0))
    assert made.version == 3 and "has not fallen by more than 1000 for 2 rounds" in made.stopped_early


def test_the_last_version_is_measured_also_when_the_run_ends_early() -> None:
    rule = shoal.StopWhen("train/loss", reaches=1e9)
    made, _ = run(rounds=8, held_out=users(6), evaluate_every=5, stop_when=rule)
    assert made.version == 1 and "error" in made.history[-1].metrics


@pytest.mark.parametrize("halt_at", [1, 2, 3])
def test_an_interrupted_run_stops_where_it_would_have(halt_at: int) -> None:
    rule = shoal.StopWhen("error", patience=3, least=1000.0)
    whole, _ = run(rounds=9, held_out=users(6), stop_when=rule)

    class Halt(Exception): ...

    def halt(result: RoundResult) -> None:
        if result.version == halt_at:
            raise Halt

    store = MemoryStore()
    with pytest.raises(Halt):
        run(rounds=9, store=store, held_out=users(6), stop_when=rule, on_round=halt)
    resumed = taken_up(store, store.runs()[0].id, held_out=users(6))
    assert (resumed.version, resumed.stopped_early) == (whole.version, whole.stopped_early) and whole.version == 4
    again = taken_up(store, resumed.run_id, held_out=users(6), rounds=20)
    assert again.version == 4 and again.stopped_early == whole.stopped_early, "more rounds do not lift the rule"
    keep_stop_when(store, resumed.run_id, None)
    assert taken_up(store, resumed.run_id, held_out=users(6), rounds=5).version == 5


def test_what_was_still_to_be_measured_is_measured_when_the_run_goes_on() -> None:
    made, store = run(rounds=2)
    assert not store.metrics(made.run_id, "error")
    taken_up(store, made.run_id, held_out=users(6), rounds=4, evaluate_every=2)
    assert sorted(row.version for row in store.metrics(made.run_id, "error")) == [2, 4]


def test_a_rule_by_a_metric_that_will_not_be_is_refused() -> None:
    with pytest.raises(DataError, match=r"'error', which it will not have; it will have none.*--held-out"):
        run(stop_when=shoal.StopWhen("error", patience=1))
    with pytest.raises(DataError, match="'accuracy', which it will not have; it will have error"):
        run(held_out=users(3), stop_when=shoal.StopWhen("accuracy", patience=1))
    with pytest.raises(DataError, match="'train/error', which its cohorts do not have; they have train/"):
        run(stop_when=shoal.StopWhen("train/error", patience=1))
    without = TASK.replace(evaluate=None)
    with pytest.raises(DataError, match="has no evaluate: leave out held_out and leave_out"):
        simulate(without, users(6), rounds=1, store=MemoryStore(), left_out=users(3), backend="sequential")


def test_users_who_cannot_be_measured_are_named() -> None:
    odd = shoal.data.Population.from_arrays({"odd": {"y": np.zeros(3, np.float32)}})
    with pytest.raises(DataError, match=r"User 'odd' cannot be measured: .*reads field 'x'"):
        run(left_out=odd)


def history() -> History:
    first = RoundResult(1, ("a", "b"), {"train/loss": 2.0}, 0.5)
    return History([first, dataclasses.replace(first, version=2, metrics={"train/loss": 1.0, "error": 0.25})])


def test_a_history_is_a_tuple_and_a_table() -> None:
    made = history()
    assert isinstance(made, tuple) and made[-1].version == 2 and len(made[:1]) == 1
    columns = made.columns()
    assert columns["version"] == [1, 2] and columns["members"] == [2, 2] and columns["train/loss"] == [2.0, 1.0]
    assert np.isnan(columns["error"][0]) and columns["error"][1] == 0.25
    assert History().columns() == {"version": [], "members": [], "seconds": []}


def test_a_history_as_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = history().to_pandas()
    assert isinstance(frame, pandas.DataFrame) and list(frame.index) == [1, 2] and frame["error"].iloc[1] == 0.25


def test_without_pandas_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"pip install 'shoal\[pandas\]'"):
        history().to_pandas()


def test_distributions_are_rounded_to_few_values() -> None:
    made = Distribution.of([0.5, 0.731, 0.93, 1.0, float("nan")])
    assert made.step == 0.05 and made.users == 4 and made.values[0] == 0.5 and made.values[-1] == 1.0
    assert [made.quantile(share) for share in (0.1, 0.5, 0.75, 1.0)] == [0.5, 0.75, 0.95, 1.0]
    for values in ([0.0, 0.0], [5.0], [-3.0, 100.0], [1e-9, 5e-9], [1e6, 1e6 + 1], [-1e300, 1e300]):
        made = Distribution.of(values)
        assert len(made.counts) <= 25 and made.users == len(values)
        assert abs(made.quantile(1.0) - max(values)) <= made.step / 2 + 1e-12 * abs(max(values))
        assert abs(made.quantile(0.01) - min(values)) <= made.step / 2 + 1e-12 * abs(min(values))
    with pytest.raises(ValueError, match="at least one finite value"):
        Distribution.of([float("inf")])
