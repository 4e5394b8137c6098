"""A task's membership inference: trained on half of each user's examples, does its loss tell which half?

The model under attack is trained with the task's own settings, noise included. So are the *shadows* that the likelihood ratio is taken from: in
pairs, one on a random half of each user's examples, the other on the rest, so that each example is in half of them. The attacker
knows the task and other halves of the same data: more than most do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import jax
import numpy as np

from shoal.audit.audited import everybody
from shoal.audit.membership import Membership, by_likelihood_ratio, by_loss, told_apart
from shoal.data import Examples, Population
from shoal.errors import DataError
from shoal.local import Shape, model_shape
from shoal.lora import with_adapters
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import view_tensors
from shoal.report.facts import facts_of
from shoal.simulate.engine import RoundResult, simulate
from shoal.task import Task
from shoal.tensors import Tensors

CHUNK: Final = 256
"""Examples whose losses are computed at a time."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What the losses of a trained model tell of who was in its training."""

    by_loss: Membership
    """By a threshold on the loss."""
    by_likelihood: Membership | None
    """By the likelihood ratio from shadows (LiRA); None: without."""
    examples: int
    shadows: int
    claimed: float | None
    """The epsilon of the ledger, for a device with all its examples; None: nothing is claimed. These numbers cannot refute it: thresholds are
    chosen on the examples that they are judged by, and examples of one user are not independent. `audited` can."""
    delta: float
    """That it is stated at."""


def learned(
    task: Task,
    users: Population,
    *,
    rounds: int,
    shadows: int = 8,
    wrong: float = 0.01,
    seed: int = 0,
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Learned:
    """Trains 1 + `shadows` models on halves of the examples and says how well losses tell the halves apart.

    Args:
        task: any that has a loss of each example.
        users: whose examples; at least two each.
        rounds: of each training.
        shadows: models for the likelihood ratio, an even number; 0: by the loss only.
        wrong: share of the examples that were not trained on which may be accused.
        seed: of halves and training.
        on_round: told of each round of each training.

    Raises:
        DataError: a user has one example, which cannot be half in.
        ValueError: the number of shadows is odd, or the rounds are so few that they do not take every user.
    """
    check_shadows(shadows)
    if few := [user for user, size in users.sizes().items() if size < 2]:
        raise DataError(f"Expected at least two examples of each user, got fewer of {few[:3]}: a half is trained on.")
    chosen = task.replace(rounds=everybody(task, len(users)))
    if rounds < chosen.rounds.min_separation:
        raise ValueError(
            f"Expected rounds >= {chosen.rounds.min_separation}, got {rounds}: the noise is made for min_separation="
            f"{chosen.rounds.min_separation}, and with fewer rounds there are users whom none takes. Take more."
        )
    whole = Examples.concatenate([examples for _, examples in users.items()])
    halves = _halves(users, shadows, seed)
    losses, claimed = [], None
    for number, was_in in enumerate(halves):
        store = MemoryStore()
        found = simulate(
            chosen, _half(users, was_in), rounds=rounds, store=store, seed=seed + number, on_round=on_round
        )
        model = view_tensors(store.blobs, store.get_commit(found.run_id, rounds).model)
        losses.append(losses_of(chosen, model, whole))
        if not number:
            spent = facts_of(store, found.run_id).spent
            claimed = spent.epsilon if spent is not None else None
    target, made = halves[0], np.array(losses)
    scores = [by_loss(made[0])]
    if shadows:
        scores.append(by_likelihood_ratio(made[0], made[1:], np.array(halves[1:])))
    tests = [told_apart(score[target], score[~target], wrong=wrong) for score in scores]
    return Learned(
        by_loss=tests[0], by_likelihood=tests[1] if shadows else None, examples=len(whole), shadows=shadows, claimed=claimed,
        delta=task.privacy.delta,
    )  # fmt: skip


def check_shadows(shadows: int) -> None:
    """Raises ValueError unless so many models can be trained in pairs."""
    if shadows % 2 or shadows < 0:
        raise ValueError(f"Expected shadows to be even, 0 or more, got {shadows}: they come in pairs.")


def losses_of(task: Task, model: Tensors, examples: Examples) -> np.ndarray:
    """The task's loss of each example, (examples,) float64, by a model's tensors."""
    task = with_adapters(task)
    like = model_shape(task)
    params = Shape(like.params, "params").tree(dict(model))
    state = Shape(like.state, "state").tree(dict(model))

    @jax.jit
    def compute(batch: Any) -> Any:
        return task.losses(params, state, batch, jax.random.key(0)).per_example

    made = []
    for start in range(0, len(examples), CHUNK):
        rows = np.arange(start, start + CHUNK) % len(examples)  # of one shape, so that it is compiled once
        made.append(np.asarray(compute({**examples.take(rows), "mask": np.ones(CHUNK, bool)}), np.float64))
    return np.concatenate(made)[: len(examples)]


def _halves(users: Population, shadows: int, seed: int) -> list[np.ndarray]:
    """(examples,) bool for each model: a random half of each user's; of shadows in pairs a half and the rest."""
    rng = np.random.default_rng([seed, 2])

    def half() -> np.ndarray:
        return np.concatenate([rng.permutation(size) < (size + 1) // 2 for size in users.sizes().values()])

    made = [half()]
    for _ in range(shadows // 2):
        made += [drawn := half(), ~drawn]
    return made


def _half(users: Population, was_in: np.ndarray) -> Population:
    made, at = {}, 0
    for user, examples in users.items():
        made[user] = examples.take(np.flatnonzero(was_in[at : at + len(examples)]))
        at += len(examples)
    return Population.from_arrays(made)
