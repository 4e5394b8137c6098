"""Native code of StableHLO programs, by IREE's compiler: for whoever makes plans. Devices need its runtime only.

The compiler runs as a process of its own for each program, which takes seconds; what it made is kept in the cache folder
and found again by program, target and version. A module holds no system's calls: IREE links it as a library that its
runtime loads by itself, so that one for `aarch64-linux` differs from one for `aarch64-linux-android` in name only.
"""

import hashlib
import os
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Final

from shoal.errors import MissingExtra, PlanError
from shoal.plan.compile_cache import programs_folder
from shoal.plan.iree_targets import Target, numbers

COMPILER_PACKAGE: Final = "iree-base-compiler"
COMPILE_S: Final = 900.0
"""Longest compilation of one program."""
OPTIONS: Final = (
    "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu",
    "--iree-global-opt-use-im2col-for-convs",
    "--iree-opt-data-tiling",
    "--iree-global-opt-enable-warn-on-uninitialized-values=false",
)
"""Of every target. Convolutions as products of matrices: measured six times as fast with AVX2. Tiles of data: an MLP takes a tenth less
time, a CNN a fifth more, which is still half of XLA's. `--iree-opt-level` is left as it is:
in 3.13, O2 and O3 refuse programs of ours."""


def compiler_version() -> tuple[int, int, int]:
    """Of the compiler that is installed here. Raises MissingExtra."""
    return numbers(_version())


def compile_for(data: bytes, target: Target, *, name: str) -> bytes:
    """The native code of one program.

    Args:
        data: a StableHLO artifact, exported for the CPU alone.
        target: what it is to run on.
        name: of the program, for errors.

    Raises:
        MissingExtra: the compiler is not installed.
        PlanError: it cannot compile the program; the text has what it said.
    """
    options = [*OPTIONS, f"--iree-llvmcpu-target-triple={target.triple}", f"--iree-llvmcpu-target-cpu={target.level}"]
    key = hashlib.sha256("\0".join((_version(), *options)).encode() + b"\0" + data).hexdigest()
    kept = programs_folder() / "iree" / f"{key}.vmfb"
    try:
        return kept.read_bytes()
    except OSError:
        pass
    made = _compiled(data, options, f"Program {name!r} cannot be compiled for {target.name}")
    _keep(kept, made)
    return made


def _version() -> str:
    try:
        return metadata.version(COMPILER_PACKAGE)
    except metadata.PackageNotFoundError:
        raise MissingExtra(COMPILER_PACKAGE, extra="iree", why="A plan for devices without JAX") from None


def _compiled(data: bytes, options: list[str], failure: str) -> bytes:
    from iree.compiler.tools.binaries import find_tool

    with tempfile.TemporaryDirectory(prefix="shoal-iree-") as folder:
        given, made = Path(folder, "program.mlirbc"), Path(folder, "program.vmfb")
        given.write_bytes(data)
        command = [find_tool("iree-compile"), *options, "-o", str(made), str(given)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=COMPILE_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise PlanError(f"{failure}: IREE's compiler took longer than {COMPILE_S:g} s.") from None
        if done.returncode:
            raise PlanError(f"{failure}: {_reason(done.stderr) or f'the compiler ended with code {done.returncode}'}.")
        return made.read_bytes()


def _reason(errors: str) -> str:
    said = [line.partition("error: ")[2] for line in errors.splitlines() if "error: " in line]
    return f"IREE's compiler says {said[0].rstrip('. ')[:200]!r}" if said else ""


def _keep(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError:  # it is only a cache
        pass
