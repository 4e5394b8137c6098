"""How many operations a trace does in products of matrices and convolutions; what else is computed is small beside them."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
from jax.extend import core


def products(jaxpr: Any) -> dict[str, float]:
    """Type -> operations (an addition and a multiplication are two) in products and convolutions of a trace.

    A loop whose turns depend on data counts once, of branches the one with most.
    """
    made: dict[str, float] = {}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            counts = [products(branch.jaxpr) for branch in eqn.params["branches"]]
            _add(made, max(counts, key=lambda count: sum(count.values())), 1)
        elif eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            _add(made, {str(eqn.invars[0].aval.dtype): _operations(eqn)}, 1)
        else:
            turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            for inner in _inside(eqn):
                _add(made, products(inner), turns)
    return made


def of_operation(eqn: Any) -> float:
    """The same of one operation of a trace, of all types."""
    if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
        return _operations(eqn)
    turns = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    return float(turns * sum(sum(products(inner).values()) for inner in _inside(eqn)))


def _operations(eqn: Any) -> float:
    left, right = (each.aval.shape for each in eqn.invars[:2])
    out = float(prod(eqn.outvars[0].aval.shape))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2.0 * out * float(prod(left[dim] for dim in contracted))
    gives = right[eqn.params["dimension_numbers"].rhs_spec[0]]
    # Of an input that is spread out with zeros (the way back of a stride) only what is not zero counts.
    return 2.0 * out * float(prod(right) / gives / prod(eqn.params["lhs_dilation"]))


def _inside(eqn: Any) -> list[Any]:
    found = []
    for value in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda v: isinstance(v, core.Jaxpr | core.ClosedJaxpr)
    ):
        if isinstance(value, core.ClosedJaxpr):
            found.append(value.jaxpr)
        elif isinstance(value, core.Jaxpr):
            found.append(value)
    return found


def _add(made: dict[str, float], count: Mapping[str, float], times: float) -> None:
    for name, number in count.items():
        made[name] = made.get(name, 0.0) + times * number
