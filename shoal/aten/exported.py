"""Takes a PyTorch module apart: its weights as NumPy arrays, and the graph of its operations for inputs of given shapes.

`torch.export` traces the module, with sizes as they are, and `run_decompositions` turns whatever the table does not have into
operations of the core set, as functions without side effects. Only here is torch imported.
"""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from shoal.errors import MissingExtra

_GRADIENT_SWITCH: Final = "wrap_with_set_grad_enabled"
_NARROW: Final = {"float64": "float32", "int64": "int32", "uint64": "uint32", "complex128": "complex64"}
"""Programs compute in 32 bits."""


@dataclass(frozen=True)
class Weights:
    """A module's tensors by the names of its `state_dict`."""

    params: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    """Those that are kept in the `state_dict`."""
    learned: frozenset[str]
    """Parameters that want a gradient."""
    shared: Mapping[str, str]
    """Another name of a tensor -> the name that it has here."""


@dataclass(frozen=True)
class Exported:
    """The graph of a module for inputs of given shapes, in training or not."""

    nodes: Sequence[Any]
    """`torch.fx` nodes of operations, in order of computing, without those that nothing needs."""
    inputs: Mapping[str, tuple[str, str]]
    """Name of a placeholder -> (`param` | `buffer` | `constant` | `input`, name or position)."""
    constants: Mapping[str, np.ndarray]
    outputs: Sequence[Any]
    """What the module returns, flat: nodes or numbers."""
    changed: Mapping[str, Any]
    """Name of a buffer -> the node that is its new value."""
    structure: Any
    """How the outputs are put together."""

    def assemble(self, leaves: list[Any]) -> Any:
        """The module's outputs in the structure that it returns them in."""
        return _torch().utils._pytree.tree_unflatten(leaves, self.structure)


def module_weights(module: Any) -> Weights:
    """The tensors of a module, copied.

    Raises:
        ValueError: it is no module, or a whole number is too large for 32 bits.
    """
    torch = _torch()
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"Expected a torch.nn.Module, got {type(module).__name__}. Call the class: Net().")
    params, buffers = (list(find(remove_duplicate=False)) for find in (module.named_parameters, module.named_buffers))
    first: dict[int, str] = {}
    for name, tensor in [*params, *buffers]:
        first.setdefault(id(tensor), name)
    persistent = set(module.state_dict(keep_vars=True))
    own = {name: tensor for name, tensor in params if first[id(tensor)] == name}
    kept = {name: tensor for name, tensor in buffers if first[id(tensor)] == name and name in persistent}
    return Weights(
        params={name: array_of(tensor, name) for name, tensor in own.items()},
        buffers={name: array_of(tensor, name) for name, tensor in kept.items()},
        learned=frozenset(name for name, tensor in own.items() if tensor.requires_grad),
        shared={name: first[id(tensor)] for name, tensor in [*params, *buffers] if first[id(tensor)] != name},
    )


def export(
    module: Any, args: Sequence[tuple[tuple[int, ...], str]], kwargs: Mapping[str, tuple[tuple[int, ...], str]], *,
    training: bool, known: Collection[str], shared: Mapping[str, str],
) -> Exported:  # fmt: skip
    """The graph of a module.

    Args:
        module: the module; it is not changed.
        args: shape and dtype of each argument.
        kwargs: the same of those by name.
        training: whether it is traced in training mode.
        known: names of operations that are left whole.
        shared: see `Weights`.

    Raises:
        ValueError: torch cannot export the module, or it does what no pure function can.
    """
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own code: attributes of recurrent layers, deprecations
            traced = copy.deepcopy(module).cpu().train(training)
            named = {name: _zeros(*spec) for name, spec in kwargs.items()}
            program = torch.export.export(traced, tuple(_zeros(*spec) for spec in args), named)
            _keep_gradient_switches(program, module)
            rest = {op: how for op, how in torch.export.default_decompositions().items() if str(op) not in known}
            program = program.run_decompositions(rest)
    except ValueError:
        raise
    except Exception as error:  # torch raises dozens of types
        text = str(error).strip().splitlines()
        raise ValueError(
            f"Expected {type(module).__name__} to be a module that torch.export takes, called with {_said(args, kwargs)}: "
            f"{type(error).__name__}: {text[0] if text else ''}"
        ) from error
    return _taken_apart(program, module, shared)


def _taken_apart(program: Any, module: Any, shared: Mapping[str, str]) -> Exported:
    signature = program.graph_signature
    inputs, constants, position = {}, {}, 0
    for spec in signature.input_specs:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            inputs[spec.arg.name], position = ("input", str(position)), position + 1
        elif kind == "PARAMETER":
            inputs[spec.arg.name] = ("param", shared.get(spec.target, spec.target))
        elif kind == "BUFFER" and spec.persistent:
            inputs[spec.arg.name] = ("buffer", shared.get(spec.target, spec.target))
        else:
            inputs[spec.arg.name] = ("constant", spec.target)
            constants[spec.target] = array_of(program.constants[spec.target], spec.target)
    outputs, changed = [], {}
    by_name = {node.name: node for node in program.graph.nodes}
    for spec in signature.output_specs:
        value = by_name[spec.arg.name] if hasattr(spec.arg, "name") else spec.arg.value
        if spec.kind.name == "USER_OUTPUT":
            outputs.append(value)
        elif spec.kind.name == "BUFFER_MUTATION" and spec.target not in constants:
            changed[shared.get(spec.target, spec.target)] = value
        else:
            raise ValueError(
                f"Expected {type(module).__name__} to change nothing but its persistent buffers, it changes {spec.target!r} "
                f"({spec.kind.name.lower()}), as nn.Embedding(max_norm=…) does."
            )
    needed = _needed([*outputs, *(node for node in changed.values() if _is_float(node))])
    nodes = [node for node in program.graph.nodes if node.op == "call_function" and node in needed]
    return Exported(nodes, inputs, constants, outputs, changed, program.call_spec.out_spec)


def _needed(ends: list[Any]) -> set[Any]:
    found: set[Any] = set()
    waiting = [node for node in ends if hasattr(node, "all_input_nodes")]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found


def _is_float(node: Any) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)


def _keep_gradient_switches(program: Any, module: Any) -> None:
    """What is computed under `torch.no_grad` is detached: torch puts such parts into the graph like any other.

    Raises:
        ValueError: the module returns such a part as it is.
    """
    torch = _torch()
    graph = program.graph_module.graph
    switches = [node for node in graph.nodes if _GRADIENT_SWITCH in str(node.target) and node.args[0] is False]
    for part in [user for switch in switches for user in switch.users]:
        if any(user.op == "output" for user in part.users):
            raise ValueError(
                f"Expected {type(module).__name__} to return nothing that it computes under torch.no_grad: it has no gradient."
            )
        with graph.inserting_after(part):
            still = graph.call_function(torch.ops.aten.detach.default, (part,))
        still.meta = dict(part.meta)
        part.replace_all_uses_with(still, delete_user_cb=lambda user, still=still: user is not still)
    program.graph_module.recompile()


def _zeros(shape: tuple[int, ...], dtype: str) -> Any:
    """Whole numbers are int64, which torch wants of labels and indices."""
    torch = _torch()
    name = "int64" if dtype.startswith(("int", "uint")) else dtype
    return torch.zeros(shape, dtype=getattr(torch, name))


def array_of(tensor: Any, name: str) -> np.ndarray:
    """A tensor as an array of at most 32 bits an element."""
    import ml_dtypes

    torch = _torch()
    plain = tensor.detach().cpu().contiguous()
    if plain.dtype == torch.bfloat16:
        half: np.ndarray = plain.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return half.copy()
    array: np.ndarray = plain.numpy().copy()
    narrow = array.astype(_NARROW.get(array.dtype.name, array.dtype.name))
    if array.dtype.kind in "iu" and not np.array_equal(narrow, array):
        raise ValueError(f"Expected the whole numbers of {name} to fit 32 bits, got up to {np.abs(array).max()}.")
    return narrow


def dtype_of(dtype: Any) -> str:
    """The name of the type that stands for a `torch.dtype`."""
    name = str(dtype).removeprefix("torch.")
    return _NARROW.get(name, name)


def _said(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    given = [*(f"{dtype} {shape}" for shape, dtype in args), *(f"{n}: {s[1]} {s[0]}" for n, s in kwargs.items())]
    return ", ".join(given) or "nothing"


def loss_module(loss: Any) -> Any | None:
    """A module of (outputs, labels) that gives a loss for each example; None for what is none of torch's losses.

    Args:
        loss: a module such as `nn.CrossEntropyLoss()`, or a function of `torch.nn.functional`. Its `reduction` is ignored.
    """
    torch = _torch()
    if isinstance(loss, torch.nn.Module):
        module = copy.deepcopy(loss)
        if hasattr(module, "reduction"):
            module.reduction = "none"
        return module
    if not getattr(loss, "__module__", "").startswith("torch.nn.functional"):
        return None

    class Functional(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is not always there
        def forward(self, outputs: Any, labels: Any) -> Any:
            return loss(outputs, labels, reduction="none")

    return Functional()


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtra("torch", extra="torch", why="Task.from_torch") from error
    return torch
