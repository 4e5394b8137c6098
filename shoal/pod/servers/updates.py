"""An optimizer's update, transfer by transfer: each is updated when its own gradient is there, not when all are.

The update is traced once. What follows for the tensors of one transfer from their gradients is a program of its own; what belongs to no tensor (a
count of steps) each has for itself. An optimizer that looks at all gradients together (a global norm to clip by) cannot be cut, and is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import optax

from shoal.flat_trace import FlatTrace
from shoal.local import Named


@final
class Updates:
    """Of one optimizer and the tensors of all transfers."""

    def __init__(
        self, optimizer: optax.GradientTransformation, like: Mapping[str, Any], members: Sequence[Sequence[str]]
    ) -> None:
        """
        Args:
            optimizer: any that looks at one tensor at a time.
            like: name -> a tensor, or its shape.
            members: tensors of each transfer.

        Raises:
            ValueError: the optimizer looks at more than one transfer's gradients for a tensor.
        """
        params = {name: jax.ShapeDtypeStruct(like[name].shape, like[name].dtype) for name in sorted(like)}
        self._optimizer, self._members = optimizer, tuple(tuple(names) for names in members)
        opt = jax.eval_shape(optimizer.init, params)
        self._opt_tree = jax.tree.structure(opt)

        def updated(gradients: Named, opt: Any, params: Named) -> Any:
            with jax.numpy_dtype_promotion("standard"):  # optax promotes in some of its transformations
                updates, opt = optimizer.update(gradients, opt, params)
                return {n: (params[n] + updates[n]).astype(params[n].dtype) for n in params}, jax.tree.leaves(opt)

        trace, _ = FlatTrace.of(updated, params, opt, params)
        num, num_opt = len(params), len(jax.tree.leaves(opt))
        self._trace, names = trace, list(params)
        gradients = dict(zip(trace.inputs[:num], names, strict=True))
        self._inputs_of_opt = trace.inputs[num : num + num_opt]
        self._params = dict(zip(names, trace.inputs[num + num_opt :], strict=True))
        self._gradients = {name: number for number, name in gradients.items()}
        reached, opt_outputs = dict(zip(names, trace.outputs[:num], strict=True)), trace.outputs[num:]
        upstream = _upstream(trace, gradients)
        transfer_of = {name: number for number, names in enumerate(self._members) for name in names}
        self.owner = [self._owner(upstream[number], transfer_of) for number in opt_outputs]
        """Of each leaf of the optimizer's state the transfer that it belongs to; None: it is everybody's."""
        for name, number in reached.items():
            self._refuse_others(name, upstream[number], transfer_of)
        self._programs: list[Any] = []
        self.wanted: list[list[int]] = []
        """Of each transfer, numbers of the leaves of the optimizer's state that it has."""
        for number, names_of in enumerate(self._members):
            opt_of = [at for at, owner in enumerate(self.owner) if owner in (number, None)]
            self._programs.append(self._program(names_of, opt_of, reached, opt_outputs))
            self.wanted.append(opt_of)

    def _owner(self, names: frozenset[str], transfer_of: Mapping[str, int]) -> int | None:
        transfers = {transfer_of[name] for name in names}
        if len(transfers) > 1:
            raise _looks_at_all(names)
        return next(iter(transfers), None)

    def _refuse_others(self, name: str, names: frozenset[str], transfer_of: Mapping[str, int]) -> None:
        if any(transfer_of[other] != transfer_of[name] for other in names):
            raise _looks_at_all(names)

    def _program(
        self, names: Sequence[str], opt_of: Sequence[int], reached: Mapping[str, int], opt_outputs: Sequence[int]
    ) -> Any:
        """Gradients, parameters and the optimizer's leaves of one transfer -> parameters and leaves."""
        outputs = [*(reached[name] for name in names), *(opt_outputs[at] for at in opt_of)]
        operations = self._trace.upstream(outputs)
        taken = [*(self._gradients[n] for n in names), *(self._params[n] for n in names), *(self._inputs_of_opt[at] for at in opt_of)]  # fmt: skip
        constants = self._trace.constants

        def run(*values: Any) -> list[Any]:
            known = dict(zip(taken, values, strict=True))
            with jax.numpy_dtype_promotion("standard"):
                for operation in operations:
                    inputs = [known[value] if value in known else constants[value] for value in operation.inputs]
                    known |= zip(operation.outputs, operation.done(inputs), strict=True)
            return [known[value] if value in known else jnp.asarray(constants[value]) for value in outputs]

        return jax.jit(run)

    def begin(self, params: Named) -> list[list[Any]]:
        """Of each transfer, its leaves of the optimizer's state."""
        leaves = jax.tree.leaves(self._optimizer.init({name: params[name] for name in sorted(self._params)}))
        return [[leaves[at] for at in wanted] for wanted in self.wanted]

    def updated(self, transfer: int, gradients: Named, params: Named, opt: Sequence[Any]) -> tuple[Named, list[Any]]:
        """Parameters and the optimizer's leaves of a transfer, one step on."""
        names = self._members[transfer]
        made = self._programs[transfer](*(gradients[n] for n in names), *(params[n] for n in names), *opt)
        return dict(zip(names, made[: len(names)], strict=True)), made[len(names) :]


def _upstream(trace: FlatTrace, gradients: Mapping[int, str]) -> dict[int, frozenset[str]]:
    """Value -> tensors whose gradients it follows from."""
    found = {number: frozenset([name]) for number, name in gradients.items()}
    none = frozenset[str]()
    for operation in trace.operations:
        mine = none.union(*(found.get(value, none) for value in operation.inputs))
        found |= dict.fromkeys(operation.outputs, mine)
    return {number: found.get(number, none) for number in (*found, *trace.outputs, *trace.inputs)}


def _looks_at_all(names: frozenset[str]) -> ValueError:
    return ValueError(
        f"Expected an optimizer that looks at one tensor at a time, got one that looks at {len(names)} together, such as {', '.join(sorted(names)[:2])}: with "
        "--servers a tensor is updated when its own gradient is there (a global norm to clip by needs them all). Leave out --servers, or clip each tensor by itself."
    )
