"""Invariant (7) of the store: what is taken from a budget is taken with the round, and is spent unless it is given back."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import BudgetSpent
from shoal.record import MemoryStore, Store, abandon_open_rounds, open_store
from shoal.record.ledger import standing
from shoal.record.store import LedgerRow, Spend
from tests.record.builders import commit_row, open_row, round_row, run_row, with_initial

NAME = "privacy"


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store = open_store(tmp_path / "run") if request.param == "sqlite" else MemoryStore()
    with_initial(opened)
    yield opened
    opened.close()


def at_most(limit: float) -> Callable[[Sequence[LedgerRow]], None]:
    def allows(before: Sequence[LedgerRow]) -> None:
        if sum(row.amount for row in standing(before)) + 1.0 > limit:
            raise BudgetSpent("no more")

    return allows


def spend(limit: float = 10.0) -> Spend:
    return Spend(budget=NAME, amount=1.0, data={"noise_multiplier": 2.0}, allows=at_most(limit))


def entries(store: Store) -> list[tuple[str, int, int | None]]:
    return [(row.entry, row.round, row.reservation) for row in store.ledger("default", NAME)]


def test_a_commit_settles_what_its_round_has_taken(store: Store) -> None:
    store.open_round("run", open_row(1), spend=spend())
    (row,) = store.ledger("default", NAME)
    assert (row.entry, row.amount, row.round, row.run_id) == ("reservation", 1.0, 1, "run")
    assert row.data == {"noise_multiplier": 2.0}
    store.commit("run", commit_row(store, 1, round=1), round=round_row(1))
    assert entries(store) == [("reservation", 1, None), ("settlement", 1, 1)]
    assert len(standing(store.ledger("default", NAME))) == 1


def test_who_allows_a_round_sees_what_became_of_those_before(store: Store) -> None:
    store.open_round("run", open_row(1), spend=spend())
    store.commit("run", commit_row(store, 1, round=1), round=round_row(1))
    seen: list[Sequence[LedgerRow]] = []
    store.open_round("run", open_row(2, base_version=1), spend=replace(spend(), allows=seen.append))
    assert [[row.entry for row in rows] for rows in seen] == [["reservation", "settlement"]]


def test_a_budget_that_is_spent_opens_no_round(store: Store) -> None:
    store.open_round("run", open_row(1), spend=spend(1.0))
    with pytest.raises(BudgetSpent):
        store.open_round("run", open_row(2, base_version=0), spend=spend(1.0))
    assert [row.number for row in store.rounds("run")] == [1] and len(entries(store)) == 1


def test_only_what_is_given_back_is_not_spent(store: Store) -> None:
    store.open_round("run", open_row(1), spend=spend(2.0))
    closed = replace(open_row(1), state="abandoned", closed_s=5.0)
    store.close_round("run", closed, gives_back=True)
    assert entries(store) == [("reservation", 1, None), ("release", 1, 1)]
    store.open_round("run", open_row(2, base_version=0), spend=spend(2.0))
    abandon_open_rounds(store, "run", time_s=9.0)  # a crash: it may have been used
    store.open_round("run", open_row(3, base_version=0), spend=spend(2.0))
    with pytest.raises(BudgetSpent):
        store.open_round("run", open_row(4, base_version=0), spend=spend(2.0))


def test_rounds_without_noise_enter_nothing(store: Store) -> None:
    store.open_round("run", open_row(1))
    store.commit("run", commit_row(store, 1, round=1), round=round_row(1))
    assert entries(store) == []


def test_two_coordinators_race_and_nothing_is_taken_twice(tmp_path: Path) -> None:
    """Two runs of one population, each by a store of its own, ask for 20 each of a budget of 25."""
    stores = [open_store(tmp_path / "record") for _ in range(2)]
    for run in "ab":
        stores[0].create_run(run_row(run))
        stores[0].commit(run, commit_row(stores[0]), round=None)
    refused = [0, 0]

    def ask(at: int) -> None:
        for number in range(1, 21):
            try:
                stores[at].open_round("ab"[at], open_row(number, base_version=0), spend=spend(25.0))
            except BudgetSpent:
                refused[at] += 1

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].ledger("default", NAME)) == 25 and sum(refused) == 15
    for each in stores:
        each.close()
