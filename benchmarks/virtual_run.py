"""One virtual fleet that trains the small net on real images: what benchmarks of waste and of asynchrony share."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from benchmarks import small_net
from shoal.data.store import Population
from shoal.fleet.host import begin_run
from shoal.fleet.keys import HostKeys
from shoal.plan.build import build
from shoal.policy import RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.simulate.virtual import Tally, VirtualClock, VirtualFleet, drive
from shoal.simulate.virtual_population import VirtualPopulation
from shoal.simulate.virtual_training import VirtualTraining


@dataclass(frozen=True)
class Curve:
    """A run's accuracy over virtual time."""

    points: tuple[tuple[float, float], ...]
    """(virtual seconds, accuracy) of the versions that were evaluated."""
    tally: Tally

    def time_to(self, target: float) -> float:
        """Virtual seconds to an accuracy; infinity where it was not reached."""
        return next((time_s for time_s, accuracy in self.points if accuracy >= target), float("inf"))


def train(
    population: VirtualPopulation,
    policy: RoundPolicy,
    *,
    until_s: float,
    target: float,
    evaluate_every: int = 1,
    server_rate: float = 1.0,
    rate: float = 0.1,
    goes_with_speed: bool = False,
    **settings: Any,
) -> Curve:
    """Trains until the accuracy is reached, or until then.

    Args:
        population: the devices.
        policy: how rounds are run.
        until_s: virtual seconds.
        target: accuracy.
        evaluate_every: versions between two evaluations.
        server_rate: learning rate of the server's rule.
        rate: of the devices' training.
        goes_with_speed: whether what a device has goes with how fast it is; else they have nothing to do with one another.
        settings: of the virtual fleet.
    """
    users, test = _data()
    keys, store, clock = HostKeys.make(), MemoryStore(), VirtualClock()
    built = build(small_net.task(policy, server_rate=server_rate, rate=rate), seed=0)
    plan = built.plan.sign(keys.signing)
    run = begin_run(store, plan, built.model, kind="simulate", rounds=1 << 30, seed=population.seed, clock=clock)
    user_of: dict[int, str] = {}
    training = VirtualTraining(plan, users, store, run, seed=population.seed, user_of=user_of.get)
    fleet = VirtualFleet(
        population, plan.manifest, clock, update_of=training.update_of, blocks_of=training.partial,
        model_bytes=plan.manifest.update_bytes,
        update_bytes=plan.manifest.update_bytes, **settings,
    )  # fmt: skip
    user_of.update(_by_speed(fleet, users) if goes_with_speed else {})
    drive(fleet, store, run, rounds=1 << 30, keys=keys, seed=population.seed)
    points: list[tuple[float, float]] = []
    while clock.time_s < until_s and (not points or points[-1][1] < target):
        known = len(fleet.tally.commits)
        fleet.run(until_s=until_s, commits=evaluate_every)
        if len(fleet.tally.commits) == known:
            break
        version = len(fleet.tally.commits)
        points.append((float(fleet.tally.commits[-1][0]), float(training.evaluate(version, test)["accuracy"])))
    return Curve(tuple(points), fleet.tally)


def _by_speed(fleet: VirtualFleet, users: Population) -> dict[int, str]:
    """Devices by speed play users by their commonest label, half of it left to chance."""
    rng = np.random.default_rng(fleet.population.seed)
    labels = [np.bincount(users[user].fields["label"]).argmax() for user in users.ids]
    order = np.argsort(np.argsort(labels) / len(labels) + rng.random(len(labels)), kind="stable")
    ranks = np.argsort(np.argsort(fleet.slowness))
    return {device: users.ids[order[rank * len(order) // len(ranks)]] for device, rank in enumerate(ranks)}


@cache
def _data() -> tuple[Any, Any]:
    return small_net.data()
