"""Which mesh to take: layouts for so many devices, what each holds and how long its steps should take, and why all but one are not it.

Shapes and arithmetic only: nothing is compiled, and there need not be any device. What a device holds of parameters and optimizer is exact, and
so is what it sends of gradients and parameters. The rest is an estimate that is the same for all layouts, which is what a choice needs:

    * activations are those that the way back needs (`work.py`); where rules split tensors, 10 parts of 34 of them stay whole and the others are divided
      as products are, as in a transformer (Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4.1);
    * a tensor's products are taken to be its share of all elements, and divided by as many devices as split it; examples by all members;
    * a tensor that a rule splits costs one sum over its axes, of rows x (elements / size of the split dimension): a product that is split along
      what it adds up is summed on the way forward, one that is split along what it gives on the way back (Shoeybi et al. 2019, "Megatron-LM");
    * of a fully sharded update two of what travels together are there whole at a time, which takes a compiler that gathers as late as it can;
    * a step is taken to last as long as its parts one after the other.

`describe.py` says of the one that is taken what its compiled program does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Final

import jax
import numpy as np
from jax.sharding import PartitionSpec

from shoal import validate
from shoal.local import Shape, model_shape, named
from shoal.lora import with_adapters
from shoal.pod.collectives import Members, SumType
from shoal.pod.layout import Layout
from shoal.pod.machine import Machine, Times
from shoal.pod.mesh import DATA, SLOW, MeshSpec
from shoal.pod.placement import Update
from shoal.pod.rules import Rules, specs
from shoal.pod.traffic import readable
from shoal.pod.work import Work, work
from shoal.task import Task

_WHOLE_ACTIVATIONS: Final = 10 / 34
UPDATES: Final[tuple[Update, ...]] = ("replicated", "sharded", "fully_sharded")


@dataclass(frozen=True)
class Proposal:
    """One layout."""

    mesh: MeshSpec
    update: Update
    device_bytes: Mapping[str, float]
    """Kind -> bytes on one device; empty where the layout is not possible."""
    wire_bytes: Mapping[str, float]
    """Axis -> bytes that one device sends in a step."""
    times: Times | None
    rejected: str = ""
    """Why it is not proposed; empty for the one that is."""

    @property
    def total_bytes(self) -> float:
        """On one device."""
        return sum(self.device_bytes.values())

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "mesh": str(self.mesh), "update": self.update, "device_bytes": dict(self.device_bytes), "total_bytes": self.total_bytes,
            "wire_bytes": dict(self.wire_bytes), "times": None if self.times is None else self.times.to_json(), "rejected": self.rejected,
        }  # fmt: skip


def proposals(
    task: Task,
    num_devices: int,
    machine: Machine,
    *,
    rules: Rules | None = None,
    num_processes: int = 1,
    batch_size: int | None = None,
    updates: Sequence[Update] = UPDATES,
    sum_type: SumType = "float32",
) -> list[Proposal]:
    """Layouts for a task, the best first, then the others that fit by their predicted steps, then those that do not, then those that cannot be.

    Args:
        task: any.
        num_devices: in all processes together.
        machine: of which they are.
        rules: how tensors are split; the axes that they name are tried in all sizes. None: there is only the members' axis.
        num_processes: with links between them that are slow; more than one is the size of the axis `slow`.
        batch_size: examples in a step, of all members; None: the task's.
        updates: which kinds are tried.
        sum_type: of gradients on the wire.

    Raises:
        ValueError: a number is not positive, processes do not divide the devices, or no size of the axes suits the rules.
    """
    validate.positive(num_devices=num_devices, num_processes=num_processes)
    if num_devices % num_processes:
        raise ValueError(
            f"Expected the same number of devices in each process, got num_devices={num_devices} in num_processes={num_processes}."
        )
    size = task.local.batch_size if batch_size is None else batch_size
    validate.positive(batch_size=size)
    model = _Model.of(task, rules or {}, work(task), size, sum_type)
    meshes = list(layouts(num_devices, _axes(rules or {}), num_processes))
    model.refuse_unusable_rules(meshes)
    made = [model.proposal(mesh, update, machine) for mesh in meshes for update in updates]
    return _judged(made, machine)


def best(found: Sequence[Proposal]) -> Proposal:
    """The one that is proposed.

    Raises:
        ValueError: none is possible, with the smallest and what it lacks.
    """
    if found and not found[0].rejected:
        return found[0]
    possible = [each for each in found if each.times is not None]
    least = min(possible, key=lambda each: each.total_bytes) if possible else found[0]
    raise ValueError(
        f"Expected a layout that fits, got none of {len(found)}. Nearest is {least.mesh} with update={least.update!r}: {least.rejected}. "
        "Take more devices, a smaller batch, rules that split large tensors, or another batch size."
    )


def lines(found: Sequence[Proposal]) -> list[str]:
    """For people: one row for each layout."""
    made = [f"{'mesh':28} {'update':14} {'a device holds':>15} {'a step':>12}  why not"]
    for each in found:
        step = "-" if each.times is None else f"{1e3 * each.times.most_s:.3g} ms"
        held = readable(each.total_bytes) if each.device_bytes else "-"
        made.append(f"{each.mesh!s:28} {each.update:14} {held:>15} {step:>12}  {each.rejected or 'taken'}")
    return made


def layouts(num_devices: int, axes: Sequence[str], num_processes: int = 1) -> Iterator[MeshSpec]:
    """Meshes of so many devices, with all sizes of the axes that rules name; those with most members first.

    Axes of rules stay inside a process: they carry sums of activations, which do not wait well.
    """
    inside = num_devices // num_processes
    divisors = [n for n in range(1, inside + 1) if inside % n == 0]
    chosen = [sizes for sizes in product(divisors, repeat=len(axes)) if inside % prod(sizes) == 0]
    for sizes in sorted(chosen, key=lambda sizes: (prod(sizes), sizes)):
        members = {SLOW: num_processes} if num_processes > 1 else {}
        yield MeshSpec(members | {DATA: inside // prod(sizes)} | dict(zip(axes, sizes, strict=True)))


def _axes(rules: Rules) -> list[str]:
    """That rules name, in order."""
    words = [axis.strip() for text in rules.values() for word in text.split(",") for axis in word.split("+")]
    return list(dict.fromkeys(axis for axis in words if axis not in ("", "-")))


@dataclass(frozen=True)
class _Model:
    """What is the same for all layouts."""

    task: Task
    rules: Rules
    work: Work
    batch_size: int
    sum_type: SumType
    params: Mapping[str, jax.ShapeDtypeStruct]
    learned: tuple[str, ...]
    state_bytes: int
    example_bytes: int
    tree: Any
    """Learned tensors by name -> what the optimizer is given."""

    @classmethod
    def of(cls, task: Task, rules: Rules, work: Work, batch_size: int, sum_type: SumType) -> "_Model":
        task = with_adapters(task)
        like = model_shape(task)
        params, shape = named(like.params, "params"), Shape(like.params, "params")
        learned = tuple(name for name in shape.names if task.leaf_rule(name) != "frozen")
        fields = task.batch_spec(1).values()
        return cls(
            task, rules, work, batch_size, sum_type, params, learned, sum(_size(leaf) for leaf in jax.tree.leaves(like.state)),
            sum(_size(leaf) for leaf in fields), shape.tree,
        )  # fmt: skip

    def split(self, mesh: MeshSpec) -> dict[str, PartitionSpec]:
        """By rules; ValueError where they do not suit the mesh."""
        return specs(self.rules, {name: tuple(leaf.shape) for name, leaf in self.params.items()}, mesh, what="rules")

    def refuse_unusable_rules(self, meshes: Sequence[MeshSpec]) -> None:
        """ValueError where no mesh suits them."""
        errors = list[ValueError]()
        for mesh in meshes:
            try:
                self.split(mesh)
            except ValueError as error:
                errors.append(error)
        if len(errors) == len(meshes):
            raise ValueError(
                f"Expected rules that suit a mesh of {meshes[0].num_devices} devices, got none: on {meshes[0]} {errors[0]}"
            ) from errors[0]

    def proposal(self, mesh: MeshSpec, update: Update, machine: Machine) -> Proposal:
        """One layout, not yet compared with others."""
        try:
            split = self.split(mesh)
        except ValueError as error:
            return Proposal(mesh, update, {}, {}, None, str(error))
        if self.batch_size % mesh.num_members:
            why = f"a batch of {self.batch_size} is no multiple of {mesh.num_members} members"
            return Proposal(mesh, update, {}, {}, None, why)
        parts = _Parts(self, mesh, update, split)
        held, wire = parts.device_bytes(), parts.wire_bytes()
        times = machine.times(
            flops=parts.flops(), dtype=self.work.dtype, moved_bytes=parts.moved_bytes(held), wire_bytes=wire
        )
        return Proposal(mesh, update, held, wire, times)


class _Parts:
    """One layout, added up."""

    def __init__(self, model: _Model, mesh: MeshSpec, update: Update, split: Mapping[str, PartitionSpec]) -> None:
        self.model, self.mesh, self.update, self.split = model, mesh, update, split
        shapes = {name: (tuple(model.params[name].shape), np.dtype(model.params[name].dtype)) for name in model.learned}
        self.members = Members(mesh, model.sum_type)
        self.layout = Layout.of(shapes, split, self.members)
        self.examples = model.batch_size // mesh.num_members

    def device_bytes(self) -> dict[str, float]:
        """Kind -> bytes on one device."""
        model, fully = self.model, self.update == "fully_sharded"
        params = sum(
            self._piece_bytes(name) if fully and name in self.layout.cuts else self._split_bytes(name)
            for name in model.params
        )
        whole = float(sum(self._split_bytes(name) for name in model.learned))
        gathered = min(whole, 2 * self._largest_bytes()) if fully else 0.0
        summed = sum(self._piece_bytes(name) for name in model.learned)
        return {
            "parameters": params, "gradients": gathered + summed if fully else whole, "gathered": gathered, "optimizer": self._optimizer_bytes(),
            "model state": model.state_bytes, "batch": self.examples * model.example_bytes, "activations": self._activation_bytes(),
        }  # fmt: skip

    def wire_bytes(self) -> dict[str, float]:
        """Axis -> bytes that one device sends in a step. Norms and metrics are left out: a few bytes a tensor."""
        made: dict[str, float] = {}
        narrow = 0.5 if self.model.sum_type == "bfloat16" else 1.0
        for name, cut in self.layout.cuts.items():
            size, padded = self._split_bytes(name), self._padded_bytes(name)
            if cut.is_whole or (self.update == "replicated" and narrow == 1.0 and len(self.members.axes) < 2):
                along, num = "+".join(self.mesh.member_axes), self.mesh.num_members
                _add(made, along, 2 * (num - 1) / num * size)
                continue
            halves = narrow + (2.0 if self.update == "fully_sharded" else 1.0)
            for axis in self.members.axes:
                num = self.mesh.sizes[axis]
                _add(made, axis, halves * (num - 1) / num * padded)
                padded /= num
        for name, spec in self.split.items():
            for along, sent in self._activation_sums(name, spec):
                _add(made, along, sent)
        return {axis: size for axis, size in made.items() if size}

    def flops(self) -> float:
        """Of one device in a step."""
        return float(self.examples * self.model.work.total_flops * self._share())

    def _share(self) -> float:
        """Of products, that a device does of those of its member."""
        sizes = {name: prod(leaf.shape) for name, leaf in self.model.params.items()}
        divided = sum(size / self._ways(name) for name, size in sizes.items())
        return float(divided / max(1, sum(sizes.values())))

    def _activation_bytes(self) -> float:
        divided = _WHOLE_ACTIVATIONS + (1 - _WHOLE_ACTIVATIONS) * self._share()
        return float(self.examples * self.model.work.kept_bytes * divided)

    def moved_bytes(self, held: Mapping[str, float]) -> float:
        """Between one device and its memory in a step: parameters are read forwards and back, all else is written and read."""
        updated = 2 * held["optimizer"] + held["parameters"]
        return (
            2 * (held["parameters"] + held["gradients"] + held["gathered"] + held["activations"])
            + held["batch"]
            + updated
        )

    def _optimizer_bytes(self) -> int:
        """An optimizer's tensors lie as the parameters do that they are like."""
        like = {name: self._local(name, in_pieces=self.update != "replicated") for name in self.layout.cuts}
        state = jax.eval_shape(self.model.task.local.optimizer.init, self.model.tree(like))
        return sum(_size(leaf) for leaf in jax.tree.leaves(state))

    def _largest_bytes(self) -> float:
        """Of what travels together."""
        apart = [(name,) for name, cut in self.layout.cuts.items() if cut.is_whole or cut.dim is not None]
        return max((sum(map(self._padded_bytes, names)) for names in [*self.layout.buckets, *apart]), default=0.0)

    def _activation_sums(self, name: str, spec: PartitionSpec) -> list[tuple[str, float]]:
        """(axes, bytes that one device sends) of the sum that a split tensor costs."""
        leaf, model = self.model.params[name], self.model
        dims = [(dim, axes) for dim, axes in enumerate(spec) if axes is not None]
        elements = max(1, sum(prod(each.shape) for each in model.params.values()))
        rows = self.examples * model.work.total_flops / (6 * elements)  # two operations an element and row, three times
        made = []
        for dim, axes in dims:
            axes = (axes,) if isinstance(axes, str) else axes
            num = self.mesh.size(*axes)
            moved = rows * prod(leaf.shape) / leaf.shape[dim] * np.dtype(leaf.dtype).itemsize
            made.append(("+".join(axes), 2 * (num - 1) / num * moved))
        return made

    def _ways(self, name: str) -> int:
        """Devices among which rules split a tensor."""
        named = [axes if isinstance(axes, tuple) else (axes,) for axes in self.split.get(name, PartitionSpec()) if axes]
        return self.mesh.size(*(axis for axes in named for axis in axes))

    def _local(self, name: str, *, in_pieces: bool) -> jax.ShapeDtypeStruct:
        """What one device has of a tensor, or of a member's piece of it."""
        leaf = self.model.params[name]
        shape = list(self.layout.cuts[name].piece(self.mesh.num_members) if in_pieces else leaf.shape)
        for dim, axes in enumerate(self.split.get(name, PartitionSpec())):
            if axes is not None:
                shape[dim] //= self.mesh.size(*((axes,) if isinstance(axes, str) else axes))
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    def _split_bytes(self, name: str) -> int:
        return _size(self._local(name, in_pieces=False))

    def _piece_bytes(self, name: str) -> int:
        return _size(self._local(name, in_pieces=True))

    def _padded_bytes(self, name: str) -> float:
        """Of all pieces together that travel, on one of the devices that split the tensor."""
        return self._piece_bytes(name) * (1 if self.layout.cuts[name].is_whole else self.mesh.num_members)


def _judged(made: Sequence[Proposal], machine: Machine) -> list[Proposal]:
    """In order, with the reasons."""
    impossible = [each for each in made if each.times is None]
    large, fitting = list[tuple[Proposal, float]](), list[tuple[Proposal, float]]()
    for each in made:
        if each.times is not None:
            (fitting if each.total_bytes <= machine.memory_bytes else large).append((each, each.times.most_s))
    fitting.sort(key=lambda pair: (pair[1], pair[0].total_bytes))
    ordered = [each for each, _ in fitting[:1]]
    for each, step in fitting[1:]:
        first = fitting[0][1]
        why = (
            f"slower: {1e3 * step:.3g} ms a step against {1e3 * first:.3g}"
            if step > first
            else f"as fast, and holds {readable(each.total_bytes - ordered[0].total_bytes)} more"
        )
        ordered.append(replace(each, rejected=why))
    for each, _ in sorted(large, key=lambda pair: pair[0].total_bytes):
        over = each.total_bytes - machine.memory_bytes
        why = f"does not fit: {readable(over)} more than the {readable(machine.memory_bytes)} of {machine.name}"
        ordered.append(replace(each, rejected=why))
    return [*ordered, *impossible]


def _size(leaf: Any) -> int:
    return int(prod(leaf.shape)) * int(np.dtype(leaf.dtype).itemsize)


def _add(made: dict[str, float], key: str, size: float) -> None:
    made[key] = made.get(key, 0.0) + size
