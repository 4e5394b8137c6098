"""In which order transfers go: TIC and TAC as published, and what they are compared with. Each is a rank for every transfer, 0 first.

`tic` and `tac` are written to be read beside the paper (Hashemi et al. 2019, "TicTac", algorithms 1 to 3, and the authors' code, `tictac/{common,tic,tac}.py`);
`fast_tac.py` finds the same order as `tac` in milliseconds. Two things that the published form leaves open are decided here:

    * The comparator is not transitive (one in about a thousand random triples goes round), so what sorting makes of it depends on the sort. Here
      the first is found by going through what is left in the order of names, and keeping whichever comes before the one kept so far.
    * A transfer that nobody waits for together with another has no M+: it goes by the rest, and last among equals.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from shoal.schedule.graph import Graph, Times

NEVER: Final = np.iinfo(np.int64).max
"""M+ of a transfer that no stage waits for together with another."""


@dataclass
class Properties:
    """Of one transfer that is outstanding (algorithm 1)."""

    communication: int
    """M: how long it takes."""
    unlocked: int = 0
    """P: computation that waits for it alone."""
    impending: int = NEVER
    """M+: the shortest that takes, together with others, to unlock a computation."""


def properties(graph: Graph, times: Times, outstanding: set[int]) -> dict[int, Properties]:
    """UpdateProperties, algorithm 1."""
    found = {r: Properties(int(times.transfers[r])) for r in outstanding}
    for stage, depends in enumerate(graph.depends):
        waits_for = outstanding & set(np.flatnonzero(depends).tolist())
        if len(waits_for) == 1:
            found[next(iter(waits_for))].unlocked += int(times.stages[stage])
        elif len(waits_for) > 1:
            together = sum(int(times.transfers[r]) for r in waits_for)
            for r in waits_for:
                found[r].impending = min(found[r].impending, together)
    return found


def is_before(a: Properties, b: Properties) -> bool:
    """The comparator (equation 6): Johnson's rule for two machines, then the shorter impending time."""
    left, right = min(b.unlocked, a.communication), min(a.unlocked, b.communication)
    return left < right if left != right else a.impending < b.impending


def tic(graph: Graph) -> np.ndarray:
    """Timing-independent (algorithm 2): every transfer takes 1, computation nothing; by M+. Equal ones share a rank."""
    ones = Times(np.ones(len(graph.transfers), np.int64), np.zeros(len(graph.stages), np.int64))
    found = properties(graph, ones, set(range(len(graph.transfers))))
    impending = np.array([found[r].impending for r in range(len(graph.transfers))], np.int64)
    return np.unique(impending, return_inverse=True)[1].astype(np.int64)


def tac(graph: Graph, times: Times) -> np.ndarray:
    """Timing-aware (algorithm 3): again and again the first by the comparator, of what is left."""
    times.check(graph)
    names = [transfer.name for transfer in graph.transfers]
    outstanding, ranks = set(range(len(names))), np.zeros(len(names), np.int64)
    for rank in range(len(names)):
        found = properties(graph, times, outstanding)
        in_order = sorted(outstanding, key=lambda r: names[r])
        first = in_order[0]
        for r in in_order[1:]:
            if is_before(found[r], found[first]):
                first = r
        ranks[first] = rank
        outstanding.remove(first)
    return ranks


def layer(graph: Graph) -> np.ndarray:
    """By the stage that is the first to need it: what a careful person writes by hand, and the honest rival of all others."""
    first = np.full(len(graph.transfers), len(graph.stages), np.int64)
    for number, stage in reversed(list(enumerate(graph.stages))):
        first[list(stage.needs)] = number
    return _ranks(np.lexsort((np.arange(len(first)), first)))


def tree(graph: Graph) -> np.ndarray:
    """By name, as a pytree has them."""
    return _ranks(np.argsort(np.array([transfer.name for transfer in graph.transfers]), kind="stable"))


def random(graph: Graph, rng: np.random.Generator) -> np.ndarray:
    """Another in every step, as transfers arrive that nobody orders."""
    return rng.permutation(len(graph.transfers)).astype(np.int64)


def _ranks(order: np.ndarray) -> np.ndarray:
    """Of an order: (n,) numbers of transfers, first to last."""
    made = np.empty(len(order), np.int64)
    made[order] = np.arange(len(order))
    return made
