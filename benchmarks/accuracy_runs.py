"""One run of the `accuracy` benchmark: an algorithm on a problem with one seed, in simulation or in a virtual fleet."""

from dataclasses import dataclass, replace
from functools import cache
from math import inf, nan
from typing import Final

import numpy as np

import shoal
from benchmarks import virtual_run
from benchmarks.accuracy_algorithms import ALGORITHMS, Algorithm, Setting
from benchmarks.accuracy_devices import STAGES, measured
from benchmarks.accuracy_problems import PROBLEMS, TUNING_SEED, Problem
from shoal.data import Examples, Population
from shoal.errors import DataError
from shoal.policy import RoundPolicy, ServerRule
from shoal.simulate.virtual_population import VirtualPopulation

EVALUATIONS: Final = 20
"""Of a run."""
LAST: Final = 3
"""Evaluations of which the mean is the final quality."""
LAST_ROUNDS: Final = 15
"""Rounds of which the devices' mean is the final quality on devices."""
FLEET_S: Final = 6000.0
"""Virtual seconds after which a fleet has not reached the target."""


@dataclass(frozen=True)
class Outcome:
    """What came of a run. NaN: not measured."""

    quality: float = nan
    """Final, centrally."""
    rounds: float = nan
    """To the target; infinity: not reached."""
    sent: float = nan
    """Final, of the model as sent, on what devices hold out."""
    reached: float = nan
    """The same of the devices' own models after local training."""
    seconds: float = nan
    """Virtual, to the target."""
    curve: tuple[tuple[int, float], ...] = ()
    """(round, central quality)."""

    def merit(self, measure: str) -> float:
        """By which settings are chosen. Of the central curve its mean, so that speed counts as well as the end."""
        if measure == "seconds":
            return -self.seconds
        if measure == "reached":
            return self.reached
        return float(np.mean([quality for _, quality in self.curve])) if self.curve else -inf


def run_one(problem: str, algorithm: str, setting: Setting, seed: int, rounds: int) -> Outcome:
    """A run by names, as it travels to a worker. One that diverges has no quality at all."""
    chosen = next(each for each in PROBLEMS if each.name == problem)
    row = next(each for each in ALGORITHMS if each.name == algorithm)
    try:
        return (_in_fleet if row.is_in_fleet else _simulated)(chosen, row, setting, seed, rounds)
    except DataError as error:
        if "NaN" not in str(error) and "bound" not in str(error):
            raise
        return Outcome(0.0, inf, 0.0, 0.0, inf, ((0, 0.0),))


def run_central(problem: str, rate: float, seed: int, epochs: int) -> float:
    """The final quality of training on all examples in one place, with a multiple of the problem's rate."""
    chosen = next(each for each in PROBLEMS if each.name == problem)
    data = chosen.data(seed)
    task = chosen.make(chosen.rate * rate)
    task = task.replace(
        local=replace(task.local, max_examples=1 << 20, weighting="uniform"),
        rounds=RoundPolicy(goal=1, over_selection=1.0, minimum_group=1),
    )
    whole = Examples.concatenate([examples for _, examples in data.users.items()])
    result = shoal.simulate(
        task, Population.from_arrays({"all": whole}), rounds=epochs, seed=seed, held_out=_judge(chosen, seed), evaluate_every=epochs,
    )  # fmt: skip
    return float(result.history[-1].metrics[chosen.quality])


def _judge(problem: Problem, seed: int) -> Examples:
    """The central examples: of the tuning seed others than of those that are judged."""
    data = problem.data(seed)
    return data.validation if seed == TUNING_SEED else data.test


def _simulated(problem: Problem, algorithm: Algorithm, setting: Setting, seed: int, rounds: int) -> Outcome:
    task = measured(algorithm.task(problem, setting), problem.quality)
    every = max(1, rounds // EVALUATIONS)
    result = shoal.simulate(
        task, problem.data(seed).users, rounds=rounds, seed=seed, held_out=_judge(problem, seed), evaluate_every=every
    )
    curve = tuple((r.version, r.metrics[problem.quality]) for r in result.history if problem.quality in r.metrics)
    of_devices = {
        stage: float(np.mean([r.metrics[f"train/{stage}"] for r in result.history[-LAST_ROUNDS:]])) for stage in STAGES
    }
    if algorithm.is_personal:
        return Outcome(reached=of_devices["reached"])
    return Outcome(
        quality=float(np.mean([quality for _, quality in curve[-LAST:]])),
        rounds=next((float(number) for number, quality in curve if quality >= problem.target), inf),
        curve=curve, **of_devices,
    )  # fmt: skip


@cache
def _fleet_problem(
    problem: str, algorithm: str, setting: tuple[tuple[str, float], ...], seed: int
) -> virtual_run.Problem:
    chosen = next(each for each in PROBLEMS if each.name == problem)
    row = next(each for each in ALGORITHMS if each.name == algorithm)
    task = row.task(chosen, dict(setting))
    return virtual_run.Problem(task, chosen.data(seed).users, _judge(chosen, seed), chosen.quality)


def _in_fleet(problem: Problem, algorithm: Algorithm, setting: Setting, seed: int, rounds: int) -> Outcome:
    """A thousand devices, always there, with speeds of sigma 1; device i plays user i modulo the users."""
    task = algorithm.task(problem, setting)
    fleet = VirtualPopulation(
        devices=1000, seed=seed, speed_sigma=1.0, round_sigma=0.1, window_hours=24.0, daily_swing=1.0, drop_out=0.0
    )
    rate = task.server.learning_rate if isinstance(task.server, ServerRule) else 1.0
    curve = virtual_run.train(
        fleet, task.rounds, until_s=FLEET_S * rounds / problem.rounds, target=problem.target, server_rate=rate,
        problem=lambda: _fleet_problem(problem.name, algorithm.name, tuple(setting.items()), seed),
        evaluate_every=4 if task.rounds.buffer else 1,
    )  # fmt: skip
    return Outcome(seconds=curve.time_to(problem.target))
