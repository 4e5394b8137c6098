"""Tasks that train, evaluate and add up statistics, beside one another: on one host, over sockets, and in simulation."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.aggregate.statistics import EDGES, field_statistics, read_results
from shoal.clock import SystemClock
from shoal.data.split import held_out_part
from shoal.data.store import Examples, Population
from shoal.errors import StoreUnavailable
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.following import Following
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.several import SeveralHosts
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.plan.stablehlo import this_runtime
from shoal.record.memory import MemoryStore
from shoal.record.retention import SETTING
from shoal.record.store import Store
from shoal.record.tensor_blobs import view_tensors

KEYS = HostKeys(bytes(range(64)))
NUM_DEVICES = 4


def loss(params, state, batch, key):  # type: ignore[no-untyped-def]
    return jnp.square(params["w"] * batch["x"] + params["b"] - batch["y"])


def evaluate(params, state, batch):  # type: ignore[no-untyped-def]
    error = jnp.abs(params["w"] * batch["x"] + params["b"] - batch["y"])
    return {"error": shoal.Sum(error, jnp.ones_like(error), (0.0, 100.0))}


def line(name: str = "line", **settings: object) -> shoal.Task:
    return shoal.Task(
        name=name,
        init=lambda key: {"w": jnp.zeros(()), "b": jnp.zeros(())},
        loss=loss,
        evaluate=evaluate,
        batch={"x": ((), "float32"), "y": ((), "float32")},
        local=shoal.Local(optimizer=optax.sgd(0.1), batch_size=4, epochs=2, holdout=0.2),
        rounds=shoal.RoundPolicy(
            goal=NUM_DEVICES, minimum_group=NUM_DEVICES, over_selection=1.0, selection_window_s=1.0
        ),
        **settings,  # type: ignore[arg-type]
    )


def population() -> Population:
    rng = np.random.default_rng(3)
    made = {}
    for number in range(NUM_DEVICES):
        x = rng.uniform(-1.0, 1.0, 10 + number).astype(np.float32)
        made[f"device-{number}"] = Examples({"x": x, "y": (3.0 * x - 1.0).astype(np.float32)})
    return Population.from_arrays(made)


def held_out(members: Population) -> dict[str, np.ndarray]:
    parts = [Examples(e.take(held_out_part(len(e), fraction=0.2, is_held_out=True))) for _, e in members.items()]
    return Examples.concatenate(parts).fields


def serve(
    store: Store,
    tasks: Sequence[shoal.Task],
    members: Population,
    *,
    rounds: Mapping[str, int],
    again: bool = False,
    config: Mapping[str, Any] | None = None,
    told: list[int] | None = None,
) -> dict[str, str]:
    """Serves the tasks over sockets until they are over; returns task -> run. `told`: takes versions that were evaluated."""
    runs = {run.name: run.id for run in store.runs()} if again else {}
    if not again:
        for task in tasks:
            built = build(task, seed=1)
            runs[task.name] = begin_run(
                store, built.plan.sign(KEYS.signing), built.model, kind="host", rounds=rounds.get(task.name, 1), seed=1,
                config=config,
            )  # fmt: skip
    told = [] if told is None else told
    asyncio.run(_serve(store, runs, {task.name: task.aggregator for task in tasks}, members, rounds, told))
    return runs


async def _serve(
    store: Store,
    runs: Mapping[str, str],
    kinds: Mapping[str, str],
    members: Population,
    rounds: Mapping[str, int],
    told: list[int],
) -> None:
    def host(run_id: str, last: int | None = None) -> Host:
        return Host(store, run_id, KEYS, rounds=last, rng=np.random.default_rng(0))

    hosts = [host(runs[name], rounds.get(name)) for name, kind in kinds.items() if kind != "evaluation"]
    following = [
        Following(
            store, runs[name], make_host=lambda last, r=runs[name]: host(r, last), clock=SystemClock(),  # type: ignore[misc]
            on_metrics=lambda version, metrics: told.append(version),
        )
        for name, kind in kinds.items()
        if kind == "evaluation"
    ]  # fmt: skip
    several = SeveralHosts(hosts, following, rng=np.random.default_rng(0))
    server = several.server(address="127.0.0.1:0")
    await server.start()
    runners: dict[str, JaxRunner] = {}

    def runner(plan: Plan) -> JaxRunner:
        return runners.setdefault(plan.manifest.hash, JaxRunner(plan))

    link = GrpcLink(f"127.0.0.1:{server.port}")
    shared = DeviceHost(make_runner=runner, runtime=this_runtime(), trusted_key=KEYS.public)
    devices = [
        Device(name, lambda n=name: members[n], link=link, host=shared, rng=np.random.default_rng(0))  # type: ignore[misc]
        for name in members
    ]
    try:
        async with asyncio.timeout(60):
            await asyncio.gather(several.run(), *(device.run() for device in devices))
    finally:
        await link.close()
        await server.close()


def test_versions_are_evaluated_on_what_devices_hold_out() -> None:
    store, members, train = MemoryStore(), population(), line()
    runs = serve(store, [train, shoal.evaluation(train, every=2)], members, rounds={"line": 5})
    found = {row.version: row.value for row in store.metrics(runs["line"], "evaluate/error")}
    assert max(found) == 5 and len(found) >= 2 and all(version >= 2 for version in found)
    fields = held_out(members)
    for version, error in found.items():
        model = view_tensors(store.blobs, store.get_commit(runs["line"], version).model)
        expected = np.abs(model["params/w"] * fields["x"] + model["params/b"] - fields["y"]).mean()
        np.testing.assert_allclose(error, expected, rtol=1e-5)
    assert {row.scope for row in store.metrics(runs["line"], "evaluate/error")} == {"cohort"}
    assert store.run(runs["line-evaluate"]).status == store.run(runs["line"]).status == "finished"
    # Taken up again, it measures what has come since, and nothing twice.
    serve(store, [train, shoal.evaluation(train, every=2)], members, rounds={"line": 6}, again=True)
    versions = [row.version for row in store.metrics(runs["line"], "evaluate/error")]
    assert versions == sorted(set(versions)) and versions[-1] == 6


def test_an_evaluation_is_told_once_though_the_training_run_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.fleet.coordinator.SWEEP_EVERY", 1)
    store, train, told, sizes = MemoryStore(), line(), list[int](), {"line": 6}
    serve(
        store, [train, shoal.evaluation(train)], population(), rounds=sizes, told=told, config={SETTING: {"recent": 1}}
    )  # fmt: skip
    assert told == sorted(set(told)) and len(told) >= 3 and told[-1] == 6


class Flaky(MemoryStore):
    """Each of an evaluation's writes is refused once, for want of space, and then taken."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: set[str] = set()

    def _refuse(self, run_id: str, write: str) -> None:
        followed = [run.id for run in self.runs() if run.name == "line"]
        has_begun = run_id not in followed and any(self.last_version(each) for each in followed)
        if has_begun and write not in self.refused:
            self.refused.add(write)
            raise StoreUnavailable("No space left.")

    def commit(self, *args: Any, **named: Any) -> Any:
        self._refuse(args[0], "take over" if named["round"] is None else "commit")
        return super().commit(*args, **named)

    def set_status(self, *args: Any, **named: Any) -> Any:
        self._refuse(args[0], args[1])
        return super().set_status(*args, **named)

    def take_lease(self, *args: Any, **named: Any) -> Any:
        self._refuse(args[0], "take lease")
        return super().take_lease(*args, **named)


def test_an_evaluation_waits_for_space_as_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.fleet.durable.RETRY_S", (0.005, 0.01))
    store, train, told = Flaky(), line(), list[int]()
    runs = serve(store, [train, shoal.evaluation(train, every=2)], population(), rounds={"line": 5}, told=told)
    assert store.refused == {"take over", "commit", "running", "finished", "take lease"}
    assert told[-1] == 5 and store.run(runs["line-evaluate"]).status == "finished"


def test_a_task_has_one_evaluation() -> None:
    train = line()
    with pytest.raises(ValueError, match="'first' and 'second' both evaluate task 'line'"):
        serve(
            MemoryStore(), [train, shoal.evaluation(train, name="first"), shoal.evaluation(train, name="second")],
            population(), rounds={"line": 1},
        )  # fmt: skip


def test_training_leaves_out_what_is_held_out() -> None:
    members, task = population(), line()
    changed = {}
    for name, examples in members.items():
        fields = {field: values.copy() for field, values in examples.fields.items()}
        fields["y"][held_out_part(len(examples), fraction=0.2, is_held_out=True)] = 50.0
        changed[name] = Examples(fields)
    first = shoal.simulate(task, members, rounds=2)
    second = shoal.simulate(task, Population.from_arrays(changed), rounds=2)
    third = shoal.simulate(task.replace(local=replace(task.local, holdout=0.0)), members, rounds=2)
    assert first.model["params/w"] == second.model["params/w"] != third.model["params/w"]


def test_what_cannot_be_evaluated_is_refused_in_one_line() -> None:
    task = line()
    with pytest.raises(ValueError, match=r"holdout=0\.2"):
        shoal.evaluation(task.replace(local=replace(task.local, holdout=0.0)))
    with pytest.raises(ValueError, match="has no `evaluate`"):
        shoal.evaluation(task.replace(evaluate=None))
    with pytest.raises(ValueError, match="stays on devices"):
        shoal.evaluation(task.replace(leaves={"params/b": "private"}))
    with pytest.raises(ValueError, match="holdout < 1"):
        shoal.Local(holdout=1.0)


MEASURES = {"x": shoal.Measure(bounds=(-1.0, 1.0), histogram=8, quantiles=(0.1, 0.5, 0.9))}


def measured(goal: int = NUM_DEVICES) -> shoal.Task:
    fields = {"x": ((), "float32"), "size": ((3,), "uint8")}
    rounds = shoal.RoundPolicy(goal=goal, minimum_group=goal, over_selection=1.0, selection_window_s=1.0)
    return shoal.statistics(fields, MEASURES, rounds=rounds)


def with_sizes(members: Population) -> Population:
    rng = np.random.default_rng(5)
    made = {}
    for name, examples in members.items():
        sizes = rng.integers(0, 200, (len(examples), 3)).astype(np.uint8)
        made[name] = Examples({**examples.fields, "size": sizes})
    return Population.from_arrays(made)


def pooled(members: Population) -> dict[str, np.ndarray]:
    return Examples.concatenate([examples for _, examples in members.items()]).fields


def hold_to_numpy(found: Mapping[str, Mapping[str, np.ndarray]], fields: Mapping[str, np.ndarray]) -> None:
    x, size = fields["x"].astype(np.float64), fields["size"].astype(np.float64)
    assert found["x"]["count"] == len(x) and found["size"]["count"].tolist() == [len(x)] * 3
    np.testing.assert_allclose(found["x"]["mean"], x.mean(), atol=1e-6)
    np.testing.assert_allclose(found["x"]["std"], x.std(), rtol=1e-6)
    np.testing.assert_allclose(found["size"]["mean"], size.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found["size"]["std"], size.std(0), rtol=1e-6)
    histogram = np.histogram(x, bins=8, range=(-1.0, 1.0))[0]
    assert found["x"]["histogram"].tolist() == histogram.tolist()
    exact = np.quantile(x, MEASURES["x"].quantiles, method="inverted_cdf")
    assert np.all(found["x"]["quantile_width"] < 1e-3)
    assert np.all(np.abs(found["x"]["quantiles"] - exact) <= found["x"]["quantile_width"] + 1e-6)
    assert not found["x"]["clipped"].any() and not found["x"]["missing"].any()


def test_statistics_in_simulation_and_on_a_fleet_are_those_of_the_pooled_data(tmp_path: Path) -> None:
    members, task = with_sizes(population()), measured()
    shoal.simulate(task, members, rounds=4, seed=1, folder=tmp_path / "run")
    found = shoal.read_statistics(tmp_path / "run")
    hold_to_numpy(found, pooled(members))
    store = MemoryStore()
    runs = serve(store, [task], members, rounds={"statistics": 4})
    commit = store.last_commit(runs["statistics"])
    assert commit is not None
    there = read_results(commit.server_state, store.blobs)
    assert {name: {k: v.tolist() for k, v in of.items()} for name, of in there.items()} == {
        name: {k: v.tolist() for k, v in of.items()} for name, of in found.items()
    }, "the same bits"


def test_what_is_beyond_the_bounds_is_clipped_and_what_is_no_number_left_out(tmp_path: Path) -> None:
    values = np.array([0.5, 3.0, -np.inf, np.nan, -0.25], np.float32)
    members = Population.from_arrays({f"d{n}": {"x": values} for n in range(2)})
    task = shoal.statistics(
        {"x": ((), "float32")}, MEASURES, rounds=shoal.RoundPolicy(goal=2, minimum_group=2, over_selection=1.0)
    )  # fmt: skip
    shoal.simulate(task, members, rounds=2, folder=tmp_path)
    found = shoal.read_statistics(tmp_path)["x"]
    assert (found["count"], found["clipped"], found["missing"]) == (8, 4, 2)
    np.testing.assert_allclose(found["mean"], np.mean([0.5, 1.0, -1.0, -0.25]), atol=1e-6)
    assert found["histogram"].sum() == 8 and found["histogram"][0] == 2 == found["histogram"][-1]


def test_one_host_trains_two_tasks_evaluates_one_and_adds_statistics_up() -> None:
    store, members = MemoryStore(), with_sizes(population())
    tasks = [line("one"), line("two"), shoal.evaluation(line("one")), measured()]
    runs = serve(store, tasks, members, rounds={"one": 3, "two": 2, "statistics": 3})
    assert {store.run(run).status for run in runs.values()} == {"finished"}
    assert store.last_version(runs["one"]) == 3 and store.last_version(runs["two"]) == 2
    assert max(row.version for row in store.metrics(runs["one"], "evaluate/error")) == 3
    assert not store.metrics(runs["two"], "evaluate/error")
    commit = store.last_commit(runs["statistics"])
    assert commit is not None
    hold_to_numpy(read_results(commit.server_state, store.blobs), pooled(members))


@pytest.mark.parametrize(
    ("fields", "measures", "said"),
    [
        ({"x": ((), "float32")}, {}, "Expected bounds of field 'x'"),
        ({"x": ((), "uint8")}, {"y": shoal.Measure()}, "'y'"),
        (
            {"x": ((), "float32")},
            {"x": shoal.Measure(bounds=(-1e19, 1e19))},
            "apart, got 2e\\+19",
        ),  # devices would all be refused
        (
            {"x": ((), "float32")},
            {"x": shoal.Measure(bounds=(0.0, 1e-30))},
            "apart, got 1e-30",
        ),  # the deviation would be 0
    ],
)
def test_statistics_that_cannot_be_made_are_refused(
    fields: dict[str, tuple[tuple[int, ...], str]], measures: dict[str, shoal.Measure], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        shoal.statistics(fields, measures)


def test_quantiles_that_move_out_of_their_edges_are_found_again() -> None:
    measure = shoal.Measure(bounds=(0.0, 100.0), quantiles=(0.5,))
    edges = np.linspace(0.0, 100.0, EDGES)[None]
    rng = np.random.default_rng(0)
    for center, rounds in ((20.0, 6), (90.0, 6)):
        values = rng.normal(center, 3.0, 1001).clip(0.0, 100.0)
        for _ in range(rounds):
            below = (values[:, None, None] < edges[None]).sum(0).astype(float)
            totals = {name: np.array(0.0) for name in ("clipped", "missing", "total", "squares")}
            totals |= {"count": np.array(1001.0), "below": below}
            found, moved = field_statistics(measure, totals, {"center": np.array(50.0), "edges": edges})
            edges = moved["edges"]
        exact = np.quantile(values, 0.5, method="inverted_cdf")
        assert abs(found["quantiles"][0] - exact) <= found["quantile_width"][0] < 1e-3
