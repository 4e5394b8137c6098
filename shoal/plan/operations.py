"""The operations of a program: a device runs arithmetic, and nothing that leaves it.

A plan holds StableHLO, which is data; but a `custom_call` names a function of the process that runs it, and one of those
calls back into Python. So a program may hold operations of the dialects StableHLO, CHLO, func, sdy and builtin alone,
and custom calls of a list: what JAX itself emits for linear algebra, random numbers, top-k and shardings. Left out, though
JAX promises to keep them stable, are hand-written kernels (`tpu_custom_call`, `mosaic_gpu_v2`) and TensorFlow
calls: they are code. The module itself is walked, not its text. Cost: below a millisecond for a hundred operations.

At build time the same is asked of the traced functions, where the answer can name the loss.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from shoal.errors import PlanError
from shoal.plan.manifest import Program

DIALECTS: Final = frozenset({"builtin", "chlo", "func", "sdy", "stablehlo"})

BYTECODE: Final = b"ML\xefR"
"""How an artifact starts; the readers would take a text too, of which no promise is made."""
OUTSIDE: Final = frozenset(f"stablehlo.{name}" for name in ("infeed", "outfeed", "send", "recv"))
"""StableHLO operations that speak to the world outside the program."""

_LAPACK: Final = (
    *("potrf", "geqrf", "gesdd", "getrf", "geev", "gees", "gehrd", "sytrd", "trsm", "gtsv", "orgqr", "syevd"),
    *("hetrd", "ungqr", "heevd"),
)  # fmt: skip
_GPU_LINALG: Final = ("getrf", "geqrf", "orgqr", "potrf", "syevd", "gesvd", "gesvdj", "gesdd", "sytrd")

CUSTOM_CALLS: Final = frozenset(
    [
        *(f"lapack_{letter}{name}_ffi" for name in _LAPACK for letter in "sdcz"),
        *(f"{maker}solver_{name}_ffi" for name in _GPU_LINALG for maker in ("cu", "hip")),
        *("cu_lu_pivots_to_permutation", "hip_lu_pivots_to_permutation", "cusparse_gtsv2_ffi"),
        *("cu_threefry2x32_ffi", "hip_threefry2x32_ffi"),
        *("Eigh", "Qr", "ProductOfElementaryHouseholderReflectors", "LuDecomposition"),
        *("ApproxTopK", "stablehlo.dynamic_approx_top_k", "stablehlo.dynamic_top_k"),
        *("Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "annotate_device_placement"),
        *("stablehlo.dynamic_reduce_window", "stablehlo.dynamic_rng_bit_generator"),
        *("AllocateBuffer", "shape_assertion"),
    ]
)  # fmt: skip
"""Targets that a `custom_call` may name; after jax 0.10 `_CUSTOM_CALL_TARGETS_GUARANTEED_STABLE`."""


def check_operations(program: Program, data: bytes) -> None:
    """Raises PlanError, naming the operation, unless a program holds only what is allowed."""
    for name, target in operations(data):
        if name.split(".", 1)[0] not in DIALECTS or name in OUTSIDE:
            raise PlanError(
                f"Program {program.name!r} holds the operation {name[:80]!r}; allowed are those of "
                f"{' | '.join(sorted(DIALECTS))} that stay inside the program. It was not run."
            )
        if name == "stablehlo.custom_call" and target not in CUSTOM_CALLS:
            raise PlanError(
                f"Program {program.name!r} calls {target[:80]!r}, which is not among the {len(CUSTOM_CALLS)} functions that a "
                f"program may call{_hint(target)}. It was not run."
            )


def operations(data: bytes) -> list[tuple[str, str]]:
    """Name and custom-call target of each operation of an artifact. Raises PlanError if it is none."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    if not data.startswith(BYTECODE):
        raise PlanError(f"A program is no StableHLO artifact: it starts with {data[:4]!r}, not with {BYTECODE!r}.")
    try:
        with mlir.make_ir_context():
            module = ir.Module.parse(stablehlo.deserialize_portable_artifact_str(data))
            return list(_walk(module.operation))
    except Exception as error:  # MLIR raises several types, none of them documented
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PlanError(f"A program is no StableHLO artifact: {text[:200]}.") from error


def refuse_callbacks(functions: Mapping[str, Callable[[], Any]], *, task: str) -> None:
    """Raises ValueError if a function of a task calls back into Python.

    Args:
        functions: what it is (`loss`) -> a function without arguments that gives its jaxpr.
        task: the task's name.
    """
    for what, trace in functions.items():
        for primitive in _primitives(trace()):
            if "callback" in primitive or primitive == "debug_print":
                raise ValueError(
                    f"Expected the {what} of task {task!r} to be arithmetic alone, it calls back into Python "
                    f"({primitive}: jax.debug.print, jax.pure_callback or the like). A plan is data and runs where there "
                    "is no Python of yours: take the call out; a metric reports numbers."
                )


def _walk(operation: Any) -> Iterator[tuple[str, str]]:
    waiting = [operation]
    while waiting:  # not recursion: a stranger's program may nest deeper than Python's stack
        current = waiting.pop()
        yield current.name, _target(current)
        waiting.extend(op.operation for region in current.regions for block in region for op in block)


def _target(operation: Any) -> str:
    from jaxlib.mlir import ir

    if operation.name != "stablehlo.custom_call":
        return ""
    return str(ir.StringAttr(operation.attributes["call_target_name"]).value)


def _hint(target: str) -> str:
    return ": it calls back into Python" if "callback" in target or "python" in target else ""


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from _primitives(inner)
