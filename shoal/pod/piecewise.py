"""Any optax optimizer on pieces of tensors, with the result that it has on whole ones.

Each member has a piece of every gradient, parameter and optimizer tensor. What an optimizer does element by element it does to a piece as it
is. What it adds up over a tensor (the norms of LARS and LAMB, a global norm to clip by) has to be added up over members too: the classic mistake
in sharding these. So an optimizer is not run but read: its update is traced, the trace is evaluated operation by operation, and where a
sum takes in all of a piece it is added up over members. Sums that do not wait for one another go in one collective: LAMB takes two for all its
norms.

Guarantees:
    * What is returned equals the update of whole tensors, but for the order in which numbers are added.
    * An optimizer of which that is not known (it sorts, draws random numbers, divides by a tensor's size) is refused.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend import core

from shoal.flat_trace import FlatTrace, Operation

Total = Callable[[Any], Any]
"""Sum of a vector over members, the same for all."""

_ELEMENTWISE: Final = {
    "abs", "add", "add_any", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "cos", "div", "eq", "erf", "exp",
    "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg",
    "not", "or", "pow", "reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh",
    "xor",
}  # fmt: skip
_RESHAPES: Final = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}
"""Which leave a piece as it is where they leave its number of elements."""


def update(
    optimizer: optax.GradientTransformation, gradients: Any, state: Any, params: Any, *, is_piece: Any, total: Total
) -> tuple[Any, Any]:
    """`optimizer.update(gradients, state, params)` of whole tensors, on pieces of them.

    Args:
        optimizer: any that acts on elements and on sums over tensors.
        gradients, state, params: pytrees; of some leaves the member has a piece, of others the whole.
        is_piece: (gradients, state, params) once more, with bools for leaves.
        total: sum over members.

    Returns:
        Updates and state, pieces where their inputs were.

    Raises:
        ValueError: the optimizer does something else with a piece.
    """
    closed, shape = _trace(optimizer, gradients, state, params)
    values = [
        _Value(value, piece)
        for value, piece in zip(jax.tree.leaves((gradients, state, params)), jax.tree.leaves(is_piece), strict=True)
    ]
    outputs = _evaluated(closed, values, total)
    made: tuple[Any, Any] = jax.tree.unflatten(jax.tree.structure(shape), [each.value for each in outputs])
    return made


def check(
    optimizer: optax.GradientTransformation, whole: Any, pieces: Any, *, total: Total = lambda sums: sums
) -> None:
    """Looks whether an update of pieces is known to be right; nothing is computed.

    Args:
        optimizer: any.
        whole, pieces: the model's parameters and a member's pieces of them, pytrees with shapes.
        total: sum over members.

    Raises:
        ValueError: it is not: the optimizer does something else than act on elements and on sums, or what it does depends on shapes.
    """
    if _work(optimizer, whole) != _work(optimizer, pieces):
        raise ValueError(
            "Expected an optimizer with update='sharded' that does the same to tensors of any shape, got one that does not (Adafactor, say, keeps "
            "rows and columns of matrices; others divide by a tensor's size). Take update='replicated'."
        )
    flags = jax.tree.map(lambda _: True, pieces)
    is_piece = (flags, state_pieces(optimizer, pieces, flags), flags)
    state = jax.eval_shape(optimizer.init, pieces)
    jax.eval_shape(partial(update, optimizer, is_piece=is_piece, total=total), pieces, state, pieces)


def acts_on_elements(optimizer: optax.GradientTransformation, whole: Any, pieces: Any) -> bool:
    """Whether it does to the elements of a piece what it does to them in the whole, and adds nothing up.

    Args:
        optimizer: any.
        whole, pieces: a tensor and a piece of it, by name, with their shapes: what an optimizer does may depend on either (masks do).
    """

    def refuse(sums: Any) -> Any:
        raise ValueError("it adds up")

    try:
        check(optimizer, whole, pieces, total=refuse)
    except Exception:  # whatever a mask raises that does not find what it looks for
        return False
    return True


def _trace(optimizer: optax.GradientTransformation, *arguments: Any) -> tuple[core.ClosedJaxpr, Any]:
    with jax.numpy_dtype_promotion("standard"):  # optax promotes in some of its transformations
        closed, shape = jax.make_jaxpr(optimizer.update, return_shape=True)(*arguments)
    return closed, shape


def _work(optimizer: optax.GradientTransformation, params: Any) -> Counter[tuple[Any, ...]]:
    """What an update does to tensors of these shapes, with which numbers, less what only reshapes them."""
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    closed, _ = _trace(optimizer, like, jax.eval_shape(optimizer.init, like), like)
    flat = FlatTrace(closed)
    numbers = {number: float(value) for number, value in flat.constants.items() if np.size(value) == 1}
    return Counter(
        (each.name, *(numbers[number] for number in each.inputs if number in numbers))
        for each in flat.operations
        if each.name not in _RESHAPES
    )


def state_pieces(optimizer: optax.GradientTransformation, params: Any, is_piece: Any) -> Any:
    """Which leaves of an optimizer's state are pieces: the state's structure, with bools for leaves.

    A leaf is one if it is larger where the parameters' pieces are.

    Args:
        params: of which some are pieces.
        is_piece: the same with bools for leaves, or one bool for all.
    """
    flags = jax.tree.map(lambda _: is_piece, params) if isinstance(is_piece, bool) else is_piece

    def grown(leaf: Any, flag: bool) -> jax.ShapeDtypeStruct:
        shape = leaf.shape
        return jax.ShapeDtypeStruct((shape[0] + 1, *shape[1:]) if flag else shape, leaf.dtype)

    before = jax.eval_shape(
        optimizer.init, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    )
    after = jax.eval_shape(optimizer.init, jax.tree.map(grown, params, flags))
    return jax.tree.map(lambda one, other: one.shape != other.shape, before, after)


@dataclass(slots=True)
class _Value:
    """One of the trace's values."""

    value: Any
    is_piece: bool
    """Else every member has the same."""
    waits: bool = False
    """It is a member's own part of a sum."""


def _evaluated(closed: core.ClosedJaxpr, inputs: Sequence[_Value], total: Total) -> list[_Value]:
    """The trace's outputs. What waits for a sum is put off until all else is done that can be; then the sums are taken together."""
    flat = FlatTrace(closed)
    known = {number: _Value(value, False) for number, value in flat.constants.items()} | dict(
        zip(flat.inputs, inputs, strict=True)
    )
    left = flat.operations
    while left:
        put_off = []
        for operation in left:
            if all(number in known and not known[number].waits for number in operation.inputs):
                made = _done(operation, [known[number] for number in operation.inputs])
                known |= zip(operation.outputs, made, strict=True)
            else:
                put_off.append(operation)
        _add_up([value for value in known.values() if value.waits], total)
        left = put_off
    return [known[number] for number in flat.outputs]


def _add_up(waiting: list[_Value], total: Total) -> None:
    for dtype in sorted({jnp.result_type(each.value) for each in waiting}, key=str):
        group = [each for each in waiting if jnp.result_type(each.value) == dtype]
        sums = total(jnp.stack([each.value for each in group]))
        for number, each in enumerate(group):
            each.value, each.waits = sums[number], False


def _done(operation: Operation, inputs: list[_Value]) -> list[_Value]:
    outputs = operation.done([each.value for each in inputs])
    is_piece, waits = _kind(operation.name, inputs, outputs)
    return [_Value(value, is_piece, waits) for value in outputs]


def _kind(name: str, inputs: list[_Value], outputs: list[Any]) -> tuple[bool, bool]:
    """Whether outputs are pieces, and whether they are parts of sums."""
    pieces = [each.value for each in inputs if each.is_piece]
    if not pieces:
        if name not in _ELEMENTWISE | _RESHAPES and any(jnp.ndim(output) for output in outputs):
            raise ValueError(
                f"Expected an optimizer that draws or makes nothing for each element with update='sharded', got one that does {name!r}: members would "
                "each make the same for other elements. Take update='replicated'."
            )
        return False, False
    size, shape = jnp.size(outputs[0]), jnp.shape(outputs[0])
    if name in _ELEMENTWISE or (name in _RESHAPES and size == jnp.size(pieces[0])):
        return True, False
    if shape == () and (name == "reduce_sum" or (name == "dot_general" and len(pieces) == len(inputs))):
        return False, True
    raise ValueError(
        f"Expected an optimizer that acts on elements and on sums over tensors with update='sharded', got one that does {name!r} to a "
        "tensor. Take update='replicated'."
    )
