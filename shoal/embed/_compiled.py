"""The one door to Numba: machine code for plain functions over flat arrays, without the GIL, kept on disk.

Numba notices that a kept function's own file has changed, but not that a function which it calls, from another file, has:
code for an old layout of arrays would run on new ones. So what is kept is marked with a hash of its own file and of
those of this package that it imports.
"""

import hashlib
import inspect
import re
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
    try:
        made: Any = numba.njit(plain, cache=True, nogil=True, error_model="numpy")
        _take_plain(made)
        made._cache._cache_file._source_stamp = (made._cache._cache_file._source_stamp, _sources(plain.__module__))
    except (AttributeError, RuntimeError):
        # Another Numba than we know, or no folder that can be written (NUMBA_CACHE_DIR names one): rather compile each time than
        # run what is out of date, or nothing.
        made = numba.njit(plain, nogil=True, error_model="numpy")
        _take_plain(made)
    return cast(F, made)


def _take_plain(made: Any) -> None:
    """Lets compiled callers compile the function once, not for every width of integer and every constant that they pass."""
    found = made.get_call_template
    made.get_call_template = lambda args, kws: found(
        tuple(map(_plain, args)), {name: _plain(of) for name, of in kws.items()}
    )


def _plain(of: Any) -> Any:
    types: Any = numba.types
    of = types.unliteral(of)
    is_narrow = isinstance(of, types.Integer) and (of.signed or of.bitwidth < 64)
    return types.int64 if is_narrow else of


@cache
def _sources(module: str) -> str:
    """A hash of a module of this package and of those that it imports, and so on."""
    digest, waiting, seen = hashlib.sha256(), [module], set[str]()
    while waiting:
        name = waiting.pop()
        path = Path(__file__).parent.joinpath(*name.split(".")[2:]).with_suffix(".py")
        if name not in seen and path.exists():
            seen.add(name)
            text = path.read_text(encoding="utf-8")
            waiting += re.findall(r"^from (shoal\.embed\.[\w.]+) import", text, re.MULTILINE)
            for names in re.findall(r"^from shoal\.embed import (.+)$", text, re.MULTILINE):
                waiting += [f"shoal.embed.{one}" for one in re.findall(r"\w+", names)]
    for name in sorted(seen):
        digest.update(Path(__file__).parent.joinpath(*name.split(".")[2:]).with_suffix(".py").read_bytes())
    return digest.hexdigest()
