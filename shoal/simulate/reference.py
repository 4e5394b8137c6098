"""Federated averaging as the paper writes it, with plain loops: the oracle that the engine is held against.

McMahan et al. 2017, algorithm 1: each member takes local steps on its examples, the server averages what they reached,
weighted by examples. No blocks, no plan, no fixed point, no padding: only the order of examples and the keys are shared
with the engine, so that the results can be compared to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from shoal.data.store import Examples
from shoal.fleet.configuration import round_seed
from shoal.local import named, seed_key
from shoal.plan.train import member_randomness
from shoal.task import Task, Tree, Variables

LocalStep = Callable[[Tree, Tree, Tree, dict[str, jax.Array], jax.Array], tuple[Tree, Tree, Tree]]
"""(params, state, optimizer state, batch, key) -> the first three after one step"""


def reference_rounds(
    task: Task, members: Mapping[str, Examples], cohorts: Sequence[Sequence[str]], *, run_seed: bytes, seed: int
) -> dict[str, np.ndarray]:
    """Trains for `len(cohorts)` rounds and returns the last model by name. Server rule: the plain mean."""
    variables = task.variables(jax.random.key(seed))
    # The batch has as many rows as there are examples: nothing is padded here.
    local_step: LocalStep = jax.jit(partial(_local_step, task))
    private: dict[str, Variables] = {}
    for version, cohort in enumerate(cohorts):
        reached, weights, steps = [], [], []
        for member in cohort:
            start = _with_private(task, variables, private.get(member))
            after, weight, taken = _client_update(
                task, local_step, start, members[member], round_seed(run_seed, version), member
            )
            private[member] = after
            reached.append(after)
            weights.append(weight)
            steps.append(taken)
        if task.local.partial == "fednova":
            reached = _of_equal_steps(variables, reached, weights, steps)
        variables = _average(task, variables, reached, weights)
    flat = named(variables.params, "params") | named(variables.state, "state")
    return {name: np.asarray(value) for name, value in sorted(flat.items())}


def _client_update(
    task: Task, local_step: LocalStep, start: Variables, examples: Examples, seed: bytes, member: str
) -> tuple[Variables, int, int]:
    randomness = member_randomness(seed, member)
    params, state = start
    opt = task.local.optimizer.init(params)
    step = count = 0
    for _ in range(task.local.epochs):
        order = randomness.rng.permutation(len(examples))
        for first in range(0, len(order), task.local.batch_size):
            chosen = examples.take(order[first : first + task.local.batch_size])
            size = len(next(iter(chosen.values())))
            batch = {name: jnp.asarray(chosen[name]) for name in task.batch} | {"mask": jnp.ones(size, bool)}
            key = jax.random.fold_in(seed_key(randomness.key), step)
            params, state, opt = local_step(params, state, opt, batch, key)
            step, count = step + 1, count + size
    return Variables(params, state), count, step


def _local_step(
    task: Task, params: Tree, state: Tree, opt: Tree, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[Tree, Tree, Tree]:
    def objective(params: Tree) -> tuple[jax.Array, Tree]:
        result = task.losses(params, state, batch, key)
        return jnp.mean(result.per_example), result.state

    gradient, state = jax.grad(objective, has_aux=True)(params)
    updates, opt = task.local.optimizer.update(gradient, opt, params)
    return optax.apply_updates(params, updates), state, opt


def _with_private(task: Task, broadcast: Variables, own: Variables | None) -> Variables:
    if own is None:
        return broadcast
    return Variables(
        _choose(task, broadcast.params, own.params, "params"), _choose(task, broadcast.state, own.state, "state")
    )


def _choose(task: Task, shared: Tree, own: Tree, prefix: str) -> Tree:
    names = iter(named_in_order(shared, prefix))
    return jax.tree.map(lambda s, o: o if task.leaf_rule(next(names)) == "private" else s, shared, own)


def named_in_order(tree: Tree, prefix: str) -> list[str]:
    """The names of a pytree's leaves, in its own order."""
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}" for path, _ in paths]


def _of_equal_steps(
    before: Variables, reached: list[Variables], weights: list[int], steps: list[int]
) -> list[Variables]:
    """Where members would have got with the mean number of steps, each as long as its own (Wang et al. 2020, equation 7)."""
    mean = sum(w * s for w, s in zip(weights, steps, strict=True)) / sum(weights)

    def at(after: Variables, taken: int) -> Variables:
        return Variables(
            jax.tree.map(lambda b, a: b + (mean / taken) * (a - b), before.params, after.params), after.state
        )

    return [at(after, taken) for after, taken in zip(reached, steps, strict=True)]


def _average(task: Task, before: Variables, reached: list[Variables], weights: list[int]) -> Variables:
    total = sum(weights)

    def mean(prefix: str, old: Tree, *news: Tree) -> Tree:
        names = iter(named_in_order(old, prefix))

        def leaf(o: jax.Array, *ns: jax.Array) -> jax.Array:
            if task.leaf_rule(next(names)) != "mean":
                return o
            return sum((w / total) * n for w, n in zip(weights, ns, strict=True))  # type: ignore[return-value]

        return jax.tree.map(leaf, old, *news)

    return Variables(
        mean("params", before.params, *(v.params for v in reached)),
        mean("state", before.state, *(v.state for v in reached)),
    )
