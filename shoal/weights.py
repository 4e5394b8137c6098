"""Initial weights from a safetensors file, with names translated."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shoal.errors import DataError
from shoal.local import named_tree
from shoal.task import Variables


def from_safetensors(
    path: Path | str, init: Callable[[jax.Array], Any], *, rename: Mapping[str, str] | None = None, strict: bool = True
) -> Callable[[jax.Array], Variables]:
    """An `init` whose tensors come from a file; what the file does not have comes from `init`.

    Args:
        path: a safetensors file.
        init: the task's own `init`; its shapes and types are what the file must have.
        rename: regular expression over the file's names -> our name (`params/dense/kernel`), with `\\1` for groups; the
            first that matches whole is taken. Without one, names are taken as they are.
        strict: every tensor of the file must be used.

    Raises:
        DataError: no such file, a wrong shape, an unused tensor.

    Example:
        ``task.replace(init=shoal.from_safetensors("model.safetensors", task.init, rename={r"(.*)\\.weight": r"params/\\1/kernel"}))``
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        found = load_file(str(path))
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(f"Cannot read {path} as safetensors: {error}.") from error
    given = {_translate(name, rename or {}): value for name, value in found.items()}

    def loaded(key: jax.Array) -> Variables:
        made = init(key)
        variables = made if isinstance(made, Variables) else Variables(made, {})
        used: set[str] = set()
        params = named_tree(variables.params, "params", lambda name, leaf: _take(given, name, leaf, used))
        state = named_tree(variables.state, "state", lambda name, leaf: _take(given, name, leaf, used))
        if strict and (unused := sorted(set(given) - used)):
            raise DataError(
                f"{path}: {len(unused)} tensors have no place in the model, such as {unused[:3]}. Rename them, or strict=False."
            )
        return Variables(params, state)

    return loaded


def _translate(name: str, rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return name


def _take(given: Mapping[str, np.ndarray], name: str, leaf: Any, used: set[str]) -> Any:
    if name not in given:
        return leaf
    value = given[name]
    if value.shape != leaf.shape:
        raise DataError(f"Expected {name} to have shape {leaf.shape}, the file has {value.shape}.")
    used.add(name)
    return jnp.asarray(value, leaf.dtype)
