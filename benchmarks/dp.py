"""Differential privacy: whether the accounting is right, what clipping and noise cost a round, and what they leave to learn.

E1: epsilon against published and independently measured numbers (`dp-accounting` 0.6.0; Kairouz et al. 2021 for the concentrated ones).
E2: rounds of `simulation`'s nets with and without `Privacy(clip_norm=…, noise_multiplier=…)`, in turns within one process. The ratio is the
median of the pairs, judged by the worse end of its 95 % interval; the goal is about the net where it is largest.

Then quality by epsilon at delta 1e-6, a device being a user: Fashion-MNIST dealt out to 3,000 users of 20 images, 600 of them in a round; and
MovieLens-100K, 400 of its 943 users in a round. Noise is calibrated for the whole run. Three seeds; rates, epochs and clip norms were chosen on
another. The ways to have it:

    central      every user may be in every round
    distributed  that, added by the users in secure groups as large as the round, of whom a tenth may collude and three tenths may go away
    sampled      cohorts by Poisson sampling, whose amplification is counted
    resting      who was in a round rests, as long as there are others; counted are the rounds that one can be in
    DP-FTRL      that, with noise that cancels over the rounds (BLT)
"""

import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any, Final

import numpy as np

import shoal
from benchmarks import simulation_common as common
from benchmarks import simulation_ours
from benchmarks.accuracy_problems import HELD_OUT, fashion_task, movielens_data, movielens_task
from benchmarks.frame import Goal, percentile_interval, run, table
from shoal.data import Examples, Population
from shoal.policy import Correlated, Privacy, RoundPolicy, Secure, Selection
from shoal.privacy import accounting
from shoal.simulate.engine import RoundResult

SAMPLED: Final = (
    (256 / 60_000, 1.1, 14_063, 1e-5, 2.597),
    (4096 / 50_000, 3.0, 875, 1e-5, 3.910),
    (1e-3, 1.0, 2000, 1e-9, 1.458),
    (1e-2, 1.0, 500, 1e-5, 1.653),
    (1.0, 5.0, 50, 1e-5, 7.077),
)
"""Sampling, noise multiplier, releases, delta, epsilon by Rényi divergences."""
CONCENTRATED: Final = ((0.2, 3.98), (0.25, 4.49), (0.5, 6.55), (0.81, 8.55), (1.0, 9.62), (2.0, 14.27))
"""Rho, epsilon of the Gaussian at 1e-10."""
PAIRS: Final = 24
WARM: Final = 3
DELTA: Final = 1e-6
EPSILONS: Final = (2.0, 8.0)
WAYS: Final = ("central", "distributed", "sampled", "resting", "DP-FTRL")
SEEDS: Final = (1, 2, 3)
ROUNDS: Final = 60


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    numbers = golden()
    agree = sum(f"{ours:.3g}" == f"{given:.3g}" for ours, given in numbers) / len(numbers)
    print(f"accounting: {len(numbers)} golden numbers, {agree:.0%} agree in three digits")
    costs = {config: cost(config, 6 if quick else PAIRS) for config in (("mlp",) if quick else ("cnn", "lenet", "mlp"))}
    table(
        ["net", "plain, ms a round", "with noise, ms", "ratio", "from", "to"],
        [
            [c, f"{1e3 * x.plain_s:.1f}", f"{1e3 * x.noisy_s:.1f}", f"{x.ratio:.3f}", f"{x.low:.3f}", f"{x.high:.3f}"]
            for c, x in costs.items()
        ],
    )
    worst = max(costs.values(), key=lambda each: each.high)
    rows = [] if quick else [row for problem in (FASHION, MOVIELENS) for row in qualities(problem)]
    table(["problem", "noise", "epsilon", "noise multiplier", "quality", "±"], [row.cells() for row in rows])
    goals = [
        Goal("E1", "share of golden accounting numbers that agree in three digits", agree, ">= 1"),
        Goal("E2", "what clipping and noise add to a round, at most of three nets", None if quick else worst.ratio - 1, "<= 0.1",
             judged=None if quick else worst.high - 1),
    ]  # fmt: skip
    told = [
        vars(row) | {"epsilon": row.epsilon if isfinite(row.epsilon) else None} for row in rows
    ]  # JSON has no infinity
    figures = {"costs": {name: vars(each) for name, each in costs.items()}, "qualities": told}
    return goals, figures


def golden() -> list[tuple[float, float]]:
    """(ours, golden), each epsilon."""
    return [
        (accounting.epsilon_of_rdp(releases * accounting.sampled_gaussian_rdp(sampling, noise), delta), epsilon)
        for sampling, noise, releases, delta, epsilon in SAMPLED
    ] + [(accounting.gaussian_epsilon(1e-10, (2 * rho) ** -0.5), epsilon) for rho, epsilon in CONCENTRATED]


# What it costs.


@dataclass(frozen=True)
class Cost:
    """Of one net."""

    plain_s: float
    noisy_s: float
    ratio: float
    low: float
    high: float


def cost(config: str, pairs: int) -> Cost:
    """Rounds with and without, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        common.make_data(Path(folder))
        data = common.load_data(Path(folder), config)
        examples = Examples(simulation_ours.fields(config, data.x.reshape(-1, *data.x.shape[2:]), data.y.reshape(-1)))
        held = np.arange(len(examples)).reshape(common.USERS, common.EACH)
        users = Population.from_split(examples, {f"{user:04d}": held[user] for user in range(common.USERS)})
        plain = simulation_ours.task(config, data.weights)
        noisy = plain.replace(privacy=Privacy(clip_norm=0.5, noise_multiplier=1.0))
        seconds = _in_turns([plain, noisy], users, WARM + pairs)
    made = np.array([each[WARM:] for each in seconds])
    ratio, low, high = percentile_interval(list(made[1] / made[0]), 50)
    return Cost(float(np.median(made[0])), float(np.median(made[1])), ratio, low, high)


def _in_turns(tasks: Sequence[shoal.Task], users: Population, rounds: int) -> list[list[float]]:
    """Seconds of each round of each task; only one of them has a round at a time."""
    turn, at = threading.Condition(), 0
    seconds: list[list[float]] = [[] for _ in tasks]

    def wait(number: int) -> None:
        with turn:
            turn.wait_for(lambda: at == number)

    def ended(number: int, result: RoundResult) -> None:
        nonlocal at
        seconds[number].append(result.seconds)
        with turn:
            at = (number + 1) % len(tasks)
            turn.notify_all()
        if len(seconds[number]) < rounds:
            wait(number)

    def play(number: int) -> None:
        wait(number)
        shoal.simulate(tasks[number], users, rounds=rounds, seed=1, on_round=lambda result: ended(number, result))

    threads = [threading.Thread(target=play, args=(number,)) for number in range(len(tasks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


# What it leaves to learn.


@dataclass(frozen=True)
class Private:
    """A problem that is learned with noise."""

    name: str
    metric: str
    task: shoal.Task
    clip_norm: float
    cohort: int
    users: Any
    """Seed -> (users, central examples)."""


@dataclass(frozen=True)
class Row:
    """Quality at one epsilon."""

    problem: str
    way: str
    epsilon: float
    """At delta 1e-6; infinity: clipped, no noise."""
    noise_multiplier: float
    quality: float
    spread: float
    """Standard deviation over seeds."""

    def cells(self) -> list[str]:
        return [
            self.problem, self.way, f"{self.epsilon:g}", f"{self.noise_multiplier:.2f}", f"{self.quality:.4f}", f"{self.spread:.4f}"
        ]  # fmt: skip


def qualities(problem: Private) -> list[Row]:
    """Without noise, then by epsilon and way."""
    rows = [_row(problem, "none", float("inf"))]
    return rows + [_row(problem, way, epsilon) for epsilon in EPSILONS for way in WAYS]


def _row(problem: Private, way: str, epsilon: float) -> Row:
    noise = _noise(problem, way, epsilon)
    found = [_quality(problem, way, epsilon, noise, seed) for seed in SEEDS]
    row = Row(problem.name, way, epsilon, noise, float(np.mean(found)), float(np.std(found, ddof=1)))
    print("  ".join(row.cells()), flush=True)
    return row


def _separation(problem: Private) -> int:
    return len(problem.users(SEEDS[0])[0]) // problem.cohort


def _noise(problem: Private, way: str, epsilon: float) -> float:
    """The noise multiplier of a run that keeps to epsilon."""
    sampling = problem.cohort / len(problem.users(SEEDS[0])[0])
    match way:
        case "none":
            return 0.0
        case "sampled":
            curve = partial(accounting.sampled_gaussian_rdp, sampling)
            return accounting.calibrate(epsilon, DELTA, releases=ROUNDS, rdp=curve)
        case "resting":
            most = accounting.participations(ROUNDS, _separation(problem))
            return accounting.calibrate(epsilon, DELTA, releases=most)
        case "DP-FTRL":
            return accounting.calibrate(epsilon, DELTA)
    return accounting.calibrate(epsilon, DELTA, releases=ROUNDS)


def _quality(problem: Private, way: str, epsilon: float, noise: float, seed: int) -> float:
    users, central = problem.users(seed)
    rests = way in ("resting", "DP-FTRL")
    limit = epsilon * 1.01 if noise else None  # Skellam noise is worth a little less
    privacy = Privacy(clip_norm=problem.clip_norm, noise_multiplier=noise, epsilon=limit, delta=DELTA)
    if way == "DP-FTRL":
        privacy = replace(privacy, correlated=Correlated(rounds=ROUNDS))
    if way == "distributed":
        privacy = replace(privacy, distributed=True, secure=Secure(members=problem.cohort))
    task = problem.task.replace(
        rounds=RoundPolicy(
            goal=problem.cohort, over_selection=1.0, selection=Selection.poisson() if way == "sampled" else Selection(),
            min_separation=_separation(problem) if rests else 1,
        ),
        local=replace(problem.task.local, weighting="uniform"),
        privacy=privacy,
    )  # fmt: skip
    made = shoal.simulate(task, users, rounds=ROUNDS, seed=seed, held_out=central, evaluate_every=ROUNDS)
    return float(made.history[-1].metrics[problem.metric])


def _fashion(seed: int) -> tuple[Population, Examples]:
    loaded, rng = shoal.data.load("fashion-mnist"), np.random.default_rng(seed)
    flags = {HELD_OUT: np.zeros(60_000, np.int32)}
    dealt = rng.permutation(60_000).reshape(3000, 20)
    users = Population.from_split(
        Examples({**loaded.train.fields, **flags}), {f"{i:04d}": dealt[i] for i in range(3000)}
    )
    return users, Examples({**loaded.test.fields, HELD_OUT: np.zeros(len(loaded.test), np.int32)})


def _movielens(seed: int) -> tuple[Population, Examples]:
    found = movielens_data()
    return found.users, found.test


def _longer(task: shoal.Task, epochs: int) -> shoal.Task:
    local = task.local
    return task.replace(local=replace(local, epochs=epochs, max_examples=epochs * local.max_examples))


FASHION: Final = Private("Fashion-MNIST", "accuracy", _longer(fashion_task(0.3), 5), 1.0, 600, _fashion)
MOVIELENS: Final = Private("MovieLens", "hit_rate", _longer(movielens_task(4.0), 3), 5.0, 400, _movielens)


if __name__ == "__main__":
    run("dp", measure, "What differential privacy costs, and whether its accounting is right.")
