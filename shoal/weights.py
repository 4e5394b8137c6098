"""Weights in safetensors files: initial ones as Hugging Face publishes them, with names translated, and trained ones.

Read is one file, a list of shards (`model.safetensors.index.json`), or a folder that has either. Files of pickles (`.bin`,
`.pt`, `.ckpt`) are refused by their name and by their first bytes: to open one is to run whatever code is in it.
"""

import fnmatch
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.errors import DataError
from shoal.local import named, named_tree
from shoal.lora import merged_tensors
from shoal.task import Variables
from shoal.tensors import is_of_model

PICKLED: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
"""How files that are, or may be, pickles are named."""
_PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHOWN: Final = 5


def from_safetensors(
    path: Path | str,
    init: Callable[[jax.Array], Any],
    *,
    rename: Mapping[str, str] | None = None,
    convert: Callable[[str, np.ndarray], np.ndarray] | None = None,
    fresh: Sequence[str] = (),
    strict: bool = True,
) -> Callable[[jax.Array], Variables]:
    """An `init` whose tensors come from a file.

    Args:
        path: a safetensors file, an index of several (`….safetensors.index.json`), or a folder that has one of them under
            the names of Hugging Face.
        init: the task's own `init`; its shapes and types are what the file must have.
        rename: regular expression over the file's names -> our name (`params/dense/kernel`), with `\\1` for groups; the
            first that matches whole is taken. Without one, names are taken as they are; `params/` and `state/` are put
            before a name that has neither.
        convert: (our name, the file's array) -> the array to take, such as a kernel the other way round.
        fresh: globs over our names of tensors that the file need not have; they come from `init`.
        strict: the file has every tensor of the model but the fresh ones, and no other.

    Raises:
        DataError: no such file or no safetensors; tensors that are missing, not expected or of another shape, by name.

    Example:
        ``task.replace(init=shoal.from_safetensors("model.safetensors", task.init, rename={r"(.*)\\.weight": r"params/\\1/kernel"}))``
    """
    found = read_safetensors(path)

    def loaded(key: jax.Array) -> Variables:
        made = init(key)
        variables = made if isinstance(made, Variables) else Variables(made, {})
        own = named(variables.params, "params") | named(variables.state, "state")
        given = _translated(found, own, rename or {}, path)
        if convert is not None:
            given = {name: convert(name, value) if name in own else value for name, value in given.items()}
        _check(own, given, fresh, strict, path)

        def take(name: str, leaf: Any) -> Any:
            return jnp.asarray(given[name], leaf.dtype) if name in given else leaf

        return Variables(
            named_tree(variables.params, "params", take),
            named_tree(variables.state, "state", take),
        )

    return loaded


def read_safetensors(path: Path | str) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file, of an index of several, or of a folder with one of them.

    Raises:
        DataError: there is none, it is not safetensors, or it is a pickle.
    """
    found: dict[str, np.ndarray] = {}
    for file in _files(Path(path)):
        arrays = _read(file)
        if twice := sorted(set(found) & set(arrays)):
            raise DataError(f"{path}: {_some(twice)} in two of its files.")
        found |= arrays
    return found


def to_safetensors(tensors: Mapping[str, np.ndarray], path: Path | str, *, bare: bool = False) -> None:
    """Writes a model as a safetensors file, without what an algorithm added to the line (`control/…`), adapters merged.

    Args:
        tensors: name -> array, such as `shoal.load(run).tensors` or `shoal.simulate(…).model`.
        path: the file; its folder must exist.
        bare: leave out `params/` and `state/`: what is left of a task from a PyTorch module is its `state_dict`.

    Raises:
        ValueError: two tensors have the same name without what is left out.
    """
    from safetensors.numpy import save_file

    tensors = merged_tensors(tensors)
    names = {name: re.sub(r"^(params|state)/", "", name) if bare else name for name in tensors if is_of_model(name)}
    if len(set(names.values())) != len(names):
        twice = sorted(name for name in names.values() if list(names.values()).count(name) > 1)
        raise ValueError(
            f"Expected each tensor to have a name of its own, got {twice[0]} twice. Write it with bare=False."
        )
    save_file({new: np.asarray(tensors[name], order="C") for name, new in names.items()}, str(path))


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        there = [path / name for name in (_WHOLE, _INDEX) if (path / name).is_file()]
        if not there:
            pickled = sorted(file.name for file in path.iterdir() if file.suffix in PICKLED)
            hint = f" {_refusal(pickled[0])}" if pickled else ""
            raise DataError(f"{path} has neither {_WHOLE} nor {_INDEX}.{hint}")
        path = there[0]
    if path.suffix != ".json":
        return [path]
    try:
        shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"Cannot read {path} as an index of safetensors files: {error}.") from error
    # An index comes from strangers: it names files of its own folder and no others.
    if outside := sorted(str(name) for name in shards if not isinstance(name, str) or Path(name).name != name):
        raise DataError(f"Expected {path} to name files of its own folder, got {_some(outside)}.")
    return [path.parent / name for name in sorted(shards)]


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if path.suffix in PICKLED or _starts_like_a_pickle(path):
        raise DataError(_refusal(path.name))
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise DataError(f"Cannot read {path} as safetensors: {error}.") from error


def _starts_like_a_pickle(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(_PICKLE_STARTS)
    except OSError:
        return False  # the reader says it better


def _refusal(name: str) -> str:
    return (
        f"{name} is a pickle: to open it is to run whatever code is in it, so shoal never does. Write it as safetensors where "
        "you trust it: safetensors.torch.save_file(torch.load(…, weights_only=True), 'model.safetensors')."
    )


def _translated(
    found: Mapping[str, np.ndarray], own: Mapping[str, Any], rename: Mapping[str, str], path: Path | str
) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for theirs, value in found.items():
        name = _ours(theirs, own, rename)
        if name in made:
            raise DataError(f"{path}: two of its tensors are named {name}; the second is {theirs}. Look at rename.")
        made[name] = value
    return made


def _ours(name: str, own: Mapping[str, Any], rename: Mapping[str, str]) -> str:
    for pattern, replacement in rename.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    return next((whole for whole in (f"params/{name}", f"state/{name}") if whole in own and name not in own), name)


def _check(
    own: Mapping[str, Any], given: Mapping[str, np.ndarray], fresh: Sequence[str], strict: bool, path: Path | str
) -> None:
    """All that is wrong, in one error."""
    missing = [n for n in own if n not in given and not any(fnmatch.fnmatchcase(n, glob) for glob in fresh)]
    unexpected = sorted(set(given) - set(own))
    misshapen = [
        f"{name} is {tuple(given[name].shape)}, the model has {tuple(leaf.shape)}"
        for name, leaf in own.items()
        if name in given and tuple(given[name].shape) != tuple(leaf.shape)
    ]
    wrong = [f"of another shape: {_some(misshapen)} (convert=… can turn one)"] if misshapen else []
    if strict and missing:
        wrong.append(f"missing: {_some(missing)} (fresh=… leaves some to init)")
    if strict and unexpected:
        wrong.append(f"not expected: {_some(unexpected)} (rename=… translates names)")
    if wrong:
        rest = "" if misshapen else "; strict=False takes what fits"
        raise DataError(f"{path} does not fit the model: {'; '.join(wrong)}{rest}.")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
