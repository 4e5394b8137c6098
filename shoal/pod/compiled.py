"""Compiled programs are kept by every process of a pod, so that a restart compiles nothing.

JAX's persistent compilation cache is written by process 0 only, as others would write the same. On a CPU they would not: an entry's key holds the
topology as the process sees it (jax 0.10, `_src/cache_key.py`), which is another in each, so all but the first compile anew in every life, and the
first waits for them. There is no setting for it; this replaces the private function that writes, for CPUs only. Where JAX no longer has that function
nothing is replaced, and a restart costs the compilation.
"""

from typing import Any, Final

_WRITES: Final = "_cache_write"


def keep_by_all() -> None:
    """From now on this process writes what it compiles, whatever its number, where JAX has a folder for it (`jax_compilation_cache_dir`)."""
    from jax._src import compilation_cache, compiler, config

    write_first = getattr(compiler, _WRITES, None)
    if write_first is None or write_first.__module__ == __name__:
        return

    def write(
        key: str, compile_s: float, module: str, backend: Any, executable: Any, host_callbacks: Any, *more: Any
    ) -> None:
        is_other = backend.process_index() != 0 and backend.platform == "cpu"
        if not is_other or host_callbacks or compile_s < config.persistent_cache_min_compile_time_secs.value:
            return write_first(key, compile_s, module, backend, executable, host_callbacks, *more)  # type: ignore[no-any-return]
        compilation_cache.put_executable_and_time(key, module, executable, backend, int(compile_s))

    setattr(compiler, _WRITES, write)
