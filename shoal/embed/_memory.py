"""Two machine instructions that NumPy does not have: copy bytes between addresses, and ask for a cache line early."""

import inspect
from collections.abc import Callable
from typing import Any, Final, cast

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_tools: Final = cast(Any, cgutils)


def _copy(typing: Any, to: Any, source: Any, size: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, source = (builder.inttoptr(value, byte) for value in arguments[:2])
        _tools.raw_memcpy(builder, to, source, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _prefetch(typing: Any, address: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = _tools.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        pointer = builder.inttoptr(arguments[0], byte)
        builder.call(function, [pointer, *(ir.Constant(number, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(types.int64), code


# What run-time type checks put around the functions in tests is taken off again.
copy: Callable[[int, int, int], None] = cast(Any, intrinsic(inspect.unwrap(_copy)))
"""`copy(to, source, size)`: memcpy of `size` bytes between two addresses; the ranges do not overlap."""
prefetch: Callable[[int], None] = cast(Any, intrinsic(inspect.unwrap(_prefetch)))
"""`prefetch(address)`: the line will be read soon."""
