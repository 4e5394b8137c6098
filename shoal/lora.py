"""Low-rank adapters: a frozen matrix that learns by two thin ones beside it (Hu et al. 2022, "LoRA: low-rank adaptation of
large language models", section 4.1).

    leaves={"params/*/kernel": "lora(4)"}

    params/dense/kernel          W, frozen: sent to a device once, in no update
    params/dense/kernel/lora_a   A (rows, 4), normal with variance 1/rows, learned
    params/dense/kernel/lora_b   B (4, columns), zeros at first, learned
    the task's functions see     W + A B

A leaf of more than two dims (a convolution's kernel) is the matrix of its last dim and all others. With the adapters as they
begin the model is the one that it was. Departure: no factor alpha/rank before A B; it would scale the learning rate.
"""

import fnmatch
import glob
import re
from collections.abc import Mapping
from math import prod
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.task import Task, Tree, Variables

A, B = "/lora_a", "/lora_b"
_RULE: Final = re.compile(r"lora\((\d+)\)")


def rank_of(rule: str) -> int | None:
    """The rank that a leaf rule names; None where it names none."""
    found = _RULE.fullmatch(rule)
    return int(found[1]) if found else None


def with_adapters(task: Task) -> Task:
    """The task whose parameters are base and adapters, as its leaf rules say; the task itself where none says so.

    Raises:
        ValueError: such a rule matches no parameter, or one that is no matrix of floats of at least that rank.
    """
    wanted = {pattern: rank for pattern, rule in task.leaves.items() if (rank := rank_of(rule)) is not None}
    if not wanted:
        return task
    like = jax.eval_shape(task.variables, jax.random.key(0))
    paths, treedef = jax.tree_util.tree_flatten_with_path(like.params)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    ranks = {name: rank for name in shapes if (rank := rank_of(task.leaf_rule(f"params/{name}"))) is not None}
    for pattern in wanted:
        if not any(fnmatch.fnmatchcase(f"params/{name}", pattern) for name in shapes):
            raise ValueError(
                f"Expected leaves of task {task.name!r} to match a parameter, got {pattern!r}, which matches none of "
                f"{', '.join(f'params/{name}' for name in shapes)}."
            )
    for name, rank in ranks.items():
        _check(name, shapes[name], rank)

    def merged(params: Mapping[str, Any]) -> Tree:
        leaves = (_merge(params[n], params[n + A], params[n + B]) if n in ranks else params[n] for n in shapes)
        return jax.tree_util.tree_unflatten(treedef, list(leaves))

    def init(key: jax.Array) -> Variables:
        params, state = task.variables(key)
        made = dict(zip(shapes, jax.tree.leaves(params), strict=True))
        for number, (name, rank) in enumerate(ranks.items()):
            base = made[name]
            rows, columns = _matrix(base.shape)
            draws = jax.random.normal(jax.random.fold_in(key, number), (rows, rank), jnp.float32)
            made[name + A] = (draws / rows**0.5).astype(base.dtype)
            made[name + B] = jnp.zeros((rank, columns), base.dtype)
        return Variables(made, state)

    evaluate, predict, penalty = task.evaluate, task.predict, task.penalty
    return task.replace(
        init=init,
        loss=lambda params, state, batch, key: task.loss(merged(params), state, batch, key),
        evaluate=evaluate and (lambda params, state, batch: evaluate(merged(params), state, batch)),
        predict=predict and (lambda params, state, batch: predict(merged(params), state, batch)),
        penalty=penalty and (lambda params: penalty(merged(params))),
        leaves=_leaves(task, ranks),
    )


def merged_tensors(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of a model, with adapters added to what they adapt."""
    adapted = {name.removesuffix(A) for name in tensors if name.endswith(A)}
    return {
        name: np.asarray(_merge(np.asarray(value), np.asarray(tensors[name + A]), np.asarray(tensors[name + B])))
        if name in adapted
        else value
        for name, value in tensors.items()
        if not name.endswith((A, B))
    }


def _merge(base: Any, a: Any, b: Any) -> Any:
    return base + (a @ b).reshape(base.shape)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return prod(shape[:-1]), shape[-1]


def _check(name: str, leaf: Any, rank: int) -> None:
    most = min(_matrix(leaf.shape)) if len(leaf.shape) >= 2 else 0
    if not 1 <= rank <= most or not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise ValueError(
            f"Expected a matrix of floats for lora({rank}), of at least as many rows and columns, got params/{name} "
            f"{leaf.dtype}{list(leaf.shape)}. Name the leaves that are to be adapted, and a rank from 1 to their smaller side."
        )


def _leaves(task: Task, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Rules that name adapters first, then those of this file, then the others: `"params/*": "frozen"` means the rest."""
    named = {pattern: rule for pattern, rule in task.leaves.items() if "/lora_" in pattern}
    rest = {pattern: rule for pattern, rule in task.leaves.items() if rank_of(rule) is None and pattern not in named}
    bases = {glob.escape(f"params/{name}"): "frozen" for name in ranks}
    adapters = {glob.escape(f"params/{name}{part}"): "mean" for name in ranks for part in (A, B)}
    return {**named, **bases, **adapters, **rest}
