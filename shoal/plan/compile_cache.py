"""Compiled programs, kept between processes: JAX's own cache in the platform's cache folder, and a lock a plan.

JAX keys an entry by program, options, platform and its own version. Two things are added. The folder's name has the
kind of processor, because a folder on a network drive may be shared by machines of which only some have an
instruction. And the processes of one machine that start together with one plan compile it once: the first takes the
plan's lock, the others wait for it (not longer than they were told) and then load what it left.

Guarantees:
    * A process never waits longer than `wait_s`; then it compiles by itself, whatever the lock says.
    * A lock dies with the process that held it. A torn entry costs a compilation, and is removed.
    * It is only a cache: if the folder cannot be written, everything works as without it.

Not a protection: who can write the folder can make this user's programs compute something else.
"""

import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final

MIN_COMPILE_S: Final = 0.3
"""What compiles faster is not kept."""
POLL_S: Final = 0.05


def cache_folder() -> Path:
    """`$SHOAL_CACHE/programs`, else `shoal/programs` in the platform's cache folder; a subfolder by processor."""
    return programs_folder() / f"{platform.machine() or 'unknown'}-{_processor()}"


def switch_on(folder: Path) -> bool:
    """Makes the JAX of this process keep what it compiles; False where the folder cannot be made."""
    import jax

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return False
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_S)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return True


@contextmanager
def compiled_once(folder: Path, key: str, *, wait_s: float) -> Iterator[None]:
    """What compiles within it is compiled by one process at a time, and by no more than one if the cache holds.

    Args:
        folder: of the cache.
        key: names what is compiled: plan, programs, version of JAX. Letters, digits, dash, dot.
        wait_s: longest wait for another process.
    """
    done = folder / f"{key}.done"
    lock = None if done.exists() else _lock(folder / f"{key}.lock", wait_s=wait_s)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        if any("Error reading persistent compilation cache" in str(warning.message) for warning in caught):
            _remove_entries(folder)
        elif lock is not None:
            _touch(done)
    finally:
        if lock is not None:
            os.close(lock)


def programs_folder() -> Path:
    """Where compiled programs of every kind are kept."""
    if chosen := os.environ.get("SHOAL_CACHE"):
        return Path(chosen) / "programs"
    if local := os.environ.get("LOCALAPPDATA"):  # Windows
        return Path(local) / "shoal" / "cache" / "programs"
    default = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or default) / "shoal" / "programs"


def _processor() -> str:
    text = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        text += "".join(
            sorted({line for line in lines if line.lower().startswith(("flags", "features", "model name"))})
        )
    except OSError:  # not Linux: the processor's name has to do
        pass
    return sha256(text.encode()).hexdigest()[:12]


def _lock(path: Path, *, wait_s: float) -> int | None:
    """An open file that is locked, or None if that took too long or cannot be done here."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError:
        return None
    deadline = time.monotonic() + wait_s
    while not _try_lock(file):
        if time.monotonic() >= deadline:
            os.close(file)
            return None
        time.sleep(POLL_S)
    return file


def _try_lock(file: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError:  # a full disk: the next process takes the lock again
        pass


def _remove_entries(folder: Path) -> None:
    for pattern in ("*-cache", "*.done"):
        for entry in folder.glob(pattern):
            try:
                entry.unlink(missing_ok=True)
            except OSError:  # open in another process on Windows
                pass
