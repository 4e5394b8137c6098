"""Asynchronous rounds beside the best synchronous ones, on devices of very different speeds.

A virtual fleet whose devices are always there, with log-normal speeds (sigma 1.0, and 0.5 and 1.5 beside it), trains a small net
on Fashion-MNIST (1,000 users, Dirichlet 0.3). Both train as many devices at once. The rival is the best of a grid of
synchronous rounds: over-selection x reporting window, late updates discarded as usual; what is best is found by the time
to the target itself, at sigma 1.0, which favours the rival. Ours: a buffer of updates, weighted by age as in FedBuff (Nguyen et al.
2022), committed when it is full.

A1 is the virtual time to the target, synchronous over asynchronous; bytes to the target beside it.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from benchmarks.frame import Goal, run, table
from benchmarks.virtual_run import Curve, train
from shoal.policy import Late, RoundPolicy
from shoal.simulate.virtual_population import VirtualPopulation

AT_ONCE: Final = 1000
SERVER_RATE: Final = 2.0
"""For both; the better of 1 and 2 for the synchronous rounds too."""
TARGET: Final = 0.74
LIMIT_S: Final = 40_000.0
GRID: Final = [(over, window_s) for over in (1.0, 1.3, 2.0) for window_s in (120.0, 300.0, 900.0)]


def synchronous(over: float, window_s: float) -> RoundPolicy:
    """A round that trains `AT_ONCE` devices."""
    return RoundPolicy(
        goal=int(AT_ONCE / over), over_selection=over, minimum_fraction=0.3, selection_window_s=10.0,
        reporting_window_s=window_s, adaptive=False,
    )  # fmt: skip


def buffered() -> RoundPolicy:
    """A version for every 25 updates."""
    return RoundPolicy(
        goal=25, buffer=25, concurrency=AT_ONCE, minimum_fraction=1.0, late=Late.discount(1.0, max_staleness=200)
    )


def population(sigma: float, seed: int) -> VirtualPopulation:
    return VirtualPopulation(
        devices=20_000, seed=seed, speed_sigma=sigma, round_sigma=0.1, window_hours=24.0, daily_swing=1.0, drop_out=0.05
    )


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    what = "virtual time to accuracy, best synchronous over buffered, sigma 1.0"
    if quick:
        return [Goal("A1", what, None, ">= 3")], {}
    best = _best_of_grid()
    rows, ratios = [], {}
    for sigma in (0.5, 1.0, 1.5):
        found = []
        for seed in range(1, 4) if sigma == 1.0 else range(1, 2):
            sync = _train(population(sigma, seed), synchronous(*best), evaluate_every=1)
            ours = _train(population(sigma, seed), buffered(), evaluate_every=5)
            found.append(sync.time_to(TARGET) / ours.time_to(TARGET))
            rows.append([
                sigma, seed, f"{best[0]}, {best[1]:.0f} s", sync.time_to(TARGET), ours.time_to(TARGET),
                found[-1], _megabytes(sync), _megabytes(ours),
            ])  # fmt: skip
        ratios[sigma] = found
    table(["sigma", "seed", "best sync", "sync, s", "async, s", "ratio", "sync MB", "async MB"], rows)
    goal = Goal("A1", what, float(np.median(ratios[1.0])), ">= 3", judged=min(ratios[1.0]))
    return [goal], {"ratios": {str(sigma): found for sigma, found in ratios.items()}}


def _best_of_grid() -> tuple[float, float]:
    """The cell with the shortest time to the target at sigma 1.0."""
    times = {cell: _train(population(1.0, 0), synchronous(*cell), evaluate_every=1).time_to(TARGET) for cell in GRID}
    table(["over-selection", "window, s", f"to {TARGET}, s"], [[*cell, time_s] for cell, time_s in times.items()])
    return min(times, key=lambda cell: times[cell])


def _train(fleet: VirtualPopulation, policy: RoundPolicy, *, evaluate_every: int) -> Curve:
    return train(fleet, policy, until_s=LIMIT_S, target=TARGET, evaluate_every=evaluate_every, server_rate=SERVER_RATE)


def _megabytes(curve: Curve) -> float:
    return (curve.tally.seconds["bytes_down"] + curve.tally.seconds["bytes_up"]) / 1e6


if __name__ == "__main__":
    run("fleet_async", measure, __doc__ or "")
