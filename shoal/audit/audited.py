"""A task audited: trained once among canaries, every device in every round, which is the worst that its ledger counts on."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from shoal.audit.canaries import Canaries, with_canaries
from shoal.audit.one_run import Bound, bound
from shoal.data import Population
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
        canaries: of which about half are in; more give a larger bound.
        seed: of coins and directions.
        on_round: told of each round.

    Raises:
        ValueError: the task does not clip.
    """
    tossed = Canaries.toss(canaries, seed=seed)
    population = tossed.among(users)
    chosen = with_canaries(task, seed=seed)
    store = MemoryStore()
    found = simulate(
        chosen.replace(rounds=everybody(task.rounds, len(population))),
        population,
        rounds=rounds,
        store=store,
        seed=seed,
        on_round=on_round,
    )
    models = [view_tensors(store.blobs, store.get_commit(found.run_id, version).model) for version in (0, rounds)]
    spent = facts_of(store, found.run_id).spent
    scores = tossed.scores(*models)
    delta = task.privacy.delta
    return Audit(
        bound=bound(scores, tossed.was_in, delta=delta),
        claimed=spent.epsilon if spent is not None else None,
        rounds=rounds,
    )


def everybody(rounds: RoundPolicy, users: int) -> RoundPolicy:
    """Rounds that all users are in."""
    return replace(rounds, goal=users, over_selection=1.0, selection=Selection(), min_separation=1)
