"""Sums over members: each gets its piece of the sum (reduce-scatter), and the pieces become the whole again (all-gather).

Members lie on two axes, `slow` and `data`. A sum goes over the fast axis first, so that over the slow one goes 1/size of it (the 2-D
reduction of Kumar et al. 2020, "Exploring the limits of concurrency in ML training on Google TPUs"), and comes back the other way round. What
travels may be rounded to bfloat16: then pieces are exchanged (all-to-all) and added up in float32 where they arrive. That moves the bytes
of a ring's reduce-scatter, rounds each gradient once instead of each partial sum, and needs no collective that adds bfloat16, which XLA turns
into float32 on a CPU. Between processes on CPUs all of it is done by passing arrays from one to one (`permute`), which takes gloo half the time or less.

All of it is called inside `jax.shard_map`, by every member at once. Piece number d S + s is that of member (s, d).
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from shoal.pod.mesh import DATA, MEMBER_AXES, MeshSpec

SumType = Literal["float32", "bfloat16"]
How = Literal["reduce_scatter", "permute", "exchange", "whole"]


@dataclass(frozen=True)
class Members:
    """The members' axes, and how sums over them are taken."""

    mesh: MeshSpec
    sum_type: SumType = "float32"
    """What of gradients is on the wire."""
    how: How = "reduce_scatter"
    """`exchange`: pieces are exchanged (all-to-all) and added here; `permute`: the same, and all else, too, by passing pieces from one to one,
    which is what gloo is quickest at (its all-reduce of two numbers takes 4 ms, this 0.2); `whole`: the whole sum is taken and a piece kept, where nothing else is right (`self_check.py`)."""

    @property
    def axes(self) -> tuple[str, ...]:
        """In the order in which sums go over them: the fast one first."""
        return tuple(axis for axis in (DATA, *MEMBER_AXES) if axis in self.mesh.member_axes)[
            : len(self.mesh.member_axes)
        ]

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Of a batch: its rows lie in the order of the devices, so that each host has consecutive ones."""
        return self.mesh.member_axes

    @property
    def num(self) -> int:
        return self.mesh.num_members

    @property
    def spec(self) -> PartitionSpec:
        """Of an array whose first dimension is the members' pieces."""
        return PartitionSpec(self.axes) if self.axes else PartitionSpec()

    def index(self) -> Any:
        """Number of the piece that is this member's."""
        return jax.lax.axis_index(self.axes) if self.axes else jnp.zeros((), jnp.int32)

    def total(self, values: Any) -> Any:
        """Sum over members of small things, such as metrics and squared norms; the same bits on each."""
        if self.how == "permute" and self.axes:
            return self._told_to_all(values)
        return jax.lax.psum(values, self.axes) if self.axes else values

    def scatter(self, tensor: Any, dim: int = 0) -> Any:
        """What each has, added up; the member's own piece of it along a dimension that N divides."""
        for axis in self.axes:
            tensor = self._scatter(tensor, axis, dim)
        return tensor

    def gather(self, piece: Any, dim: int = 0) -> Any:
        """The pieces of all, one after the other along a dimension. Its gradient is added up over members as by `scatter`."""

        def whole(piece: Any) -> Any:
            for axis in reversed(self.axes):
                if self.how == "permute":
                    piece = self._passed_around(piece, axis, dim)
                else:
                    piece = jax.lax.all_gather(piece, axis, axis=dim, tiled=True)
            return piece

        gathered = jax.custom_vjp(whole)
        gathered.defvjp(lambda piece: (whole(piece), None), lambda _, slope: (self.scatter(slope, dim),))
        return gathered(piece)

    def own(self, tensor: Any, dim: int = 0) -> Any:
        """The member's own piece of what all have."""
        size = tensor.shape[dim] // self.num
        return jax.lax.dynamic_slice_in_dim(tensor, self.index() * size, size, dim)

    def _scatter(self, tensor: Any, axis: str, dim: int) -> Any:
        wide, num = tensor.dtype, self.mesh.sizes[axis]
        sent = tensor.astype(self.sum_type) if self.sum_type != "float32" else tensor
        if self.how == "whole":
            whole = jax.lax.psum(
                sent.astype(wide), axis
            )  # of bfloat16 XLA's CPU compiler aborts beside axes that are its own
            size = whole.shape[dim] // num
            return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * size, size, dim)
        if self.how == "permute":
            return self._handed_over(sent, axis, dim, wide)
        if self.how == "exchange" or sent.dtype != wide:
            arrived = jax.lax.all_to_all(sent, axis, split_axis=dim, concat_axis=dim, tiled=True).astype(wide)
            shape = arrived.shape
            return jnp.sum(arrived.reshape(*shape[:dim], num, shape[dim] // num, *shape[dim + 1 :]), axis=dim)
        return jax.lax.psum_scatter(sent, axis, scatter_dimension=dim, tiled=True)

    # From one to one: the k-th goes to the member k further on.

    def _told_to_all(self, values: Any) -> Any:
        """Arrays of one type go together."""
        leaves, tree = jax.tree.flatten(values)
        leaves = [jnp.asarray(leaf) for leaf in leaves]
        for dtype in {leaf.dtype: None for leaf in leaves}:
            at = [number for number, leaf in enumerate(leaves) if leaf.dtype == dtype]
            row = jnp.concatenate([leaves[number].reshape(-1) for number in at])
            for axis in self.axes:
                row = jnp.sum(self._passed_around(row[None], axis, 0), axis=0, dtype=dtype)
            ends = [int(end) for end in np.cumsum([leaves[number].size for number in at])[:-1]]
            for number, part in zip(at, jnp.split(row, ends), strict=True):
                leaves[number] = part.reshape(leaves[number].shape)
        return jax.tree.unflatten(tree, leaves)

    def _handed_over(self, sent: Any, axis: str, dim: int, wide: Any) -> Any:
        """Each gives every other its piece, and adds up what it is given."""
        num, own = self.mesh.sizes[axis], jax.lax.axis_index(axis)
        size = sent.shape[dim] // num

        def piece(number: Any) -> Any:
            return jax.lax.dynamic_slice_in_dim(sent, number * size, size, dim)

        total = piece(own).astype(wide)
        for k in range(1, num):
            arrived = jax.lax.ppermute(piece((own + k) % num), axis, _further(num, k))
            total = total + arrived.astype(wide)
        return total

    def _passed_around(self, piece: Any, axis: str, dim: int) -> Any:
        """Each gives every other its piece, and lays what it is given side by side."""
        num, own = self.mesh.sizes[axis], jax.lax.axis_index(axis)
        size = piece.shape[dim]
        if num == 2:  # what follows would write the whole twice
            other = jax.lax.ppermute(piece, axis, _further(num, 1))
            is_first = own == 0
            return jnp.concatenate([jnp.where(is_first, piece, other), jnp.where(is_first, other, piece)], axis=dim)
        whole = jnp.zeros((*piece.shape[:dim], num * size, *piece.shape[dim + 1 :]), piece.dtype)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, piece, own * size, dim)
        for k in range(1, num):
            arrived = jax.lax.ppermute(piece, axis, _further(num, k))
            whole = jax.lax.dynamic_update_slice_in_dim(whole, arrived, (own - k) % num * size, dim)
        return whole


def _further(num: int, k: int) -> list[tuple[int, int]]:
    return [(member, (member + k) % num) for member in range(num)]
