"""Statistics from sums: means, standard deviations, histograms, quantiles. NumPy: the same bits on every machine.

The model holds, for each field, a `center` (the mean of the round before), the `histogram`'s edges, and `edges` around
each quantile; the state of the line holds the results, which no device is sent. Quantiles: devices say how many of their
values are below each edge, so the edges between which the quantile lies are known exactly for the cohort; the next
round's edges are between those, one step wider on each side, since it has other devices. Where a quantile has moved out of
them they reach from there to the bound. A result is interpolated; it is off by no more than `quantile_width`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Self

import numpy as np

from shoal import validate
from shoal.aggregate.accumulator import Accumulator
from shoal.errors import QuorumNotReached
from shoal.fixed import read
from shoal.record.store import Blobs
from shoal.tensors import Entry, Index, TensorSpec

EDGES: Final = 65
"""Edges around each quantile: each round narrows them 64 / 3 times."""
PREFIX: Final = "results/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """What is asked of a field, beside count, mean and standard deviation."""

    bounds: tuple[float, float] | None = None
    """Smallest and largest value; those beyond are clipped and counted as clipped. None: those of an integer dtype."""
    histogram: int = 0
    """Bins of equal width between the bounds; 0: no histogram."""
    quantiles: tuple[float, ...] = ()
    """Which, in [0, 1]: (0.5,) is the median."""

    def __post_init__(self) -> None:
        if self.bounds is not None and not -1e30 < self.bounds[0] < self.bounds[1] < 1e30:
            raise ValueError(f"Expected bounds=(low, high) with low < high, below 1e30, got bounds={self.bounds!r}.")
        validate.between(0, 4096, histogram=self.histogram)
        for each in self.quantiles:
            validate.between(0.0, 1.0, quantiles=each)

    def within(self, low: float, high: float) -> Self:
        """With these bounds."""
        return replace(self, bounds=(low, high))


def measure_to_json(measure: Measure) -> dict[str, Any]:
    """As options of a plan hold it."""
    made = {f.name: getattr(measure, f.name) for f in fields(measure)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in made.items()}


def _measure_from_json(data: Mapping[str, Any]) -> Measure:
    low, high = data["bounds"]
    return Measure(
        bounds=(float(low), float(high)), histogram=data["histogram"], quantiles=tuple(map(float, data["quantiles"]))
    )


class Statistics:
    """An `Aggregator`. See the module's text."""

    needs = "sum"

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError, KeyError or TypeError for options that `shoal.statistics` would not have written."""
        self._measures = {field: _measure_from_json(data) for field, data in options["fields"].items()}

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        if not sums.members:
            raise QuorumNotReached("Nobody has reported.")
        known = {entry.spec.name: blobs.view(entry.hash, entry.spec) for entry in model}
        after, results = dict(known), dict[str, np.ndarray]()
        for field, measure in self._measures.items():
            prefix = f"statistics/{field}/"
            totals = {
                name.removeprefix(prefix): read(total, sums.fixed[name])
                for name, total in sums.totals.items()
                if name.startswith(prefix)
            }
            params = {name: known[f"params/{field}/{name}"].astype(np.float64) for name in _params(measure)}
            made, moved = field_statistics(measure, totals, params)
            results |= {f"{PREFIX}{field}/{name}": np.asarray(value) for name, value in made.items()}
            after |= {f"params/{field}/{name}": value.astype(np.float32) for name, value in moved.items()}
        entries = (
            Entry(entry.spec, blobs.put(np.ascontiguousarray(after[entry.spec.name]).tobytes())) for entry in model
        )
        state = (
            Entry(TensorSpec.of(name, value), blobs.put(np.ascontiguousarray(value).tobytes()))
            for name, value in sorted(results.items())
        )
        return Index(tuple(entries)), Index(tuple(state))


def _params(measure: Measure) -> list[str]:
    return ["center", *(["histogram"] if measure.histogram else []), *(["edges"] if measure.quantiles else [])]


def field_statistics(
    measure: Measure, totals: Mapping[str, np.ndarray], params: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The results of one field, and its part of the next model.

    Args:
        measure: what was asked.
        totals: sums over the cohort, float64: count, clipped, missing, total, squares (*S), histogram (*S, bins), below
            (*S, Q, EDGES).
        params: what devices were sent, float64: center (*S), histogram (bins + 1), edges (*S, Q, EDGES).

    Returns:
        count, clipped, missing, histogram: int64; mean, std, quantiles, quantile_width, …: float64, NaN without a value.
        And the next center and edges.
    """
    count = totals["count"]
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = totals["total"] / count
        variance = totals["squares"] / count - shift * shift
    mean = params["center"] + shift
    results = {name: np.rint(totals[name]).astype(np.int64) for name in ("count", "clipped", "missing")}
    results |= {"mean": mean, "std": np.sqrt(np.maximum(variance, 0.0))}
    moved = {"center": np.where(count > 0, mean, params["center"])}
    if measure.histogram:
        above = np.concatenate([totals["histogram"], np.zeros((*count.shape, 1))], axis=-1)
        results["histogram"] = np.rint(above[..., :-1] - above[..., 1:]).astype(np.int64)
        results["histogram_edges"] = params["histogram"]
    if measure.quantiles:
        results["quantiles_at"] = np.array(measure.quantiles)
        found, width, moved["edges"] = _quantiles(measure, count, totals["below"], params["edges"])
        results["quantiles"], results["quantile_width"] = found, width
    # NumPy makes numbers of arrays without dimensions.
    return {n: np.asarray(v) for n, v in results.items()}, {n: np.asarray(v) for n, v in moved.items()}


def _quantiles(
    measure: Measure, count: np.ndarray, below: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values (*S, Q), how far they may be off, and the next edges (*S, Q, EDGES)."""
    assert measure.bounds is not None
    low, high = measure.bounds
    number = count[..., None]
    below = below.copy()
    # A value at the upper bound is below no edge.
    below[..., -1] = np.where(edges[..., -1] >= np.float32(high), number, below[..., -1])
    target = np.maximum(np.array(measure.quantiles) * number, 1.0)
    reached = below >= target[..., None]
    at = np.where(reached.any(axis=-1), reached.argmax(axis=-1), EDGES)
    is_inside = (at > 0) & (at < EDGES)
    upper = np.clip(at, 1, EDGES - 1)[..., None]
    begin, end = (np.take_along_axis(edges, upper - step, axis=-1)[..., 0] for step in (1, 0))
    few, many = (np.take_along_axis(below, upper - step, axis=-1)[..., 0] for step in (1, 0))
    value = begin + (end - begin) * np.clip((target - few) / np.maximum(many - few, 1.0), 0.0, 1.0)
    value = np.where(at == 0, edges[..., 0], np.where(at == EDGES, edges[..., -1], value))
    width = end - begin
    first = np.where(is_inside, begin - width, np.where(at == 0, low, edges[..., -1]))
    last = np.where(is_inside, end + width, np.where(at == 0, edges[..., 0], high))
    is_known = number > 0
    first = np.where(is_known, np.clip(first, low, high), edges[..., 0])
    last = np.where(is_known, np.clip(last, low, high), edges[..., -1])
    moved = first[..., None] + (last - first)[..., None] * (np.arange(EDGES) / (EDGES - 1))
    moved[..., -1] = last
    off = np.where(is_inside, width, np.inf)
    return np.where(is_known, value, np.nan), np.where(is_known, off, np.nan), moved


def read_results(state: Index, blobs: Blobs) -> dict[str, dict[str, np.ndarray]]:
    """Field -> name -> value, of a version of a statistics task; empty for the first version and for other tasks."""
    made: dict[str, dict[str, np.ndarray]] = {}
    for entry in state:
        if entry.spec.name.startswith(PREFIX):
            field, name = entry.spec.name.removeprefix(PREFIX).rsplit("/", 1)
            made.setdefault(field, {})[name] = np.array(blobs.view(entry.hash, entry.spec))
    return made
