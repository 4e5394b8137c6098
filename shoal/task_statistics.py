"""Statistics of what devices hold: a task that learns nothing, and adds up counts, sums and histograms.

    measured = shoal.statistics(
        {"age": ((), "float32")}, {"age": shoal.Measure(bounds=(0.0, 120.0), histogram=24, quantiles=(0.5, 0.9))}
    )

It is run like any other task: `shoal.simulate(measured, …)`, or `shoal host file.py:measured` beside the tasks that train.
Devices send counts, sums about a centre, and how many values lie below each of some edges; only sums over at least the
smallest group are seen. Centres and edges are the "model": each round moves the centres to the means (so that standard
deviations lose no digits) and narrows the edges around the quantiles. `aggregate/statistics.py` is the server's part,
`shoal.read_statistics` gives the results.

Each round is about its own cohort: with `goal` devices a round, the results are those of the last `goal` devices.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from shoal.aggregate.statistics import EDGES, Measure, measure_to_json
from shoal.fixed import SumSpec
from shoal.local import LocalRule, Named, Report, model_specs
from shoal.policy import RoundPolicy
from shoal.task import Local, Task
from shoal.tensors import TensorSpec

_NARROWEST: Final = 1e-15  # squares of what is much smaller are 0
_SLACK: Final = 1.0 + 2.0**-10  # a member adds its values up in float32, which may round upwards


def statistics(
    batch: Mapping[str, tuple[tuple[int, ...], str]],
    measures: Mapping[str, Measure] | None = None,
    *,
    name: str = "statistics",
    rounds: RoundPolicy | None = None,
    max_examples: int = 1 << 16,
) -> Task:
    """A task that adds up statistics of fields, each element of a field on its own.

    Args:
        batch: field -> (shape of one example, dtype), as of a `Task`.
        measures: field -> what is asked of it; count, mean and standard deviation always are.
        name: of the task.
        rounds: how its rounds are run.
        max_examples: most of a device's examples that are used; of more, a random part.

    Raises:
        ValueError: a measure is of no field, a field of floats has no bounds, or they are so wide or narrow that float32 does
            not hold the sums of squares.
    """
    asked = dict(measures or {})
    if strangers := sorted(asked.keys() - batch.keys()):
        raise ValueError(f"Expected measures of the fields {' | '.join(batch)}, got {strangers[0]!r}.")
    chosen = {field: _bounded(field, dtype, asked.get(field, Measure())) for field, (_, dtype) in sorted(batch.items())}
    for field, measure in chosen.items():
        _check_width(field, measure, max_examples)
    shapes = {field: tuple(shape) for field, (shape, _) in batch.items()}

    def init(key: Any) -> dict[str, Any]:
        return {field: _begin(measure, shapes[field]) for field, measure in chosen.items()}

    return Task(
        name=name, init=init, loss=lambda params, state, batch, key: jnp.zeros(batch["mask"].shape), batch=batch,
        local=Local(batch_size=64, weighting="uniform", max_examples=max_examples), rounds=rounds or RoundPolicy(),
        rule=lambda task: statistics_rule(task, chosen, shapes), aggregator="statistics",
        options={"fields": {field: measure_to_json(measure) for field, measure in chosen.items()}},
    )  # fmt: skip


def _bounded(field: str, dtype: str, measure: Measure) -> Measure:
    if measure.bounds is not None:
        return measure
    kind = np.dtype(dtype)
    if kind.kind == "b":
        return measure.within(0.0, 1.0)
    if kind.kind not in "iu":
        raise ValueError(
            f"Expected bounds of field {field!r} ({dtype}): sums of numbers without bounds cannot be exact. Set "
            f"shoal.Measure(bounds=(low, high)); values beyond are clipped, and counted as clipped."
        )
    info = np.iinfo(kind)
    return measure.within(float(info.min), float(info.max))


def _check_width(field: str, measure: Measure, most: int) -> None:
    assert measure.bounds is not None
    widest = sqrt(float(np.finfo(np.float32).max) / (most * _SLACK))
    if not _NARROWEST <= (width := measure.bounds[1] - measure.bounds[0]) <= widest:
        raise ValueError(
            f"Expected bounds of field {field!r} that are {_NARROWEST:g} to {widest:.3g} apart, got {width:.3g}: float32 holds the "
            f"squares of no others, added up over max_examples={most}. Scale the field."
        )


def _begin(measure: Measure, shape: tuple[int, ...]) -> dict[str, Any]:
    assert measure.bounds is not None
    low, high = measure.bounds
    made = {"center": np.full(shape, (low + high) / 2, np.float32)}
    if measure.histogram:
        made["histogram"] = np.linspace(low, high, measure.histogram + 1, dtype=np.float32)
    if measure.quantiles:
        edges = np.linspace(low, high, EDGES, dtype=np.float32)
        made["edges"] = np.broadcast_to(edges, (*shape, len(measure.quantiles), EDGES)).copy()
    return {name: jnp.asarray(value) for name, value in made.items()}


def statistics_rule(task: Task, measures: Mapping[str, Measure], shapes: Mapping[str, tuple[int, ...]]) -> LocalRule:
    """One pass over the examples, that adds their values up."""
    specs = {
        field: _sums(field, measure, shapes[field], task.local.max_examples) for field, measure in measures.items()
    }
    flat = sorted((spec for of_field in specs.values() for spec in of_field), key=lambda spec: spec.tensor.name)
    names = {spec.tensor.name: spec.tensor for spec in flat}

    def begin(broadcast: Named, device_state: Named) -> Named:
        zeros = {f"sum/{name}": jnp.zeros(spec.shape, spec.dtype) for name, spec in names.items()}
        return dict(sorted({**broadcast, **zeros, "weight": jnp.zeros((), jnp.int32)}.items()))

    def block(carry: Named, batches: Named, mask: jnp.ndarray, key: jnp.ndarray) -> Named:
        carry = dict(carry)
        for k in range(mask.shape[0]):
            for field, measure in measures.items():
                for name, value in _add_up(field, measure, batches[field][k], mask[k], carry).items():
                    carry[f"sum/{name}"] += value
            carry["weight"] = jnp.maximum(carry["weight"], jnp.any(mask[k]).astype(jnp.int32))
        return carry

    def finish(carry: Named, broadcast: Named) -> Report:
        made = {name.removeprefix("statistics/"): carry[f"sum/{name}"] for name in names}
        return Report({"statistics": made}, carry["weight"], {}, {})

    return LocalRule(
        begin=begin, block=block, finish=finish, broadcast=model_specs(task), device_state=(), sums=tuple(flat)
    )


def _sums(field: str, measure: Measure, shape: tuple[int, ...], most: int) -> list[SumSpec]:
    assert measure.bounds is not None
    width = measure.bounds[1] - measure.bounds[0]

    def spec(name: str, shape: tuple[int, ...], bound: float, dtype: str = "int32") -> SumSpec:
        tensor = TensorSpec(name=f"statistics/{field}/{name}", shape=shape, dtype=dtype)
        return SumSpec(tensor=tensor, bound=bound, weighted=False)

    made = [spec(name, shape, float(most)) for name in ("count", "clipped", "missing")]
    made += [spec("total", shape, width * most * _SLACK, "float32")]
    made += [spec("squares", shape, width**2 * most * _SLACK, "float32")]
    if measure.histogram:
        made.append(spec("histogram", (*shape, measure.histogram), float(most)))
    if measure.quantiles:
        made.append(spec("below", (*shape, len(measure.quantiles), EDGES), float(most)))
    return made


def _add_up(field: str, measure: Measure, given: Any, mask: Any, model: Named) -> dict[str, Any]:
    """The sums over one batch of a field, (B, …)."""
    assert measure.bounds is not None
    low, high = measure.bounds
    center = model[f"params/{field}/center"]
    value = given.astype(jnp.float32)
    here = jnp.broadcast_to(mask.reshape(mask.shape[0], *([1] * (value.ndim - 1))), value.shape)
    counts = here & ~jnp.isnan(value)
    held = jnp.clip(jnp.where(counts, value, jnp.zeros_like(value)), jnp.float32(low), jnp.float32(high))
    off = jnp.where(counts, held - jnp.broadcast_to(center[None], held.shape), jnp.zeros_like(held))

    def number(which: Any) -> Any:
        return jnp.sum(which, axis=0, dtype=jnp.int32)

    made = {
        "count": number(counts),
        "clipped": number(counts & (value != held)),
        "missing": number(here & ~counts),
        "total": jnp.sum(off, axis=0),
        "squares": jnp.sum(off * off, axis=0),
    }
    if measure.histogram:
        lower = model[f"params/{field}/histogram"][:-1]
        lower = lower.reshape((1,) * held.ndim + lower.shape)
        made["histogram"] = number(counts[..., None] & (held[..., None] >= lower))
    if measure.quantiles:
        edges = model[f"params/{field}/edges"][None]
        made["below"] = number(counts[..., None, None] & (held[..., None, None] < edges))
    return {f"statistics/{field}/{name}": value for name, value in made.items()}
