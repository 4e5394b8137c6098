"""What is found when a run is taken up again: after a stop, a crash, on another machine.

The record holds only whole transactions, so there is nothing to repair. What was under way is told from what was done: a
round still open had nobody left to close it, and a group without a version waits for the next commit.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shoal.record.store import CommitRow, GroupRow, RoundRow, RunRow, Store


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenUp:
    """Where a run stands."""

    run: RunRow
    last: CommitRow | None
    """The version to go on from; None before the initial model."""
    waiting: Sequence[GroupRow]
    """Groups whose devices were told *counted*: the next commit must hold them."""
    abandoned: Sequence[RoundRow]
    """Rounds that were open and are closed now."""
    next_round: int
    """The number of the next round."""


def abandon_open_rounds(
    store: Store, run_id: str, *, time_s: float, why: str = "the run was taken up again"
) -> list[RoundRow]:
    """Closes rounds left open as abandoned, each in a transaction; returns them as they are now.

    Args:
        time_s: Now, in epoch seconds.
        why: Goes into the reason, after `abandoned: `.
    """
    closed = [
        replace(
            row, state="abandoned", closed_s=time_s, released=row.selected - row.counted, reason=f"abandoned: {why}"
        )
        for row in store.rounds(run_id)
        if row.state == "open"
    ]
    for row in closed:
        store.close_round(run_id, row)
    return closed


def take_up(store: Store, run_id: str, *, time_s: float) -> TakenUp:
    """Closes what was left open, sets the run's status to running, and says where it stands. Doing it twice is harmless.

    Args:
        time_s: Now, in epoch seconds.
    """
    abandoned = abandon_open_rounds(store, run_id, time_s=time_s)
    store.set_status(run_id, "running", time_s=None)
    return TakenUp(
        run=store.run(run_id),
        last=store.last_commit(run_id),
        waiting=store.groups(run_id, waiting=True),
        abandoned=abandoned,
        next_round=1 + max((row.number for row in store.rounds(run_id)), default=0),
    )
