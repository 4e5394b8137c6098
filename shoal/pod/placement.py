"""Where the arrays of a task lie on a mesh: parameters, the model's state, the optimizer's, batches.

Two descriptions of each array: *manual* specs name the members' axes only, for what is inside `jax.shard_map`; shardings name the axes of rules, too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shoal.local import Shape, model_shape, named
from shoal.pod.collectives import Members
from shoal.pod.layout import Layout
from shoal.pod.loss_scaling import LossScaling
from shoal.task import Task, Tree

Update = Literal["replicated", "sharded", "fully_sharded"]
State = dict[str, Any]
"""``params`` (name -> tensor, or pieces), ``state`` (name -> tensor), ``opt`` (the optimizer's pytree), ``step`` (int32), and ``scale`` where the
loss is scaled."""

WHOLE: Final = PartitionSpec()
_MARK: Final = 7919
"""Dimensions from it on mark a parameter; no tensor has another of that size by chance."""


@dataclass(frozen=True)
class Placement:
    """Of one task on one mesh."""

    task: Task
    """With its adapters."""
    mesh: Mesh
    members: Members
    update: Update
    specs: Mapping[str, PartitionSpec]
    """Name of a parameter -> how rules split it, along axes that are not the members'."""
    inputs: Mapping[str, PartitionSpec]
    """Field -> how its dimensions after the first are split."""
    accumulate: int = 1
    """Parts that a member's share of a batch is taken in, one after the other: 1/accumulate of the memory for activations."""
    scaling: LossScaling | None = None
    """Of the loss, for models that compute in float16."""
    remat: tuple[str, ...] = ()
    """Globs over paths of the model, whose activations are made again on the way back (`remat.py`)."""
    group: int = 1
    """Members whose batch statistics are taken together (`batch_norm.py`)."""

    @cached_property
    def like(self) -> Any:
        return model_shape(self.task)

    @cached_property
    def params_shape(self) -> Shape:
        return Shape(self.like.params, "params")

    @cached_property
    def state_shape(self) -> Shape:
        return Shape(self.like.state, "state")

    @cached_property
    def learned(self) -> tuple[str, ...]:
        """Parameters that are not frozen."""
        return tuple(name for name in self.params_shape.names if self.task.leaf_rule(name) != "frozen")

    @cached_property
    def layout(self) -> Layout:
        flat = named(self.like.params, "params")
        shapes = {name: (tuple(flat[name].shape), np.dtype(flat[name].dtype)) for name in self.learned}
        return Layout.of(shapes, self.specs, self.members)

    @property
    def is_cut(self) -> bool:
        """Whether updates are of pieces."""
        return self.update != "replicated"

    @cached_property
    def manual_specs(self) -> State:
        """Of a State, along the members' axes."""
        return self._specs({name: self.layout.spec(name) for name in self.learned}, dict.fromkeys(self.learned, WHOLE))

    @cached_property
    def shardings(self) -> Any:
        """Of a State, as it lies on the mesh."""
        pieces = {name: self.layout.full_spec(name, self.specs.get(name, WHOLE)) for name in self.learned}
        specs = self._specs(pieces, self.specs)
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs, is_leaf=_is_spec)

    def _specs(self, pieces: Mapping[str, PartitionSpec], whole: Mapping[str, PartitionSpec]) -> State:
        """Of a State, from those of pieces and of whole tensors."""
        params = {name: whole.get(name, WHOLE) for name in self.params_shape.names}
        if self.update == "fully_sharded":
            params |= pieces
        scale = {"scale": jax.tree.map(lambda _: WHOLE, self.scaling.begin())} if self.scaling else {}
        return {
            "params": params, "state": dict.fromkeys(self.state_shape.names, WHOLE), "step": WHOLE,
            "opt": self._opt_specs(pieces if self.is_cut else whole), **scale,
        }  # fmt: skip

    def _opt_specs(self, params: Mapping[str, PartitionSpec]) -> Tree:
        """An optimizer's tensor that is like a parameter lies as that does; all else is whole.

        Found by trying: each parameter gets a last dimension of its own, and what has that, too, is like it.
        """
        marked = {
            name: jax.ShapeDtypeStruct((*like.shape, _MARK + number), like.dtype)
            for number, (name, like) in enumerate(self.piece_shapes.items())
        }
        by_shape = {like.shape: params.get(name, WHOLE) for name, like in marked.items()}
        return jax.tree.map(lambda leaf: by_shape.get(leaf.shape, WHOLE), jax.eval_shape(self.optimizer_init, marked))

    @property
    def optimized_shapes(self) -> tuple[Tree, Tree]:
        """Of the learned tensors as pytrees: whole, and as the optimizer has them."""
        cuts = self.layout.cuts
        whole = {name: jax.ShapeDtypeStruct(cuts[name].shape, cuts[name].dtype) for name in self.learned}
        return self.learned_tree(whole), self.learned_tree(self.piece_shapes)

    @cached_property
    def piece_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of learned tensors as the optimizer has them."""
        cuts, num = self.layout.cuts, self.members.num
        return {
            n: jax.ShapeDtypeStruct(cuts[n].piece(num) if self.is_cut else cuts[n].shape, cuts[n].dtype)
            for n in self.learned
        }

    def row_shardings(self, before: int) -> dict[str, NamedSharding]:
        """Field, `mask` too -> how an array lies whose dimension after so many others counts examples."""
        fields = (*self.task.batch, "mask")
        return {
            n: NamedSharding(self.mesh, PartitionSpec(*self.rows(before), *self.inputs.get(n, WHOLE))) for n in fields
        }

    @property
    def replicated(self) -> NamedSharding:
        """Of an array that is whole on every device."""
        return NamedSharding(self.mesh, WHOLE)

    def rows(self, before: int) -> PartitionSpec:
        """Of an array whose dimension after so many others counts examples, along the members' axes."""
        return PartitionSpec(*(None,) * before, self.members.row_axes or None)

    def optimizer_init(self, learned: Mapping[str, Any]) -> Tree:
        """The optimizer's state."""
        return self.task.local.optimizer.init(self.learned_tree(learned))

    def learned_tree(self, learned: Mapping[str, Any]) -> Tree:
        """The parameters' pytree with what is learned: frozen leaves become None, which optax passes over."""
        return self.params_shape.tree({name: learned[name] for name in self.learned})


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
