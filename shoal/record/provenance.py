"""Where numbers come from: versions, machine, commit of the source, command line. It goes with every run and result.

Guarantees:
    No user name, no host name, no absolute path, and no value of an option that is named like a secret.
    Asking starts nothing: JAX is not imported, and its devices are named only where it has found them already.
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

LIBRARIES: Final = ("jax", "jaxlib", "flax", "optax", "numpy", "sqlalchemy", "grpcio", "safetensors")
"""Libraries whose versions change results, or could."""

_SECRET: Final = re.compile(r"(?i)(token|secret|passw|credential|api-?key|private-?key)")
_PATH: Final = re.compile(r"(?:[A-Za-z]:)?(?:~|[\\/])[^\s:=,;]*[\\/](?=[^\s:=,;\\/]*)")
_GIT_TIMEOUT_S: Final = 10.0


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """What one needs to know to make a result again, as JSON.

    Args:
        arguments: The command line; `sys.argv` if not given.

    Returns:
        `shoal`, `python`, `libraries` {name: version}, `platform`, `machine`, `processor`, `cores` (those this process may
        use), `memory_bytes`, `accelerators` [kind, …], `commit`, `dirty` (None where the source is no checkout),
        `command`.
    """
    commit, dirty = _commit(Path(__file__).resolve().parent)
    return {
        "shoal": _version("shoal"),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "platform": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": visible_cores(),
        "memory_bytes": int(psutil.virtual_memory().total),
        "accelerators": _accelerators(),
        "commit": commit,
        "dirty": dirty,
        "command": tell_command(sys.argv if arguments is None else arguments),
    }


def visible_cores() -> int:
    """Processor cores that this process may use, which may be fewer than the machine has."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return os.cpu_count() or 1 if affinity is None else len(affinity(0))


def tell_command(arguments: Sequence[str]) -> list[str]:
    """A command line without what it should not tell: paths become their last part, secrets `…`.

    >>> tell_command(["/home/ann/.venv/bin/shoal", "train", "--token=abc", "--api-key", "k", "--out=/home/ann/x"])
    ['shoal', 'train', '--token=…', '--api-key', '…', '--out=x']
    """
    told: list[str] = []
    hide_next = False
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        is_secret = option.startswith("-") and bool(_SECRET.search(option))
        if hide_next and not argument.startswith("-"):
            told.append("…")
        elif is_secret and equals:
            told.append(f"{option}=…")
        else:
            told.append(_PATH.sub("", argument))
        hide_next = is_secret and not equals
    return told


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """The processor's model; Linux alone keeps it in a file."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def _accelerators() -> list[str]:
    """Kinds of JAX's devices other than the CPU, where JAX runs already: asking it otherwise would start it."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    is_running = getattr(bridge, "backends_are_initialized", None)
    if is_running is None or not is_running():
        return []
    return [str(device.device_kind) for device in sys.modules["jax"].devices() if device.platform != "cpu"]


def _commit(source: Path) -> tuple[str, bool | None]:
    """The commit that a checkout is at, and whether files under version control differ from it."""
    if not any((parent / ".git").exists() for parent in source.parents):
        return "", None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        return commit, bool(_git(source, "status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git here, or not this user's checkout
        return "", None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S).stdout.strip()
