"""A trace (jaxpr) without functions in it: what they do stands where they are called, each value has a number.

    jaxpr with jit, closed calls, custom derivatives, rematerialization, branches --> [Operation(inputs, outputs)], in an order in which they can be done

So it can be asked which operations need which inputs, and parts of it can be run on their own (`schedule/staged.py`), or in another way
(`pod/piecewise.py`). Branches are all gone through, and of each output the one is taken whose turn it is. Loops stay one operation each, but for those over inputs that
are to be taken apart (a stack of layers' parameters): these are gone through turn by turn, and what one loop leaves of each turn (for the way back, say) the next one takes as
it is. What is no stack may be taken apart, too, into pieces of some rows each, which are joined where it is used.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, count, pairwise
from typing import Any, Final, final

import jax
import jax.numpy as jnp
from jax.extend import core

_CALLS: Final = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}
"""Operations that are functions -> where their trace is."""
KEEP_LAYERS: Final = {"convert_element_type"}
"""Operations that do to a stack what they do to each of its layers."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One of the trace, with numbers for its values."""

    eqn: core.JaxprEqn | None
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    own: Callable[..., Any] | None = None
    """What it does where the trace has no equation for it."""

    @property
    def name(self) -> str:
        if self.eqn is not None:
            return self.eqn.primitive.name
        return getattr(self.own, "__name__", "layer")

    def done(self, values: Sequence[Any]) -> list[Any]:
        """What comes of its inputs."""
        if self.eqn is None:
            assert self.own is not None
            return [self.own(*values)]
        made = _bound(self.eqn, *values)
        return list(made) if self.eqn.primitive.multiple_results else [made]


@final
class FlatTrace:
    """Of one function, for inputs of given shapes."""

    def __init__(self, closed: core.ClosedJaxpr, apart: Mapping[int, Sequence[int]] | None = None) -> None:
        """
        Args:
            closed: the trace.
            apart: position of an input (n, …) that is to be taken apart -> rows of each piece, n together; of a stack of layers one each.
        """
        self._closed = closed
        self.operations: list[Operation] = []
        self.constants: dict[int, Any] = {}
        self.avals: dict[int, Any] = {}
        """Number -> shape and type, of inputs and of what operations make."""
        self._numbers = count()
        self._layers: dict[int, list[int]] = {}
        """Number of a value (n, …) -> those of its n layers, which are there without it."""
        self.inputs = [self._number(var.aval) for var in closed.jaxpr.invars]
        self.pieces = {at: self._taken_apart(self.inputs[at], rows) for at, rows in (apart or {}).items()}
        """Position of an input that is taken apart -> numbers of its pieces (rows, …), which come in its place."""
        self.outputs = self._put(closed.jaxpr, closed.consts, self.inputs)

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any) -> tuple["FlatTrace", Any]:
        """The trace of a function and the shape of what it returns; arguments may be shapes."""
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        return cls(closed), shape

    def with_apart(self, apart: Mapping[int, Sequence[int]]) -> "FlatTrace":
        """The same with some inputs taken apart; see `__init__`."""
        return FlatTrace(self._closed, apart)

    def pieces_of(self, number: int, rows: Sequence[int]) -> list[int]:
        """Numbers of the pieces (rows, …) of a value (n, …)."""
        if not are_layers(rows):
            shape = self.avals[number].shape[1:]
            return [
                self._add(partial(_rows, begin, end), [number], (end - begin, *shape)) for begin, end in spans(rows)
            ]
        layers = self._layers_of(number)
        made = {
            layer: self._add(_raised, [layer], (1, *self.avals[layer].shape)) for layer in sorted(layers)
        }  # as they are made
        return [made[layer] for layer in layers]

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
            if eqn.primitive.name == "scan" and self._is_over_layers(eqn, taken):
                given = self._turn_by_turn(eqn, taken)
            elif eqn.primitive.name in KEEP_LAYERS and taken[0] in self._layers:
                given = [self._layer_by_layer(eqn, taken[0])]
            elif eqn.primitive.name == "cond":
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
            self.operations.append(Operation(None, (index, *each), (given[-1],), select_n))
        return given

    def _is_over_layers(self, eqn: core.JaxprEqn, taken: Sequence[int]) -> bool:
        return any(number in self._layers for number in stacks_of(eqn, taken))

    def _turn_by_turn(self, eqn: core.JaxprEqn, taken: Sequence[int]) -> list[int]:
        """A loop, without the loop."""
        num_consts, num_carry, length = (eqn.params[name] for name in ("num_consts", "num_carry", "length"))
        body: core.ClosedJaxpr = eqn.params["jaxpr"]
        consts, carry = taken[:num_consts], list(taken[num_consts : num_consts + num_carry])
        stacks = [self._layers_of(number) for number in stacks_of(eqn, taken)]
        left: list[list[int]] = [[-1] * length for _ in eqn.outvars[num_carry:]]
        for turn in reversed(range(length)) if eqn.params["reverse"] else range(length):
            made = self._put(body.jaxpr, body.consts, [*consts, *carry, *(layers[turn] for layers in stacks)])
            carry = made[:num_carry]
            for each, number in zip(left, made[num_carry:], strict=True):
                each[turn] = number
        return carry + [self._stacked(layers) for layers in left]

    def _layer_by_layer(self, eqn: core.JaxprEqn, number: int) -> int:
        made: Any = eqn.outvars[0].aval
        layers = self._layers_of(number)
        return self._stacked(
            [self._add(partial(_bound, eqn), [each], self.avals[each].shape, made.dtype) for each in layers]
        )

    def _layers_of(self, number: int) -> list[int]:
        if number not in self._layers:
            num, *shape = self.avals[number].shape
            self._layers[number] = [self._add(partial(_layer, at), [number], shape) for at in range(num)]
        return self._layers[number]

    def _stacked(self, layers: list[int]) -> int:
        made = self._add(_stack, layers, (len(layers), *self.avals[layers[0]].shape))
        self._layers[made] = layers
        return made

    def _taken_apart(self, number: int, rows: Sequence[int]) -> list[int]:
        shape = self.avals[number].shape
        pieces = [self._number(self._shaped(number, (num, *shape[1:]))) for num in rows]
        if not are_layers(rows):
            self.operations.append(Operation(None, tuple(pieces), (number,), _joined))
            return pieces
        self._layers[number] = [self._add(partial(_layer, 0), [piece], shape[1:]) for piece in pieces]
        self.operations.append(Operation(None, tuple(self._layers[number]), (number,), _stack))
        return pieces

    def _add(self, own: Callable[..., Any], inputs: Sequence[int], shape: Sequence[int], dtype: Any = None) -> int:
        made = self._number(self._shaped(inputs[0], shape, dtype))
        self.operations.append(Operation(None, tuple(inputs), (made,), own))
        return made

    def _shaped(self, number: int, shape: Sequence[int], dtype: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype or self.avals[number].dtype)

    def _constant(self, value: Any) -> int:
        made = next(self._numbers)
        self.constants[made] = value
        self.avals[made] = jax.typeof(value)
        return made


def are_layers(rows: Sequence[int]) -> bool:
    """Whether pieces of so many rows are the layers of a stack."""
    return max(rows) == 1


def spans(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The first row of each piece, and the one after its last."""
    return pairwise(accumulate(rows, initial=0))


def stacks_of(eqn: core.JaxprEqn, taken: Sequence[int]) -> Sequence[int]:
    """Of what a loop takes, that of which each turn takes a layer."""
    return taken[eqn.params["num_consts"] + eqn.params["num_carry"] :]


def _bound(eqn: core.JaxprEqn, *values: Any) -> Any:
    with eqn.ctx.manager:
        return eqn.primitive.bind(*values, **eqn.params)


def select_n(index: Any, *branches: Any) -> Any:
    """A choice between the outputs of branches, by number."""
    return jnp.where(index == 0, *branches) if len(branches) == 2 else jax.lax.select_n(index, *branches)


def _layer(at: int, stack: Any) -> Any:
    return jax.lax.index_in_dim(stack, at, keepdims=False)


def _raised(layer: Any) -> Any:
    return layer[None]


def _stack(*layers: Any) -> Any:
    return jnp.stack(layers)


def _rows(begin: int, end: int, value: Any) -> Any:
    """(end - begin, …) of a value (n, …)."""
    return jax.lax.slice_in_dim(value, begin, end)


def _joined(*pieces: Any) -> Any:
    return jnp.concatenate(pieces)
