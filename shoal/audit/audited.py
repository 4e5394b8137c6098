"""A task audited: trained once among canaries, every device in as many rounds as its noise is made for, the worst that its ledger counts on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from shoal.audit.canaries import Canaries, with_canaries
from shoal.audit.one_run import Bound, bound
from shoal.data import Population
from shoal.errors import DataError
from shoal.policy import RoundPolicy, Selection
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import view_tensors
from shoal.report.facts import facts_of
from shoal.simulate.engine import RoundResult, simulate
from shoal.task import Task


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What an audit found."""

    bound: Bound
    claimed: float | None
    """The epsilon that the ledger says; None: there is no noise, and nothing is claimed."""
    rounds: int

    @property
    def refutes(self) -> bool:
        """Whether the claim is wrong, with the bound's confidence."""
        return self.claimed is not None and self.bound.epsilon > self.claimed


def audited(
    task: Task,
    users: Population,
    *,
    rounds: int,
    canaries: int = 400,
    seed: int = 0,
    on_round: Callable[[RoundResult], None] = lambda result: None,
) -> Audit:
    """Trains a task among canaries and says what epsilon that refutes.

    Args:
        task: with privacy.clip_norm.
        users: whose data it trains on.
        rounds: of the audit.
        canaries: of which about half are in; more give a larger bound. Those that no round took are not guessed about.
        seed: of coins and directions.
        on_round: told of each round.

    Raises:
        ValueError: the task does not clip, or the rounds took fewer than two canaries.
        DataError: there are too few devices for so many to rest as the task's noise is made for.
    """
    tossed = Canaries.toss(canaries, seed=seed)
    population = tossed.among(users)
    chosen = with_canaries(task.replace(rounds=everybody(task, len(population))), seed=seed)
    store, taken = MemoryStore(), set[str]()

    def told(result: RoundResult) -> None:
        taken.update(result.members)
        on_round(result)

    found = simulate(chosen, population, rounds=rounds, store=store, seed=seed, on_round=told)
    tried = np.array([name in taken for name in tossed.ids])
    if np.sum(tried) < 2:
        raise ValueError(
            f"Expected rounds that take at least 2 canaries, got {np.sum(tried)} of {canaries} in {rounds} rounds: with min_separation="
            f"{task.rounds.min_separation} most rest. Take more canaries, or more rounds."
        )
    models = [view_tensors(store.blobs, store.get_commit(found.run_id, version).model) for version in (0, rounds)]
    spent = facts_of(store, found.run_id).spent
    scores = tossed.scores(*models)
    delta = task.privacy.delta
    return Audit(
        bound=bound(scores[tried], tossed.was_in[tried], delta=delta),
        claimed=spent.epsilon if spent is not None else None,
        rounds=rounds,
    )


def everybody(task: Task, devices: int) -> RoundPolicy:
    """Rounds that each of so many devices is in as often as may be: in all, or where noise is correlated in every `min_separation`-th, as there the
    noise is made for that and would be more with less.

    Raises:
        DataError: so few would be in a round that it could not be.
    """
    hands = 1 if task.privacy.correlated is None else task.rounds.min_separation
    goal = devices // hands
    if hands > 1 and goal < task.rounds.minimum_group:
        raise DataError(
            f"Expected at least {hands * task.rounds.minimum_group} devices (users and canaries) to audit task {task.name!r}, got {devices}: the "
            f"noise is made for min_separation={hands}, so each is in one round of so many, and minimum_group={task.rounds.minimum_group}. Bring "
            "more users, or canaries."
        )
    return replace(task.rounds, goal=goal, over_selection=1.0, selection=Selection(), min_separation=hands)
