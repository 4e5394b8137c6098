"""What tasks from a framework's module have in common: inputs, labels, a loss, metrics.

A framework gives a `Module`: how its parameters come to be and how it is applied. This makes a `Task` of it. To support
another framework is to write such a `Module`; `task_flax.py` is the shortest example.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shoal.task import LOSS_BOUND, Batch, LeafRule, Loss, Sum, Variables, takes_argument

Apply = Callable[[Any, Any, Batch, jax.Array | None], tuple[Any, Any]]
"""(params, state, batch, key or None) -> (outputs, new state); a key means training."""

Read = Callable[[Batch], tuple[Any, ...]]
"""batch -> what the module is called with."""

LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "softmax_cross_entropy": optax.softmax_cross_entropy_with_integer_labels,
    "sigmoid_cross_entropy": lambda outputs, labels: optax.sigmoid_binary_cross_entropy(
        outputs.reshape(labels.shape), labels.astype(outputs.dtype)
    ),
    "squared_error": lambda outputs, targets: jnp.square(
        outputs.reshape(targets.shape) - targets.astype(outputs.dtype)
    ),
}
"""Name -> (outputs, labels) -> losses (B, …); where an example has several, their mean is taken. Classes are last."""


@dataclass(frozen=True, kw_only=True)
class Module:
    """A framework's module as pure functions."""

    init: Callable[[jax.Array], Variables]
    apply: Apply
    heeds_mask: bool
    """Padding in a batch changes nothing for the real examples."""
    leaves: Mapping[str, LeafRule] = field(default_factory=dict)
    """Rules of leaves that follow from the module, after those that the user gives."""
    bounds: Mapping[str, float] = field(default_factory=dict)
    """The same for bounds."""


def supervised(
    make: Callable[..., Any],
    module: Callable[[Read], Module],
    *,
    loss: str | Callable[[Any, Any], Any],
    batch: Mapping[str, tuple[tuple[int, ...], str]],
    inputs: str | Sequence[str] | Callable[[Batch], Any] | None = None,
    outputs: Callable[[Any], Any] | None = None,
    labels: str | Callable[[Batch], Any] = "label",
    loss_bound: tuple[float, float] = LOSS_BOUND,
    **settings: Any,
) -> Any:
    """A task that learns labels from inputs.

    Args:
        make: the class to make, `Task`.
        module: how to read a batch -> the module.
        loss: a key of `LOSSES`, or (outputs, labels) -> losses (B, …).
        batch: field -> (shape of one example, dtype).
        inputs: the field that the module reads, several in the order of its arguments, or batch -> inputs; by default the
            first field that is not the labels. uint8 fields are divided by 255.
        outputs: what the module returns -> what loss and prediction take of it; by default all.
        labels: the field of the labels, or batch -> labels.
        loss_bound: between what the reported loss of one example is clipped (training is not).
        **settings: any other field of `Task`.

    Raises:
        ValueError: an unknown loss or field.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"Expected loss to be one of {' | '.join(LOSSES)} or a function, got loss={loss!r}.")
    loss_fn = LOSSES[loss] if isinstance(loss, str) else loss
    classifies = loss == "softmax_cross_entropy"
    target = _target(labels, batch)
    made = module(_reader(inputs, labels, batch))

    def apply(params: Any, state: Any, batch: Batch, key: jax.Array | None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # frameworks promote in some of their layers
            found, after = made.apply(params, state, batch, key)
            return (found if outputs is None else outputs(found)), after

    def losses(outputs: Any, batch: Batch) -> Any:
        found = loss_fn(outputs, target(batch))
        return found.mean(axis=tuple(range(1, found.ndim))) if found.ndim > 1 else found

    def metrics(per_example: Any, outputs: Any, batch: Batch) -> dict[str, Sum]:
        ones = jnp.ones_like(per_example)
        found = {"loss": Sum(per_example, ones, loss_bound)}
        if classifies:
            right = (jnp.argmax(outputs, axis=-1) == target(batch)).astype(per_example.dtype)
            right = right.mean(axis=tuple(range(1, right.ndim))) if right.ndim > 1 else right
            found["accuracy"] = Sum(right, ones, (0.0, 1.0))
        return found

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
        "init": made.init,
        "loss": loss_of,
        "evaluate": evaluate,
        "predict": predict,
        "heeds_mask": made.heeds_mask,
    }
    rules = {name: {**settings.get(name, {}), **getattr(made, name)} for name in ("leaves", "bounds")}
    return make(batch=batch, **{**functions, **settings, **rules})


def call_arguments(call: Callable[..., Any], batch: Batch, training: bool) -> dict[str, Any]:
    """Of `train`, `training`, `deterministic` and `mask`, what a module's call names."""
    known = {"train": training, "training": training, "deterministic": not training, "mask": batch["mask"]}
    return {name: value for name, value in known.items() if takes_argument(call, name)}


def example_batch(batch: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Any]:
    """A batch of one example of zeros, to start a module with."""
    made: dict[str, Any] = {name: jnp.zeros((1, *shape), dtype) for name, (shape, dtype) in batch.items()}
    return made | {"mask": jnp.ones((1,), jnp.bool_)}


def _reader(inputs: str | Sequence[str] | Callable[[Batch], Any] | None, labels: Any, batch: Mapping[str, Any]) -> Read:
    if callable(inputs):
        chosen = inputs
        return lambda batch: (chosen(batch),)
    if inputs is None:
        inputs = next((name for name in batch if name != labels), "")
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    if not names or not set(names) <= set(batch):
        raise ValueError(f"Expected inputs to be among the fields {sorted(batch)}, got inputs={inputs!r}.")
    return lambda batch: tuple(_scaled(batch[name]) for name in names)


def _scaled(value: Any) -> Any:
    return value.astype(jnp.float32) / 255.0 if value.dtype == jnp.uint8 else value


def _target(labels: str | Callable[[Batch], Any], batch: Mapping[str, Any]) -> Callable[[Batch], Any]:
    if callable(labels):
        return labels
    if labels not in batch:
        raise ValueError(f"Expected labels to be one of the fields {sorted(batch)}, got labels={labels!r}.")
    return lambda batch: batch[labels]
