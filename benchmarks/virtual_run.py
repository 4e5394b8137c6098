"""One virtual fleet that trains a small net on real images: what benchmarks of a fleet's rounds share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from benchmarks import small_net
from shoal import server
from shoal.data.store import Examples, Population
from shoal.fleet.keys import HostKeys
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.manifest import ServerHalf
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run
from shoal.policy import RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.simulate.virtual import Tally, VirtualClock, VirtualFleet, drive
from shoal.simulate.virtual_population import VirtualPopulation
from shoal.simulate.virtual_training import VirtualTraining
from shoal.task import Task
from shoal.tensors import sha256


@dataclass(frozen=True)
class Curve:
    """A run's accuracy over virtual time."""

    points: tuple[tuple[float, float], ...]
    """(virtual seconds, accuracy) of the versions that were evaluated."""
    tally: Tally

    def time_to(self, target: float) -> float:
        """Virtual seconds to an accuracy; infinity where it was not reached."""
        return next((time_s for time_s, accuracy in self.points if accuracy >= target), float("inf"))


class Problem:
    """A task and its data; programs are built and compiled once, whatever the rounds are like."""

    def __init__(self, task: Task, users: Population, test: Examples, quality: str = "accuracy") -> None:
        """`quality`: name of the metric that is the run's accuracy."""
        self.users, self.test, self.quality = users, test, quality
        self._built: Built = build(task, seed=0)
        self.model = self._built.model
        self.runner = JaxRunner(self._built.plan)

    def plan(self, policy: RoundPolicy, *, server_rate: float) -> Plan:
        """The plan with these rounds and this rate at the server: programs do not depend on them."""
        manifest = self._built.plan.manifest
        half = ServerHalf(rounds=policy, rule=server.sgd(server_rate), about=manifest.server.about)
        promises = replace(manifest.promises, minimum_group=policy.minimum_group)
        made = replace(manifest, half=half, server_hash=sha256(half.data), promises=promises)
        return Plan(made, self._built.plan.programs)


@cache
def fashion(rate: float = 0.1) -> Problem:
    """The small net on Fashion-MNIST."""
    return Problem(small_net.task(RoundPolicy(), rate=rate), *small_net.data())


def train(
    population: VirtualPopulation,
    policy: RoundPolicy,
    *,
    until_s: float,
    target: float,
    problem: Callable[[], Problem] = fashion,
    evaluate_every: int = 1,
    server_rate: float = 1.0,
    goes_with_speed: bool = False,
    **settings: Any,
) -> Curve:
    """Trains until the accuracy is reached, or until then.

    Args:
        population: the devices.
        policy: how rounds are run.
        until_s: virtual seconds.
        target: accuracy.
        problem: what is learned.
        evaluate_every: versions between two evaluations.
        server_rate: learning rate of the server's rule.
        goes_with_speed: whether what a device has goes with how fast it is; else they have nothing to do with one another.
        settings: of the virtual fleet.
    """
    learned = problem()
    keys, store, clock = HostKeys.make(), MemoryStore(), VirtualClock()
    plan = learned.plan(policy, server_rate=server_rate).sign(keys.signing)
    run = begin_run(store, plan, learned.model, kind="simulate", rounds=1 << 30, seed=population.seed, clock=clock)
    user_of: dict[int, str] = {}
    training = VirtualTraining(
        plan, learned.users, store, run, seed=population.seed, user_of=user_of.get, runner=learned.runner
    )
    size = plan.manifest.update_bytes
    fleet = VirtualFleet(
        population, plan.manifest, clock, update_of=training.update_of, blocks_of=training.partial,
        **{"model_bytes": size, "update_bytes": size, **settings},
    )  # fmt: skip
    user_of.update(_by_speed(fleet, learned.users) if goes_with_speed else {})
    drive(fleet, store, run, rounds=1 << 30, keys=keys, seed=population.seed)
    points: list[tuple[float, float]] = []
    while clock.time_s < until_s and (not points or points[-1][1] < target):
        known = len(fleet.tally.commits)
        fleet.run(until_s=until_s, commits=evaluate_every)
        if len(fleet.tally.commits) == known:
            break
        version = len(fleet.tally.commits)
        points.append(
            (float(fleet.tally.commits[-1][0]), float(training.evaluate(version, learned.test)[learned.quality]))
        )
    return Curve(tuple(points), fleet.tally)


def _by_speed(fleet: VirtualFleet, users: Population) -> dict[int, str]:
    """Devices by speed play users by their commonest label, half of it left to chance."""
    rng = np.random.default_rng(fleet.population.seed)
    labels = [np.bincount(users[user].fields["label"]).argmax() for user in users.ids]
    order = np.argsort(np.argsort(labels) / len(labels) + rng.random(len(labels)), kind="stable")
    ranks = np.argsort(np.argsort(fleet.slowness))
    return {device: users.ids[order[rank * len(order) // len(ranks)]] for device, rank in enumerate(ranks)}
