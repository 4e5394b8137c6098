"""Runs the graph of a PyTorch module on JAX arrays.

After each operation the result gets the type that torch computed for it, and must have the shape that torch computed: where
the table is wrong it says so when the task is built, and not by numbers that are off.
"""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp

from shoal.aten import elementwise, layers, recurrent, reductions, shapes
from shoal.aten.exported import Exported, dtype_of
from shoal.aten.table import Step

FUNCTIONS: Final = {
    **elementwise.TABLE.functions, **reductions.TABLE.functions, **shapes.TABLE.functions, **layers.TABLE.functions
}  # fmt: skip
WITH_STEP: Final = {**layers.WITH_STEP.functions, **recurrent.WITH_STEP.functions}
KNOWN: Final = frozenset(FUNCTIONS) | frozenset(WITH_STEP)
"""Operations that the table has."""
MIXING: Final = ("aten._native_batch_norm_legit_functional.default", "aten._native_batch_norm_legit.no_stats")
"""Operations that mix the examples of a batch, which heed the mask where the batch comes first."""
_IGNORED: Final = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "generator", "requires_grad")
_NO_RESULT: Final = ("aten._assert", "aten.sym_constrain", "aten._local_scalar")


def unknown_operations(exported: Exported) -> list[str]:
    """Names of operations that the table does not have, sorted."""
    names = {str(node.target) for node in exported.nodes if node.target is not operator.getitem}
    return sorted(name for name in names if name not in KNOWN and not name.startswith(_NO_RESULT))


def run(
    exported: Exported, params: Mapping[str, Any], buffers: Mapping[str, Any], inputs: list[Any], key: jax.Array | None, mask: Any,
) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """Calls the module.

    Args:
        exported: its graph for inputs of these shapes.
        params, buffers: its tensors by name.
        inputs: its arguments, flat, in order.
        key: of what it draws; None where it draws nothing.
        mask: (B,), for operations that mix examples; None: all examples are real.

    Returns:
        What the module returns, and the buffers of floating type that it changes.
    """
    tensors = {"param": params, "buffer": buffers, "constant": exported.constants}
    values: dict[str, Any] = {
        name: inputs[int(place)] if kind == "input" else jnp.asarray(tensors[kind][place])
        for name, (kind, place) in exported.inputs.items()
    }
    step = Step(_keys(key), mask)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for node in exported.nodes:
            values[node.name] = _result(node, values, step)
    outputs = [_value(output, values) for output in exported.outputs]
    changed = {name: values[node.name] for name, node in exported.changed.items() if node.name in values}
    return exported.assemble(outputs), changed


def _result(node: Any, values: Mapping[str, Any], step: Step) -> Any:
    args = _value(node.args, values)
    if node.target is operator.getitem:
        if args[0][args[1]] is None:
            raise ValueError(
                f"Expected a module that does not use output {args[1]} of {node.args[0].target}, such as the places of max pooling: "
                "shoal does not compute it."
            )
        return args[0][args[1]]
    name = str(node.target)
    if name.startswith(_NO_RESULT):
        return None
    kwargs = {key: _value(value, values) for key, value in node.kwargs.items() if key not in _IGNORED}
    try:
        made = WITH_STEP[name](step, *args, **kwargs) if name in WITH_STEP else FUNCTIONS[name](*args, **kwargs)
    except NotImplementedError as error:
        raise ValueError(f"Expected a module without {error}: shoal has no such operation in JAX.") from error
    return _like(made, node.meta["val"], node)


def _like(made: Any, expected: Any, node: Any) -> Any:
    """With torch's type; refuses another shape than torch's."""
    if isinstance(expected, list | tuple):
        return [None if one is None else _like(one, two, node) for one, two in zip(made, expected, strict=False)]
    made = jnp.asarray(made)
    assert made.shape == tuple(expected.shape), f"{node.target}: shape {made.shape}, torch has {tuple(expected.shape)}"
    return made.astype(dtype_of(expected.dtype))


def _value(argument: Any, values: Mapping[str, Any]) -> Any:
    """An argument of a node, with arrays for nodes and JAX's types for torch's."""
    if isinstance(argument, list | tuple):
        return [_value(one, values) for one in argument]
    if hasattr(argument, "all_input_nodes"):
        return values[argument.name]
    kind = type(argument)
    if kind.__module__.partition(".")[0] == "torch":
        return dtype_of(argument) if kind.__name__ == "dtype" else None
    return argument


def _keys(key: jax.Array | None) -> Iterator[jax.Array]:
    number = 0
    while True:
        if key is None:
            raise ValueError("Expected a module that draws no random numbers outside of training, it does.")
        yield jax.random.fold_in(key, number)
        number += 1
