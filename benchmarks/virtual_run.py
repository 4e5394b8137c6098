"""One virtual fleet that trains the small net on real images: what benchmarks of waste and of asynchrony share."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from benchmarks import small_net
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
    **settings: Any,
) -> Curve:
    """Trains until the accuracy is reached, or until then."""
    users, test = _data()
    keys, store, clock = HostKeys.make(), MemoryStore(), VirtualClock()
    built = build(small_net.task(policy, server_rate=server_rate), seed=0)
    plan = built.plan.sign(keys.signing)
    run = begin_run(store, plan, built.model, kind="simulate", rounds=1 << 30, seed=population.seed, clock=clock)
    training = VirtualTraining(plan, users, store, run, seed=population.seed)
    fleet = VirtualFleet(
        population, plan.manifest, clock, update_of=training.update_of, blocks_of=training.partial,
        model_bytes=plan.manifest.update_bytes,
        update_bytes=plan.manifest.update_bytes, **settings,
    )  # fmt: skip
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


@cache
def _data() -> tuple[Any, Any]:
    return small_net.data()
