"""Processors that plans are compiled for ahead of time, and what this machine is among them. Imports neither IREE nor JAX.

A target is a family (`x86_64-linux`), which is part of a runtime's kind, and a level of it: the instructions that a program
may use. A device names its family and every level that its processor has; a program names the one that it needs. So a
device is refused in words where its processor lacks an instruction, and takes the best variant where there are several.
"""

import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from shoal.errors import MissingExtra, PlanError
from shoal.plan.manifest import IREE, Runtime

CALLING_CONVENTION: Final = 1
"""A module with a function `main` that takes the manifest's inputs in their order and gives its outputs; raised when that changes."""
RUNTIME_PACKAGE: Final = "iree-base-runtime"
CPU_INFO: Final = Path("/proc/cpuinfo")


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What a plan may be compiled for."""

    name: str
    """As `shoal host --iree` says it."""
    family: str
    """Architecture and system."""
    level: str
    """The instructions that programs may use, by the name that LLVM gives such a processor."""
    triple: str
    """As LLVM names the family."""

    def needs(self, version: tuple[int, int, int]) -> Runtime:
        """What it takes to run what the compiler of that version makes for it."""
        return Runtime(
            kind=IREE + self.family, version=version, calling_convention=CALLING_CONVENTION, platforms=(self.level,)
        )


_X86, _ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
TARGETS: Final = {
    target.name: target
    for target in (
        Target(name="x86_64-linux", family="x86_64-linux", level="x86-64-v3", triple=_X86),
        Target(name="x86_64-linux-avx512", family="x86_64-linux", level="x86-64-v4", triple=_X86),
        Target(name="aarch64-linux", family="aarch64-linux", level="generic", triple=_ARM),
        Target(
            name="aarch64-linux-android",
            family="aarch64-linux-android",
            level="generic",
            triple="aarch64-none-linux-android29",
        ),
    )
}
"""Name -> target. x86-64-v3 is any x86-64 since Haswell (2013) or Zen (2017); `generic` any 64-bit ARM."""

_V3: Final = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4: Final = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])
X86_LEVELS: Final = {"x86-64": frozenset[str](), "x86-64-v3": _V3, "x86-64-v4": _V4}
"""Level -> what Linux calls its instructions (x86-64 psABI, table 3.1); from the least to the most."""


def find_target(name: str) -> Target:
    """A target by name. Raises ValueError for an unknown one."""
    if name not in TARGETS:
        raise ValueError(f"Expected a target of {' | '.join(TARGETS)}, got {name!r}.")
    return TARGETS[name]


def this_runtime() -> Runtime:
    """What the IREE that is installed here runs, on this processor. Starts nothing.

    Raises:
        MissingExtra: it is not installed.
        PlanError: this version compiles no plans for such a machine.
    """
    version = installed_version()
    if not version:
        raise MissingExtra(RUNTIME_PACKAGE, extra="iree-runtime", why="--runtime iree")
    return Runtime(
        kind=IREE + _family(), version=numbers(version), calling_convention=CALLING_CONVENTION, platforms=_levels()
    )


def installed_version() -> str:
    """Of IREE's runtime; empty where it is not installed. As `importlib.metadata` says it, which takes 2 MB in a process that waits."""
    pattern = f"{RUNTIME_PACKAGE.replace('-', '_')}-*.dist-info"
    found = (path for folder in sys.path if Path(folder).is_dir() for path in Path(folder).glob(pattern))
    return next((path.stem.split("-")[1] for path in found), "")


def numbers(version: str) -> tuple[int, int, int]:
    """The first three numbers of a version: (3, 13, 0) of `3.13.0rc1`."""
    parts = [part.split("rc")[0] for part in version.split("+")[0].split(".")]
    found = [int(part) for part in parts[:3] if part.isdigit()]
    major, minor, patch = (*found, 0, 0, 0)[:3]
    return major, minor, patch


def levels_of(flags: frozenset[str]) -> tuple[str, ...]:
    """The levels of an x86-64 processor with those instructions, from the least to the most."""
    return tuple(level for level, needed in X86_LEVELS.items() if needed <= flags)


def _family() -> str:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    android = "-android" if hasattr(sys, "getandroidapilevel") else ""
    family = f"{machine}-linux{android}"
    if not sys.platform.startswith(("linux", "android")) or family not in {t.family for t in TARGETS.values()}:
        raise PlanError(
            f"This machine ({platform.machine()}, {platform.system()}) is none that plans are compiled for, which are "
            f"{' | '.join(sorted({t.family for t in TARGETS.values()}))}; leave out --runtime iree, and JAX runs the plan."
        )
    return family


@cache
def _levels() -> tuple[str, ...]:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ("generic",)
    try:
        lines = CPU_INFO.read_text().splitlines()
    except OSError:  # hidden from a container: what is not known to be there is not used
        lines = []
    flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    return levels_of(frozenset(flags.split()))
