"""The fused engine: a cohort's whole training, its exact sums and its checks in one compiled program.

    model, pool, indices, counts, keys ──> one program ──> int64 sums, weights, checks

    for each chunk of V members (a loop; the mesh's devices each have their share of the members)
        begin                                     V at once (vmap), or one
        for each step until the longest of the V is done   (a loop whose length is data, not shape)
            gather the batch from the pool, block
        finish, round(weight x value x 2^-exponent) to int64, add      rule 3 of the design

Memory is bounded by the chunk, not by the cohort. XLA's runtime on a CPU keeps about ten kilobytes of each step until a program ends, so
a long cohort is trained in parts, each handed the sums of those before. The mesh may span hosts (`jax.distributed`): each makes the same cohort, trains its
share and goes on with the sums of all, so that all have the same record. How many members go together, and over how many devices, is a
`Layout`: settings of speed alone (`layout.py` finds them), by which results differ no more than by rounding. Sums are the
integers of an `Accumulator`; the server's part of a round is the very code of a fleet.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shoal import validate
from shoal.aggregate.accumulator import Accumulator
from shoal.fixed import STEPS
from shoal.fleet.configuration import Configuration
from shoal.local import LocalRule, Named, Report
from shoal.plan.manifest import HELD_OUT, Manifest
from shoal.simulate.cohort import Cohort, arranged, packed, refuse, room_for
from shoal.tensors import Tensors

log = logging.getLogger("shoal.simulate")

AXIS: Final = "members"
AT_ONCE_S: Final = 2e-4
"""What it takes to fetch results that are there already."""
CHUNKS: Final = 256
"""Most chunks of each device in one call of the program."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a cohort is laid out over the machine."""

    devices: int
    """JAX devices that share the members."""
    together: int
    """Members that a device trains at once; 1: one after the other."""

    def __post_init__(self) -> None:
        validate.types(self)
        validate.positive(devices=self.devices, together=self.together)

    def __str__(self) -> str:
        devices = "1 device" if self.devices == 1 else f"{self.devices} devices"
        return f"{devices}, {self.together} at once"

    def to_json(self) -> dict[str, int]:
        return {"devices": self.devices, "together": self.together}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Layout":
        """Raises TypeError or ValueError for anything that `to_json` would not have written."""
        return cls(**data)


@dataclass(eq=False)
class Fused:
    """Trains cohorts. Compiles once for each shape of them; `cohort.py` sees to it that there are few."""

    rule: LocalRule
    manifest: Manifest
    layout: Layout
    seconds: dict[str, float] = field(default_factory=dict)
    """Phase -> seconds since the last `take_seconds`."""
    _compiled: dict[tuple[tuple[int, ...], ...], Any] = field(default_factory=dict)
    _chunks: int = 0
    _model: tuple[str, Named] | None = None
    _pool: tuple[Tensors, Named] | None = None

    def __post_init__(self) -> None:
        devices = jax.devices()[: self.layout.devices]
        mesh = Mesh(np.array(devices), (AXIS,))
        self._is_wide = bool(jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        self._whole, self._shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(AXIS))
        self._mesh = mesh

    def sums(
        self,
        configuration: Configuration,
        members: Sequence[str],
        cohort: Cohort,
        states: Sequence[Tensors | None],
        *,
        root: str,
        model: Tensors,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> tuple[Accumulator, list[Tensors]]:
        """The sums of a cohort, and what each member keeps.

        Args:
            configuration: of the round.
            members: names, for what is said of them.
            cohort: their examples.
            states: what each has kept.
            root: hash of the model.
            model: what they start from.
            meanwhile: called while they train.

        Raises:
            DataError: a member's update is not finite or out of bounds.
        """
        begun = time.perf_counter()
        sums = configuration.accumulator(self.manifest)
        parts = in_parts(packed(
            cohort.steps, devices=self.layout.devices, together=self.layout.together, chunks=self._chunks_for(len(members))
        ), CHUNKS)  # fmt: skip
        rows, at = np.concatenate(parts), np.empty(len(members), np.int64)
        at[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
        placed, kept_before = arranged(cohort, rows), self._states(states, at, len(rows))
        both = self._model_on_devices(root, model), self._pool_on_devices(cohort.pool)
        scales = np.array([2.0 ** -sums.fixed[spec.tensor.name].exponent for spec in self.manifest.sums])
        totals: Named = {} if len(parts) == 1 else sums.totals
        collected = []
        staged = time.perf_counter()
        with jax.enable_x64(True):
            for number, part in enumerate(parts):
                which = slice(number * len(part), (number + 1) * len(part))
                inputs = (
                    *both,
                    {name: self._handed(values[which]) for name, values in kept_before.items()},
                    *(self._handed(values[which]) for values in (placed.indices, placed.counts, placed.keys)),
                    scales,
                    totals,
                )
                if number == 0:
                    program = self._program(inputs)
                    compiled = time.perf_counter()
                totals, *told = program(*inputs)
                collected.append(told)
            meanwhile()
            beside = time.perf_counter()
            totals, collected = jax.device_get((totals, collected))
        weights, largest, kept = jax.tree.map(_joined, *collected)
        done = time.perf_counter()
        waited = done - beside > AT_ONCE_S  # else what went on meanwhile took longer than the training
        data = staged - begun + (0.0 if waited else beside - compiled)
        compute = done - (compiled if waited else beside)
        for phase, value in (("data", data), ("compile", compiled - staged), ("compute", compute)):
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        self._check(members, sums, weights[at], largest[at])
        sums.totals.update(totals)
        sums.weight, sums.members = int(np.sum(weights[at], dtype=np.int64)), len(members)
        return sums, [{name: np.array(values[row]) for name, values in kept.items()} for row in at]

    def take_seconds(self) -> dict[str, float]:
        """Where the time went since this was asked last, by phase."""
        taken, self.seconds = self.seconds, {}
        return taken

    # What is on the devices.

    def _model_on_devices(self, root: str, model: Tensors) -> Named:
        if self._model is None or self._model[0] != root:
            self._model = root, {name: _put(value, self._whole) for name, value in model.items()}
        return self._model[1]

    def _pool_on_devices(self, pool: Tensors) -> Named:
        if self._pool is None or self._pool[0] is not pool:
            self._pool = pool, {name: _put(value, self._whole) for name, value in pool.items()}
        return self._pool[1]

    def _handed(self, values: np.ndarray) -> Any:
        """What changes with each round: JAX puts it in its place when the program is called, if it is one host's."""
        return values if self._shared.is_fully_addressable else _put(values, self._shared)

    def _states(self, states: Sequence[Tensors | None], at: np.ndarray, rows: int) -> Tensors:
        made = {spec.name: np.zeros((rows, *spec.shape), spec.numpy_dtype) for spec in self.manifest.device_state}
        for row, state in zip(at, states, strict=True):
            for name, value in (state or {}).items():
                made[name][row] = value
        return made

    def _chunks_for(self, members: int) -> int:
        """Chunks of each device: as many as the largest cohort so far needed. Where cohorts differ in size, a few programs do."""
        needed = -(-members // (self.layout.devices * self.layout.together))
        self._chunks = room_for(needed, before=self._chunks)
        return self._chunks

    # The program.

    def _program(self, inputs: tuple[Any, ...]) -> Any:
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(inputs))
        if shapes not in self._compiled:
            begun = time.perf_counter()
            placed = (*[self._whole] * 2, *[self._shared] * 4, *[self._whole] * 2)
            self._compiled[shapes] = jax.jit(self._sharded(), in_shardings=placed).lower(*inputs).compile()
            members, steps, examples = inputs[3].shape
            log.info(
                "compiled %s of %d members, up to %d steps of %d examples each, for %s: %.1f s",
                "parts of a round," if inputs[-1] else "a round", members, steps, examples, self.layout, time.perf_counter() - begun,
            )  # fmt: skip
        return self._compiled[shapes]

    def _sharded(self) -> Callable[..., Any]:
        whole, shared = PartitionSpec(), PartitionSpec(AXIS)
        return jax.shard_map(
            self._share,
            mesh=self._mesh,
            in_specs=(whole, whole, shared, shared, shared, shared, whole, whole),
            out_specs=whole if jax.process_count() > 1 else (whole, shared, shared, shared),
            check_vma=False,
        )

    def _share(
        self, model: Named, pool: Named, states: Named, indices: Any, counts: Any, keys: Any, scales: Any, before: Named
    ) -> tuple[Named, Any, Any, Named]:
        """One device's share of the members: chunk after chunk. `before`: the sums of the parts before, if there are parts."""
        together = self.layout.together
        chunks = jax.tree.map(
            lambda values: values.reshape(-1, together, *values.shape[1:]), (states, indices, counts, keys)
        )
        zeros = {spec.tensor.name: jnp.zeros(spec.tensor.shape, jnp.int64) for spec in self.manifest.sums}

        def chunk(totals: Named, given: tuple[Named, Any, Any, Any]) -> tuple[Named, tuple[Any, Any, Named]]:
            with jax.enable_x64(self._is_wide):  # what the plan's programs were made under
                report, takes_part = self._train(model, pool, *given)
            reported, added, largest = flat_sums(report), {}, []
            for number, spec in enumerate(self.manifest.sums):
                name = spec.tensor.name
                weight = report.weight.astype(jnp.float64) if spec.weighted else jnp.ones((together,), jnp.float64)
                times = jnp.where(takes_part, weight * scales[number], 0.0)
                added[name] = totals[name] + _rounded(reported[name], times)
                largest.append(_largest(reported[name]))
            if STEPS in reported:
                largest.append(reported[STEPS].reshape(together).astype(jnp.float64))
            return added, (jnp.where(takes_part, report.weight, 0), jnp.stack(largest, 1), report.device_state)

        totals, collected = jax.lax.scan(chunk, zeros, chunks)
        weights, largest, kept = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), collected)
        if jax.process_count() > 1:  # every host goes on with what all members left
            weights, largest, kept = jax.lax.all_gather((weights, largest, kept), AXIS, tiled=True)
        totals = jax.lax.psum(totals, AXIS)
        return (
            {name: value + before[name] if before else value for name, value in totals.items()},
            weights,
            largest,
            kept,
        )

    def _train(
        self, model: Named, pool: Named, states: Named, indices: Any, counts: Any, keys: Any
    ) -> tuple[Report, Any]:
        """The members of one chunk: (reports (V, …), which of them take part (V,))."""
        rule, together = self.rule, self.layout.together
        if together == 1:
            report, takes_part = self._train_one(
                model, pool, *jax.tree.map(lambda values: values[0], (states, indices, counts, keys))
            )
            return jax.tree.map(lambda value: value[None], report), takes_part[None]
        steps = jnp.max(jnp.sum(counts != 0, axis=1, dtype=jnp.int32))
        carry = jax.vmap(rule.begin, in_axes=(None, 0), axis_size=together)(model, states)

        def step(number: Any, carry: Named) -> Named:
            at = jax.lax.dynamic_index_in_dim(indices, number, axis=1, keepdims=False)
            batches, mask = self._batch(pool, at, jax.lax.dynamic_index_in_dim(counts, number, axis=1, keepdims=False))
            batches = {name: values[:, None] for name, values in batches.items()}
            made: Named = jax.vmap(rule.block)(carry, batches, mask[:, None], keys)
            return made

        carry = jax.lax.fori_loop(0, steps, step, carry)
        reports: Report = jax.vmap(rule.finish, in_axes=(0, None))(carry, model)
        return reports, jnp.any(counts != 0, axis=1)

    def _train_one(
        self, model: Named, pool: Named, state: Named, indices: Any, counts: Any, key: Any
    ) -> tuple[Report, Any]:
        rule = self.rule

        def step(number: Any, carry: Named) -> Named:
            at = jax.lax.dynamic_index_in_dim(indices, number, keepdims=False)
            batches, mask = self._batch(pool, at, jax.lax.dynamic_index_in_dim(counts, number, keepdims=False))
            return rule.block(carry, {name: values[None] for name, values in batches.items()}, mask[None], key)

        steps = jnp.sum(counts != 0, dtype=jnp.int32)
        carry = jax.lax.fori_loop(0, steps, step, rule.begin(model, state))
        return rule.finish(carry, model), steps > 0

    def _batch(self, pool: Named, indices: Any, counts: Any) -> tuple[Named, Any]:
        """(fields (…, B, …), mask (…, B)): of each row of indices the first `counts` count; if below zero, as held out."""
        mask = jax.lax.broadcasted_iota(jnp.int32, indices.shape, indices.ndim - 1) < jnp.abs(counts)[..., None]
        fields = {name: jnp.take(values, indices, axis=0, mode="clip") for name, values in pool.items()}
        if self.manifest.training.part == "both":
            fields[HELD_OUT] = jnp.broadcast_to(counts[..., None] < 0, mask.shape)
        return fields, mask

    def _check(self, members: Sequence[str], sums: Accumulator, weights: np.ndarray, largest: np.ndarray) -> None:
        """`largest`: (C, K), of each sum its largest absolute value; last the steps, where they are reported."""
        is_good = (weights >= 1) & (weights <= sums.max_weight)
        refuse(members, is_good, f"Expected 1 <= weight <= {sums.max_weight}, got VALUE.", weights)
        for spec, values in zip(self.manifest.sums, largest.T, strict=False):
            name = spec.tensor.name
            refuse(members, np.isfinite(values), f"{name} holds NaN or infinity.", values)
            bound = sums.fixed[name].bound
            why = f"Expected |{name}| <= {bound:g}, got VALUE. The bound is a setting of the task."
            refuse(members, values <= bound, why, values)
        if largest.shape[1] > len(self.manifest.sums):
            refuse(members, largest[:, -1] >= 1, "It took no step.", largest[:, -1])


def _joined(*values: np.ndarray) -> np.ndarray:
    return values[0] if len(values) == 1 else np.concatenate(values)


def in_parts(rows: np.ndarray, most: int) -> list[np.ndarray]:
    """(D, n, V) members by device and chunk -> parts (D * m * V,), each device's rows together, all of one length with m <= `most`.

    >>> in_parts(np.arange(6).reshape(2, 3, 1), 2)
    [array([0, 1, 3, 4]), array([ 2, -1,  5, -1])]
    """
    devices, chunks, together = rows.shape
    count = -(-chunks // most)
    each = -(-chunks // count)
    whole = np.full((devices, count * each, together), -1, rows.dtype)
    whole[:, :chunks] = rows
    return [part.reshape(-1) for part in np.split(whole, count, axis=1)]


def _put(values: np.ndarray, sharding: NamedSharding) -> jax.Array:
    here = sharding.is_fully_addressable  # else JAX would compare the values of all hosts
    made: jax.Array = (
        jax.device_put(values, sharding)
        if here
        else jax.make_array_from_callback(values.shape, sharding, values.__getitem__)
    )
    return made


def flat_sums(report: Report) -> Named:
    """What a report adds, by flat name."""
    made = {f"{kind}/{name}": value for kind, tensors in report.sums.items() for name, value in tensors.items()}
    return made | {f"metric/{name}": value for name, value in report.metrics.items()}


def _rounded(values: Any, times: Any) -> Any:
    """sum over V of round(value x times), as `fixed.add` rounds; those that do not take part add nothing."""
    times = times.reshape(-1, *(1 for _ in values.shape[1:]))
    scaled = jnp.rint(values.astype(jnp.float64) * times)
    return jnp.sum(jnp.where(times != 0, scaled, 0.0).astype(jnp.int64), axis=0)


def _largest(values: Any) -> Any:
    """(V,): the largest absolute value; NaN where there is one."""
    return jnp.max(jnp.abs(values.reshape(values.shape[0], -1)), axis=1, initial=0.0).astype(jnp.float64)
