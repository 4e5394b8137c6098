"""What a run takes, said before it starts: parameters, bytes on each device, what a step sends, and how long it should take.

The program is lowered and compiled as the trainer does it (or is handed in, when that is done already), but nothing runs. Bytes of the state are those
of its shapes and shardings; what is needed besides, and the work of a step, is what the compiler says. It counts a loop's body once: a model that
scans over its layers does more than is said here. Times are a roofline (`machine.py`): a step takes between the longest of its parts and their sum.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.local import Named
from shoal.pod.machine import Clock, Machine, Times
from shoal.pod.placement import State
from shoal.pod.step import Program
from shoal.pod.traffic import Traffic, beside, readable
from shoal.pod.traffic_compiled import compiled_traffic
from shoal.pod.traffic_lowered import lowered_traffic, product_type

_MOST_ROWS: Final = 7
"""Of collectives, in the table for people."""


@dataclass(frozen=True)
class Made:
    """A program's steps, lowered and compiled for one shape of batches."""

    lowered: Any
    """`jax.stages.Lowered`."""
    compiled: Any
    """`jax.stages.Compiled`."""
    lower_s: float
    compile_s: float


@dataclass(frozen=True)
class Description:
    """Of one program on one machine."""

    mesh: str
    update: str
    sum_type: str
    batch_size: int
    steps_per_call: int
    num_params: int
    num_learned: int
    param_bytes: int
    """Of one whole copy."""
    device_bytes: Mapping[str, int]
    """Kind -> bytes on one device. `gradients` are among the compiler's `temporaries`; where it says nothing of these they are missing."""
    lowered: Traffic
    compiled: Traffic
    """Of one call."""
    flops: float
    """Of one device in one step."""
    moved_bytes: float
    """Between one device and its memory in one step."""
    dtype: str
    """Of most products."""
    machine: Machine
    times: Times
    lower_s: float
    compile_s: float

    @property
    def total_bytes(self) -> int:
        """On one device, at most at once: gradients are not counted again where temporaries are known."""
        known = "temporaries" in self.device_bytes
        return sum(size for kind, size in self.device_bytes.items() if not (known and kind == "gradients"))

    @property
    def fits(self) -> bool:
        """Whether the machine's memory holds it."""
        return self.total_bytes <= self.machine.memory_bytes

    def lines(self) -> list[str]:
        """For people, at most about twenty."""
        kinds = [f"{kind} {readable(size)}" for kind, size in self.device_bytes.items()]
        fits = "fits in" if self.fits else "DOES NOT FIT in"
        links = "".join(f", along {axes} {_ms(seconds)}" for axes, seconds in self.times.links_s.items())
        rows = beside(self.lowered, self.compiled)
        more = [f"and {len(rows) - _MOST_ROWS - 1} rows more: see to_json()"] if len(rows) > _MOST_ROWS + 1 else []
        return [
            f"mesh {self.mesh}, update {self.update}, sums in {self.sum_type}, batch {self.batch_size}, {self.steps_per_call} steps a call",
            f"parameters: {self.num_params:,}, learned {self.num_learned:,}, {readable(self.param_bytes)}",
            f"a device holds {'; '.join(kinds)} (gradients are temporary)",
            f"  together {readable(self.total_bytes)}: {fits} {readable(self.machine.memory_bytes)}",
            f"a device computes {self.flops:.3g} operations in {self.dtype} and moves {readable(self.moved_bytes)} in its memory a step",
            f"a device sends in a call of {self.steps_per_call} steps:",
            *(f"  {row}" for row in rows[: _MOST_ROWS + 1]),
            *more,
            f"on {self.machine.name}: products {_ms(self.times.math_s)}, memory {_ms(self.times.memory_s)}{links}",
            f"  a step takes {_ms(self.times.least_s)} (all at once) to {_ms(self.times.most_s)} (one after the other)",
            f"lowered in {self.lower_s:.1f} s, compiled in {self.compile_s:.1f} s",
        ]  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "mesh": self.mesh, "update": self.update, "sum_type": self.sum_type, "batch_size": self.batch_size,
            "steps_per_call": self.steps_per_call, "num_params": self.num_params, "num_learned": self.num_learned, "param_bytes": self.param_bytes,
            "device_bytes": dict(self.device_bytes), "total_bytes": self.total_bytes, "fits": self.fits, "lowered": self.lowered.to_json(),
            "compiled": self.compiled.to_json(), "flops": self.flops, "moved_bytes": self.moved_bytes, "dtype": self.dtype,
            "machine": self.machine.name, "times": self.times.to_json(), "lower_s": self.lower_s, "compile_s": self.compile_s,
        }  # fmt: skip


def lower(program: Program, batches: Mapping[str, Any]) -> Any:
    """`program.steps` with the state donated, lowered on shapes alone: `jax.stages.Lowered`.

    Args:
        program: whose mesh has devices here.
        batches: field -> (k, B, …), arrays or shapes, without the mask.

    Raises:
        ValueError: members do not divide the batch.
    """
    num, size = _sizes(program, batches)
    places = program.row_shardings(1)
    fields = {name: _placed(values, places[name]) for name, values in batches.items()}
    mask = jax.ShapeDtypeStruct((num, size), jnp.bool_, sharding=places["mask"])
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    return jax.jit(program.steps, donate_argnums=0).lower(_state(program), fields, mask, key)


def make(program: Program, batches: Mapping[str, Any], *, clock: Clock = time.perf_counter) -> Made:
    """Lowers and compiles what `lower` takes, and says how long each took.

    Raises:
        ValueError: members do not divide the batch.
    """
    begun = clock()
    lowered = lower(program, batches)
    between = clock()
    compiled = lowered.compile()
    return Made(lowered, compiled, between - begun, clock() - between)


def describe(
    program: Program, batches: Mapping[str, Any], machine: Machine, *, made: Made | None = None
) -> Description:
    """What a run of the program takes.

    Args:
        program: whose mesh has devices here.
        batches: field -> (k, B, …), arrays or shapes, without the mask: what one call takes.
        machine: on which times are predicted.
        made: of `make`, where that is done; else it is done here.

    Raises:
        ValueError: members do not divide the batch.
    """
    num, size = _sizes(program, batches)
    made = make(program, batches) if made is None else made
    lowered = lowered_traffic(made.lowered, program.members.mesh.sizes)
    compiled = compiled_traffic(made.compiled.as_text(), program.members.mesh.sizes)
    cost = made.compiled.cost_analysis() or {}
    counted = _counted_steps(program, num)
    flops, moved = cost.get("flops", 0.0) / counted, cost.get("bytes accessed", 0.0) / counted
    dtype = product_type(made.lowered)
    wire = {axes: sent / num for axes, sent in _wire_bytes(lowered, compiled).items()}
    flat = {name: leaf for name, leaf in zip(program.params_shape.names, jax.tree.leaves(program.like.params), strict=True)}  # fmt: skip
    return Description(
        mesh=str(program.members.mesh), update=program.update, sum_type=program.members.sum_type, batch_size=size, steps_per_call=num,
        num_params=sum(leaf.size for leaf in flat.values()), num_learned=sum(flat[name].size for name in program.learned),
        param_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values()),
        device_bytes=_device_bytes(program, batches, made.compiled), lowered=lowered, compiled=compiled, flops=flops, moved_bytes=moved,
        dtype=dtype, machine=machine, times=machine.times(flops=flops, dtype=dtype, moved_bytes=moved, wire_bytes=wire), lower_s=made.lower_s,
        compile_s=made.compile_s,
    )  # fmt: skip


def _counted_steps(program: Program, num: int) -> float:
    """Steps whose work the compiler counts: all on a CPU, where they are written out; elsewhere they are a loop, of which it counts one turn."""
    return num if jax.default_backend() == "cpu" else 1 / program.accumulate


def _wire_bytes(lowered: Traffic, compiled: Traffic) -> dict[str, float]:
    """Axes -> bytes that one device sends, of which times are predicted.

    Where both programs have an axis it is the smaller: the compiled one may be wider than on the machine (bfloat16 on a CPU), and the lowered one
    counts tensors whole that rules split.
    """
    ours, theirs = lowered.by_axis(), compiled.by_axis()
    return {axes: min(side[axes] for side in (ours, theirs) if axes in side) for axes in sorted({*ours, *theirs})}


def state_bytes(program: Program) -> dict[str, int]:
    """Kind of state -> bytes on one device, by shapes and shardings alone."""
    kinds = {"params": "parameters", "opt": "optimizer", "state": "model state"}
    state = _state(program)
    return {kind: sum(_held(leaf) for leaf in jax.tree.leaves(state[key])) for key, kind in kinds.items()}


def gradient_bytes(program: Program) -> int:
    """Of all gradients on one device, before they are added up."""
    flat = dict(zip(program.params_shape.names, jax.tree.leaves(program.like.params), strict=True))
    split = {name: jax.NamedSharding(program.mesh, program.specs[name]) for name in program.learned if name in program.specs}  # fmt: skip
    return sum(
        prod(split[name].shard_shape(flat[name].shape) if name in split else flat[name].shape)
        * flat[name].dtype.itemsize
        for name in program.learned
    )


def _device_bytes(program: Program, batches: Mapping[str, Any], compiled: Any) -> dict[str, int]:
    made = state_bytes(program)
    places = program.row_shardings(1)
    made["batch"] = sum(_held(_placed(values, places[name])) for name, values in batches.items())
    made["gradients"] = gradient_bytes(program)
    said = compiled.memory_analysis()
    if said is not None:
        made["temporaries"] = int(
            said.temp_size_in_bytes + max(0, said.output_size_in_bytes - said.alias_size_in_bytes)
        )
    return made


def _state(program: Program) -> State:
    """Shapes of a State, with where they lie."""
    like = jax.eval_shape(program.beginning, jax.random.key(0))
    placed: State = jax.tree.map(_placed, like, program.shardings)
    return placed


def _placed(values: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(values.shape, values.dtype, sharding=sharding)


def _held(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    shape: tuple[int, ...] = leaf.sharding.shard_shape(leaf.shape)
    return prod(shape) * int(np.dtype(leaf.dtype).itemsize)


def _sizes(program: Program, batches: Named | Mapping[str, Any]) -> tuple[int, int]:
    """Steps and examples."""
    num, size = next(iter(batches.values())).shape[:2]
    if size % program.members.num:
        raise ValueError(
            f"Expected a batch that the {program.members.num} members of {program.members.mesh} divide, got {size} examples. "
            f"Take {program.members.num * -(-size // program.members.num)}, or another mesh."
        )
    return num, size


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
