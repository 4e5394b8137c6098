"""The lease of a run, for every store: who has it writes, nobody else does (invariant 6), whatever the clocks say."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.errors import LeaseHeld, LeaseLost, StoreError
from shoal.record import EventRow, LeaseRow, MemoryStore, Store, open_store
from tests.record.builders import (
    commit_row,
    contents,
    group_row,
    metric_row,
    open_row,
    round_row,
    run_row,
    telemetry_row,
    usage_row,
    with_initial,
)

Opened = tuple[Store, Store]


@pytest.fixture(params=["sqlite", "memory"])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opened]:
    """The stores of two processes on one record, which has a run."""
    if request.param == "sqlite":
        one: Store = open_store(tmp_path / "run")
        with_initial(one)
        other: Store = open_store(tmp_path / "run")
    else:
        memory = MemoryStore()
        with_initial(memory)
        one, other = memory, memory.opened_again()
    yield one, other
    one.close()
    other.close()


def take(store: Store, holder: str, now_s: float = 0.0, **changes: LeaseRow) -> int:
    return store.take_lease("run", holder=holder, now_s=now_s, life_s=30.0, **changes)


def writes(store: Store) -> dict[str, Callable[[], object]]:
    """Every call that writes rows of a run, each of which would pass on a run as `with_initial` makes it."""
    return {
        "set_status": lambda: store.set_status("run", "failed", time_s=1.0),
        "set_plan": lambda: store.set_plan("run", ""),
        "set_config": lambda: store.set_config("run", {"rate": 0.2}),
        "open_round": lambda: store.open_round("run", open_row(1)),
        "close_round": lambda: store.close_round("run", round_row(9, base_version=0, state="abandoned")),
        "add_group": lambda: store.add_group("run", group_row(), counted=[(b"n", 1.0)]),
        "forget_sums": lambda: store.forget_sums("run", before_version=1),
        "commit": lambda: store.commit("run", commit_row(store, 1), round=round_row(1), counted=[(b"m", 1.0)]),
        "refuse": lambda: store.refuse("run", b"r", reason="late", expires_s=1.0),
        "forget_tokens": lambda: store.forget_tokens("run", before_s=9.0, to_version=99),
        "sweep": lambda: store.sweep("run", since_version=0, before_version=1, every=0, finals_before=0),
        "log": lambda: store.log("run", [metric_row()]),
        "add_usage": lambda: store.add_usage("run", [usage_row()]),
        "journal": lambda: store.journal("run", [EventRow(time_s=0.0, kind="x", data={})]),
        "add_telemetry": lambda: store.add_telemetry("run", telemetry_row()),
    }


def test_every_call_that_writes_is_refused_to_all_but_the_holder__invariant_6(stores: Opened) -> None:
    one, other = stores
    one.open_round("run", open_row(9, base_version=0))
    take(one, "one")
    before = contents(one)
    for call in writes(other).values():
        with pytest.raises(LeaseHeld, match=r"belongs to another process, one, until 00:00:30 UTC"):
            call()
    assert contents(one) == before
    take(other, "other", now_s=31.0)
    for call in writes(one).values():
        with pytest.raises(LeaseLost, match=r"\(fence 1\): other has taken it over \(fence 2\)"):
            call()
    assert contents(one) == before
    for call in writes(other).values():
        call()
    assert contents(one) != before and one.last_version("run") == 1


def test_the_list_of_calls_that_write_is_whole(stores: Opened) -> None:
    reads = {
        "run", "runs", "rounds", "round_log", "ledger", "groups", "waiting_nonces", "counted_nonces", "final", "last_version", "last_commit", "get_commit",
        "commits", "token", "metrics", "usage", "events", "telemetry", "close", "blobs", "lease", "settling",
    }  # fmt: skip
    of_leases = {"take_lease", "renew_lease", "end_lease"}
    calls = {name for name in vars(Store) if not name.startswith("_")}
    assert calls == reads | of_leases | {"create_run"} | writes(stores[0]).keys()


def test_it_is_held_until_it_expires_or_ends__and_fences_rise(stores: Opened) -> None:
    one, other = stores
    assert one.lease("run") is None
    assert take(one, "one", now_s=100.0) == 1
    assert other.lease("run") == LeaseRow(holder="one", fence=1, expires_s=130.0)
    with pytest.raises(LeaseHeld) as refused:
        take(other, "other", now_s=129.9)
    assert (refused.value.holder, refused.value.expires_s) == ("one", 130.0)
    one.renew_lease("run", 1, expires_s=160.0)
    with pytest.raises(LeaseHeld):
        take(other, "other", now_s=159.0)
    assert take(other, "other", now_s=160.0) == 2
    other.end_lease("run", 2)
    assert one.lease("run") == LeaseRow(holder="", fence=2, expires_s=0.0)
    assert take(one, "one again", now_s=0.0) == 3


def test_one_that_has_expired_is_good_until_another_takes_it(stores: Opened) -> None:
    one, other = stores
    fence = take(one, "one")
    one.log("run", [metric_row()])  # no call that writes looks at a clock
    with pytest.raises(LeaseHeld):
        other.log("run", [metric_row()])
    one.renew_lease("run", fence, expires_s=5000.0)
    take(other, "other", now_s=5000.0)
    with pytest.raises(LeaseLost):
        one.renew_lease("run", fence, expires_s=9000.0)


def test_one_who_lost_it_stays_shut_out_also_after_the_others_end(stores: Opened) -> None:
    one, other = stores
    stale = take(one, "one")
    fence = take(other, "other", now_s=60.0)
    one.end_lease("run", stale)  # does nothing: it is not its own
    other.log("run", [metric_row()])
    other.end_lease("run", fence)
    with pytest.raises(LeaseLost, match="its lease was ended"):
        one.log("run", [metric_row()])
    other.log("run", [metric_row()])  # nobody has it: as without leases
    assert take(one, "one once more") == 3
    one.log("run", [metric_row()])


def test_its_holder_and_the_same_store_take_it_again_at_once(stores: Opened) -> None:
    one, other = stores
    assert (take(one, "one"), take(one, "one, another part of it")) == (1, 2)
    assert take(other, "one, another part of it") == 3  # a life goes on through another connection
    with pytest.raises(LeaseLost):
        one.log("run", [metric_row()])


def test_one_that_is_dead_is_followed_at_once_unless_it_has_changed(stores: Opened) -> None:
    one, other = stores
    take(one, "one")
    seen = other.lease("run")
    one.renew_lease("run", 1, expires_s=60.0)
    with pytest.raises(LeaseHeld):
        take(other, "other", instead_of=seen)
    seen = other.lease("run")
    assert seen is not None and take(other, "other", instead_of=seen) == 2


def test_bad_terms_and_unknown_runs_are_refused(stores: Opened) -> None:
    one, _ = stores
    with pytest.raises(ValueError, match="life_s > 0"):
        one.take_lease("run", holder="one", now_s=0.0, life_s=0.0)
    with pytest.raises(ValueError, match="Expected a holder"):
        take(one, "")
    with pytest.raises(StoreError, match="Expected a run of this store"):
        one.take_lease("x", holder="one", now_s=0.0, life_s=1.0)
    with pytest.raises(StoreError, match="Expected a run of this store"):
        one.lease("x")
    with pytest.raises(LeaseLost):
        one.renew_lease("run", 1, expires_s=1.0)


def test_runs_of_one_record_have_leases_of_their_own(stores: Opened) -> None:
    one, other = stores
    one.create_run(run_row("second"))
    take(one, "one")
    other.take_lease("second", holder="other", now_s=0.0, life_s=30.0)
    one.set_status("run", "running", time_s=None)
    other.set_status("second", "running", time_s=None)
    with pytest.raises(LeaseHeld):
        one.set_status("second", "failed", time_s=1.0)


def test_a_crash_within_the_taking_leaves_the_store_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shoal.record import _statements as sql

    store = open_store(tmp_path)
    with_initial(store)

    def broken(*_: object) -> None:
        raise OSError("now")

    with monkeypatch.context() as patch:
        patch.setattr(type(sql.FIND_RUN), "run", broken)
        with pytest.raises(OSError, match="now"):
            take(store, "one")
    assert store.lease("run") is None
    store.log("run", [metric_row()])
    store.close()
