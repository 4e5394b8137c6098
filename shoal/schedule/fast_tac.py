"""TAC, found incrementally: the order of `orders.tac`, in milliseconds for a thousand transfers (the paper took 10 s).

When a transfer is given its place only the stages downstream of it change: what each still waits for is counted down. Of the comparator (P, M, M+)
two things follow that spare the rest:

    * who unlocks computation (P > 0) comes before all who do not, so only those are compared, in the order of names;
    * among those who do not only M+ counts, and the least M+ is that of the stage that waits for the least.

With Numba (the extra `embed`) it is compiled; without it takes about a hundred times as long, and is the same.
"""

from collections.abc import Callable
from importlib.util import find_spec
from inspect import unwrap
from typing import Any, Final

import numpy as np

from shoal.schedule.graph import Graph, Times

_NEVER: Final = np.iinfo(np.int64).max


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """By Numba, where it is installed."""
    if find_spec("numba") is None:
        return function
    from numba import njit

    made: Callable[..., Any] = njit(cache=True)(unwrap(function))
    return made


def fast_tac(graph: Graph, times: Times) -> np.ndarray:
    """Rank of each transfer, 0 first.

    Args:
        graph: of a step; pass `graph.forward` for the order of pulls.
        times: of its parts.

    Raises:
        ValueError: times of another graph.
    """
    times.check(graph)
    found = graph.by_name
    order = _order(found.begins, found.stages, found.waits, times.transfers[found.names], times.stages)
    ranks = np.empty(len(order), np.int64)
    ranks[found.names[order]] = np.arange(len(order))
    return ranks


@_compiled
def _order(
    begins: np.ndarray, stages: np.ndarray, num_waits: np.ndarray, communication: np.ndarray, computation: np.ndarray
) -> np.ndarray:
    """The transfers, first to last.

    Args:
        begins, stages: stages[begins[r] : begins[r + 1]] are those downstream of transfer r.
        num_waits: transfers upstream of each stage.
        communication: M of each transfer.
        computation: of each stage.
    """
    num = len(communication)
    unlocked = np.zeros(num, np.int64)
    is_left = np.ones(num, np.bool_)
    order = np.empty(num, np.int64)
    waits = num_waits.copy()  # what is outstanding upstream of a stage: how many,
    together = np.zeros(len(waits), np.int64)  # how long,
    numbers = np.zeros(len(waits), np.int64)  # and the sum of their numbers, which is the number of the last one
    for r in range(num):
        for at in range(begins[r], begins[r + 1]):
            together[stages[at]] += communication[r]
            numbers[stages[at]] += r
    for stage in range(len(waits)):
        if waits[stage] == 1:
            unlocked[numbers[stage]] += computation[stage]
    for place in range(num):
        first = -1
        for r in range(num):  # who unlocks something, in the order of names
            if not is_left[r] or unlocked[r] == 0:
                continue
            if first < 0:
                first = r
                continue
            left, right = min(unlocked[first], communication[r]), min(unlocked[r], communication[first])
            if left == right:
                left = _impending(r, begins, stages, waits, together)
                right = _impending(first, begins, stages, waits, together)
            if left < right:
                first = r
        if first < 0:
            first = _least(is_left, begins, stages, waits, together)
        order[place] = first
        is_left[first] = False
        for at in range(begins[first], begins[first + 1]):
            stage = stages[at]
            waits[stage] -= 1
            together[stage] -= communication[first]
            numbers[stage] -= first
            if waits[stage] == 1:
                unlocked[numbers[stage]] += computation[stage]
    return order


@_compiled
def _impending(r: int, begins: np.ndarray, stages: np.ndarray, waits: np.ndarray, together: np.ndarray) -> int:
    """M+ of a transfer."""
    least = _NEVER
    for at in range(begins[r], begins[r + 1]):
        if waits[stages[at]] > 1 and together[stages[at]] < least:
            least = together[stages[at]]
    return least


@_compiled
def _least(is_left: np.ndarray, begins: np.ndarray, stages: np.ndarray, waits: np.ndarray, together: np.ndarray) -> int:
    """The first by name of those with the least M+."""
    least = _NEVER
    for stage in range(len(waits)):
        if waits[stage] > 1 and together[stage] < least:
            least = together[stage]
    for r in range(len(is_left)):
        if is_left[r]:
            if least == _NEVER:
                return r
            for at in range(begins[r], begins[r + 1]):
                if waits[stages[at]] > 1 and together[stages[at]] == least:
                    return r
    return -1
