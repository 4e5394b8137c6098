"""Operations of a user's function replaced by others of the same operands and results, wherever in its programs they stand."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun

P = ParamSpec("P")
R = TypeVar("R")

Replacement = Callable[[JaxprEqn], JaxprEqn | None]
"""What stands for an operation; None leaves it."""


def function(fn: Callable[P, R], replacement: Replacement) -> Callable[P, R]:
    """The same function with its operations replaced, also those inside `jit`, `scan`, `cond`, `remat` and functions with
    derivatives of their own. It traces `fn` on each call: call it inside `jit`."""

    @functools.wraps(fn)
    def made(*args: P.args, **kwargs: P.kwargs) -> R:
        closed, like = jax.make_jaxpr(fn, return_shape=True)(*args, **kwargs)
        leaves = jaxpr_as_fun(_replaced(closed, replacement))(*jax.tree.leaves((args, kwargs)))
        result: R = jax.tree.unflatten(jax.tree.structure(like), leaves)
        return result

    return made


def _replaced(value: Any, replacement: Replacement) -> Any:
    """A program, or a parameter that may hold some; the same object where there is nothing to replace."""
    if isinstance(value, ClosedJaxpr):
        inner = _replaced(value.jaxpr, replacement)
        return value if inner is value.jaxpr else value.replace(jaxpr=inner)
    if isinstance(value, Jaxpr):
        equations = [_equation(equation, replacement) for equation in value.eqns]
        same = all(new is old for new, old in zip(equations, value.eqns, strict=True))
        return value if same else value.replace(eqns=equations)
    if type(value) in (tuple, list):
        items = [_replaced(item, replacement) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value


def _equation(equation: JaxprEqn, replacement: Replacement) -> JaxprEqn:
    made = replacement(equation)
    if made is not None:
        return made
    params = {name: _replaced(value, replacement) for name, value in equation.params.items()}
    if all(params[name] is equation.params[name] for name in params):
        return equation
    changed: JaxprEqn = equation.replace(params=params)
    return changed


def is_whole(sharding: Any) -> bool:
    """Whether each device has all of it: also what the gradients inside a `shard_map` say of their share."""
    return sharding is None or all(axis is None for axis in sharding.spec)
