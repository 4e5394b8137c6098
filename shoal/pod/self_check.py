"""Do the collectives add up on this machine? If not, which do; and which of those that do is quick.

A sum over members that is silently wrong trains a wrong model and says nothing. It has happened: jax-ml/jax #40830 (2026), where gloo's reduce-scatter
gave the first member wrong values for pieces of 4 MiB and right ones for 256 KiB. So before the first step all members add up numbers whose
sums are known, whole ones that have no rounding, at the size of the program's largest bucket, by each way that `Members.how` has:

    numbers f(i, member) --scatter as the program does--> piece --compare--> wrong elements --sum over members--> one verdict for all
    numbers f(i)         --gather------------------------> whole --compare--^

The way is the first of `reduce_scatter`, `permute`, `exchange`, `whole` that is right. Where members are several processes, a later one is taken if
scattering and gathering take it less than four fifths of the time: gloo is quickest at passing pieces from one to one. Within one
process, where tests compare bits, time has no say. A run that goes on does so in the way that it began (`kept_way`), if that is right: the same additions in the same order,
and no other way is tried.

Guarantees:
    * All processes learn the same verdict, or an error ends those that did not.
    * Programs are compiled, and processes have met, before the first collective of size: gloo gives up on who is 30 s late.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shoal.errors import ShoalError
from shoal.pod.collectives import How, Members
from shoal.pod.layout import Layout

LARGEST_BYTES: Final = 64 << 20
REPEATS: Final = 6
"""A defect may be a race."""
MUCH_FASTER: Final = 4 / 5
_WAYS: Final[tuple[How, ...]] = get_args(How)
_KEPT: Final = "sums-by"
"""File with the name of a way."""
_LOGGER: Final = logging.getLogger(__name__)

Scatter = Callable[[Members, Any], Any]
"""What each member has (n,), added up -> the member's piece (n / N,)."""


class NoWayAddsUp(ShoalError):
    """Sums over members are wrong on this machine, however they are taken."""


@dataclass(frozen=True)
class Verdict:
    """What was found."""

    how: How
    """For `Members`."""
    why: str
    """Why it is not the first of the ways; empty if it is."""
    wrong: Mapping[How, int]
    """Way -> elements that were not the sum, of all members and repetitions."""
    times_s: Mapping[How, float]
    """Way -> seconds of scattering and gathering once, the mean of members."""
    seconds: float
    """That the check took, compilation included."""


def self_check(mesh: Mesh, layout: Layout, *, prefer: How | None = None, scatter: Scatter = Members.scatter) -> Verdict:
    """Tries each way to add up over the members, at the size of the layout's largest bucket.

    Args:
        mesh: the real one.
        layout: of the program; its members say on which axes, and in which type.
        prefer: the way that is taken if it is right, without a look at others; None, or not the same in all processes: the quickest of those that are.
        scatter: what is tried, for tests.

    Raises:
        NoWayAddsUp: none is right.
    """
    begun, members = time.perf_counter(), layout.members
    if members.num == 1:
        return Verdict(members.how, "", {}, {}, 0.0)

    def tried(ways: Sequence[How]) -> tuple[dict[How, int], dict[How, float]]:
        programs = _Programs(mesh, members, _elements(layout), scatter, ways)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("shoal.pod.self_check")
        return _of_all(mesh, members, programs.run())

    if (known := _agreed(prefer)) is not None:
        wrong, times_s = tried([known])
        if not wrong[known]:
            return Verdict(known, "the run began with it", wrong, times_s, time.perf_counter() - begun)
        _LOGGER.warning(
            "sums over members by %s, with which the run began, are wrong now: %d elements", known, wrong[known]
        )
    wrong, times_s = tried(_WAYS)
    how, why = choice(wrong, times_s, by_time=_processes(mesh) > 1)
    if why:
        _LOGGER.log(logging.WARNING if wrong[_WAYS[0]] else logging.INFO, "sums over members by %s: %s", how, why)
    return Verdict(how, why, wrong, times_s, time.perf_counter() - begun)


def choice(wrong: Mapping[How, int], times_s: Mapping[How, float], *, by_time: bool) -> tuple[How, str]:
    """The way to take, and why it is not the first.

    Raises:
        NoWayAddsUp: none is right.
    """
    right = [how for how in _WAYS if not wrong[how]]
    if not right:
        counts = ", ".join(f"{how}: {wrong[how]} wrong elements" for how in _WAYS)
        raise NoWayAddsUp(
            f"Expected sums over members that add up, got none on this machine ({counts}). Try fewer devices a process, another "
            "release of jaxlib, or on a CPU JAX_CPU_COLLECTIVES_IMPLEMENTATION=mpi."
        )
    chosen = right[0]
    why = "" if chosen == _WAYS[0] else f"{_WAYS[0]} gave {wrong[_WAYS[0]]} wrong elements here"
    for how in right[1:] if by_time else ():
        if times_s[how] < MUCH_FASTER * times_s[chosen]:
            why = f"it takes {1e3 * times_s[how]:.1f} ms where {chosen} takes {1e3 * times_s[chosen]:.1f} ms" + (
                f", and {why}" if wrong[_WAYS[0]] else ""
            )
            chosen = how
    return chosen, why


def kept_way(folder: Path) -> How | None:
    """The way that a run began with, on the same kind of device; None: it has yet to begin, or goes on elsewhere."""
    with suppress(FileNotFoundError):
        found = (folder / _KEPT).read_text().split()
        return next((how for how in _WAYS if found == [how, jax.default_backend()]), None)
    return None


def keep_way(folder: Path, how: How) -> None:
    """For those who go on with a run: what was found to be right between its processes."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_KEPT}.partial"
    partial.write_text(f"{how} {jax.default_backend()}\n")
    partial.rename(folder / _KEPT)


def _agreed(prefer: How | None) -> How | None:
    """What all processes prefer; None where they differ."""
    if jax.process_count() == 1:
        return prefer
    own = np.int32(-1 if prefer is None else _WAYS.index(prefer))
    numbers = {int(number) for number in np.ravel(multihost_utils.process_allgather(own))}
    return prefer if numbers == {int(own)} else None


class _Programs:
    """What is run, compiled: the numbers, what each way makes of them, and how much of that is wrong."""

    def __init__(self, mesh: Mesh, members: Members, size: int, scatter: Scatter, ways: Sequence[How]) -> None:
        self._mesh, self._members, self._ways = mesh, members, ways
        own, all_have = members.spec, PartitionSpec()
        values, piece = self._like(size * members.num, own), self._like(size, own)
        self._turns = [jax.device_put(np.uint32(turn), NamedSharding(mesh, all_have)) for turn in range(REPEATS)]

        def made(turn: Any) -> tuple[Any, Any]:
            everything = _numbers(members, jnp.arange(size, dtype=jnp.uint32), members.index(), turn)
            return everything, _hashed(_own_indices(members, size), turn, 1021)

        def scattered(how: How) -> Callable[[Any], Any]:
            return lambda values: scatter(replace(members, how=how), values)

        def compared(how: How) -> Callable[[Any, Any, Any], Any]:
            by = replace(members, how=how)
            return lambda piece, whole, turn: _wrong(by, size, piece, whole, turn)[None]

        self._made = self._compiled(made, (all_have,), (own, own), self._turns[0])
        self._scattered = {how: self._compiled(scattered(how), (own,), own, values) for how in self._ways}
        self._gathered = {
            how: self._compiled(replace(members, how=how).gather, (own,), all_have, piece) for how in self._ways
        }
        like = piece, self._like(size, all_have), self._turns[0]
        self._compared = {
            how: self._compiled(compared(how), (own, all_have, all_have), own, *like) for how in self._ways
        }

    def run(self) -> dict[How, tuple[int, float]]:
        """Way -> elements that are wrong on this process's members, and its fewest seconds. The ways take turns."""
        wrong = dict.fromkeys(self._ways, 0)
        seconds: dict[How, list[float]] = {how: [] for how in self._ways}
        for turn in self._turns:
            values, known = jax.block_until_ready(self._made(turn))
            for how in self._ways:
                begun = time.perf_counter()
                piece = jax.block_until_ready(self._scattered[how](values))
                whole = jax.block_until_ready(self._gathered[how](known))
                seconds[how].append(time.perf_counter() - begun)
                counts = self._compared[how](piece, whole, turn)
                wrong[how] += sum(int(shard.data.sum()) for shard in counts.addressable_shards)
        return {how: (wrong[how], min(seconds[how])) for how in self._ways}

    def _compiled(self, function: Any, into: Any, out: Any, *like: Any) -> Any:
        axes = set(self._members.axes)
        mapped = jax.shard_map(
            function, mesh=self._mesh, in_specs=into, out_specs=out, axis_names=axes, check_vma=False
        )
        return jax.jit(mapped).lower(*like).compile()

    def _like(self, size: int, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=NamedSharding(self._mesh, spec))


def _wrong(members: Members, size: int, piece: Any, whole: Any, turn: Any) -> Any:
    """Elements of this member's piece, and of what it gathered, that are not what they should be. Also the small sum, of all there is."""
    share = size // members.num
    mine = _own_indices(members, size)

    def added(member: Any, total: Any) -> Any:
        return total + _numbers(members, mine, member, turn)

    expected = jax.lax.fori_loop(0, members.num, added, jnp.zeros(share, jnp.float32))
    known = _hashed(jnp.arange(size, dtype=jnp.uint32), turn, 1021)
    small = members.total(jnp.ones((3,), jnp.float32)) != members.num
    return sum(jnp.sum(each, dtype=jnp.int32) for each in (piece != expected, whole != known, small))


def _own_indices(members: Members, size: int) -> Any:
    share = size // members.num
    return members.index().astype(jnp.uint32) * jnp.uint32(share) + jnp.arange(share, dtype=jnp.uint32)


def _numbers(members: Members, index: Any, member: Any, turn: Any) -> Any:
    """What a member has at these indices: whole numbers whose sums the type on the wire holds exactly (bfloat16: up to 256)."""
    own = jnp.asarray(member).astype(jnp.uint32) + jnp.uint32(1)
    seed = turn + jnp.uint32(REPEATS) * own
    if members.sum_type == "float32":
        return _hashed(index, seed, 1021)
    sparse = jnp.uint32(-(-members.num // 64))  # of very many members not all have something at an index
    return jnp.where((index + own) % sparse == 0, _hashed(index, seed, 3), jnp.zeros((), jnp.float32))


def _hashed(index: Any, seed: Any, below: int) -> Any:
    """Numbers in [0, below) that have no pattern: what lands in a wrong place is seen."""
    mixed = index * jnp.uint32(2654435761) + seed * jnp.uint32(2246822519)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(3266489917)
    return ((mixed ^ (mixed >> 13)) % jnp.uint32(below)).astype(jnp.float32)


def _of_all(
    mesh: Mesh, members: Members, found: Mapping[How, tuple[int, float]]
) -> tuple[dict[How, int], dict[How, float]]:
    """What all processes found: counts added up, times as means. What carries it is checked by numbers that go with it.

    Raises:
        NoWayAddsUp: these few numbers do not add up, either.
    """
    devices = mesh.devices.size
    own = [min(count, 1 << 10) for count, _ in found.values()] + [seconds for _, seconds in found.values()]
    row = np.asarray([1.0, 3.0, *own], np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    rows = jax.make_array_from_callback((devices, row.size), sharding, lambda _: row[None])
    added = jax.jit(lambda rows: jnp.sum(rows, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))(rows)
    sums = np.asarray(added.addressable_data(0), np.float64)
    if not np.array_equal(sums[:2], [devices, 3 * devices]):
        raise NoWayAddsUp(
            f"Expected {devices} devices to add up 1 and 3 to {devices} and {3 * devices}, got {sums[0]:g} and {sums[1]:g}: not even a sum of "
            "two numbers over all of them is right on this machine."
        )
    counts, times = sums[2 : 2 + len(found)], sums[2 + len(found) :] / devices
    return (
        {how: round(count) for how, count in zip(found, counts, strict=True)},
        {how: float(each) for how, each in zip(found, times, strict=True)},
    )


def _elements(layout: Layout) -> int:
    """Of the largest that one collective moves, a multiple of the members' number."""
    num = layout.members.num
    sizes = [num * sum(layout.cuts[name].columns(num) for name in names) for names in layout.buckets]
    sizes += [int(np.prod(cut.shape)) for cut in layout.cuts.values() if cut.dim is not None]
    return -(-min(max(sizes, default=num), LARGEST_BYTES // 4) // num) * num


def _processes(mesh: Mesh) -> int:
    return len({device.process_index for device in mesh.devices.flat})
