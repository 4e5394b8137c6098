"""Divides DRAM between tables so that the fewest blocks are read: along the convex hulls of their read curves.

Each table has a curve of block reads over bytes (`miniature.read_curve`). On the lower convex hulls the greedy choice, always the
segment that saves most reads a byte, is exactly optimal; a point between two measured ones is reached by giving
bytes in part, where the hull's straight line is an estimate. A new division replaces the old only if it saves enough
(`redivide`), as moving DRAM between tables empties caches.

References: Cidon et al., 2015, Dynacache, HotCloud (convex allocation); Eisenman et al., 2019, arXiv 1811.05922.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from shoal import validate

Points = Sequence[tuple[float, float]]
"""(bytes, block reads) of a table, bytes rising."""


def lower_hull(points: Points) -> list[tuple[float, float]]:
    """The corners of the lower convex hull, as far as reads fall."""
    hull: list[tuple[float, float]] = []
    for size, reads in sorted(points):
        if hull and reads >= hull[-1][1]:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], (size, reads)):
            hull.pop()
        hull.append((size, reads))
    return hull


def divide(curves: Mapping[str, Points], total_bytes: float) -> dict[str, float]:
    """Bytes for each table.

    Args:
        curves: block reads over bytes for each table, weighted alike (the same stretch of time).
        total_bytes: at least the sum of the tables' smallest measured budgets; what is beyond the largest is spread
            over the tables as the rest is.

    Raises:
        ValueError: Less than every table's smallest budget together; a curve without points.
    """
    if empty := [name for name, points in curves.items() if not points]:
        raise ValueError(f"Expected a point or more for each table, got none for {empty}.")
    hulls = {name: lower_hull(points) for name, points in curves.items()}
    given = {name: hull[0][0] for name, hull in hulls.items()}
    left = total_bytes - sum(given.values())
    if left < 0:
        raise ValueError(
            f"Expected total_bytes >= {sum(given.values()):.0f}, what the smallest budgets need, got {total_bytes}."
        )
    segments = [(_slope(a, b), name, b[0] - a[0]) for name, hull in hulls.items() for a, b in pairwise(hull)]
    for _, name, size in sorted(segments):
        taken = min(left, size)
        given[name] += taken
        left -= taken
    spread = left / max(1e-9, sum(given.values()))
    return {name: size * (1 + spread) for name, size in given.items()}


def reads_of(curves: Mapping[str, Points], given: Mapping[str, float]) -> float:
    """Block reads of all tables at a division, by straight lines between the hulls' corners."""
    total = 0.0
    for name, points in curves.items():
        hull = lower_hull(points)
        total += float(np.interp(given[name], [size for size, _ in hull], [reads for _, reads in hull]))
    return total


def redivide(
    curves: Mapping[str, Points], current: Mapping[str, float], *, total_bytes: float = 0.0, least_gain: float = 0.03
) -> dict[str, float]:
    """The best division of `total_bytes`, by default the same bytes, or the current one where the best saves less than `least_gain` of the reads."""
    validate.between(0, 1, least_gain=least_gain)
    best = divide(curves, total_bytes or sum(current.values()))
    before, after = reads_of(curves, current), reads_of(curves, best)
    return best if before - after > least_gain * before else dict(current)


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])
