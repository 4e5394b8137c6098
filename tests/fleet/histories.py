"""One history of a server that is killed, by seed; many of them: ``python -m tests.fleet.histories exact 0 1000 1`` (and on how many Edges)."""

import functools
import logging
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import replace

from shoal.fleet.round_log import replay
from shoal.policy import Late, RoundPolicy
from tests.fleet import toy
from tests.fleet.world import RUN, Faults, World

EXACT = toy.exact("0", "1", "2", selection_window_s=20.0, reporting_window_s=30.0)
UNIFORM = RoundPolicy(
    goal=3, minimum_group=2, minimum_fraction=0.6, over_selection=1.3, selection_window_s=20.0, reporting_window_s=30.0
)
SURPLUS = RoundPolicy(
    goal=2, minimum_group=2, minimum_fraction=1.0, over_selection=2.0, selection_window_s=20.0, reporting_window_s=30.0
)
LATE = replace(SURPLUS, late=Late.discount(0.5, max_staleness=1))
PATCHED = replace(SURPLUS, late=Late.patch(max_staleness=2))
STORED = replace(UNIFORM, goal=5, group_size=2, late=Late.discount(0.5, max_staleness=1))
ASYNCHRONOUS = replace(
    UNIFORM, goal=2, minimum_fraction=1.0, buffer=2, concurrency=4, late=Late.discount(0.5, max_staleness=2)
)
EXACT_STORED = toy.exact(
    "0", "1", "2", "3", "4", minimum_group=2, group_size=2, selection_window_s=20.0, reporting_window_s=30.0
)
RESTING = replace(UNIFORM, goal=2, minimum_fraction=1.0, min_separation=2)
POLICIES = {
    "exact": EXACT, "uniform": UNIFORM, "surplus": SURPLUS, "late": LATE, "patched": PATCHED, "stored": STORED,
    "asynchronous": ASYNCHRONOUS, "exact_stored": EXACT_STORED,
    "resting": RESTING,
}  # fmt: skip
NUM_DEVICES = 6


def rounds(name: str) -> int:
    return 3 if POLICIES[name].max_staleness or POLICIES[name].min_separation > 1 else 2


@functools.cache
def plan(name: str) -> object:
    return toy.plan(POLICIES[name])


def history(name: str, seed: int, faults: Faults, *, num_edges: int = 1) -> World:
    """One history, run to its end and checked."""
    devices = len(POLICIES[name].selection.ids) or NUM_DEVICES * POLICIES[name].min_separation  # else all might rest
    world = World(  # type: ignore[arg-type]
        seed, plan(name), rounds=rounds(name), num_devices=devices, faults=faults, num_edges=num_edges
    )
    world.run()
    world.check(POLICIES[name])
    if seed % 5 == 0:
        check_logs(world)
    if name == "exact":
        assert world.final == undisturbed(), "the same bits"
    return world


def check_logs(world: World) -> None:
    """Every round that a machine closed can be run again, and closes as it did."""
    for row in world.store.rounds(RUN):
        log = world.store.round_log(RUN, row.number)
        assert (log is None) == (row.reason in ("", "the host stopped")), row
        if log is not None:
            close = replay(log).close
            assert close is not None and (close.round, close.reason) == (row.number, row.reason)


@functools.cache
def undisturbed() -> str:
    world = World(0, plan("exact"), rounds=rounds("exact"), num_devices=3, faults=Faults())  # type: ignore[arg-type]
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
        dead=("5", "2") if not name.startswith("exact") and rng.random() < 0.3 else (),
        usurped=rng.choice([0.0, 0.0, 0.002, 0.02]),
    )


def many(name: str, seeds: Iterable[int], *, num_edges: int = 1) -> None:
    begun, crashes, edges, shut_out, seeds = time.perf_counter(), 0, 0, 0, list(seeds)
    for seed in seeds:
        faults = any_faults(name, seed)
        if num_edges > 1:
            faults = replace(
                faults, usurped=0.0, crash=min(faults.crash, 0.02), edge=random.Random(seed).choice([0.0, 0.02, 0.1])
            )
        try:
            world = history(name, seed, faults, num_edges=num_edges)
            crashes, edges = crashes + world.crashes, edges + world.edge_crashes
            shut_out += world.shut_out
        except BaseException as error:
            error.add_note(f"history({name!r}, {seed}, {faults}, num_edges={num_edges})")
            raise
    print(
        f"{len(seeds)} histories, {crashes} crashes, {edges} of Edges, {shut_out} stale servers shut out, {len(seeds) / (time.perf_counter() - begun):.0f} histories per second"
    )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    many(sys.argv[1], range(int(sys.argv[2]), int(sys.argv[3])), num_edges=int(sys.argv[4]))
