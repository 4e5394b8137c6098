"""Tasks that train, evaluate and add up statistics, beside one another: on one host, over sockets, and in simulation."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shoal
from shoal.clock import SystemClock
from shoal.data.split import held_out_part
from shoal.data.store import Examples, Population
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.following import Following
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.host import Host, begin_run
from shoal.fleet.keys import HostKeys
from shoal.fleet.several import SeveralHosts
from shoal.plan.build import build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.stablehlo import this_runtime
from shoal.record.memory import MemoryStore
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
    store: Store, tasks: Sequence[shoal.Task], members: Population, *, rounds: Mapping[str, int], again: bool = False
) -> dict[str, str]:
    """Serves the tasks over sockets until they are over; returns task -> run."""
    runs = {run.name: run.id for run in store.runs()} if again else {}
    if not again:
        for task in tasks:
            built = build(task, seed=1)
            runs[task.name] = begin_run(
                store, built.plan.sign(KEYS.signing), built.model, kind="host", rounds=rounds.get(task.name, 1), seed=1
            )
    asyncio.run(_serve(store, runs, {task.name: task.aggregator for task in tasks}, members, rounds))
    return runs


async def _serve(
    store: Store, runs: Mapping[str, str], kinds: Mapping[str, str], members: Population, rounds: Mapping[str, int]
) -> None:
    def host(run_id: str, last: int | None = None) -> Host:
        return Host(store, run_id, KEYS, rounds=last, rng=np.random.default_rng(0))

    hosts = [host(runs[name], rounds.get(name)) for name, kind in kinds.items() if kind != "evaluation"]
    following = [
        Following(store, runs[name], make_host=lambda last, r=runs[name]: host(r, last), clock=SystemClock())  # type: ignore[misc]
        for name, kind in kinds.items()
        if kind == "evaluation"
    ]
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
