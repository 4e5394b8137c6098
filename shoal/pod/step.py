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

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shoal.local import Named, added, seed_key
from shoal.pod.batch_norm import groups
from shoal.pod.loss_scaling import all_finite, chosen
from shoal.pod.piecewise import state_pieces, update
from shoal.pod.placement import WHOLE, Placement, State
from shoal.pod.remat import rematerialized
from shoal.task import LOSS_BOUND, Sum, Tree

_GATHERS: Final = ("all_gather", "concatenate", "reshape", "slice", "split", "squeeze", "transpose")
"""Operations of `Layout.gather`."""


@dataclass(frozen=True)
class Program(Placement):
    """What is compiled for one task on one mesh."""

    def begin(self, key: jax.Array) -> State:
        """The state before the first step, each array made where it belongs."""
        made: State = jax.jit(self.beginning, out_shardings=self.shardings)(key)
        return made

    def beginning(self, key: jax.Array) -> State:
        """The state before the first step; to be compiled with `shardings` for its outputs."""
        variables = self.task.variables(key)
        params = dict(zip(self.params_shape.names, jax.tree.leaves(variables.params), strict=True))
        learned = {name: params[name] for name in self.learned}
        opt, cut = self._inside(
            self._begin_inside, (dict.fromkeys(learned, WHOLE),), (self.manual_specs["opt"], self._cut_specs)
        )(learned)
        state = dict(zip(self.state_shape.names, jax.tree.leaves(variables.state), strict=True))
        scale = {"scale": self.scaling.begin()} if self.scaling else {}
        return {"params": params | cut, "state": state, "opt": opt, "step": jnp.zeros((), jnp.int32), **scale}

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
            mask: (k, B), True for real examples, of which each step has one at least.
            key: (2,) uint32.

        Returns:
            The state, and `loss/numerator`, …: (k,), over the whole batch.
        """

        def inside(state: State, batches: Named, key: Any) -> tuple[State, Named]:
            return repeated(lambda state, batch: self._step(state, batch, key), state, batches)

        fields = {name: self.rows(1) for name in (*batches, "mask")}
        run = self._inside(inside, (self.manual_specs, fields, WHOLE), (self.manual_specs, WHOLE))
        made: tuple[State, Named] = run(state, batches | {"mask": mask}, key)
        return made

    def gradient(self, state: State, batch: Named, mask: Any, key: Any) -> Named:
        """The gradient of a batch's mean loss, as the optimizer would get it; to measure it. Only of replicated updates.

        Args:
            state: of `begin`.
            batch: field -> (B, …).
            mask: (B,), True for real examples.
            key: (2,) uint32.
        """
        assert self.update == "replicated", self.update

        def inside(state: State, batch: Named, key: Any) -> Named:
            count = self.members.total(jnp.sum(batch["mask"], dtype=jnp.int32))
            part, _, _ = self._gradient(state, batch, count, self._step_key(state, key))
            made: Named = self.members.total(part)
            return made

        fields = {name: self.rows(0) for name in (*batch, "mask")}
        made: Named = self._inside(inside, (self.manual_specs, fields, WHOLE), WHOLE)(
            state, batch | {"mask": mask}, key
        )
        return made

    def evaluate(self, params: Named, state: Named, batch: Named, mask: Any) -> Named:
        """What all members' parts of a batch add to each metric of `task.evaluate`.

        Args:
            params, state: of a State.
            batch: field -> (B, …).
            mask: (B,), True for real examples.
        """

        def inside(params: Named, state: Named, batch: Named) -> Named:
            assert self.task.evaluate is not None
            whole = self._gathered(params)
            metrics = self.task.evaluate(self.params_shape.tree(whole), self.state_shape.tree(state), batch)
            made: Named = self.members.total(added(metrics, batch["mask"]))
            return made

        fields = {name: self.rows(0) for name in (*batch, "mask")}
        places = (self.manual_specs["params"], self.manual_specs["state"], fields)
        made: Named = self._inside(inside, places, WHOLE)(params, state, batch | {"mask": mask})
        return made

    def whole(self, params: Named) -> Named:
        """A State's parameters, each of them whole."""
        made: Named = self._inside(self._gathered, (self.manual_specs["params"],), WHOLE)(params)
        return made

    def _gathered(self, params: Named) -> Named:
        if self.update != "fully_sharded":
            return params
        made: Named = params | self.layout.gather({name: params[name] for name in self.learned})
        return made

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
        count = self.members.total(jnp.sum(batch["mask"], dtype=jnp.int32))
        gradient, after, metrics = self._gradient(state, batch, count, self._step_key(state, key))
        kept = {name: state["params"][name] for name in self.learned}
        summed, pieces = self._summed(kept, gradient)
        if self.scaling is None:
            reached, opt = self._reached(pieces, summed, state["opt"])
            done = {"params": state["params"] | reached, "opt": opt}
        else:
            scale, summed = state["scale"], self.scaling.unscaled(state["scale"], summed)
            is_finite = self.members.total((~all_finite(summed)).astype(jnp.int32)) == 0
            reached, opt = self._reached(pieces, summed, state["opt"])
            before = {"params": state["params"], "opt": state["opt"]}
            done = chosen(is_finite, {"params": state["params"] | reached, "opt": opt}, before)
            done["scale"] = self.scaling.after(scale, is_finite)
        done |= {"state": self._mean_state(after, state["state"], count), "step": state["step"] + 1}
        return done, self.members.total(metrics)

    def _step_key(self, state: State, key: Any) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(seed_key(key), state["step"]), self.members.index())

    def _gradient(self, state: State, batch: Named, count: Any, key: Any) -> tuple[Named, Named, Named]:
        """This member's part of the gradient, of the model's state and of the metric sums, from its examples in `accumulate` parts."""
        frozen = {name: state["params"][name] for name in self.params_shape.names if name not in self.learned}
        kept = {name: state["params"][name] for name in self.learned}
        scale = self.scaling.factor(state["scale"]) if self.scaling else None
        num = self.members.num * self.accumulate

        losses = rematerialized(self.task.losses, self.remat)

        def objective(learned: Named, part: Named, number: Any) -> tuple[Any, tuple[Named, Named]]:
            if self.update == "fully_sharded":
                learned = self.layout.gather(learned)
            params, mask = self.params_shape.tree(frozen | learned), part["mask"]
            own_key = jax.random.fold_in(key, number) if self.accumulate > 1 else key
            # Where a member has padding alone, the loss sees it as real: a mean over no example is not a number, which no mask takes out again.
            seen = part | {"mask": mask | ~jnp.any(mask)}
            with groups(self.members, self.group):
                result = losses(params, self.state_shape.tree(state["state"]), seen, own_key)
            total = jnp.sum(jnp.where(mask, result.per_example, jnp.zeros_like(result.per_example)))
            mean = total / jnp.maximum(count, 1).astype(total.dtype)
            if self.task.penalty is not None:
                mean = mean + self.task.penalty(params) / num
            after = self._weighed(result.state, mask)
            metrics = {"loss": Sum(result.per_example, jnp.ones_like(result.per_example), LOSS_BOUND)} | result.metrics
            return mean if scale is None else mean.astype(jnp.float32) * scale, (after, added(metrics, mask))

        if self.update == "fully_sharded":
            # What was gathered is not kept for the way back, but gathered again: nor may anything be kept that it is only a view of.
            objective = jax.checkpoint(objective, policy=lambda operation, *_, **__: operation.name not in _GATHERS)
        gradient_of = jax.grad(objective, has_aux=True)
        if self.accumulate == 1:
            gradient, (after, metrics) = gradient_of(kept, batch, 0)
            return gradient, after, metrics

        def one(carry: tuple[Named, Any], part: Named) -> tuple[tuple[Named, Any], tuple[Named, Named]]:
            gradient, number = carry
            more, seen = gradient_of(kept, part, number)
            return (jax.tree.map(jnp.add, gradient, more), number + 1), seen

        parts = {n: v.reshape(self.accumulate, v.shape[0] // self.accumulate, *v.shape[1:]) for n, v in batch.items()}
        begin = (jax.tree.map(jnp.zeros_like, kept), jnp.zeros((), jnp.int32))
        (gradient, _), seen = repeated(one, begin, parts)
        after, metrics = jax.tree.map(lambda values: jnp.sum(values, axis=0), seen)
        return gradient, after, metrics

    def _summed(self, kept: Named, gradient: Named) -> tuple[Named, Named]:
        """The sum over members as the optimizer takes it, and the learned tensors likewise."""
        if self.update == "replicated":
            if self._has_two_ways:
                return self.layout.gather(self.layout.scatter(gradient)), kept
            return self.members.total(gradient), kept
        if self.update == "sharded":
            return self.layout.scatter(gradient), self.layout.own(kept)
        # The way back through `gather` has added up what is in pieces.
        whole = {name: gradient[name] for name, cut in self.layout.cuts.items() if cut.is_whole}
        return gradient | (self.members.total(whole) if whole else {}), kept

    def _reached(self, pieces: Named, gradient: Named, opt: Tree) -> tuple[Named, Tree]:
        """Learned tensors as they are kept, and the optimizer's state."""
        reached, opt = self._optimized(pieces, gradient, opt)
        return self.layout.gather(reached) if self.update == "sharded" else reached, opt

    @property
    def _has_two_ways(self) -> bool:
        """Whether a sum is taken in pieces though all need the whole: over two axes, in fewer bytes, or where sums are slow (gloo takes each
        tensor by itself)."""
        members = self.members
        return len(members.axes) > 1 or members.sum_type != "float32" or members.how in ("exchange", "permute")

    def _optimized(self, pieces: Named, gradient: Named, opt: Tree) -> tuple[Named, Tree]:
        params, slopes = self.learned_tree(pieces), self.learned_tree(gradient)
        with jax.numpy_dtype_promotion("standard"):  # optax promotes in some of its transformations
            if self.is_cut:
                is_piece = (self.learned_tree(self._is_piece), self._opt_is_piece, self.learned_tree(self._is_piece))
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
        return state_pieces(
            self.task.local.optimizer, self.learned_tree(self.piece_shapes), self.learned_tree(self._is_piece)
        )

    # A model's state is the mean of what the parts of a batch make of it, each as often as it has examples: for a running mean that is the
    # running mean of the whole batch.

    def _weighed(self, state: Tree, mask: Any) -> Named:
        count = jnp.sum(mask, dtype=jnp.int32)
        made = dict(zip(self.state_shape.names, jax.tree.leaves(state), strict=True))
        return {name: _times(value, count) for name, value in made.items() if self.task.leaf_rule(name) != "frozen"}

    def _mean_state(self, weighed: Named, before: Named, count: Any) -> Named:
        if not weighed:
            return before
        totals = self.members.total(weighed)
        return before | {name: _over(total, count).astype(before[name].dtype) for name, total in totals.items()}


def _times(value: Any, count: Any) -> Any:
    """0 where the count is 0, whatever the value."""
    if jnp.issubdtype(value.dtype, jnp.floating):
        return jnp.where(count > 0, value * count.astype(value.dtype), jnp.zeros_like(value))
    return value.astype(jnp.int32) * count


def _over(total: Any, count: Any) -> Any:
    if jnp.issubdtype(total.dtype, jnp.floating):
        return total / count.astype(total.dtype)
    return total // count


def repeated(function: Any, carry: Any, rows: Any) -> tuple[Any, Any]:
    """`jax.lax.scan`, without a loop on a CPU, where convolutions in loops are slow."""
    if jax.tree.leaves(rows)[0].shape[0] > 1:
        scanned: tuple[Any, Any] = jax.lax.scan(function, carry, rows, unroll=jax.default_backend() == "cpu")
        return scanned
    carry, made = function(carry, jax.tree.map(lambda values: values[0], rows))
    return carry, jax.tree.map(lambda value: value[None], made)
