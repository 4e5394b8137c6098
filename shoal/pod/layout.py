"""Where learned tensors lie: how each is cut into pieces, one for each member, and what travels together.

A tensor that is whole on every member's devices is cut flat: padded to N equal pieces, and moved in buckets with others, so that one collective
moves many. A tensor that a rule splits along other axes is cut along a dimension that is not split and that N divides, by itself. One that has none
is kept whole, and its update computed by all.

A flat piece of a tensor with k dimensions has shape (columns, 1, …), k in all: an optimizer that goes by the number of dimensions (no
weight decay on biases, say) sees what it would see.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from shoal.pod.collectives import Members

BUCKET_BYTES: Final = 32 << 20
"""Of one collective's operand, unless a single tensor is larger."""
ALONE_BYTES: Final = 1 << 20
"""From it on a tensor travels by itself: to lay it beside others, and to take it out again, takes longer than a collective more."""


@dataclass(frozen=True)
class Cut:
    """Of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype
    dim: int | None
    """Along which it is cut; None: flat."""
    is_whole: bool = False

    def piece(self, num_members: int) -> tuple[int, ...]:
        """The shape of a piece."""
        if self.is_whole:
            return self.shape
        if self.dim is None:
            return (self.columns(num_members), *(1,) * (len(self.shape) - 1))
        return (*self.shape[: self.dim], self.shape[self.dim] // num_members, *self.shape[self.dim + 1 :])

    def columns(self, num_members: int) -> int:
        """Elements of a flat piece, padding included."""
        return -(-prod(self.shape) // num_members)


@dataclass(frozen=True)
class Layout:
    """Of all learned tensors, by name."""

    cuts: Mapping[str, Cut]
    buckets: Sequence[tuple[str, ...]]
    """Names of flat ones that travel together."""
    members: Members

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
        specs: Mapping[str, PartitionSpec],
        members: Members,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> "Layout":
        """
        Args:
            shapes: name -> shape and type.
            specs: name -> how a rule splits it.
            members: who has the pieces.
            bucket_bytes: most that one collective moves of several tensors.
        """
        cuts = {
            name: _cut(shape, dtype, specs.get(name, PartitionSpec()), members.num)
            for name, (shape, dtype) in shapes.items()
        }
        return cls(cuts, tuple(_buckets(cuts, members.num, bucket_bytes)), members)

    def scatter(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """What each member has of the tensors, added up: the member's own pieces."""
        made: dict[str, Any] = {}
        for names in self.buckets:
            row = self.members.scatter(jnp.concatenate([self._rows(name, tensors[name]) for name in names], axis=1))
            made |= self._parts(names, row)
        for name, cut in self._apart():
            tensor = tensors[name]
            made[name] = self.members.total(tensor) if cut.is_whole else self.members.scatter(tensor, cut.dim or 0)
        return made

    def gather(self, pieces: Mapping[str, Any]) -> dict[str, Any]:
        """Whole tensors of everybody's pieces."""
        made = {}
        for names in self.buckets:
            row = jnp.concatenate([pieces[name].reshape(1, -1) for name in names], axis=1)
            matrix = self.members.gather(row)
            for name, part in zip(names, jnp.split(matrix, self._ends(names), axis=1), strict=True):
                shape = self.cuts[name].shape
                made[name] = part.reshape(-1)[: prod(shape)].reshape(shape)
        for name, cut in self._apart():
            made[name] = pieces[name] if cut.is_whole else self.members.gather(pieces[name], cut.dim or 0)
        return made

    def own(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The member's pieces of tensors that all have."""
        made = {}
        for name, cut in self.cuts.items():
            if cut.is_whole:
                made[name] = tensors[name]
            elif cut.dim is None:
                made[name] = self.members.own(self._rows(name, tensors[name])).reshape(cut.piece(self.members.num))
            else:
                made[name] = self.members.own(tensors[name], cut.dim)
        return made

    def spec(self, name: str) -> PartitionSpec:
        """Of the array that holds everybody's pieces, along the members' axes."""
        cut = self.cuts[name]
        if cut.is_whole:
            return PartitionSpec()
        return PartitionSpec(*(None,) * (cut.dim or 0), self.members.axes) if self.members.axes else PartitionSpec()

    def full_spec(self, name: str, rule: PartitionSpec) -> PartitionSpec:
        """The same with the axes along which a rule splits the tensor."""
        cut = self.cuts[name]
        if cut.is_whole:
            return rule
        if cut.dim is None:
            return self.spec(name)
        words: list[Any] = [*rule, *(None,) * (len(cut.shape) - len(rule))]
        words[cut.dim] = self.members.axes or None
        return PartitionSpec(*words)

    def _apart(self) -> list[tuple[str, Cut]]:
        return [(name, cut) for name, cut in self.cuts.items() if cut.is_whole or cut.dim is not None]

    def _rows(self, name: str, tensor: Any) -> Any:
        num = self.members.num
        columns = self.cuts[name].columns(num)
        return jnp.pad(tensor.reshape(-1), (0, num * columns - tensor.size)).reshape(num, columns)

    def _parts(self, names: Sequence[str], row: Any) -> dict[str, Any]:
        parts = jnp.split(row, self._ends(names), axis=1)
        return {
            name: part.reshape(self.cuts[name].piece(self.members.num)) for name, part in zip(names, parts, strict=True)
        }

    def _ends(self, names: Sequence[str]) -> Any:
        return np.cumsum([self.cuts[name].columns(self.members.num) for name in names])[:-1]


def _cut(shape: tuple[int, ...], dtype: np.dtype, spec: PartitionSpec, num_members: int) -> Cut:
    if not any(spec):
        return Cut(shape, dtype, None)
    free = [d for d, size in enumerate(shape) if size % num_members == 0 and (d >= len(spec) or spec[d] is None)]
    return Cut(shape, dtype, max(free, key=lambda d: shape[d])) if free else Cut(shape, dtype, None, is_whole=True)


def _buckets(cuts: Mapping[str, Cut], num_members: int, most_bytes: int) -> list[tuple[str, ...]]:
    """In the order of the tensors; one type in each."""
    full: list[tuple[str, ...]] = []
    filling: dict[np.dtype, tuple[list[str], int]] = {}
    for name, cut in cuts.items():
        if cut.is_whole or cut.dim is not None:
            continue
        size = num_members * cut.columns(num_members) * cut.dtype.itemsize
        if size >= ALONE_BYTES:
            full.append((name,))
            continue
        names, taken = filling.get(cut.dtype, ([], 0))
        if names and taken + size > most_bytes:
            full.append(tuple(names))
            names, taken = [], 0
        filling[cut.dtype] = ([*names, name], taken + size)
    return [*full, *(tuple(names) for names, _ in filling.values())]
