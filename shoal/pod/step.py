"""One step on a mesh: every member's gradient on its part of the batch, their sum, the update, on pieces or whole.

    batch (B, …) --split over members--> (B/N, …) --loss, gradient--> sum over members --optimizer--> parameters

    replicated      every member adds up everything and updates everything
    sharded         each gets its piece of the sum, updates that, and all gather the new parameters: the same bytes, 1/N of the optimizer's
                    memory and work (Xu et al. 2020, "Automatic cross-replica sharding of weight update in data-parallel training")
    fully_sharded   parameters are kept in pieces, too, and gathered where the loss needs them, forwards and again backwards

The mean is over the real examples of the whole batch, so the result is that of one device but for the order of additions. Axes other than the
members' are the compiler's (GSPMD): inside a member everything is written as for one device.

A model's state (batch statistics) is the mean of what the members made of it. Randomness of the loss comes from (key, step, member): a model with
dropout draws other masks on another mesh.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shoal.local import Named, Shape, model_shape, named, seed_key
from shoal.pod.collectives import Members
from shoal.pod.layout import Layout
from shoal.pod.piecewise import state_pieces, update
from shoal.task import LOSS_BOUND, Loss, Sum, Task, Tree

Update = Literal["replicated", "sharded", "fully_sharded"]
State = dict[str, Any]
"""``params`` (name -> tensor, or pieces), ``state`` (name -> tensor), ``opt`` (the optimizer's pytree), ``step`` (int32)."""

_GATHERED: Final = "gathered"
_WHOLE: Final = PartitionSpec()


@dataclass(frozen=True)
class Program:
    """What is compiled for one task on one mesh."""

    task: Task
    """With its adapters."""
    mesh: Mesh
    members: Members
    update: Update
    specs: Mapping[str, PartitionSpec]
    """Name of a parameter -> how rules split it, along axes that are not the members'."""
    inputs: Mapping[str, PartitionSpec]
    """Field -> how its dimensions after the first are split."""

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

    # Where things are. Manual specs name the members' axes only; shardings name those of rules, too.

    @cached_property
    def manual_specs(self) -> State:
        """Of a State, along the members' axes."""
        kept = {name: _WHOLE for name in self.params_shape.names}
        if self.update == "fully_sharded":
            kept |= {name: self.layout.spec(name) for name in self.learned}
        pieces = {name: self.layout.spec(name) if self.is_cut else _WHOLE for name in self.learned}
        return {
            "params": kept, "state": dict.fromkeys(self.state_shape.names, _WHOLE), "opt": self._opt_specs(pieces), "step": _WHOLE,
        }  # fmt: skip

    def _opt_specs(self, pieces: Mapping[str, PartitionSpec]) -> Tree:
        """An optimizer's tensor that is like a parameter lies as that does; all else is whole.

        Found by trying: each parameter in turn is taken to be larger, and what becomes larger with it is like it.
        """
        like = self.piece_shapes
        before = jax.eval_shape(self.optimizer_init, like)
        specs = jax.tree.map(lambda _: _WHOLE, before)
        for name, spec in pieces.items():
            grown = {**like, name: jax.ShapeDtypeStruct((*like[name].shape, 2), like[name].dtype)}
            after = jax.eval_shape(self.optimizer_init, grown)
            specs = jax.tree.map(
                lambda found, one, other, spec=spec: spec if one.shape != other.shape else found,
                specs,
                before,
                after,
                is_leaf=_is_spec,
            )
        return specs

    @cached_property
    def piece_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of learned tensors as the optimizer has them."""
        cuts, num = self.layout.cuts, self.members.num
        return {
            n: jax.ShapeDtypeStruct(cuts[n].piece(num) if self.is_cut else cuts[n].shape, cuts[n].dtype)
            for n in self.learned
        }

    @cached_property
    def shardings(self) -> Any:
        """Of a State, as it lies on the mesh."""

        def placed(spec: PartitionSpec) -> NamedSharding:
            return NamedSharding(self.mesh, spec)

        made = jax.tree.map(placed, self.manual_specs, is_leaf=_is_spec)
        if self.update != "fully_sharded":
            made["params"] |= {name: placed(spec) for name, spec in self.specs.items() if name in made["params"]}
        return made

    def batch_sharding(self, field: str) -> NamedSharding:
        """Of a field's (k, B, …)."""
        return NamedSharding(self.mesh, PartitionSpec(None, self.members.axes or None, *self.inputs.get(field, _WHOLE)))

    # Programs.

    def begin(self, key: jax.Array) -> State:
        """The state before the first step, each array made where it belongs."""

        def made(key: jax.Array) -> State:
            variables = self.task.variables(key)
            params = dict(zip(self.params_shape.names, jax.tree.leaves(variables.params), strict=True))
            learned = {name: params[name] for name in self.learned}
            opt, cut = self._inside(
                self._begin_inside, (dict.fromkeys(learned, _WHOLE),), (self.manual_specs["opt"], self._cut_specs)
            )(learned)
            state = dict(zip(self.state_shape.names, jax.tree.leaves(variables.state), strict=True))
            return {"params": params | cut, "state": state, "opt": opt, "step": jnp.zeros((), jnp.int32)}

        return jax.jit(made, out_shardings=self.shardings)(key)

    @property
    def _cut_specs(self) -> dict[str, PartitionSpec]:
        return {name: self.layout.spec(name) for name in self.learned} if self.update == "fully_sharded" else {}

    def _begin_inside(self, learned: Named) -> tuple[Tree, Named]:
        pieces = self.layout.own(learned) if self.is_cut else learned
        return self.optimizer_init(pieces), pieces if self.update == "fully_sharded" else {}

    def steps(self, state: State, batches: Named, mask: Any, key: Any) -> tuple[State, Named]:
        """Some steps; to be compiled with the state donated.

        Args:
            state: of `begin`.
            batches: field -> (k, B, …).
            mask: (k, B), True for real examples. A step without any changes nothing.
            key: (2,) uint32.

        Returns:
            The state, and `loss/numerator`, …: (k,), over the whole batch.
        """
        fields = {name: PartitionSpec(None, self.members.axes or None) for name in (*batches, "mask")}

        def inside(state: State, batches: Named, key: Any) -> tuple[State, Named]:
            made = []
            for number in range(mask.shape[0]):
                state, metrics = self._step(state, {name: values[number] for name, values in batches.items()}, key)
                made.append(metrics)
            return state, jax.tree.map(lambda *each: jnp.stack(each), *made)

        run = self._inside(inside, (self.manual_specs, fields, _WHOLE), (self.manual_specs, _WHOLE))
        after, metrics = run(state, batches | {"mask": mask}, key)
        return after, metrics

    def _inside(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """A function of what one member has, called by all."""
        if not self.members.axes:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.members.axes),
            check_vma=False,
        )

    # Inside a member.

    def _step(self, state: State, batch: Named, key: Any) -> tuple[State, Named]:
        mask, num = batch["mask"], self.members.num
        count = self.members.total(jnp.sum(mask, dtype=jnp.int32))
        step_key = jax.random.fold_in(jax.random.fold_in(seed_key(key), state["step"]), self.members.index())
        frozen = {name: state["params"][name] for name in self.params_shape.names if name not in self.learned}

        def objective(learned: Named) -> tuple[Any, Loss]:
            if self.update == "fully_sharded":
                learned = {
                    name: checkpoint_name(value, _GATHERED) for name, value in self.layout.gather(learned).items()
                }
            params = self.params_shape.tree(frozen | learned)
            result = self.task.losses(params, self.state_shape.tree(state["state"]), batch, step_key)
            total = jnp.sum(jnp.where(mask, result.per_example, jnp.zeros_like(result.per_example)))
            mean = total / jnp.maximum(count, 1).astype(total.dtype)
            if self.task.penalty is not None:
                mean = mean + self.task.penalty(params) / num
            return mean, result

        kept = {name: state["params"][name] for name in self.learned}
        if self.update == "fully_sharded":  # what was gathered is not kept for the way back, but gathered again
            policy = jax.checkpoint_policies.save_anything_except_these_names(_GATHERED)
            objective = jax.checkpoint(objective, policy=policy)  # type: ignore[assignment]
        gradient, result = jax.grad(objective, has_aux=True)(kept)
        reached, opt = self._updated(kept, gradient, state["opt"])
        after = {
            "params": state["params"] | reached, "state": self._mean_state(result.state), "opt": opt, "step": state["step"] + 1,
        }  # fmt: skip
        live = count > 0
        after = jax.tree.map(lambda new, old: jnp.where(live, new, old), after, state)
        return after, self.members.total(_metric_sums(result, mask))

    def _updated(self, kept: Named, gradient: Named, opt: Tree) -> tuple[Named, Tree]:
        """Learned tensors as they are kept, and the optimizer's state."""
        if self.update == "replicated":
            summed = (
                self.layout.gather(self.layout.scatter(gradient))
                if self._has_two_ways
                else self.members.total(gradient)
            )
            pieces = kept
        elif self.update == "sharded":
            summed, pieces = self.layout.scatter(gradient), self.layout.own(kept)
        else:  # the way back through `gather` has added it up
            summed, pieces = gradient, kept
        reached, opt = self._optimized(pieces, summed, opt)
        return self.layout.gather(reached) if self.update == "sharded" else reached, opt

    @property
    def _has_two_ways(self) -> bool:
        """Whether a sum is taken in pieces though all need the whole: over two axes, in fewer bytes, or where sums are slow (gloo takes each
        tensor by itself)."""
        members = self.members
        return len(members.axes) > 1 or members.sum_type != "float32" or members.how == "exchange"

    def _optimized(self, pieces: Named, gradient: Named, opt: Tree) -> tuple[Named, Tree]:
        params, slopes = self._tree(pieces), self._tree(gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes in some of its transformations
            if self.is_cut:
                is_piece = (self._tree(self._is_piece), self._opt_is_piece, self._tree(self._is_piece))
                updates, opt = update(
                    self.task.local.optimizer, slopes, opt, params, is_piece=is_piece, total=self.members.total
                )
            else:
                updates, opt = self.task.local.optimizer.update(slopes, opt, params)
            reached = jax.tree.map(lambda p, u: (p + u).astype(p.dtype), params, updates)
        return dict(zip(self.learned, jax.tree.leaves(reached), strict=True)), opt

    @cached_property
    def _is_piece(self) -> dict[str, bool]:
        return {name: not self.layout.cuts[name].is_whole for name in self.learned}

    @cached_property
    def _opt_is_piece(self) -> Tree:
        return state_pieces(self.task.local.optimizer, self._tree(self.piece_shapes), self._tree(self._is_piece))

    def optimizer_init(self, learned: Named) -> Tree:
        """The optimizer's state."""
        return self.task.local.optimizer.init(self._tree(learned))

    def _tree(self, learned: Mapping[str, Any]) -> Tree:
        # Frozen leaves become None, which optax passes over.
        return self.params_shape.tree({name: learned[name] for name in self.learned})

    def _mean_state(self, state: Tree) -> Named:
        made = dict(zip(self.state_shape.names, jax.tree.leaves(state), strict=True))
        floats = {name: value for name, value in made.items() if jnp.issubdtype(value.dtype, jnp.floating)}
        means = jax.tree.map(lambda total: total / self.members.num, self.members.total(floats)) if floats else {}
        return made | means


def _metric_sums(result: Loss, mask: Any) -> Named:
    """What the examples of this member add to each metric."""
    metrics = {"loss": Sum(result.per_example, jnp.ones_like(result.per_example), LOSS_BOUND)} | result.metrics
    made = {}
    for name, metric in sorted(metrics.items()):
        low, high = metric.bound
        zero = jnp.zeros((), jnp.float32)
        made[f"{name}/denominator"] = jnp.sum(
            jnp.where(mask, jnp.clip(metric.denominator.astype(jnp.float32), 0.0, 1.0), zero)
        )
        made[f"{name}/numerator"] = jnp.sum(
            jnp.where(mask, jnp.clip(metric.numerator.astype(jnp.float32), low, high), zero)
        )
    return made


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)
