"""Tasks from Flax modules, NNX or Linen, in one line.

    Task.from_flax(lambda rngs: Net(rngs=rngs), loss="softmax_cross_entropy", batch=…)    # NNX: a function of rngs
    Task.from_flax(Net(rngs=nnx.Rngs(0)), loss="softmax_cross_entropy", batch=…)          # NNX: its weights are the first
    Task.from_flax(Net(), loss="softmax_cross_entropy", batch=…)                          # Linen: the module

The module is called with the inputs and, where its `__call__` takes them, with `train`, `training` (or `deterministic`) and
`mask`. A module that keeps batch statistics and does not take the mask can only be trained on whole batches; shoal
then refuses partial ones instead of letting padding into the statistics.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from shoal.task import Batch, Variables, takes_argument
from shoal.task_supervised import Module, Read, call_arguments, example_batch, supervised


def from_flax(
    make: Callable[..., Any], module: Any, *, batch: Mapping[str, tuple[tuple[int, ...], str]], **settings: Any
) -> Any:
    """A task from a Flax module.

    Args:
        make: the class to make, `Task`.
        module: a Linen module, an NNX module, or a function of `nnx.Rngs` that returns an NNX module.
        batch: field -> (shape of one example, dtype).
        **settings: `loss`, `inputs`, `outputs`, `labels`, `loss_bound` (see `shoal.task_supervised.supervised`), any other field of `Task`.

    Raises:
        ValueError: an unknown loss or field, or no Flax module.
    """
    chosen = _made(module)
    kind = _linen if _is_linen(chosen) else _nnx
    return supervised(make, lambda read: kind(chosen, read, batch), batch=batch, **settings)


def _made(module: Any) -> Any:
    from flax import linen

    is_class = isinstance(module, type) and issubclass(module, linen.Module)
    return module() if is_class else module


def _is_linen(module: Any) -> bool:
    from flax import linen

    return isinstance(module, linen.Module)


def _linen(module: Any, read: Read, batch: Any) -> Module:
    call = type(module).__call__

    def init(key: jax.Array) -> Variables:
        example = example_batch(batch)
        made = dict(module.init(_linen_rngs(key), *read(example), **call_arguments(call, example, False)))
        return Variables(made.pop("params", {}), made)

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        arguments = call_arguments(call, batch, key is not None)
        variables = {"params": params, **state}
        if key is None:
            return module.apply(variables, *read(batch), **arguments), state
        made = module.apply(variables, *read(batch), **arguments, rngs=_linen_rngs(key), mutable=list(state))
        return made[0], {**state, **made[1]}

    keeps_statistics = "batch_stats" in jax.eval_shape(init, jax.random.key(0)).state
    return Module(init=init, apply=apply, heeds_mask=takes_argument(call, "mask") or not keeps_statistics)


def _linen_rngs(key: jax.Array) -> dict[str, jax.Array]:
    """Keys of the streams; Linen takes that of `params` for one that has another name."""
    return {"params": key, "dropout": jax.random.fold_in(key, 1)}


def _nnx(module: Any, read: Read, batch: Any) -> Module:
    from flax import nnx

    given = isinstance(module, nnx.Module)

    def build(key: jax.Array) -> Any:
        return nnx.clone(module) if given else module(nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 1)))

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    if not isinstance(abstract, nnx.Module):
        raise ValueError(
            f"Expected a Flax module or a function of nnx.Rngs that returns an NNX module, got {type(abstract).__name__}."
        )

    def parts(model: Any) -> tuple[Any, Any, Any, Any]:
        """Graph, parameters, random streams, everything else."""
        filters: tuple[Any, ...] = (nnx.Param, nnx.RngState, ...)
        made: Any = nnx.split(model, *filters)
        graph, params, streams, state = made
        return graph, params, streams, state

    def init(key: jax.Array) -> Variables:
        _, params, _, state = parts(build(key))
        return Variables(nnx.to_pure_dict(params), nnx.to_pure_dict(state))

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        graph, params_like, streams, state_like = parts(abstract)
        nnx.replace_by_pure_dict(params_like, params)
        nnx.replace_by_pure_dict(state_like, state)
        # The random streams are made anew from the step's key, so they are no part of the model's state.
        nnx.replace_by_pure_dict(
            streams, _streams(nnx.to_pure_dict(streams), jax.random.key(0) if key is None else key)
        )
        model = nnx.merge(graph, params_like, streams, state_like)
        model.train() if key is not None else model.eval()
        outputs = model(*read(batch), **call_arguments(type(model).__call__, batch, key is not None))
        *_, after = parts(model)
        return outputs, nnx.to_pure_dict(after) if key is not None else state

    keeps_statistics = bool(jax.tree.leaves(nnx.to_pure_dict(nnx.split(abstract, nnx.BatchStat, ...)[1])))
    heeds_mask = takes_argument(type(abstract).__call__, "mask") or not keeps_statistics
    return Module(init=init, apply=apply, heeds_mask=heeds_mask)


def _streams(like: Any, key: jax.Array) -> Any:
    leaves, tree = jax.tree.flatten(like)
    made = [
        jax.random.fold_in(key, number)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)
