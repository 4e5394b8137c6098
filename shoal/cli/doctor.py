"""`shoal doctor`: is this machine fit, and if not, what to do. A line for each question: ok, warn or fail."""

import os
import platform
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

from shoal.cli import options, words
from shoal.cli.failures import describe
from shoal.cli.screen import Screen, Stopwatch

EPILOG = options.examples("shoal doctor", "shoal doctor runs/digits")

LEAST_MEMORY: Final = 2 << 30
LEAST_DISK: Final = 2 << 30
MOST_CLOCK_ERROR_S: Final = 2.0


@dataclass(frozen=True)
class Finding:
    """One line."""

    status: Literal["ok", "warn", "fail"]
    what: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.status:4}  {self.what:12}  {self.detail}{f' {self.advice}' if self.advice else ''}"


def doctor(
    run: Annotated[Path | None, typer.Argument(metavar="RUN", help="A run folder to look at, too.")] = None,
    json: options.AsJson = False,
) -> None:
    """Say whether this machine is fit.

    Looks at cores, memory, disk, versions, accelerators, compiler, ports, clock, caches and, if given, a run's record. Exits with 1 if anything fails; a warning says what would be better.
    """
    screen, watch = Screen(json=json), Stopwatch()
    findings: list[Finding] = []
    for what, look in _questions(run):
        screen.live(f"looking at {what}")
        findings += _found(what, look)
        for finding in findings[-1:] if what != "runtime" else findings[-2:]:
            screen.line(str(finding))
        watch.lap(what)
    failed = [finding.what for finding in findings if finding.status == "fail"]
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.document({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    if failed:
        screen.say(f"shoal: this machine is not fit: {', '.join(failed)}.")
        raise typer.Exit(1)


def _questions(run: Path | None) -> Iterator[tuple[str, Callable[[], Finding | list[Finding]]]]:
    yield "machine", machine
    yield "memory", memory
    yield "disk", disk
    yield "python", python
    yield "libraries", libraries
    yield "runtime", runtime
    yield "iree", iree
    yield "port", port
    yield "clock", clock
    yield "cache", cache
    if run is not None:
        yield "record", lambda: record(run)


def _found(what: str, look: Callable[[], Finding | list[Finding]]) -> list[Finding]:
    try:
        made = look()
    except Exception as error:  # a look that fails is a finding, not the end of the others
        return [Finding("fail", what, describe(error))]
    return made if isinstance(made, list) else [made]


def machine() -> Finding:
    """Processor and cores."""
    from shoal.record.provenance import visible_cores

    cores, all_cores = visible_cores(), os.cpu_count() or 1
    seen = f"{cores} of {all_cores} cores" if cores != all_cores else words.count(cores, "core")
    return Finding("ok", "machine", f"{platform.system()} {platform.release()} on {platform.machine()}, {seen}")


def memory() -> Finding:
    """Free memory, and swap."""
    import psutil

    found = psutil.virtual_memory()
    text = f"{words.size(found.available)} free of {words.size(found.total)}"
    if found.available < LEAST_MEMORY:
        return Finding(
            "warn", "memory", f"{text}.", "A device process takes about 1 GiB: play fewer, or end other programs."
        )
    return Finding("ok", "memory", text)


def disk() -> Finding:
    """Free disk where runs are made, and whether it can be written."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    with tempfile.NamedTemporaryFile(dir=here) as file:
        file.write(b"x")
    text = f"{words.size(free)} free in the working folder"
    if free < LEAST_DISK:
        return Finding(
            "warn", "disk", f"{text}.", "A run keeps every version of its model: make room, or use --run elsewhere."
        )
    return Finding("ok", "disk", text)


def python() -> Finding:
    """Python and shoal."""
    import shoal

    return Finding("ok", "python", f"Python {platform.python_version()}, shoal {shoal.__version__}")


def libraries() -> Finding:
    """Libraries that shoal needs, against what it was installed with."""
    import re
    from importlib import metadata

    needed = [text for text in metadata.requires("shoal") or [] if "extra ==" not in text]
    found, wrong = [], []
    for text in needed:
        name, least = re.split(r"[<>=!~;\[ ]", text, maxsplit=1)[0], re.search(r">=\s*([0-9.]+)", text)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name} is missing")
            continue
        found.append(f"{name} {version}")
        if least and _numbers(version) < _numbers(least[1]):
            wrong.append(f"{name} is {version}, older than {least[1]}")
    if wrong:
        return Finding("fail", "libraries", f"{'; '.join(wrong)}.", "Install shoal again: pip install --upgrade shoal.")
    return Finding("ok", "libraries", ", ".join(found))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3] if part.isdigit())


def runtime() -> list[Finding]:
    """JAX, in a process of its own: accelerators, and how long a tiny program takes to compile."""
    from shoal.cli.jax_probe import ask_jax

    try:
        said = ask_jax()
    except OSError as error:
        return [Finding("fail", "runtime", f"JAX does not start: {describe(error)}", "Install jax for this machine.")]
    accelerators = [kind for kind in said.kinds if kind != "cpu"]
    text = ", ".join(accelerators) if accelerators else "none; the processor computes"
    status: Literal["ok", "warn"] = "warn" if said.compile_s > 10 else "ok"
    advice = "The machine is busy or slow: expect long starts." if status == "warn" else ""
    return [
        Finding("ok", "accelerators", text),
        Finding(
            status, "compiler",
            f"a tiny program compiles in {words.duration(said.compile_s)}; JAX starts in {words.duration(said.start_s)}", advice,
        ),
    ]  # fmt: skip


def iree() -> Finding:
    """What there is for devices without JAX."""
    from importlib import metadata

    from shoal.plan.iree_compiler import COMPILER_PACKAGE
    from shoal.plan.iree_targets import RUNTIME_PACKAGE, this_runtime

    found = {}
    for what, name in (("compiler", COMPILER_PACKAGE), ("runtime", RUNTIME_PACKAGE)):
        try:
            found[what] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    if not found:
        return Finding("ok", "iree", "not installed; it is for devices without JAX (pip install 'shoal[iree]')")
    text = ", ".join(f"{what} {version}" for what, version in found.items())
    return Finding("ok", "iree", f"{text}; runs {this_runtime()}" if "runtime" in found else text)


def port() -> Finding:
    """Whether a free port can be listened on and reached."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number), timeout=5):
            pass
    proxies = [
        name
        for name in ("http_proxy", "https_proxy", "grpc_proxy")
        if os.environ.get(name) or os.environ.get(name.upper())
    ]
    if proxies and "127.0.0.1" not in os.environ.get("no_proxy", os.environ.get("NO_PROXY", "")):
        text = f"a free port works, but {proxies[0]} is set: gRPC would use it."
        return Finding("warn", "port", text, "Put the host's name into no_proxy.")
    return Finding("ok", "port", f"a free port ({number}) can be listened on and reached")


def clock() -> Finding:
    """Whether time goes forward, and the wall clock agrees with the disk's."""
    first = time.monotonic()
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"x")
        file.flush()
        apart = abs(os.stat(file.name).st_mtime - time.time())
    if time.monotonic() < first:
        return Finding("fail", "clock", "the monotonic clock went back.", "Look at the machine's time source.")
    year = time.gmtime().tm_year
    if apart > MOST_CLOCK_ERROR_S or year < 2025:
        text = f"the wall clock is {apart:.1f} s from the disk's, in the year {year}."
        return Finding("warn", "clock", text, "Set it (NTP): assignments and certificates expire by it.")
    return Finding("ok", "clock", f"goes forward; {words.duration(apart)} from the disk's")


def cache() -> Finding:
    """Where data sets and compiled programs are kept."""
    from shoal.data.cache import cache_folder, make_folder

    folder = cache_folder()
    make_folder(folder)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
    held = sum(path.stat().st_size for path in folder.parent.rglob("*") if path.is_file())
    return Finding("ok", "cache", f"{folder.parent}, {words.size(held)}")


def record(run: Path) -> Finding:
    """Whether a run's record can be read by this version, and its files are whole."""
    from shoal.record.run import open_run
    from shoal.record.schema import SCHEMA_VERSION

    with open_run(run) as opened:
        version, row = opened.store.last_version(opened.id), opened.row
        commit = opened.store.last_commit(opened.id)
        for entry in commit.model if commit is not None else ():
            opened.store.blobs.get(entry.hash)  # compared with its hash
    return Finding(
        "ok",
        "record",
        f"{row.name} {row.id}, {row.status}, version {version}; schema {SCHEMA_VERSION}, last model whole",
    )
