"""Whose a run's lease is, the same for every store: rules on its row, no I/O. What a lease promises stands in `store.py`."""

import time

from shoal import validate
from shoal.errors import LeaseHeld, LeaseLost
from shoal.record.store import LeaseRow

FREE = ""
"""Holder of a lease that was ended."""


def check_terms(holder: str, life_s: float) -> None:
    """Raises ValueError for a holder or a life that cannot be."""
    validate.positive(life_s=life_s)
    if holder == FREE:
        raise ValueError("Expected a holder that nobody else is, got ''. `holder_name()` makes one.")


def taken(
    row: LeaseRow | None, run: str, *, holder: str, now_s: float, life_s: float, mine: int | None, instead_of: LeaseRow | None
) -> LeaseRow:  # fmt: skip
    """The row of a new holder. Raises LeaseHeld where another may not have it yet.

    Args:
        row: as it is.
        run: whose it is.
        holder: who takes it.
        now_s: epoch seconds.
        life_s: seconds until it expires.
        mine: the fence that this store has.
        instead_of: a lease that is known to be dead.
    """
    fence = 0 if row is None else row.fence
    is_anothers = row is not None and row.holder not in (FREE, holder) and row.fence != mine
    if row is not None and is_anothers and row != instead_of and row.expires_s > now_s:
        raise held(run, row)
    return LeaseRow(holder=holder, fence=fence + 1, expires_s=now_s + life_s)


def held(run: str, row: LeaseRow) -> LeaseHeld:
    return LeaseHeld(
        f"Run {run} belongs to another process, {row.holder}, until {_time(row.expires_s)}. End it, or wait until then "
        "and take the run up again.",
        holder=row.holder,
        expires_s=row.expires_s,
    )


def lost(run: str, row: LeaseRow | None, mine: int | None) -> LeaseLost:
    whose = "its lease was ended"
    if row is not None and row.holder != FREE:
        whose = f"{row.holder} has taken it over (fence {row.fence})"
    return LeaseLost(
        f"Run {run} is no longer this process's (fence {mine}): {whose}. Nothing was written; nothing that was told to be "
        "counted is lost."
    )


def check_fence(row: LeaseRow | None, run: str, mine: int | None) -> None:
    """Raises the refusal of a store that has this fence, where the lease is another's: invariant (6)."""
    if mine != (None if row is None or row.holder == FREE else row.fence):
        raise lost(run, row, mine) if row is None or mine is not None else held(run, row)


def _time(epoch_s: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(min(max(epoch_s, 0.0), 4e9)))
