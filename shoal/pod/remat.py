"""Rematerialization by path: what a part of a model makes on the way forwards is made again on the way back, not kept.

Paths are those of `jax.named_scope`, which Flax opens for each of its modules: ``Decoder/block_3/attention``. So memory can be traded for time from
outside, without touching the model: the trace of the loss is cut where a path that a pattern matches begins and ends, and each such piece goes
through `jax.checkpoint` (Chen et al. 2016, "Training deep nets with sublinear memory cost").
"""

import fnmatch
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import jax
from jax.extend import core

Function = Callable[..., Any]


def rematerialized(function: Function, globs: Sequence[str]) -> Function:
    """The function, with what lies below paths that match made again on the way back.

    Args:
        function: of arrays in pytrees.
        globs: over paths; the shortest part of a path that matches is one piece.

    Raises:
        ValueError: when it is called: a glob matches nothing.
    """
    if not globs:
        return function

    def made(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        _refuse_unused(closed.jaxpr, globs)
        outputs = _evaluated(closed, jax.tree.leaves(arguments), globs)
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return made


def paths(function: Function, *arguments: Any) -> list[str]:
    """Those of a function, for a look at what could be matched."""
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return sorted({_path(eqn) for eqn in jaxpr.eqns} - {""})


def _evaluated(closed: core.ClosedJaxpr, inputs: Sequence[Any], globs: Sequence[str]) -> list[Any]:
    jaxpr = closed.jaxpr
    known = dict(zip(jaxpr.invars, inputs, strict=True)) | dict(zip(jaxpr.constvars, closed.consts, strict=True))
    pieces = [(piece, list(eqns)) for piece, eqns in groupby(jaxpr.eqns, lambda eqn: _piece(_path(eqn), globs))]
    wanted: list[set[Any]] = [_variables(jaxpr.outvars)]
    """By piece, from the last one: what is read after it."""
    for _, eqns in reversed(pieces):
        wanted.append(wanted[-1] | {atom for eqn in eqns for atom in _variables(eqn.invars)})
    wanted.reverse()
    for (piece, eqns), later in zip(pieces, wanted[1:], strict=True):
        made = dict.fromkeys(var for eqn in eqns for var in eqn.outvars)
        read = dict.fromkeys(atom for eqn in eqns for atom in eqn.invars if not isinstance(atom, core.Literal))
        taken = [var for var in read if var not in made]
        given = [var for var in made if var in later]
        effects = set().union(*(eqn.effects for eqn in eqns))
        part = core.Jaxpr((), taken, given, eqns, effects, jaxpr.debug_info)
        run = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))
        outputs = (run if piece is None else jax.checkpoint(run))(*(known[var] for var in taken))
        known |= zip(given, outputs, strict=True)
    return [atom.val if isinstance(atom, core.Literal) else known[atom] for atom in jaxpr.outvars]


def _variables(atoms: Sequence[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


def _path(eqn: core.JaxprEqn) -> str:
    return str(eqn.source_info.name_stack)


def _piece(path: str, globs: Sequence[str]) -> str | None:
    """The shortest part of the path, from its beginning, that a glob matches."""
    words = path.split("/")
    for end in range(1, len(words) + 1):
        part = "/".join(words[:end])
        if any(fnmatch.fnmatchcase(part, glob) for glob in globs):
            return part
    return None


def _refuse_unused(jaxpr: core.Jaxpr, globs: Sequence[str]) -> None:
    found = {_path(eqn) for eqn in jaxpr.eqns}
    for glob in globs:
        if not any(_piece(path, [glob]) for path in found):
            known = sorted({"/".join(path.split("/")[:3]) for path in found if path})
            raise ValueError(
                f"Expected each of remat to match a path of the loss, got {glob!r}, which matches none of {', '.join(known) or 'none'}."
            )
