"""Programs as StableHLO portable artifacts: exported here, loaded by any JAX from 0.4.35 on.

`jax.export`'s own serialization changes with almost every release, so that an older JAX cannot read a newer one's. What
does keep its promise is the StableHLO artifact inside (years of compatibility, and read by other runtimes too). A
program is therefore just that artifact, written for the oldest StableHLO version that can hold it, with flat inputs and
outputs that the manifest describes. To load one, a function of the same signature is exported by the JAX at hand and
its module replaced by the program's. Cost: 2 to 20 kB and a few milliseconds a program.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax import export

from shoal.errors import PlanError
from shoal.plan.manifest import Program, Runtime
from shoal.tensors import TensorSpec, sha256, specs_of

PLATFORMS: Final = ("cpu", "cuda", "rocm", "tpu")
CALLING_CONVENTION: Final = 9
"""The oldest that today's JAX writes; read since JAX 0.4.31."""
OLDEST_VERSIONS: Final = ((1, 0, 0), (1, 5, 0), (1, 9, 0), (1, 13, 0))
"""StableHLO versions that are tried in turn before the newest: the first that can hold a program is taken."""


def export_program(
    name: str,
    function: Callable[..., Any],
    *arguments: Mapping[str, Any],
    outputs: Callable[[Any], dict[str, Any]],
    platforms: tuple[str, ...] = PLATFORMS,
) -> tuple[Program, bytes]:
    """Exports a function of named arrays.

    Args:
        name: one of `manifest.PROGRAMS`.
        function: takes one mapping for each of `arguments`.
        arguments: name -> ShapeDtypeStruct; the names over all of them are distinct.
        outputs: turns the function's result into one flat mapping; the program returns it sorted by name.
        platforms: where it is to run; with several its first input says which.

    Returns:
        Its description and its bytes.
    """
    flat = {key: value for argument in arguments for key, value in argument.items()}
    assert len(flat) == sum(map(len, arguments)), "names of a program's inputs are distinct"

    def run(*values: Any) -> tuple[Any, ...]:
        result = _apply(function, arguments, values)
        return tuple(value for _, value in sorted(outputs(result).items()))

    named_outputs = jax.eval_shape(lambda *values: outputs(_apply(function, arguments, values)), *flat.values())
    with jax.numpy_rank_promotion("allow"):
        exported = _with_convention(
            lambda: export.export(jax.jit(run, keep_unused=True), platforms=platforms)(*flat.values())
        )
    version, data = _oldest_artifact(exported)
    needs = Runtime(kind="stablehlo", version=version, calling_convention=CALLING_CONVENTION, platforms=platforms)
    program = Program(
        name=name,
        needs=needs,
        inputs=specs_of(flat),
        outputs=specs_of(dict(sorted(named_outputs.items()))),
        hash=sha256(data),
        size_bytes=len(data),
    )
    return program, data


def load_program(program: Program, data: bytes) -> Callable[..., tuple[Any, ...]]:
    """A function of the program's inputs, in order, that returns its outputs, in order. Not yet compiled."""
    outputs = program.outputs

    def signature(*_: Any) -> tuple[Any, ...]:
        return tuple(jnp.zeros(spec.shape, spec.numpy_dtype) for spec in outputs)

    arguments = [jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype) for spec in program.inputs]
    platforms = program.needs.platforms
    shell = _with_convention(
        lambda: export.export(jax.jit(signature, keep_unused=True), platforms=platforms)(*arguments)
    )
    call: Callable[..., tuple[Any, ...]] = dataclasses.replace(
        shell,
        mlir_module_serialized=data,
        calling_convention_version=program.needs.calling_convention,
        fun_name=program.name,
    ).call
    return call


def this_runtime() -> Runtime:
    """What the JAX at hand can run."""
    from jaxlib.mlir.dialects import stablehlo

    major, minor, patch = (int(part) for part in stablehlo.get_current_version().split("."))
    platform = jax.default_backend()
    if platform == "gpu":
        platform = "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
    return Runtime(
        kind="stablehlo",
        version=(major, minor, patch),
        calling_convention=int(export.maximum_supported_calling_convention_version),
        platforms=(platform,) if platform in PLATFORMS else ("cpu",),
    )


def module_text(data: bytes) -> str:
    """The program in readable form, for checks. Raises PlanError if it is none."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import stablehlo

    try:
        with mlir.make_ir_context():
            return str(ir.Module.parse(stablehlo.deserialize_portable_artifact_str(data)))
    except Exception as error:  # MLIR raises several types, none of them documented
        raise PlanError(f"A program is no StableHLO artifact: {str(error).splitlines()[0][:200]}.") from error


def inputs_read(program: Program, data: bytes) -> set[str]:
    """The inputs that a program's outputs may depend on: it does something with them. Raises PlanError if it is none."""
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(module_text(data))
        main = next(
            operation for operation in module.body if ir.StringAttr(operation.attributes["sym_name"]).value == "main"
        )
        # What comes before the program's own inputs is the calling convention's.
        arguments = main.regions[0].blocks[0].arguments[-len(program.inputs) :]
        return {spec.name for spec, value in zip(program.inputs, arguments, strict=True) if list(value.uses)}


def _apply(function: Callable[..., Any], arguments: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> Any:
    given = iter(values)
    return function(*({key: next(given) for key in argument} for argument in arguments))


def _with_convention(make: Callable[[], Any]) -> Any:
    before = getattr(jax.config, "jax_export_calling_convention_version")  # noqa: B009 (not in the stubs)
    jax.config.update("jax_export_calling_convention_version", CALLING_CONVENTION)
    try:
        return make()
    finally:
        jax.config.update("jax_export_calling_convention_version", before)


def _oldest_artifact(exported: Any) -> tuple[tuple[int, int, int], bytes]:
    # jaxlib's own serializer is used because jax.export writes for a version four weeks old, not for the oldest.
    from jax._src.interpreters import mlir
    from jaxlib import _jax
    from jaxlib.mlir.dialects import stablehlo

    major, minor, patch = (int(part) for part in stablehlo.get_current_version().split("."))
    text = _without_locations(exported.mlir_module())
    for version in (*OLDEST_VERSIONS, (major, minor, patch)):
        try:
            with mlir.make_ir_context():
                return version, bytes(_jax.mlir.serialize_portable_artifact(text, ".".join(map(str, version)), False))
        except Exception as error:  # a version that lacks an operation: XlaRuntimeError or ValueError, by release
            last = error
    raise PlanError(f"The program cannot be written as StableHLO: {last}") from last


def _without_locations(text: str) -> str:
    # Source paths and line numbers would make the plan's hash depend on where the source lies, and tell it.
    from jax._src.interpreters import mlir
    from jaxlib.mlir import ir, passmanager

    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        passmanager.PassManager.parse("builtin.module(strip-debuginfo)").run(module.operation)
        return str(mlir.module_to_string(module))


def struct(spec: TensorSpec) -> jax.ShapeDtypeStruct:
    """The abstract value of a spec."""
    return jax.ShapeDtypeStruct(spec.shape, spec.numpy_dtype)
