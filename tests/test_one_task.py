"""The mission as a test: `examples/one_task.py` as a plain loop, in simulation, on a fleet in one process, over sockets, on a mesh.

Simulation and fleets hold the same bits: they run the plan's own programs one member at a time and close a round with the same
code. The plain loop shares nothing with them but the order of examples and the keys, and agrees to rounding; so does a mesh, where a round is one
step of each member.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from itertools import count
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shoal
from examples.one_task import population, task
from shoal.fleet.configuration import round_seed
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.host import Host, run_seed
from shoal.fleet.keys import HostKeys
from shoal.fleet.link import Link, LocalLink
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.plan.stablehlo import this_runtime
from shoal.pod.trainer import Trainer
from shoal.pod.training import Watch
from shoal.policy import Selection
from shoal.record.memory import MemoryStore
from shoal.simulate.engine import go_on
from shoal.simulate.reference import reference_rounds
from shoal.task import Task
from shoal.tensors import Tensors

ROUNDS, SEED = 2, 5
MEMBERS = tuple(f"member-{i}" for i in range(4))
KEYS = HostKeys(bytes(range(64)))


def with_exact(chosen: Task) -> Task:
    """The same four members in every round, so that every way does the same."""
    least = 4 if chosen.privacy.secure is None else 3  # each member's secrets are for the three others to open
    return chosen.replace(
        rounds=replace(chosen.rounds, goal=4, minimum_group=least, selection=Selection.exact(MEMBERS))
    )


class Ways:
    """One task, built once; each way of running it returns the last model."""

    def __init__(self, chosen: Task) -> None:
        self.task = with_exact(chosen)
        self.built: Built = build(self.task, seed=SEED)
        self.plan: Plan = self.built.plan.sign(KEYS.signing)
        self.members = population()
        self.random = os.urandom
        """Of the devices."""
        self.runner = JaxRunner(self.plan)  # of the simulation, of the devices, of the server's programs: compiled once

    def plain_loop(self) -> dict[str, np.ndarray]:
        members = {name: self.members[name] for name in MEMBERS}
        return reference_rounds(self.task, members, [MEMBERS] * ROUNDS, run_seed=run_seed(SEED), seed=SEED)

    def simulated(self) -> Tensors:
        store, run_id = self.begin()
        return go_on(store, run_id, self.members, runner=self.runner, keys=KEYS).model

    def on_a_fleet(self, linked: "Callable[[Host], AbstractAsyncContextManager[Link]]") -> Tensors:
        store, run_id = self.begin()
        asyncio.run(self._serve(Host(store, run_id, KEYS, call_program=self.runner.call), linked))
        commit = store.last_commit(run_id)
        assert commit is not None and commit.version == ROUNDS
        return {entry.spec.name: store.blobs.view(entry.hash, entry.spec) for entry in commit.model}

    def begin(self) -> tuple[MemoryStore, str]:
        store = MemoryStore()
        return store, begin_run(store, self.plan, self.built.model, kind="host", rounds=ROUNDS, seed=SEED)

    async def _serve(self, host: Host, linked: "Callable[[Host], AbstractAsyncContextManager[Link]]") -> None:
        running = asyncio.create_task(host.run())
        async with linked(host) as link:
            shared = DeviceHost(make_runner=lambda plan: self.runner, runtime=this_runtime(), random=self.random)
            devices = [
                Device(name, lambda n=name: self.members[n], link=link, host=shared, rng=np.random.default_rng(0))
                for name in MEMBERS
            ]
            await asyncio.wait_for(asyncio.gather(running, *(device.run() for device in devices)), timeout=50)
        await host.edge.close()


@asynccontextmanager
async def in_one_process(host: Host) -> AsyncIterator[Link]:
    yield LocalLink(host.edge)


@asynccontextmanager
async def over_sockets(host: Host) -> AsyncIterator[Link]:
    server = host.server(address="127.0.0.1:0")
    await server.start()
    link = GrpcLink(f"127.0.0.1:{server.port}")
    yield link
    await link.close()
    await server.close(grace_s=0.2)


def same_bits(one: Tensors, other: Tensors) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


@pytest.fixture(scope="module")
def ways() -> Ways:
    return Ways(task)


@pytest.fixture(scope="module")
def simulated(ways: Ways) -> Tensors:
    return ways.simulated()


def test_the_model_learns_something(ways: Ways, simulated: Tensors) -> None:
    assert not np.array_equal(simulated["params/conv/kernel"], ways.built.model["params/conv/kernel"])
    assert "params/head/bias" in simulated, "the private leaf keeps its first value on the server"
    np.testing.assert_array_equal(simulated["params/head/bias"], ways.built.model["params/head/bias"])


def test_simulation_agrees_with_the_plain_loop(ways: Ways, simulated: Tensors) -> None:
    reference = ways.plain_loop()
    assert sorted(reference) == sorted(simulated)
    for name, value in simulated.items():
        np.testing.assert_allclose(value, reference[name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_fleet_in_one_process_gives_the_bits_of_the_simulation(ways: Ways, simulated: Tensors) -> None:
    same_bits(ways.on_a_fleet(in_one_process), simulated)


@pytest.mark.integration
def test_a_fleet_over_sockets_gives_the_bits_of_the_simulation(ways: Ways, simulated: Tensors) -> None:
    same_bits(ways.on_a_fleet(over_sockets), simulated)


def small_init(key: jax.Array) -> dict[str, jax.Array]:
    return {"w": 0.01 * jax.random.normal(key, (144, 4))}


def small_loss(params: Any, state: Any, batch: Any, key: Any) -> jax.Array:
    flat = batch["image"].reshape(-1, 144).astype("float32") / 255.0
    return optax.softmax_cross_entropy_with_integer_labels(flat @ params["w"], batch["label"])


def small_task(**changes: Any) -> Task:
    return shoal.Task(**{
        "name": "small", "init": small_init, "loss": small_loss,
        "batch": {"image": ((12, 12, 1), "uint8"), "label": ((), "int32")},
        "local": shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, epochs=1, steps_per_block=1, max_examples=64),
        "rounds": shoal.RoundPolicy(goal=4, minimum_group=3), **changes,
    })  # fmt: skip


@pytest.mark.parametrize(
    "server", [shoal.server.adam(0.02), optax.adam(0.02)], ids=["adam as data", "adam as a program"]
)
def test_other_server_rules_give_the_same_bits_too(server: Any) -> None:
    small = small_task(server=server)
    ways = Ways(small)
    same_bits(ways.on_a_fleet(in_one_process), ways.simulated())


@pytest.mark.parametrize("linked", [in_one_process, pytest.param(over_sockets, marks=pytest.mark.integration)])
def test_a_fleet_of_secure_groups_gives_the_bits_of_the_simulation(linked: Any) -> None:
    secure = shoal.Secure(members=4, colluders=0.0, dropouts=0.0)
    ways = Ways(small_task(privacy=shoal.Privacy(clip_norm=0.05, secure=secure)))
    assert ways.plan.manifest.promises.group == "secure"
    same_bits(ways.on_a_fleet(linked), ways.simulated())


@pytest.mark.parametrize(
    "secure", [None, shoal.Secure(members=4, colluders=0.0, dropouts=0.0)], ids=["clear", "secure"]
)
def test_noise_is_the_same_in_simulation_and_on_a_fleet(secure: shoal.Secure | None) -> None:
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    bare, noisy = (
        Ways(small_task(local=local, privacy=shoal.Privacy(clip_norm=0.05, noise_multiplier=noise, secure=secure)))
        for noise in (0.0, 1.0)
    )
    simulated = noisy.simulated()
    same_bits(noisy.on_a_fleet(in_one_process), simulated)
    noise = simulated["params/w"] - bare.simulated()["params/w"]
    expected = 0.05 * np.sqrt(ROUNDS) / 4  # of each round's mean over four
    assert np.std(noise) == pytest.approx(expected, rel=0.15)


def test_correlated_noise_is_the_same_in_simulation_and_on_a_fleet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.plan.run_plan.new_run_id", lambda *args, **kwargs: "one-run")
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    privacy = shoal.Privacy(clip_norm=0.05, noise_multiplier=1.0, correlated=shoal.Correlated(rounds=ROUNDS))
    ways = Ways(small_task(local=local, privacy=privacy))
    simulated = ways.simulated()
    same_bits(ways.on_a_fleet(in_one_process), simulated)
    bare = Ways(small_task(local=local, privacy=shoal.Privacy(clip_norm=0.05))).simulated()
    assert np.std(simulated["params/w"] - bare["params/w"]) > 0.05 / 4


@pytest.mark.parametrize(
    ("up", "down"),
    [
        pytest.param("bfloat16", "int8", marks=pytest.mark.slow),
        ("int8", "bfloat16"),
        pytest.param("top_k", "bfloat16", marks=pytest.mark.slow),
        pytest.param("float32", "int8", marks=pytest.mark.slow),
    ],
)
def test_what_is_sent_in_fewer_bytes_is_the_same_in_simulation_and_on_a_fleet(up: Any, down: Any) -> None:
    ways = Ways(shoal.compressed(small_task(), up, down=down))
    simulated = ways.simulated()
    same_bits(ways.on_a_fleet(over_sockets), simulated)
    exact = Ways(small_task()).simulated()
    assert not np.array_equal(simulated["params/w"], exact["params/w"])
    np.testing.assert_allclose(simulated["params/w"], exact["params/w"], atol=0.5 if up == "top_k" else 0.02)


@pytest.mark.parametrize(
    ("compression", "bits"),
    [
        ({"rotate": True}, 16),
        ({"up": "random_k", "share": 0.5}, 0),
        *(pytest.param({"rotate": True}, bits, marks=pytest.mark.slow) for bits in (0, 32)),
        *(pytest.param({"up": "random_k", "share": 0.5}, bits, marks=pytest.mark.slow) for bits in (16, 32)),
    ],
)
def test_linear_maps_are_undone_on_sums_in_every_mode(compression: dict[str, Any], bits: int) -> None:
    secure = shoal.Secure(members=4, colluders=0.0, dropouts=0.0, bits=bits) if bits else None
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    plain = small_task(local=local, privacy=shoal.Privacy(clip_norm=0.05, secure=secure))
    ways = Ways(shoal.compressed(plain, **compression))
    assert any(spec.rotated or spec.one_of > 1 for spec in ways.plan.manifest.sums)
    simulated = ways.simulated()
    same_bits(ways.on_a_fleet(in_one_process), simulated)
    if "rotate" in compression:
        exact = Ways(plain.replace(privacy=shoal.Privacy(clip_norm=0.05))).simulated()
        np.testing.assert_allclose(simulated["params/w"], exact["params/w"], atol=2e-5 if bits == 16 else 1e-6)


def test_noise_that_devices_add_is_as_large_in_simulation_and_on_a_fleet() -> None:
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    secure = shoal.Secure(members=4, colluders=0.0, dropouts=0.0)
    bare = Ways(small_task(local=local, privacy=shoal.Privacy(clip_norm=0.05))).simulated()["params/w"]
    ways = Ways(
        small_task(
            local=local, privacy=shoal.Privacy(clip_norm=0.05, noise_multiplier=1.0, distributed=True, secure=secure)
        )
    )
    expected = 0.05 * np.sqrt(ROUNDS) / 4  # of each round's mean over four
    made = [ways.simulated(), ways.on_a_fleet(in_one_process), ways.on_a_fleet(in_one_process)]
    noises = [tensors["params/w"] - bare for tensors in made]
    for noise in noises:
        assert np.std(noise) == pytest.approx(expected, rel=0.15)
    assert abs(np.corrcoef(noises[1].reshape(-1), noises[2].reshape(-1))[0, 1]) < 0.3, "of the devices' own randomness"


@pytest.mark.parametrize("noise", [0.0, 1.0], ids=["no noise", "noise"])
@pytest.mark.parametrize(
    "clip_norm",
    [{"params/w": 0.05}, shoal.AdaptiveClip(initial=0.05, learning_rate=0.9)],
    ids=["by tensor", "adaptive"],
)
def test_every_clip_norm_is_the_same_in_simulation_and_on_a_fleet_of_secure_groups(
    clip_norm: Any, noise: float
) -> None:
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    secure = shoal.Secure(members=4, colluders=0.0, dropouts=0.0)
    privacy = shoal.Privacy(clip_norm=clip_norm, noise_multiplier=noise, secure=secure)
    ways = Ways(small_task(local=local, privacy=privacy))
    simulated = ways.simulated()
    same_bits(ways.on_a_fleet(in_one_process), simulated)
    clear = Ways(small_task(local=local, privacy=replace(privacy, secure=None))).simulated()
    np.testing.assert_allclose(simulated["params/w"], clear["params/w"], atol=1.0 if noise else 1e-6)
    assert ("clip/log_scale" in simulated) is isinstance(clip_norm, shoal.AdaptiveClip)


EXAMPLES = shoal.ExamplePrivacy(clip_norm=0.5, noise_multiplier=2.0)


@pytest.mark.parametrize(
    "privacy",
    [
        shoal.Privacy(examples=EXAMPLES),
        shoal.Privacy(examples=EXAMPLES, clip_norm=0.05, noise_multiplier=1.0),
        shoal.Privacy(examples=EXAMPLES, clip_norm=0.05, secure=shoal.Secure(members=4, colluders=0.0, dropouts=0.0)),
    ],
    ids=["alone", "and noise on sums", "in secure groups"],
)
def test_noise_on_examples_is_the_device_s_own_and_the_same_with_the_same_keys(privacy: shoal.Privacy) -> None:
    local = shoal.Local(optimizer=optax.sgd(0.1), batch_size=8, steps_per_block=1, weighting="uniform")
    ways = Ways(small_task(local=local, privacy=privacy))
    simulated = ways.simulated()
    drawn = count()

    def as_in_simulation(size: int) -> bytes:
        return round_seed(run_seed(SEED), next(drawn) // len(MEMBERS))[:size]

    ways.random = as_in_simulation
    same_bits(ways.on_a_fleet(in_one_process), simulated)
    ways.random = os.urandom
    assert not np.array_equal(ways.on_a_fleet(in_one_process)["params/w"], simulated["params/w"])


@pytest.mark.slow
def test_a_task_learns_with_a_little_noise_on_its_examples() -> None:
    little = shoal.Privacy(examples=shoal.ExamplePrivacy(clip_norm=1.0, noise_multiplier=0.2))
    local = shoal.Local(optimizer=optax.sgd(0.5), batch_size=8, epochs=2, steps_per_block=2, weighting="uniform")
    chosen = small_task(local=local, privacy=little)
    losses = [
        float(np.mean(small_loss(model, {}, {name: jax.numpy.asarray(v) for name, v in everybody.items()}, None)))
        for everybody in [examples_of_all()]
        for model in (
            {"w": build(chosen, seed=SEED).model["params/w"]},
            {"w": shoal.simulate(chosen, population(), rounds=12, seed=SEED).model["params/w"]},
        )
    ]
    assert losses[1] < 0.6 * losses[0], losses


def examples_of_all() -> dict[str, np.ndarray]:
    members = population()
    return {name: np.concatenate([members[user].fields[name] for user in members]) for name in ("image", "label")}


def test_a_step_on_a_mesh_is_a_round_of_members_who_take_one_step() -> None:
    one_step = shoal.Local(optimizer=optax.sgd(0.1), batch_size=64, steps_per_block=1)
    ways = Ways(small_task(local=one_step))
    simulated = ways.simulated()
    everyone = shoal.data.Examples.concatenate([ways.members[name] for name in MEMBERS])
    trainer = Trainer(
        ways.task, mesh="slow=2,data=2", devices=jax.devices()[:4], batch_size=len(everyone), update="sharded"
    )
    state = trainer.train(everyone, steps=ROUNDS, commit_every=ROUNDS, seed=SEED)
    np.testing.assert_allclose(trainer.whole(state)["params/w"], simulated["params/w"], rtol=1e-4, atol=1e-6)


def test_the_task_of_the_fleet_learns_on_a_mesh() -> None:
    everyone = shoal.data.Examples.concatenate([examples for _, examples in population().items()])
    losses: list[float] = []
    watch = Watch(on_version=lambda version: losses.append(version.training["loss"]))
    trainer = Trainer(task, mesh="data=4", devices=jax.devices()[:4], batch_size=32, steps_per_call=1)
    trainer.train(everyone, steps=40, commit_every=10, watch=watch)
    assert losses[-1] < 0.7 * losses[0], losses
