"""A plan's programs for devices without JAX: the same programs, compiled ahead of time, beside the ones for JAX.

What a device runs is compiled: training, and `predict` for the model that it keeps. What only servers run is not.
"""

from collections.abc import Callable, Sequence
from typing import Final

from shoal.plan.iree_compiler import compile_for, compiler_version
from shoal.plan.iree_targets import find_target
from shoal.plan.manifest import DEVICE_PROGRAMS, Program
from shoal.tensors import sha256

COMPILED: Final = (*DEVICE_PROGRAMS, "predict")

Exported = Sequence[tuple[Program, bytes]]
"""Programs and their bytes."""


def compiled(
    exported: Exported, targets: Sequence[str], *, progress: Callable[[str], None]
) -> list[tuple[Program, bytes]]:
    """The variants of programs for targets.

    Args:
        exported: programs in StableHLO, for the CPU alone.
        targets: names of `iree_targets.TARGETS`.
        progress: is told what is being compiled, in words.

    Raises:
        MissingExtra: IREE's compiler is not installed.
        PlanError: it cannot compile one of them.
        ValueError: an unknown target.
    """
    version, chosen = compiler_version(), [find_target(name) for name in dict.fromkeys(targets)]
    wanted = [(target, program, data) for target in chosen for program, data in exported if program.name in COMPILED]
    made = []
    for number, (target, program, data) in enumerate(wanted, 1):
        progress(f"compiling {program.name} for {target.name} ({number} of {len(wanted)})")
        code = compile_for(data, target, name=program.name)
        variant = Program(
            name=program.name, needs=target.needs(version), inputs=program.inputs, outputs=program.outputs, hash=sha256(code),
            size_bytes=len(code),
        )  # fmt: skip
        made.append((variant, code))
    return made
