"""The one door to Numba: machine code for plain functions over flat arrays, without the GIL, kept on disk.

Numba does not notice that a compiled function called from another file has changed: after such a change delete
`__pycache__/*.nb?` beside these files (installing a release does).
"""

import inspect
from collections.abc import Callable
from typing import TypeVar, cast

from shoal.errors import MissingExtra

try:
    import numba
except ImportError as error:
    raise MissingExtra("numba", extra="embed", why="shoal.embed") from error

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Compiles the function on first use. What run-time type checks put around it in tests is taken off again."""
    return cast(F, numba.njit(inspect.unwrap(function), cache=True, nogil=True, error_model="numpy"))
