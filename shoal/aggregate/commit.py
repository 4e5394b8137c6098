"""From a group's sums to the next version: mean, server rule, blobs. Piece by piece, so that it takes no memory.

A tensor takes a step along the *mean* of its updates; one whose sum is not weighted (`SumSpec.weighted`) has the *sum* of
them added, whoever reported and however late, and no other rule: SCAFFOLD's control variate is such a sum.

Where the clip norm is adaptive, updates come divided by the scale of the version that they were made from (`clip_norm.LOG_SCALE`); what is
made of their sums is multiplied by it again.

Where updates came through a linear map (`codec/linear.py`), it is undone here, on their sum.

A tensor is read (memory-mapped), stepped and written in pieces of `fixed.CHUNK` elements; beyond the sums themselves a
commit of any size holds a few megabytes. Tensors that are not averaged (frozen, private) keep their blob.
"""

from collections.abc import Callable, Iterator, Mapping
from decimal import Context, Decimal
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np

from shoal.aggregate.accumulator import Accumulator
from shoal.aggregate.linear import Linear, version_of
from shoal.aggregate.server_rule import initial_slot, slots, step
from shoal.clip_norm import LOG_SCALE
from shoal.codec.linear import VERSION
from shoal.errors import QuorumNotReached
from shoal.fixed import CHUNK, read
from shoal.policy import ServerRule
from shoal.record.store import Blobs
from shoal.tensors import Entry, Index, Tensors, TensorSpec, check

CallProgram = Callable[[str, Tensors], Tensors]
"""(program of the plan, inputs) -> outputs; for rules of kind `program`."""


@runtime_checkable
class Aggregator(Protocol):
    """Turns what the groups of a round hold into the next version. `needs` says how much it has to see."""

    @property
    def needs(self) -> str:
        """`sum` (one sum over all members), `group_sums`, or `updates`."""
        ...

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        """The next model and server state; their tensors are durable blobs when it returns."""
        ...


class WeightedMean:
    """The weighted mean of the members' updates, given to the server rule (McMahan et al. 2017, algorithm 1)."""

    needs = "sum"

    def __init__(self, rule: ServerRule, *, call: CallProgram | None = None) -> None:
        """`call` runs the plan's server programs; only rules of kind `program` need it."""
        if rule.kind == "program" and call is None:
            raise ValueError("Expected call=… for a server rule of kind 'program': it runs the plan's server programs.")
        self._rule, self._call = rule, call

    def commit(self, sums: Accumulator, model: Index, server_state: Index, blobs: Blobs) -> tuple[Index, Index]:
        if not sums.weight:
            raise QuorumNotReached("There is no update to take the mean of.")
        if self._rule.kind == "program":
            return self._commit_program(sums, model, server_state, blobs)
        kept = {entry.spec.name: entry for entry in server_state}
        scale, version = scale_of(model, blobs), version_of(model, blobs)
        entries: list[Entry] = []
        slot_entries: list[Entry] = []
        for entry in model:
            name = f"delta/{entry.spec.name}"
            if entry.spec.name == VERSION:
                entries.append(Entry(entry.spec, blobs.put(np.array([version + 1], np.uint32).tobytes())))
                continue
            if name not in sums.totals:
                entries.append(entry)
                continue
            linear = Linear(sums.spec(name), prod(entry.spec.shape), version=version)
            times = 1.0 if entry.spec.name == LOG_SCALE else scale
            made = self._commit_tensor(entry, sums, kept, blobs, linear, scale=times)
            entries.append(made.pop("value"))
            slot_entries += made.values()
        return Index(tuple(entries)), Index(tuple(sorted(slot_entries, key=lambda entry: entry.spec.name)))

    def _commit_tensor(
        self,
        entry: Entry,
        sums: Accumulator,
        kept: Mapping[str, Entry],
        blobs: Blobs,
        linear: Linear,
        *,
        scale: float,
    ) -> dict[str, Entry]:
        total, fixed = sums.totals[f"delta/{entry.spec.name}"], sums.fixed[f"delta/{entry.spec.name}"]
        is_mean = sums.is_weighted(f"delta/{entry.spec.name}")
        is_learned = _is_param(entry) and is_mean
        rule = self._rule if is_learned else ServerRule()  # statistics take the plain mean
        times, divisor = scale * (sums.mean_steps() if is_learned else 1.0), sums.weight if is_mean else 1
        names = {slot: f"{slot}/{entry.spec.name}" for slot in slots(rule)}
        specs = {"value": entry.spec} | {
            slot: TensorSpec(name=name, shape=entry.spec.shape, dtype="float32") for slot, name in names.items()
        }
        before = blobs.view(entry.hash, entry.spec).reshape(-1)
        olds = {slot: blobs.view(kept[n].hash, specs[slot]).reshape(-1) for slot, n in names.items() if n in kept}
        writers = {part: blobs.writer() for part in specs}
        flat = total.reshape(-1)
        for piece in _pieces(before.size):
            mean = times * linear.undone(lambda part: read(flat[part], fixed, divisor=divisor), piece)
            slot_values = {
                slot: olds[slot][piece].astype(np.float64)
                if slot in olds
                else np.full(mean.shape, initial_slot(rule, slot))
                for slot in names
            }
            after = step(rule, before[piece].astype(np.float64), mean, slot_values)
            for part, values in after.items():
                writers[part].write(values.astype(specs[part].numpy_dtype).tobytes())
        return {part: Entry(specs[part], writer.finish()) for part, writer in writers.items()}

    def _commit_program(self, sums: Accumulator, model: Index, state: Index, blobs: Blobs) -> tuple[Index, Index]:
        assert self._call is not None
        plain = WeightedMean(ServerRule()).commit(_but_for(sums, "delta/params/"), model, Index(()), blobs)[0]
        learned = [entry for entry in plain if f"delta/{entry.spec.name}" in sums.totals and _is_param(entry)]
        values = {f"model/{entry.spec.name}": blobs.view(entry.hash, entry.spec) for entry in learned}
        times = scale_of(model, blobs) * sums.mean_steps()
        means = {
            f"mean/{entry.spec.name}": _mean(sums, entry.spec, times, version=version_of(model, blobs))
            for entry in learned
        }
        kept = {entry.spec.name: blobs.view(entry.hash, entry.spec) for entry in state}
        kept = kept or self._call("server_begin", values)
        made = self._call("server_step", {**values, **means, **kept})
        after = {entry.spec.name: made[f"model/{entry.spec.name}"] for entry in learned}
        check(after, (entry.spec for entry in learned), what="the server program's model")
        entries = [
            Entry(entry.spec, blobs.put(after[entry.spec.name].tobytes())) if entry.spec.name in after else entry
            for entry in plain
        ]
        slot_entries = [
            Entry(TensorSpec.of(name, value), blobs.put(value.tobytes()))
            for name, value in sorted(made.items())
            if name.startswith("server_state/")
        ]
        return Index(tuple(entries)), Index(tuple(slot_entries))


def _pieces(size: int) -> Iterator[slice]:
    # At least one piece, so that an empty tensor is written too.
    return (slice(start, start + CHUNK) for start in range(0, max(size, 1), CHUNK))


def _is_param(entry: Entry) -> bool:
    return entry.spec.name.startswith("params/")


def scale_of(model: Index, blobs: Blobs) -> float:
    """What updates made from this version were divided by: the adaptive clip norm over the initial one; 1 where there is none."""
    entry = next((entry for entry in model if entry.spec.name == LOG_SCALE), None)
    if entry is None:
        return 1.0
    # In decimals, whose exponential is rounded alike on every machine; a C library's is not.
    return float(Decimal(float(blobs.view(entry.hash, entry.spec))).exp(Context(prec=30)))


def _mean(sums: Accumulator, spec: TensorSpec, times: float, *, version: int) -> np.ndarray:
    key = f"delta/{spec.name}"
    mean = read(sums.totals[key], sums.fixed[key], divisor=sums.weight)
    undone = Linear(sums.spec(key), prod(spec.shape), version=version).undone_whole(mean)
    return (times * undone).astype(np.float32).reshape(spec.shape)


def _but_for(sums: Accumulator, prefix: str) -> Accumulator:
    # A view of some of the totals: the others' tensors then keep their blob.
    chosen = object.__new__(Accumulator)
    chosen.__dict__.update(sums.__dict__, totals={n: t for n, t in sums.totals.items() if not n.startswith(prefix)})
    return chosen
