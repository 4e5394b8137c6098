"""The one door to Numba: machine code for plain functions over flat arrays, without the GIL, kept on disk.

Numba notices that a kept function's own file has changed, but not that a function which it calls, from another file, has:
code for an old layout of arrays would run on new ones. So what is kept is marked with a hash of all files that hold such
functions.
"""

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

from shoal.errors import MissingExtra

try:
    import numba
except ImportError as error:
    raise MissingExtra("numba", extra="embed", why="shoal.embed") from error

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compiles the function on first use. What run-time type checks put around it in tests is taken off again."""
    plain = inspect.unwrap(function)
    made: Any = numba.njit(plain, cache=True, nogil=True, error_model="numpy")
    try:
        made._cache._cache_file._source_stamp = (made._cache._cache_file._source_stamp, _sources())
    except AttributeError:  # another Numba than we know: rather compile each time than run what is out of date
        made = numba.njit(plain, nogil=True, error_model="numpy")
    return cast(F, made)


@cache
def _sources() -> str:
    """A hash of the files in this package that hold compiled functions."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        data = path.read_bytes()
        if b"compiled" in data:
            digest.update(data)
    return digest.hexdigest()
