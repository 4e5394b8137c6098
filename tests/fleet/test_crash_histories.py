"""Thousands of lives of a server that is killed at any point, in virtual time: what was said holds. See `world.py`."""

import functools
import random
import time
from collections.abc import Iterable

import pytest

from shoal.policy import RoundPolicy
from tests.fleet import toy
from tests.fleet.world import Faults, World

EXACT = toy.exact("0", "1", "2", selection_window_s=20.0, reporting_window_s=30.0)
UNIFORM = RoundPolicy(
    goal=3, minimum_group=2, minimum_fraction=0.6, over_selection=1.3, selection_window_s=20.0, reporting_window_s=30.0
)
POLICIES = {"exact": EXACT, "uniform": UNIFORM}
ROUNDS, NUM_DEVICES = 2, 6


@functools.cache
def plan(name: str) -> object:
    return toy.plan(POLICIES[name])


def history(name: str, seed: int, faults: Faults) -> World:
    """One history, run to its end and checked."""
    devices = len(POLICIES[name].selection.ids) or NUM_DEVICES
    world = World(seed, plan(name), rounds=ROUNDS, num_devices=devices, faults=faults)  # type: ignore[arg-type]
    world.run()
    world.check(POLICIES[name])
    if name == "exact":
        assert world.final == undisturbed(), "the same bits"
    return world


@functools.cache
def undisturbed() -> str:
    world = World(0, plan("exact"), rounds=ROUNDS, num_devices=3, faults=Faults())  # type: ignore[arg-type]
    world.run()
    return world.final


def any_faults(name: str, seed: int) -> Faults:
    rng = random.Random(f"faults {name} {seed}")
    return Faults(
        crash=rng.choice([0.0, 0.005, 0.02, 0.05]),
        broken=rng.choice([0.0, 0.02, 0.1]),
        amnesia=rng.choice([0.0, 0.02, 0.1]),
        bad=rng.choice([0.0, 0.1]),
        stop=rng.choice([0.0, 0.0, 0.01]),
        dead=("5", "2") if name == "uniform" and rng.random() < 0.3 else (),
    )


def many(name: str, seeds: Iterable[int]) -> None:
    begun, count, crashes = time.perf_counter(), 0, 0
    for count, seed in enumerate(seeds, 1):
        faults = any_faults(name, seed)
        try:
            crashes += history(name, seed, faults).crashes
        except BaseException as error:
            error.add_note(f"history({name!r}, {seed}, {faults})")
            raise
    print(f"{count} histories, {crashes} crashes, {count / (time.perf_counter() - begun):.0f} histories per second")


@pytest.mark.parametrize("name", POLICIES)
def test_a_crash_at_every_single_point(name: str) -> None:
    points = history(name, 1, Faults()).points
    for point in range(1, points + 1):
        assert history(name, 1, Faults(crash_at=point)).crashes == 1, f"point {point}"


@pytest.mark.parametrize("name", POLICIES)
def test_histories(name: str) -> None:
    many(name, range(1000))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", POLICIES)
def test_tens_of_thousands_of_histories(name: str) -> None:
    many(name, range(1000, 16_000))
