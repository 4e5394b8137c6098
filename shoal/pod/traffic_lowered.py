"""The collectives of a lowered program, read off its StableHLO: in functions that it calls and in loops, times their turns.

`jax.jit(f).lower(…)` is enough: nothing is compiled. A loop's turns are known where it counts from one constant to another, as `scan` and
`fori_loop` with fixed ends do; else they are said to be unknown.
"""

from collections.abc import Mapping
from math import ceil
from typing import Any, Final

import numpy as np
from jaxlib.mlir import ir

from shoal.pod.traffic import KINDS, Collective, Kind, Traffic, along, operand

_BRANCHES: Final = ("stablehlo.case", "stablehlo.if")
_PRODUCTS: Final = ("stablehlo.dot_general", "stablehlo.convolution")


def lowered_traffic(lowered: Any, sizes: Mapping[str, int]) -> Traffic:
    """What one device sends in one run.

    Args:
        lowered: of `jax.jit(f).lower(…)`.
        sizes: the axes of the mesh it was made for, in order.

    Raises:
        ValueError: a group names no device of that mesh, or is not written out.
    """
    module = lowered.compiler_ir("stablehlo")
    reader = _Reader(module, sizes)
    reader.read(reader.functions["main"], 1, False)
    return Traffic(tuple(reader.found))


def product_type(lowered: Any) -> str:
    """The type of most elements that products and convolutions give, which is the one whose speed counts; float32 where there is none."""
    elements: dict[str, int] = {}

    def visit(operation: Any) -> None:
        if operation.name in _PRODUCTS:
            factor, made = (ir.RankedTensorType(v.type) for v in (operation.operands[0], operation.results[0]))
            name = operand(str(factor.element_type), ()).dtype
            elements[name] = elements.get(name, 0) + int(np.prod(made.shape))
        for inner in _inside(operation):
            visit(inner)

    visit(lowered.compiler_ir("stablehlo").operation)
    return max(elements, key=lambda name: elements[name], default="float32")


def _inside(operation: Any) -> list[Any]:
    return [each.operation for region in operation.regions for block in region.blocks for each in block.operations]


class _Reader:
    """Goes through a module from `main` on."""

    def __init__(self, module: Any, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self.found: list[Collective] = []
        named = [each.operation for each in module.body.operations if "sym_name" in each.operation.attributes]
        self.functions = {ir.StringAttr(each.attributes["sym_name"]).value: each for each in named}

    def read(self, operation: Any, times: int | None, is_conditional: bool) -> None:
        """Takes in what is inside an operation that is done so often."""
        for inner in _inside(operation):
            self._one(inner, times, is_conditional)

    def _one(self, operation: Any, times: int | None, is_conditional: bool) -> None:
        name = operation.name
        kind = name.removeprefix("stablehlo.")
        if kind in KINDS:
            self.found.append(self._collective(operation, kind, times, is_conditional))
        elif name == "func.call":
            callee = ir.FlatSymbolRefAttr(operation.attributes["callee"]).value
            self.read(self.functions[callee], times, is_conditional)
        elif name == "stablehlo.while":
            turns = _turns(operation)
            self.read(operation, None if times is None or turns is None else times * turns, is_conditional)
        else:
            self.read(operation, times, is_conditional or name in _BRANCHES)

    def _collective(self, operation: Any, kind: Kind, times: int | None, is_conditional: bool) -> Collective:
        written = "source_target_pairs" if kind == "collective_permute" else "replica_groups"
        attribute = operation.attributes[written]
        if not isinstance(attribute, ir.DenseElementsAttr):
            raise ValueError(f"Expected the groups of {kind} as numbers of devices, got {attribute}.")
        group_size, axes = along(np.asarray(attribute).tolist(), self.sizes)
        types = [ir.RankedTensorType(value.type) for value in operation.operands]
        given = tuple(operand(str(each.element_type), each.shape) for each in types)
        return Collective(kind, given, group_size, axes, times, is_conditional)


def _turns(loop: Any) -> int | None:
    """Of a `while` that counts from a constant by a constant to a constant."""
    condition, body = (region.blocks[0].operations for region in loop.regions)
    test = _maker(_last(condition).operands[0])
    if test is None or test.name != "stablehlo.compare" or not isinstance(test.operands[0], ir.BlockArgument):
        return None
    number = test.operands[0].arg_number
    step = _maker(_last(body).operands[number])
    if step is None or step.name != "stablehlo.add" or not isinstance(step.operands[0], ir.BlockArgument):
        return None
    if step.operands[0].arg_number != number:
        return None
    first, by, end = (_constant(value) for value in (loop.operands[number], step.operands[1], test.operands[1]))
    if first is None or end is None or not by:
        return None
    direction = str(test.attributes["comparison_direction"])
    if ("LT" in direction and by > 0) or ("GT" in direction and by < 0):
        return max(0, ceil((end - first) / by))
    if ("LE" in direction and by > 0) or ("GE" in direction and by < 0):
        return max(0, (end - first) // by + 1)
    return None


def _last(operations: Any) -> Any:
    return operations[len(operations) - 1].operation


def _maker(value: Any) -> Any:
    """The operation whose result it is; None for an argument."""
    return None if isinstance(value, ir.BlockArgument) else value.owner.operation


def _constant(value: Any) -> int | None:
    maker = _maker(value)
    if maker is None or maker.name != "stablehlo.constant":
        return None
    held = np.asarray(ir.DenseElementsAttr(maker.attributes["value"]))
    return int(held) if held.ndim == 0 and np.issubdtype(held.dtype, np.integer) else None
