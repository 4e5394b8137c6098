"""A trace (jaxpr) without functions in it: what they do stands where they are called, each value has a number.

    jaxpr with jit, closed calls, custom derivatives, rematerialization, branches --> [Operation(inputs, outputs)], in an order in which they can be done

So it can be asked which operations need which inputs, and parts of it can be run on their own (`schedule/staged.py`), or in another way
(`pod/piecewise.py`). Loops stay one operation each. Branches are all gone through, and of each output the one is taken whose turn it is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, final

import jax
import jax.numpy as jnp
from jax.extend import core

_CALLS: Final = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Operations that are functions -> where their trace is."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One of the trace, with numbers for its values."""

    eqn: core.JaxprEqn | None
    """None: a choice between the outputs of branches, by number."""
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.eqn.primitive.name if self.eqn is not None else "select_n"

    def done(self, values: Sequence[Any]) -> list[Any]:
        """What comes of its inputs."""
        if self.eqn is None:
            index, *branches = values
            return [
                jnp.where(index == 0, branches[0], branches[1])
                if len(branches) == 2
                else jax.lax.select_n(index, *branches)
            ]
        with self.eqn.ctx.manager:
            made = self.eqn.primitive.bind(*values, **self.eqn.params)
        return list(made) if self.eqn.primitive.multiple_results else [made]


@final
class FlatTrace:
    """Of one function, for inputs of given shapes."""

    def __init__(self, closed: core.ClosedJaxpr) -> None:
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        """Number -> shape and type, of inputs and of what operations make."""
        self._numbers = count()
        self.inputs = [self._number(var.aval) for var in closed.jaxpr.invars]
        self.outputs = self._put(closed.jaxpr, closed.consts, self.inputs)

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> tuple["FlatTrace", Any]:
        """The trace of a function and the shape of what it returns; arguments may be shapes."""
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        return cls(closed), shape

    def upstream(self, values: Iterable[int]) -> list[Operation]:
        """Operations that some of these values follow from, in order."""
        wanted, kept = set(values), []
        for operation in reversed(self.operations):
            if wanted.intersection(operation.outputs):
                wanted.update(operation.inputs)
                kept.append(operation)
        return kept[::-1]

    def _number(self, aval: Any) -> int:
        number = next(self._numbers)
        self.avals[number] = aval
        return number

    def _put(self, jaxpr: core.Jaxpr, consts: Sequence[Any], inputs: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: self._constant(value) for var, value in zip(jaxpr.constvars, consts, strict=True)}

        def number(atom: Any) -> int:
            return self._constant(atom.val) if isinstance(atom, core.Literal) else known[atom]

        for eqn in jaxpr.eqns:
            called = eqn.params.get(_CALLS.get(eqn.primitive.name, ""))
            taken = [number(atom) for atom in eqn.invars]
            if eqn.primitive.name == "cond":
                given = self._chosen(eqn.params["branches"], taken[0], taken[1:])
            elif called is None:
                given = [self._number(var.aval) for var in eqn.outvars]
                self.operations.append(Operation(eqn, tuple(taken), tuple(given)))
            else:
                inner, inner_consts = (
                    (called.jaxpr, called.consts) if isinstance(called, core.ClosedJaxpr) else (called, ())
                )
                given = self._put(inner, inner_consts, taken)
            known |= zip(eqn.outvars, given, strict=True)
        return [number(atom) for atom in jaxpr.outvars]

    def _chosen(self, branches: Sequence[core.ClosedJaxpr], index: int, inputs: Sequence[int]) -> list[int]:
        outputs = zip(*(self._put(branch.jaxpr, branch.consts, inputs) for branch in branches), strict=True)
        given = []
        for each in outputs:
            given.append(self._number(self.avals[each[0]]))
            self.operations.append(Operation(None, (index, *each), (given[-1],)))
        return given

    def _constant(self, value: Any) -> int:
        made = next(self._numbers)
        self.constants[made] = value
        self.avals[made] = jax.typeof(value)
        return made
