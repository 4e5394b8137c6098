"""One task, built and compiled once; the ways to run it."""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import jax
import numpy as np

from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.link import Link
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.run_plan import begin_run
from shoal.plan.stablehlo import this_runtime
from shoal.record.memory import MemoryStore
from shoal.simulate.engine import RoundResult, Simulation, go_on
from shoal.task import Task
from shoal.tensors import Tensors
from tests.algorithms.problem import COHORT, SEED, exact, population
from tests.test_one_task import in_one_process

KEYS = HostKeys(bytes(range(64)))
Linked = Callable[[Host], AbstractAsyncContextManager[Link]]


class Ways:
    """The programs of a task and of the same with other rounds are alike: one runner does for both."""

    def __init__(self, chosen: Task) -> None:
        self.task, self.exact = chosen, exact(chosen)
        self.built = build(chosen, seed=SEED)
        self.runner = JaxRunner(self.built.plan.sign(KEYS.signing))

    def simulate(self, *, rounds: int, exactly: bool = False) -> Simulation:
        built = self._built(exactly)
        store, run_id = self._begin(built, rounds)
        return go_on(store, run_id, population(), runner=self.runner)

    def fused(self, *, rounds: int) -> Simulation:
        store, run_id = self._begin(self.built, rounds)
        return go_on(store, run_id, population(), runner=self.runner, task=self.task)

    def taken_up(self, folder: Path, *, rounds: int, halts_after: int) -> Simulation:
        """A run that ends in the middle, and is gone on with by another life."""
        store, run_id = self._begin(self.built, rounds)
        go_on(store, run_id, population(), runner=self.runner, folder=folder, rounds=halts_after)
        return go_on(store, run_id, population(), runner=self.runner, folder=folder, rounds=rounds)

    def on_a_fleet(self, *, rounds: int, linked: Linked = in_one_process) -> Tensors:
        store, run_id = self._begin(self._built(True), rounds)
        asyncio.run(self._serve(Host(store, run_id, KEYS, call_program=self.runner.call), linked))
        commit = store.last_commit(run_id)
        assert commit is not None and commit.version == rounds
        return {entry.spec.name: store.blobs.view(entry.hash, entry.spec) for entry in commit.model}

    def _built(self, exactly: bool) -> Built:
        return build(self.exact, seed=SEED) if exactly else self.built

    def _begin(self, built: Built, rounds: int) -> tuple[MemoryStore, str]:
        store = MemoryStore()
        plan = built.plan.sign(KEYS.signing)
        return store, begin_run(store, plan, built.model, kind="host", rounds=rounds, seed=SEED)

    async def _serve(self, host: Host, linked: Linked) -> None:
        members, running = population(), asyncio.create_task(host.run())
        async with linked(host) as link:
            shared = DeviceHost(make_runner=lambda plan: self.runner, runtime=this_runtime())
            devices = [
                Device(name, lambda n=name: members[n], link=link, host=shared, rng=np.random.default_rng(0))
                for name in COHORT
            ]
            await asyncio.wait_for(asyncio.gather(running, *(device.run() for device in devices)), timeout=50)
        await host.edge.close()


def simulated(chosen: Task, *, rounds: int = 2) -> Tensors:
    """The last model of a simulation."""
    return Ways(chosen).simulate(rounds=rounds).model


def cohorts(made: Simulation) -> list[tuple[str, ...]]:
    return [_members(result) for result in made.history]


def _members(result: RoundResult) -> tuple[str, ...]:
    return result.members


def same_bits(one: Tensors, other: Tensors, *, names: Sequence[str] = ()) -> None:
    """All tensors, or those named, are the same."""
    assert names or list(one) == list(other)
    for name in names or one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def close(one: Tensors, other: Tensors, *, names: Sequence[str] = (), rtol: float = 2e-5) -> None:
    """To rounding."""
    for name in names or other:
        np.testing.assert_allclose(one[name], other[name], rtol=rtol, atol=rtol, err_msg=name)


def initial(chosen: Task) -> dict[str, np.ndarray]:
    """The first model of the problem, float64."""
    params = chosen.variables(jax.random.key(SEED)).params
    return {name: np.asarray(value, np.float64) for name, value in params.items()}
