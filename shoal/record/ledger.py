"""Rules of the ledger, the same for every store: which reservations stand, and what answers one. No I/O."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from shoal.record.store import LedgerRow, Spend


def standing(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """The reservations that were not given back: what is spent."""
    released = {row.reservation for row in rows if row.entry == "release"}
    return [row for row in rows if row.entry == "reservation" and row.number not in released]


def reserved(spend: Spend, *, run_id: str, population: str, round: int, time_s: float) -> LedgerRow:
    """The entry of what a round takes; numbered by the store."""
    return LedgerRow(
        number=0, population=population, budget=spend.budget, entry="reservation", amount=spend.amount, run_id=run_id, round=round,
        time_s=time_s, data=spend.data,
    )  # fmt: skip


def answers(
    rows: Sequence[LedgerRow], *, round: int, entry: Literal["settlement", "release"], time_s: float
) -> list[LedgerRow]:
    """Entries that answer a round's reservations which nothing has answered yet.

    Args:
        rows: of the run.
        round: whose reservations.
        entry: what becomes of them.
        time_s: seconds since the epoch.
    """
    known = {row.reservation for row in rows}
    return [
        replace(row, number=0, entry=entry, reservation=row.number, time_s=time_s, data={})
        for row in rows
        if row.entry == "reservation" and row.round == round and row.number not in known
    ]
