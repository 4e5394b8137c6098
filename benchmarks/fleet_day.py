"""A day of a million devices: how long the machines of a live host take for it, on one core, under a virtual clock.

Check-ins follow the daily swing; devices are told to come again after half an hour on average, so that there are millions
of them; rounds of 300 of 390 selected are patched with what comes late. No numbers are trained: what is measured is
selection, groups, pace, commits.
"""

import os
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.frame import Goal, run, table
from shoal.policy import Late, RoundPolicy
from shoal.simulate.virtual import virtual_fleet
from shoal.simulate.virtual_population import VirtualPopulation

POLICY = RoundPolicy(
    goal=300,
    over_selection=1.3,
    selection_window_s=60.0,
    reporting_window_s=240.0,
    late=Late.patch(max_staleness=5),
    adaptive=False,
)


def measure(quick: bool) -> tuple[Sequence[Goal], dict[str, Any]]:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    hours = 1.0 if quick else 24.0
    fleet = virtual_fleet(VirtualPopulation(devices=1_000_000, train_s=90.0), POLICY, most_delay_s=1800.0)
    begun = time.perf_counter()
    fleet.run(until_s=hours * 3600.0)
    minutes = (time.perf_counter() - begun) / 60.0
    tally = fleet.tally
    table(
        ["virtual hours", "minutes", "check-ins", "rounds", "assigned", "updates a round", "µs a check-in"],
        [[
            hours, minutes, tally.num_check_ins, len(tally.commits), tally.assigned,
            sum(updates for _, updates, _ in tally.commits) / max(1, len(tally.commits)),
            60e6 * minutes / tally.num_check_ins,
        ]],
    )  # fmt: skip
    by_hour = [0] * (int(hours) + 1)
    for second, number in tally.check_ins.items():
        by_hour[second // 3600] += number
    print("check-ins by hour:", " ".join(map(str, by_hour)))
    enough = tally.num_check_ins >= 5_000_000 and sum(updates >= 300 for _, updates, _ in tally.commits) >= 300
    why = "a quick run is one hour of the day" if quick else ""
    what = "minutes for a virtual day of 1,000,000 devices, >= 5 M check-ins, >= 300 rounds of 300, on one core"
    if not enough and not quick:
        print("NOT ENOUGH: the day had fewer check-ins or rounds than the goal asks for")
    value = minutes if enough or quick else float("inf")
    return [Goal("V1", what, value, "<= 5", why=why)], {"check_ins": tally.num_check_ins, "rounds": len(tally.commits)}


if __name__ == "__main__":
    run("fleet_day", measure, __doc__ or "")
