"""Tasks from Equinox modules in one line. Needs the extra `equinox`.

    Task.from_equinox(lambda key: Net(key=key), loss="softmax_cross_entropy", batch=…)      # new weights for each seed
    Task.from_equinox(eqx.nn.MLP(4, 3, 16, 2, key=key), loss=…, batch=…)                    # its weights are the first
    Task.from_equinox(eqx.nn.make_with_state(Net)(key=key), loss=…, batch=…)                # (module, state)

A module is called with one example, as Equinox modules are, and mapped over the batch by `jax.vmap(…, axis_name="batch")`;
with `key=` (one for each example while training, else None) where it takes it, and with its state where it has one. It is in
inference mode outside of training.

Floating-point arrays are parameters. Other arrays of the module stay as they are; flags and counters of its state travel as
float32, so that they can be averaged, and are rounded when they are used. `eqx.nn.BatchNorm` does not take a mask: a
module that has one is trained on whole batches.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from shoal.errors import MissingExtra
from shoal.local import name_of
from shoal.task import Batch, Variables, takes_argument
from shoal.task_supervised import Module, Read, supervised

AXIS: Final = "batch"
"""Name of the axis over which examples are mapped."""
COUNTER_BOUND: Final = 2.0**20
"""Most that a counter of the state may grow by in a round."""


def from_equinox(
    make: Callable[..., Any], module: Any, *, batch: Mapping[str, tuple[tuple[int, ...], str]], **settings: Any
) -> Any:
    """A task from an Equinox module.

    Args:
        make: the class to make, `Task`.
        module: a module, (module, state) of `eqx.nn.make_with_state`, or a function of a key that returns either.
        batch: field -> (shape of one example, dtype).
        **settings: `loss`, `inputs`, `outputs`, `labels`, `loss_bound` (see `shoal.task_supervised.supervised`), any other field of `Task`.

    Raises:
        ImportError: Equinox is not installed.
        ValueError: an unknown loss or field, or no Equinox module.
    """
    return supervised(make, lambda read: _module(module, read), batch=batch, **settings)


def _module(given: Any, read: Read) -> Module:
    eqx = _equinox()

    def build(key: jax.Array) -> tuple[Any, Any]:
        """Module and state, or None where it has none."""
        made = given if isinstance(given, eqx.Module) or not callable(given) else _called(given, key)
        model, state = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
        if not isinstance(model, eqx.Module) or not (state is None or isinstance(state, eqx.nn.State)):
            raise ValueError(
                "Expected an eqx.Module, (module, state) or a function of a key that returns one of them, got "
                f"{type(made).__name__}."
            )
        if state is None and _indices(model):
            raise ValueError(
                f"Expected the state of {type(model).__name__} to come with it: eqx.nn.make_with_state({type(model).__name__})(…)."
            )
        return model, state

    model_like, state_like = eqx.filter_eval_shape(build, jax.random.key(0))
    arrays_like, static = eqx.partition(model_like, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    indices = _indices(model_like)
    kept_like = _kept(state_like, indices)
    takes_key = takes_argument(type(model_like).__call__, "key")

    def init(key: jax.Array) -> Variables:
        model, state = build(key)
        arrays = _named(eqx.filter(model, eqx.is_array))
        params = {name: leaf for name, leaf in arrays.items() if _is_float(leaf)}
        fixed = {name: leaf for name, leaf in arrays.items() if not _is_float(leaf)}
        kept = jax.tree.map(_as_float, _kept(state, indices))
        return Variables(params, {part: values for part, values in (("fixed", fixed), ("kept", kept)) if values})

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        values = {**params, **state.get("fixed", {})}
        arrays = jax.tree_util.tree_map_with_path(lambda path, _: values[name_of(path)], arrays_like)
        model = eqx.nn.inference_mode(eqx.combine(arrays, static), value=key is None)
        # A copy, as to set a value spoils a state; without weak types, which would refuse values of strong ones.
        before = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_like)
        for name, index in indices.items():
            before = before.set(index, jax.tree.map(_as_kind, state["kept"][name], kept_like[name]))

        def one(inputs: tuple[Any, ...], key: Any) -> tuple[Any, Any]:
            keyed = {"key": key} if takes_key else {}
            return model(*inputs, before, **keyed) if indices else (model(*inputs, **keyed), None)

        keys = None if key is None else jax.random.split(key, batch["mask"].shape[0])
        mapped = jax.vmap(one, in_axes=(0, None if keys is None else 0), out_axes=(0, None), axis_name=AXIS)
        outputs, after = mapped(read(batch), keys)
        if key is None or not indices:
            return outputs, state
        return outputs, {**state, "kept": jax.tree.map(_as_float, _kept(after, indices))}

    fixed = [name for name, leaf in _named(arrays_like).items() if not _is_float(leaf)]
    counters = [name for name, leaf in _named(kept_like).items() if not _is_float(leaf)]
    norms = jax.tree.leaves(model_like, is_leaf=lambda node: isinstance(node, eqx.nn.BatchNorm))
    return Module(
        init=init,
        apply=apply,
        heeds_mask=not any(isinstance(node, eqx.nn.BatchNorm) for node in norms),
        leaves={f"state/fixed/{name}": "frozen" for name in fixed},
        bounds={f"state/kept/{name}": COUNTER_BOUND for name in counters},
    )


def _equinox() -> Any:
    try:
        import equinox
    except ImportError as error:
        raise MissingExtra("equinox", extra="equinox", why="Task.from_equinox") from error
    return equinox


def _called(function: Callable[..., Any], key: jax.Array) -> Any:
    return function(key=key) if takes_argument(function, "key") else function(key)


def _indices(model: Any) -> dict[str, Any]:
    """Where the module has state: path -> `eqx.nn.StateIndex`."""
    index_type = _equinox().nn.StateIndex
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, index_type))[0]
    return {name_of(path): leaf for path, leaf in leaves if isinstance(leaf, index_type)}


def _kept(state: Any, indices: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state.get(index) for name, index in indices.items()}


def _named(tree: Any) -> dict[str, Any]:
    return {name_of(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _is_float(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _as_float(leaf: Any) -> Any:
    return leaf if _is_float(leaf) else leaf.astype(jnp.float32)


def _as_kind(leaf: Any, like: Any) -> Any:
    return leaf if _is_float(like) else jnp.round(leaf).astype(like.dtype)
