"""Tasks from Flax modules, NNX or Linen, in one line.

    Task.from_flax(lambda rngs: Net(rngs=rngs), loss="softmax_cross_entropy", batch=…)    # NNX: a function of rngs
    Task.from_flax(Net(), loss="softmax_cross_entropy", batch=…)                          # Linen: the module

The module is called with the inputs and, where its `__call__` takes them, with `train` (or Linen's `deterministic`)
and `mask`. A module that keeps batch statistics and does not take the mask can only be trained on whole batches; shoal
then refuses partial ones instead of letting padding into the statistics.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shoal.task import Batch, Loss, Sum, Variables, takes_argument

Apply = Callable[[Any, Any, Batch, jax.Array | None], tuple[Any, Any]]
"""(params, state, batch, key or None) -> (outputs, new state); a key means training."""

LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "softmax_cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
    "sigmoid_cross_entropy": lambda outputs, labels: optax.sigmoid_binary_cross_entropy(
        outputs.reshape(labels.shape), labels.astype(outputs.dtype)
    ),
    "squared_error": lambda outputs, targets: jnp.square(
        outputs.reshape(targets.shape) - targets.astype(outputs.dtype)
    ),
}
"""Name -> (outputs, labels) -> losses (B, …); where an example has several, their mean is taken."""

LOSS_BOUND = (0.0, 100.0)


def from_flax(
    make: Callable[..., Any],
    module: Any,
    *,
    loss: str | Callable[[Any, Any], Any],
    batch: Mapping[str, tuple[tuple[int, ...], str]],
    inputs: str | Callable[[Batch], Any] | None = None,
    labels: str = "label",
    loss_bound: tuple[float, float] = LOSS_BOUND,
    **settings: Any,
) -> Any:
    """A task from a Flax module.

    Args:
        make: the class to make, `Task`.
        module: a Linen module, or a function of `nnx.Rngs` that returns an NNX module.
        loss: a key of `LOSSES`, or (outputs, labels) -> losses (B,).
        batch: field -> (shape of one example, dtype).
        inputs: the field that the module reads, or batch -> inputs; by default the first field that is not the
            labels. uint8 inputs are divided by 255.
        labels: the field of the labels.
        loss_bound: what the reported loss of one example is clipped to (training is not).
        **settings: any other field of `Task`.

    Raises:
        ValueError: an unknown loss or field.
    """
    module = _made(module)
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"Expected loss to be one of {' | '.join(LOSSES)} or a function, got loss={loss!r}.")
    if labels not in batch:
        raise ValueError(f"Expected labels to be one of the fields {sorted(batch)}, got labels={labels!r}.")
    loss_fn = LOSSES[loss] if isinstance(loss, str) else loss
    first = next((name for name in batch if name != labels), "")
    chosen = inputs if inputs is not None else first
    if isinstance(chosen, str) and chosen not in batch:
        raise ValueError(f"Expected inputs to be one of the fields {sorted(batch)}, got inputs={chosen!r}.")
    read = chosen if callable(chosen) else _field(chosen)
    init, strict_apply, heeds_mask = _linen(module, read, batch) if _is_linen(module) else _nnx(module, read, batch)
    classifies = loss == "softmax_cross_entropy"

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # Flax promotes in some of its layers
            return strict_apply(params, state, batch, key)

    def losses(outputs: Any, batch: Batch) -> Any:
        made = loss_fn(outputs, batch[labels])
        return made.mean(axis=tuple(range(1, made.ndim))) if made.ndim > 1 else made

    def metrics(per_example: Any, outputs: Any, batch: Batch) -> dict[str, Sum]:
        ones = jnp.ones_like(per_example)
        made = {"loss": Sum(per_example, ones, loss_bound)}
        if classifies:
            right = (jnp.argmax(outputs, axis=-1) == batch[labels]).astype(per_example.dtype)
            right = right.mean(axis=tuple(range(1, right.ndim))) if right.ndim > 1 else right
            made["accuracy"] = Sum(right, ones, (0.0, 1.0))
        return made

    def loss_of(params: Any, state: Any, batch: Batch, key: jax.Array) -> Loss:
        outputs, state = apply(params, state, batch, key)
        per_example = losses(outputs, batch)
        return Loss(per_example, state, metrics(per_example, outputs, batch))

    def evaluate(params: Any, state: Any, batch: Batch) -> dict[str, Sum]:
        outputs, _ = apply(params, state, batch, None)
        return metrics(losses(outputs, batch), outputs, batch)

    def predict(params: Any, state: Any, batch: Batch) -> Any:
        return apply(params, state, batch, None)[0]

    functions = {
        "init": init,
        "loss": loss_of,
        "evaluate": evaluate,
        "predict": predict,
        "heeds_mask": heeds_mask,
    }
    return make(batch=batch, **{**functions, **settings})


def _field(name: str) -> Callable[[Batch], Any]:
    def read(batch: Batch) -> Any:
        value = batch[name]
        return value.astype(jnp.float32) / 255.0 if value.dtype == jnp.uint8 else value

    return read


def _made(module: Any) -> Any:
    from flax import linen

    is_class = isinstance(module, type) and issubclass(module, linen.Module)
    return module() if is_class else module


def _is_linen(module: Any) -> bool:
    from flax import linen

    return isinstance(module, linen.Module)


def _call_arguments(call: Callable[..., Any], batch: Batch, training: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if takes_argument(call, "train"):
        arguments["train"] = training
    if takes_argument(call, "deterministic"):
        arguments["deterministic"] = not training
    if takes_argument(call, "mask"):
        arguments["mask"] = batch["mask"]
    return arguments


def _example(batch: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    made: dict[str, Any] = {name: jnp.zeros((1, *shape), dtype) for name, (shape, dtype) in batch.items()}
    return made | {"mask": jnp.ones((1,), jnp.bool_)}


def _linen(module: Any, read: Callable[[Batch], Any], batch: Any) -> tuple[Callable[..., Any], Apply, bool]:
    call = type(module).__call__

    def init(key: jax.Array) -> Variables:
        example = _example(batch)
        made = dict(
            module.init({"params": key, "dropout": key}, read(example), **_call_arguments(call, example, False))
        )
        return Variables(made.pop("params", {}), made)

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        arguments = _call_arguments(call, batch, key is not None)
        variables = {"params": params, **state}
        if key is None:
            return module.apply(variables, read(batch), **arguments), state
        made = module.apply(variables, read(batch), **arguments, rngs={"dropout": key}, mutable=list(state))
        return made[0], {**state, **made[1]}

    keeps_statistics = "batch_stats" in jax.eval_shape(init, jax.random.key(0)).state
    return init, apply, takes_argument(call, "mask") or not keeps_statistics


def _nnx(
    module: Callable[..., Any], read: Callable[[Batch], Any], batch: Any
) -> tuple[Callable[..., Any], Apply, bool]:
    from flax import nnx

    def build(key: jax.Array) -> Any:
        return module(nnx.Rngs(params=key, dropout=jax.random.fold_in(key, 1)))

    abstract = nnx.eval_shape(lambda: build(jax.random.key(0)))
    if not isinstance(abstract, nnx.Module):
        raise ValueError(
            f"Expected a Linen module or a function of nnx.Rngs that returns an NNX module, got {type(abstract).__name__}."
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
        outputs = model(read(batch), **_call_arguments(type(model).__call__, batch, key is not None))
        *_, after = parts(model)
        return outputs, nnx.to_pure_dict(after) if key is not None else state

    keeps_statistics = bool(jax.tree.leaves(nnx.to_pure_dict(nnx.split(abstract, nnx.BatchStat, ...)[1])))
    return init, apply, takes_argument(type(abstract).__call__, "mask") or not keeps_statistics


def _streams(like: Any, key: jax.Array) -> Any:
    leaves, tree = jax.tree.flatten(like)
    made = [
        jax.random.fold_in(key, number)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else jnp.zeros(leaf.shape, leaf.dtype)
        for number, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(tree, made)
