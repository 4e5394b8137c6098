"""What a program sends: its collectives, with their bytes and the axis of the mesh that each goes along.

It is read off twice. The lowered program (`traffic_lowered.py`, StableHLO) is what we wrote: exact, the same on every platform, and had without
compiling. The compiled one (`traffic_compiled.py`, HLO text) is what the compiler made of it: it merges collectives, changes types (XLA's CPU
compiler adds up and moves bfloat16 as float32), and holds those that only it puts in, for axes that rules split. What the lowered program moves of a
tensor that a rule splits is counted whole there; the compiled program has the parts.

Bytes are those that one device sends in a ring of n, which is the least that any algorithm sends (Patarasuk & Yuan 2009, "Bandwidth optimal
all-reduce algorithms for clusters of workstations"), for a whole of S bytes:

    all_reduce                                2 (n - 1) / n  S
    reduce_scatter, all_gather, all_to_all      (n - 1) / n  S      S: before it is cut, or after it is gathered
    collective_permute                                       S

A mean over devices: where n does not divide S some send an element more. Not counted: send and recv, collectives of which the sizes are data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Literal

import jax.numpy as jnp
import numpy as np

Kind = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "collective_permute"]
KINDS: Final[tuple[Kind, ...]] = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "collective_permute")
_NAMES: Final = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "pred": "bool", "i1": "bool", "c64": "complex64",
    "c128": "complex128", "complex<f32>": "complex64", "complex<f64>": "complex128",
}  # fmt: skip


@dataclass(frozen=True)
class Operand:
    """A tensor that a device gives to a collective."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * jnp.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Collective:
    """One operation of a program, by all devices in groups."""

    kind: Kind
    operands: tuple[Operand, ...]
    """What each device gives; several where the compiler has merged."""
    group_size: int
    axes: tuple[str, ...]
    """Of the mesh, along which the members of a group differ; none: each is alone."""
    times: int | None = 1
    """How often it is done in one run of the program; None: it is in a loop whose turns depend on data."""
    is_conditional: bool = False
    """It is in a branch that may not be taken."""

    @property
    def whole_bytes(self) -> int:
        """S of the module's docstring."""
        given = sum(operand.size_bytes for operand in self.operands)
        return given * self.group_size if self.kind == "all_gather" else given

    @property
    def wire_bytes(self) -> float:
        """That one device sends each time."""
        if not self.axes:
            return 0.0
        if self.kind == "collective_permute":
            return float(self.whole_bytes)
        share = self.whole_bytes * (self.group_size - 1) / self.group_size
        return 2 * share if self.kind == "all_reduce" else share

    @property
    def total_bytes(self) -> float:
        """That one device sends in one run; of a loop of unknown length that of one turn."""
        return self.wire_bytes * (1 if self.times is None else self.times)

    @property
    def along(self) -> str:
        """Its axes, as in tables: `data`, `slow+data`."""
        return "+".join(self.axes) or "none"


@dataclass(frozen=True)
class Traffic:
    """All collectives of one program, in its order."""

    collectives: tuple[Collective, ...]

    def total_bytes(self, keep: Callable[[Collective], bool] = lambda _: True) -> float:
        """That one device sends in one run, of those that are kept."""
        return sum(each.total_bytes for each in self.collectives if keep(each))

    def by_axis(self) -> dict[str, float]:
        """Axis (`data`, `slow+data`) -> bytes that one device sends in one run."""
        made: dict[str, float] = {}
        for each in self.collectives:
            made[each.along] = made.get(each.along, 0.0) + each.total_bytes
        return made

    @property
    def num_unknown(self) -> int:
        """Collectives in loops of unknown length: totals hold one turn of each."""
        return sum(each.times is None for each in self.collectives)

    def grouped(self) -> dict[tuple[str, Kind, str], tuple[int, float]]:
        """(axis, kind, types) -> (how many in one run, bytes that one device sends)."""
        made: dict[tuple[str, Kind, str], tuple[int, float]] = {}
        for each in self.collectives:
            key = (each.along, each.kind, "+".join(sorted({operand.dtype for operand in each.operands})))
            number, size = made.get(key, (0, 0.0))
            made[key] = (number + (1 if each.times is None else each.times), size + each.total_bytes)
        return dict(sorted(made.items()))

    def to_json(self) -> dict[str, Any]:
        """Totals and rows, for machines."""
        rows = [
            {"axis": axis, "kind": kind, "types": types, "number": number, "wire_bytes": size}
            for (axis, kind, types), (number, size) in self.grouped().items()
        ]
        return {"wire_bytes_by_axis": self.by_axis(), "loops_of_unknown_length": self.num_unknown, "collectives": rows}


def beside(lowered: Traffic, compiled: Traffic) -> list[str]:
    """Both as a table: one row for each axis, kind and type, number and bytes."""
    left, right = lowered.grouped(), compiled.grouped()
    lines = [f"{'along':12} {'collective':18} {'type':10} {'lowered':>18} {'compiled':>18}"]
    for key in sorted({*left, *right}):
        cells = [_cell(side.get(key)) for side in (left, right)]
        lines.append(f"{key[0]:12} {key[1]:18} {key[2]:10} {cells[0]:>18} {cells[1]:>18}")
    for name, traffic in (("lowered", lowered), ("compiled", compiled)):
        if traffic.num_unknown:
            lines.append(f"{traffic.num_unknown} of the {name} are in loops of unknown length: one turn is counted.")
    return lines


def _cell(found: tuple[int, float] | None) -> str:
    return "-" if found is None else f"{found[0]} x, {readable(found[1])}"


def readable(size_bytes: float) -> str:
    """Bytes for people: `1.50 MB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes:.0f} B"


# For the two readers.


def operand(type_name: str, shape: Sequence[int]) -> Operand:
    """Of a type as MLIR or HLO writes it: f32, bf16, i8, s8, ui32, u32, pred, f8E4M3FN.

    Raises:
        ValueError: it is none that is known.
    """
    name = _NAMES.get(type_name)
    if name is None:
        number = type_name.lstrip("uis")
        if number.isdigit():
            name = ("uint" if type_name.startswith("u") else "int") + number
        else:
            name = type_name.lower().replace("f8", "float8_", 1)
    try:
        jnp.dtype(name)
    except TypeError as error:
        raise ValueError(
            f"Expected a type of numbers in a collective, such as f32, bf16 or s32, got {type_name!r}."
        ) from error
    return Operand(name, tuple(shape))


def along(groups: Sequence[Sequence[int]], sizes: Mapping[str, int]) -> tuple[int, tuple[str, ...]]:
    """How large the groups are, and the axes along which their members differ.

    Args:
        groups: numbers of devices, in the mesh's order; none: one group of all. -1 fills up a shorter group.
        sizes: the mesh's axes, in order.

    Raises:
        ValueError: a number is no device of the mesh.
    """
    whole = [list(range(prod(sizes.values())))]
    kept = [[number for number in group if number >= 0] for group in groups] or whole
    largest = max((number for group in kept for number in group), default=0)
    if largest >= prod(sizes.values()):
        raise ValueError(
            f"Expected groups of the {prod(sizes.values())} devices of the mesh {dict(sizes)}, got device {largest}. "
            "Name the axes of the mesh for which the program was made."
        )
    differ = np.zeros(len(sizes), bool)
    for group in kept:
        places = np.asarray(np.unravel_index(group, tuple(sizes.values())))
        differ |= (places != places[:, :1]).any(axis=1)
    return max(map(len, kept)), tuple(axis for axis, differs in zip(sizes, differ, strict=True) if differs)
