"""What a device checks of a plan before it loads a program of it: sizes, and that the programs fit the manifest.

Signature and hashes are `Plan.verify`'s, the operations inside a program `operations.py`'s. No JAX here: a device that
refuses a plan has not started a runtime for it. Cost: one pass over the specs, milliseconds for ten thousand tensors.

Guarantees:
    * A plan that passes has programs of just the inputs and outputs that `build.py` gives them, in that order.
    * Its estimate of memory, below, is within the limit. What a program needs inside is for the runner to bound.

The estimate: the broadcast tensors three times (arriving, held, and those of the version before), the device state, the carry twice (one program's input
and output), one block's feed, the sums, and the inputs and outputs of the largest program.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from shoal.errors import PlanError
from shoal.plan.manifest import Manifest, Program
from shoal.plan.runner import Limits
from shoal.tensors import TensorSpec, total_bytes

MAX_TENSORS: Final = 1 << 16
"""In any one list of a manifest."""
MAX_PROGRAMS: Final = 256
"""Variants of programs in one plan."""

Signature = list[tuple[str, tuple[int, ...], str]]
"""Name, shape and element type of each tensor."""


def check_plan(manifest: Manifest, limits: Limits) -> None:
    """Raises PlanError unless this device can hold the plan and its programs fit its manifest."""
    _check_counts(manifest)
    for program in manifest.programs:
        _check_size(manifest, program, limits)
    # Sizes go first: whether a plan of a tebibyte is consistent need not be known.
    if (needed := memory_bytes(manifest)) > limits.memory_bytes:
        raise PlanError(
            f"The plan of task {manifest.task!r} asks for {readable(needed)} of memory, "
            f"this device allows {readable(limits.memory_bytes)}."
        )
    _check_signatures(manifest)


def memory_bytes(manifest: Manifest) -> int:
    """The estimate of the module's text."""
    carry = max((total_bytes(program.outputs) for program in manifest.variants("begin")), default=0)
    feed = max((total_bytes(_feed(program.inputs)) for program in manifest.variants("block")), default=0)
    largest = max(
        (total_bytes(program.inputs) + total_bytes(program.outputs) for program in manifest.programs), default=0
    )
    kept = total_bytes(manifest.device_state)
    return 3 * manifest.model_bytes + kept + 2 * carry + feed + manifest.update_bytes + largest


def readable(size_bytes: float) -> str:
    """`8.0 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size_bytes < 1024 or unit == "TiB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    raise AssertionError("the last unit returns")


def _feed(inputs: Iterable[TensorSpec]) -> list[TensorSpec]:
    return [spec for spec in inputs if not spec.name.startswith("carry/")]


def _check_counts(manifest: Manifest) -> None:
    if len(manifest.programs) > MAX_PROGRAMS:
        raise PlanError(
            f"Expected the plan of task {manifest.task!r} to have at most {MAX_PROGRAMS} programs, "
            f"got {len(manifest.programs)}."
        )
    lists: dict[str, Sequence[object]] = {
        "broadcast": manifest.broadcast, "device_state": manifest.device_state, "sums": manifest.sums,
        "batch": manifest.batch,
    }  # fmt: skip
    for number, program in enumerate(manifest.programs):
        lists[f"inputs of {program.name} ({number})"] = program.inputs
        lists[f"outputs of {program.name} ({number})"] = program.outputs
    for what, tensors in lists.items():
        if len(tensors) > MAX_TENSORS:
            raise PlanError(
                f"Expected {what} of task {manifest.task!r} to have at most {MAX_TENSORS} tensors, got {len(tensors)}."
            )


def _check_size(manifest: Manifest, program: Program, limits: Limits) -> None:
    if program.size_bytes > limits.program_bytes:
        raise PlanError(
            f"Program {program.name!r} of task {manifest.task!r} has {readable(program.size_bytes)}, "
            f"this device allows {readable(limits.program_bytes)}."
        )


def _check_signatures(manifest: Manifest) -> None:
    begins = manifest.variants("begin")
    for name in ("begin", "block", "finish"):
        if not manifest.variants(name):
            raise PlanError(f"The plan of task {manifest.task!r} has no program {name!r}; every plan has one.")
    carry = _signature(begins[0].outputs)
    for program in manifest.programs:
        if check := _CHECKS.get(program.name):
            check(manifest, program, carry)


def _check_begin(manifest: Manifest, program: Program, carry: Signature) -> None:
    inputs = _broadcast(manifest) + _signature(manifest.device_state, "device_state/")
    _expect(program, "inputs", _signature(program.inputs), inputs)
    _expect(program, "outputs", _signature(program.outputs), carry)
    if stray := [name for name, _, _ in carry if not name.startswith("carry/")]:
        raise PlanError(f"Expected outputs of program 'begin' to be named carry/…, got {stray[0][:80]!r}.")


def _check_block(manifest: Manifest, program: Program, carry: Signature) -> None:
    size = (manifest.training.steps_per_block, manifest.training.batch_size)
    inputs = [*carry, *_batch(manifest, size), ("key", (manifest.promises.privacy.key_words,), "uint32")]
    _expect(program, "inputs", _signature(program.inputs), inputs)
    _expect(program, "outputs", _signature(program.outputs), carry)


def _check_finish(manifest: Manifest, program: Program, carry: Signature) -> None:
    _expect(program, "inputs", _signature(program.inputs), carry + _broadcast(manifest))
    outputs = [
        *_signature(manifest.update, "sum/"), ("weight", (), "int32"),
        *_signature(manifest.device_state, "device_state/"),
    ]  # fmt: skip
    _expect(program, "outputs", _signature(program.outputs), sorted(outputs))


def _check_evaluate(manifest: Manifest, program: Program, _: Signature) -> None:
    _check_model_inputs(manifest, program)
    outputs = _signature(spec.tensor for spec in manifest.metrics)
    _expect(program, "outputs", _signature(program.outputs), sorted(outputs))


def _check_predict(manifest: Manifest, program: Program, _: Signature) -> None:
    _check_model_inputs(manifest, program)
    size, outputs = manifest.training.evaluate_batch_size, program.outputs
    if [spec.name for spec in outputs] != ["output/prediction"] or outputs[0].shape[:1] != (size,):
        got = [(spec.name[:80], list(spec.shape)) for spec in outputs[:3]]
        raise PlanError(f"Expected program 'predict' to give output/prediction [{size}, …], got {got}.")


def _check_keys(manifest: Manifest, program: Program, _: Signature) -> None:
    size = manifest.training.evaluate_batch_size
    _expect(program, "inputs", _signature(program.inputs), _batch(manifest, (size,)))
    for name, shape, dtype in _signature(program.outputs):
        if not name.startswith("keys/") or shape[:1] != (size,) or "int" not in dtype:
            raise PlanError(
                f"Expected outputs of program 'keys' to be keys/… [{size}, …] of an integer type, "
                f"got {_text((name, shape, dtype))}."
            )


_CHECKS: Final[dict[str, Callable[[Manifest, Program, Signature], None]]] = {
    "begin": _check_begin,
    "block": _check_block,
    "finish": _check_finish,
    "evaluate": _check_evaluate,
    "predict": _check_predict,
    "keys": _check_keys,
}  # the server's programs never run on a device


def _check_model_inputs(manifest: Manifest, program: Program) -> None:
    size = (manifest.training.evaluate_batch_size,)
    _expect(program, "inputs", _signature(program.inputs), _broadcast(manifest) + _batch(manifest, size))


def _broadcast(manifest: Manifest) -> Signature:
    return _signature(manifest.broadcast, "broadcast/")


def _batch(manifest: Manifest, size: tuple[int, ...]) -> Signature:
    fields: Signature = [(f"batch/{spec.name}", (*size, *spec.shape), spec.dtype) for spec in manifest.batch]
    return [*fields, ("mask", size, "bool")]


def _signature(specs: Iterable[TensorSpec], prefix: str = "") -> Signature:
    return [(prefix + spec.name, spec.shape, spec.dtype) for spec in specs]


def _expect(program: Program, what: str, got: Signature, expected: Signature) -> None:
    if got == expected:
        return
    for number, wanted in enumerate(expected):
        found = got[number] if number < len(got) else None
        if found != wanted:
            raise PlanError(
                f"Expected {what} {number} of program {program.name!r} to be {_text(wanted)}, got {_text(found)}. "
                "The plan was not made by this version of shoal, or is damaged."
            )
    raise PlanError(
        f"Expected program {program.name!r} to have {len(expected)} {what}, got {len(got)}, "
        f"the first too many {_text(got[len(expected)])}."
    )


def _text(item: tuple[str, tuple[int, ...], str] | None) -> str:
    return "nothing" if item is None else f"{item[0][:80]} {item[2]}{list(item[1])}"
