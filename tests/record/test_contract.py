"""The store's contract, for every store. Each test of an invariant names it as `store.py` does."""

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import StoreError
from shoal.record import (
    EventRow,
    MemoryStore,
    RoundLog,
    RoundRow,
    Store,
    abandon_open_rounds,
    open_store,
    put_tensors,
    take_up,
)
from shoal.record.store import FinalRow
from shoal.tensors import Entry, Index, TensorSpec, sha256
from tests.record.builders import (
    EMPTY,
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


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened: Store = open_store(tmp_path / "run") if request.param == "sqlite" else MemoryStore()
    yield opened
    opened.close()


def test_stores_and_blobs_are_what_their_protocols_say(store: Store) -> None:
    from shoal.record import Blobs

    assert isinstance(store, Store) and isinstance(store.blobs, Blobs)


def test_a_run_reads_back(store: Store) -> None:
    store.create_run(run_row("b"))
    store.create_run(run_row("a", config={"sizes": (1, 2)}))
    assert store.run("b") == run_row("b")
    assert store.run("a").config == {"sizes": [1, 2]}  # as JSON has it
    assert [row.id for row in store.runs()] == ["a", "b"]
    store.set_status("a", "finished", time_s=9.0)
    assert (store.run("a").status, store.run("a").finished_s) == ("finished", 9.0)
    store.set_config("a", {"sizes": (3,), "rounds": 7})
    assert store.run("a").config == {"sizes": [3], "rounds": 7} and store.run("b") == run_row("b")
    with pytest.raises(ValueError, match="config"):
        store.set_config("a", {"odd": object()})


def test_a_run_is_created_once_and_must_exist(store: Store) -> None:
    store.create_run(run_row())
    with pytest.raises(StoreError, match="run exists"):
        store.create_run(run_row())
    calls: list[Callable[[], object]] = [
        lambda: store.run("x"), lambda: store.rounds("x"), lambda: store.last_commit("x"), lambda: store.log("x", []),
        lambda: store.set_status("x", "failed", time_s=1.0), lambda: store.token("x", b"n"),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(StoreError, match=r"Expected a run of this store \(run\), got 'x'"):
            call()


def test_config_must_be_json(store: Store) -> None:
    with pytest.raises(ValueError, match="config to be JSON"):
        store.create_run(run_row(config={"rate": math.nan}))
    assert store.runs() == []


def test_a_commit_reads_back_whole(store: Store) -> None:
    with_initial(store)
    store.open_round("run", open_row())
    commit = commit_row(store, 1, server_state=put_tensors(store.blobs, {"m": np.ones(2, np.float32)}))
    metrics = [metric_row(version=1), metric_row("loss", scope="class", device_class="phone")]
    store.commit(
        "run",
        commit,
        round=round_row(),
        groups=[group_row()],
        counted=[(b"n1", 50.0)],
        metrics=metrics,
        usage=[usage_row()],
    )
    assert store.last_commit("run") == store.get_commit("run", 1) == commit
    assert [row.version for row in store.commits("run")] == [0, 1]
    assert store.rounds("run") == [round_row()]
    assert store.groups("run") == [group_row(number=1, version=1)]
    assert (store.metrics("run"), store.metrics("run", "loss")) == (metrics, metrics[1:])
    assert store.usage("run") == [usage_row()]
    token = store.token("run", b"n1")
    assert token is not None and (token.state, token.version, token.expires_s) == ("counted", 1, 50.0)


def test_versions_have_no_gap__invariant_1(store: Store) -> None:
    store.create_run(run_row())
    assert store.last_commit("run") is None
    with pytest.raises(StoreError, match="Expected version 0 of run run next, got 1"):
        store.commit("run", commit_row(store, 1), round=None)
    store.commit("run", commit_row(store), round=None)
    for version in (0, 2):
        with pytest.raises(StoreError, match=f"Expected version 1 of run run next, got {version}"):
            store.commit("run", commit_row(store, version), round=None)
    with pytest.raises(StoreError, match="has versions 0 to 0, got 1"):
        store.get_commit("run", 1)


def test_a_nonce_is_counted_once__invariant_2(store: Store) -> None:
    with_initial(store)
    store.commit("run", commit_row(store, 1), round=round_row(), counted=[(b"a", 1.0), (b"b", 1.0)])
    with pytest.raises(StoreError, match=f"Nonce {b'b'.hex()} was counted before, in version 1"):
        store.commit("run", commit_row(store, 2), round=round_row(2), counted=[(b"c", 1.0), (b"b", 1.0)])
    with pytest.raises(StoreError, match="comes twice"):
        store.commit("run", commit_row(store, 2), round=round_row(2), counted=[(b"c", 1.0), (b"c", 1.0)])
    with pytest.raises(StoreError, match="was counted before"):
        store.add_group("run", group_row(), counted=[(b"a", 1.0)])
    with pytest.raises(StoreError, match="cannot be refused"):
        store.refuse("run", b"a", reason="late", expires_s=1.0)
    assert store.token("run", b"c") is None and store.last_version("run") == 1


def test_a_refused_nonce_is_not_counted__invariant_2(store: Store) -> None:
    with_initial(store)
    store.refuse("run", b"a", reason="late", expires_s=9.0)
    store.refuse("run", b"a", reason="again", expires_s=9.0)
    token = store.token("run", b"a")
    assert token is not None and (token.state, token.reason, token.version) == ("refused", "late", None)
    with pytest.raises(StoreError, match=r"was refused before \(late\)"):
        store.commit("run", commit_row(store, 1), round=round_row(), counted=[(b"a", 1.0)])


def test_runs_have_nonces_of_their_own(store: Store) -> None:
    with_initial(store)
    store.create_run(run_row("other"))
    store.refuse("run", b"a", reason="late", expires_s=9.0)
    assert store.token("other", b"a") is None


def test_expired_tokens_are_forgotten(store: Store) -> None:
    with_initial(store)
    store.commit("run", commit_row(store, 1), round=round_row(), counted=[(b"a", 1.0), (b"b", 2.0)])
    assert store.forget_tokens("run", before_s=2.0, to_version=99) == 1
    assert store.token("run", b"a") is None and store.token("run", b"b") is not None


def test_what_recent_versions_hold_is_known_whatever_the_clock_says(store: Store) -> None:
    with_initial(store)
    number = store.add_group("run", group_row(), counted=[(b"in a group", 1.0)])
    store.refuse("run", b"refused", reason="late", expires_s=1.0)
    store.commit(
        "run", commit_row(store, 1), round=round_row(), groups=[group_row(number=number)], counted=[(b"direct", 1.0)]
    )
    assert store.forget_tokens("run", before_s=1e9, to_version=0) == 1
    assert store.token("run", b"refused") is None
    assert store.token("run", b"direct") is not None and store.token("run", b"in a group") is not None
    assert store.forget_tokens("run", before_s=1e9, to_version=1) == 2


def test_a_group_waits_for_its_commit__invariant_2(store: Store) -> None:
    with_initial(store)
    number = store.add_group("run", group_row(), counted=[(b"a", 1.0)])
    token = store.token("run", b"a")
    assert token is not None and (token.state, token.version) == ("counted", None)
    (waiting,) = store.groups("run", waiting=True)
    assert waiting == group_row(number=number)
    store.commit("run", commit_row(store, 1), round=round_row(), groups=[waiting, group_row()], counted=[(b"b", 1.0)])
    assert store.groups("run", waiting=True) == []
    assert [row.version for row in store.groups("run")] == [1, 1]
    token = store.token("run", b"a")
    assert token is not None and token.version == 1
    for taken in (waiting, group_row(number=7)):
        with pytest.raises(StoreError, match="to wait for a commit"):
            store.commit("run", commit_row(store, 2), round=round_row(2), groups=[taken])


def test_who_is_in_a_group_that_waits_is_known_however_long_it_waits(store: Store) -> None:
    with_initial(store)
    number = store.add_group("run", group_row(), counted=[(b"a", 1.0)])
    assert store.forget_tokens("run", before_s=9.0, to_version=99) == 0
    assert store.waiting_nonces("run") == [b"a"]
    store.commit("run", commit_row(store, 1), round=round_row(), groups=[group_row(number=number)])
    assert store.forget_tokens("run", before_s=9.0, to_version=99) == 1


def test_who_is_in_versions_is_known_until_it_is_forgotten(store: Store) -> None:
    with_initial(store)
    number = store.add_group("run", group_row(), counted=[(b"a", 1.0)])
    assert store.counted_nonces("run", since_version=0) == {}
    store.refuse("run", b"r", reason="bad", expires_s=1.0)
    first = [group_row(number=number), group_row()]
    store.commit("run", commit_row(store, 1), round=round_row(), groups=first, counted=[(b"b", 1.0)])
    store.commit("run", commit_row(store, 2), round=round_row(2), groups=[group_row()], counted=[(b"c", 1.0)])
    known = store.counted_nonces("run", since_version=0)
    assert {version: sorted(nonces) for version, nonces in known.items()} == {1: [b"a", b"b"], 2: [b"c"]}
    assert store.counted_nonces("run", since_version=2) == {2: [b"c"]}
    store.forget_tokens("run", before_s=9.0, to_version=1)
    assert store.counted_nonces("run", since_version=0) == {2: [b"c"]}


def test_sums_are_kept_while_they_may_be_wanted(store: Store) -> None:
    with_initial(store)
    kept = [store.blobs.put(data) for data in (b"one", b"two", b"three")]
    store.commit("run", commit_row(store, 1), round=round_row(), groups=[group_row(sums_root=kept[0])])
    store.add_group("run", group_row(base_version=1, sums_root=kept[1]), counted=[(b"a", 1.0)])
    store.commit("run", commit_row(store, 2), round=round_row(2), groups=[group_row(base_version=1, sums_root=kept[2])])
    assert [row.base_version for row in store.groups("run", since_version=1)] == [1, 1]
    assert store.waiting_nonces("run") == [b"a"]
    assert store.forget_sums("run", before_version=2) == 2, "one still waits for its commit"
    assert [row.sums_root for row in store.groups("run")] == ["", kept[1], ""]
    assert [store.blobs.has(hash) for hash in kept] == [False, True, False]
    assert store.forget_sums("run", before_version=2) == 0


def test_a_version_gets_its_final_form_with_a_later_commit(store: Store) -> None:
    with_initial(store)
    store.commit("run", commit_row(store, 1), round=round_row())
    assert store.final("run", 1) is None
    other = commit_row(store, 9)
    final = FinalRow(version=1, model=other.model, server_state=other.server_state)
    store.commit("run", commit_row(store, 2), round=round_row(2), final=final)
    assert store.final("run", 1) == final and store.final("run", 2) is None
    assert store.get_commit("run", 1) == commit_row(store, 1), "what devices were given stays as it was"


def test_equal_sums_of_two_groups_are_one_blob_until_both_are_forgotten(store: Store) -> None:
    with_initial(store)
    root = store.blobs.put(b"sums")
    store.commit("run", commit_row(store, 1), round=round_row(), groups=[group_row(sums_root=root)])
    store.commit("run", commit_row(store, 2), round=round_row(2), groups=[group_row(base_version=1, sums_root=root)])
    store.forget_sums("run", before_version=1)
    assert store.blobs.has(root)
    store.forget_sums("run", before_version=2)
    assert not store.blobs.has(root)


def test_a_commit_names_blobs_that_exist__invariant_4(store: Store) -> None:
    store.create_run(run_row())
    absent = Index((Entry(TensorSpec(name="w", shape=(), dtype="int8"), sha256(b"1")),))
    with pytest.raises(StoreError, match="is not in"):
        store.commit("run", commit_row(store, 0, model=absent), round=None)
    with pytest.raises(StoreError, match="is not in"):
        store.set_plan("run", sha256(b"plan"))
    with_plan = store.blobs.put(b"plan")
    store.set_plan("run", with_plan)
    store.commit("run", commit_row(store), round=None)
    with pytest.raises(StoreError, match="is not in"):
        store.add_group("run", group_row(sums_root=sha256(b"sums")), counted=[])
    assert store.run("run").plan_hash == with_plan
    assert all(store.blobs.has(entry.hash) for commit in store.commits("run") for entry in commit.model)


def test_a_refused_call_changes_nothing__invariant_5(store: Store) -> None:
    with_initial(store)
    store.open_round("run", open_row())
    waiting = store.add_group("run", group_row(), counted=[(b"a", 1.0)])
    before = contents(store)
    group = group_row(number=waiting)
    more = {"metrics": [metric_row()], "usage": [usage_row()]}
    calls: list[Callable[[], object]] = [
        lambda: store.commit(
            "run", commit_row(store, 1), round=round_row(), groups=[group], counted=[(b"a", 1.0)], **more
        ),
        lambda: store.commit(
            "run", commit_row(store, 1), round=round_row(), groups=[group, group_row(number=9)], **more
        ),
        lambda: store.commit("run", commit_row(store, 2), round=round_row(2), counted=[(b"z", 1.0)], **more),
        lambda: store.close_round("run", round_row(base_version=4), usage=[usage_row()]),
        lambda: store.close_round("run", round_row(5, base_version=0), usage=[usage_row()]),
        lambda: store.add_group("run", group_row(), counted=[(b"z", 1.0), (b"a", 1.0)]),
        lambda: store.open_round("run", open_row()),
        lambda: store.open_round("run", open_row(2, base_version=4)),
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()
        assert contents(store) == before
    assert store.token("run", b"z") is None


def test_a_round_closes_once(store: Store) -> None:
    with_initial(store)
    with pytest.raises(StoreError, match="was never opened"):
        store.close_round("run", round_row())
    store.open_round("run", open_row())
    abandoned = round_row(state="abandoned", reason="abandoned: nobody came")
    store.close_round("run", abandoned, usage=[usage_row()])
    assert store.rounds("run") == [abandoned] and store.usage("run") == [usage_row()]
    with pytest.raises(StoreError, match="is abandoned"):
        store.close_round("run", abandoned)
    with pytest.raises(StoreError, match="is abandoned"):
        store.commit("run", commit_row(store, 1), round=round_row())


@pytest.mark.parametrize(
    ("what", "match"),
    [
        ({"round": round_row(2)}, "round of commit 1 to be number 1"),
        ({"round": round_row(state="abandoned")}, "state committed"),
        ({"round": round_row(base_version=1)}, "base versions before commit 1"),
        ({"groups": [group_row(version=3)]}, "version=None"),
        ({"groups": [group_row(weight=2**63)]}, "weight"),
        ({"groups": [group_row(number=1), group_row(number=1)]}, "each waiting group once"),
        ({"counted": [(b"", 1.0)]}, "nonce of 1 to 64 bytes"),
        ({"metrics": [metric_row(scope="class")]}, "device_class"),
        ({"metrics": [metric_row("")]}, "metric with a name"),
        ({"usage": [usage_row(seconds=math.inf)]}, "finite seconds"),
        ({"log": RoundLog(round=1, data=b"", kept=1)}, "log of the round that is closed"),
        ({"round": round_row(), "log": RoundLog(round=1, data=b"", kept=0)}, "at least 1 round"),
        ({"round": round_row(analytics={"odd": math.nan})}, "analytics to be JSON"),
    ],
)
def test_callers_mistakes_are_value_errors(store: Store, what: dict[str, object], match: str) -> None:
    with_initial(store)
    with pytest.raises(ValueError, match=match):
        store.commit("run", commit_row(store, 1), **{"round": None, **what})  # type: ignore[arg-type]
    assert store.last_version("run") == 0


def test_logs_of_the_newest_rounds_are_kept(store: Store) -> None:
    with_initial(store)
    for number in (1, 2, 4):
        log = RoundLog(round=number, data=bytes([0, number, 255]), kept=2)
        store.commit("run", commit_row(store, number if number < 4 else 3, round=number),
                     round=round_row(number, base_version=0), log=log)  # fmt: skip
    assert [store.round_log("run", number) for number in range(5)] == [None, None, None, None, b"\0\4\xff"]
    store.open_round("run", open_row(5, base_version=3))
    log = RoundLog(round=5, data=b"5", kept=2)
    store.close_round("run", round_row(5, base_version=3, state="abandoned"), log=log)
    assert [store.round_log("run", number) for number in (4, 5)] == [b"\0\4\xff", b"5"]


def test_metrics_of_any_value_read_back(store: Store) -> None:
    store.create_run(run_row())
    values = [math.nan, math.inf, -math.inf, 0.1, 1e-310, 3]
    store.log("run", [metric_row(str(i), value=value) for i, value in enumerate(values)])
    got = [row.value for row in store.metrics("run")]
    assert math.isnan(got[0]) and got[1:] == values[1:] and all(type(value) is float for value in got)


def test_usage_and_journal_read_back_in_order(store: Store) -> None:
    store.create_run(run_row())
    store.add_usage("run", [usage_row("push", joules=1.5), usage_row("pull")])
    events = [EventRow(time_s=2.0, kind="closed", data={"why": "goal"}), EventRow(time_s=1.0, kind="opened", data={})]
    store.journal("run", events)
    assert [row.phase for row in store.usage("run")] == ["push", "pull"]
    assert store.events("run") == events


def test_telemetry_reads_back_by_day(store: Store) -> None:
    store.create_run(run_row())
    rows = [telemetry_row(day=2), telemetry_row(day=1, sums=(-3, 0, 7)), telemetry_row(day=2, reports=5)]
    for row in rows:
        store.add_telemetry("run", row)
    assert store.telemetry("run") == [rows[1], rows[0], rows[2]]
    for wrong in ({"day": -1}, {"noise": 0.0}, {"sums": (2**64,)}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            store.add_telemetry("run", telemetry_row(**wrong))


def test_numpy_scalars_become_numbers(store: Store) -> None:
    with_initial(store)
    store.log("run", [metric_row(version=2, value=np.float64(0.25))])
    (row,) = store.metrics("run")
    assert (row.version, row.value, type(row.value)) == (2, 0.25, float)


def test_an_empty_model_is_a_model(store: Store) -> None:
    store.create_run(run_row())
    store.commit("run", commit_row(store, model=EMPTY), round=None)
    assert store.get_commit("run", 0).model == EMPTY


def test_taking_up_closes_what_was_open(store: Store) -> None:
    with_initial(store)
    store.set_status("run", "failed", time_s=7.0)
    store.open_round("run", open_row(3, base_version=0, selected=5, counted=2))
    store.add_group("run", group_row(round=3), counted=[(b"a", 1.0)])
    taken = take_up(store, "run", time_s=9.0)
    (row,) = taken.abandoned
    assert isinstance(row, RoundRow) and (row.state, row.closed_s, row.released) == ("abandoned", 9.0, 3)
    assert row.reason == "abandoned: the run was taken up again"
    assert taken.last is not None and taken.last.version == 0 and taken.next_round == 4
    assert [group.number for group in taken.waiting] == [1]
    assert (taken.run.status, taken.run.finished_s) == ("running", None)
    assert abandon_open_rounds(store, "run", time_s=10.0) == []


def test_threads_count_each_nonce_once__invariant_2(store: Store) -> None:
    with_initial(store)
    won: list[int] = []

    def offer(thread: int) -> None:
        for nonce in range(5):
            try:
                store.add_group("run", group_row(), counted=[(bytes([nonce]), 1.0)])
                won.append(nonce)
            except StoreError:
                assert store.token("run", bytes([nonce])) is not None

    threads = [threading.Thread(target=offer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == list(range(5)) and [row.number for row in store.groups("run")] == [1, 2, 3, 4, 5]


# Sweeping the past


def long_line(store: Store, versions: int = 10) -> Store:
    """A line whose versions each have a tensor of their own, a shared one, a round, a group, a nonce, usage, a metric."""
    with_initial(store)
    for version in range(1, versions + 1):
        store.commit(
            "run", commit_row(store, version), round=round_row(version), groups=[group_row(round=version, base_version=version - 1)],
            counted=[(bytes([version]), 100.0 + version)], metrics=[metric_row(version=version)],
            usage=[usage_row(round=version)],
            final=FinalRow(version=version - 1, model=own(store, 50 + version), server_state=EMPTY) if version > 1 else None,
        )  # fmt: skip
    return store


def own(store: Store, value: int) -> Index:
    return put_tensors(store.blobs, {"w": np.full(3, value, np.float32)})


def kept_whole(store: Store) -> list[int]:
    return [commit.version for commit in store.commits("run") if not commit.is_swept]


def test_sweeping_keeps_the_first_every_nth_and_the_newest(store: Store) -> None:
    long_line(store)
    gone = [entry.hash for version in (1, 2, 3, 5, 6) for entry in store.get_commit("run", version).model]
    shared = store.get_commit("run", 0).model
    deleted = store.sweep("run", since_version=0, before_version=8, every=4, finals_before=0)
    assert kept_whole(store) == [0, 4, 8, 9, 10]
    assert [commit.version for commit in store.commits("run")] == list(range(11)), "the line has no gap: invariant (1)"
    swept = store.get_commit("run", 5)
    assert (swept.is_swept, swept.model, swept.members, swept.round) == (True, EMPTY, 2, 5)
    assert all(
        store.blobs.has(entry.hash) for version in kept_whole(store) for entry in store.get_commit("run", version).model
    )
    named = {entry.hash for version in kept_whole(store) for entry in store.get_commit("run", version).model}
    assert all(store.blobs.has(entry.hash) for entry in shared), "what other versions name stays: invariant (4)"
    assert not any(store.blobs.has(hash) for hash in set(gone) - named)
    finals = 6  # final forms of 1, 2, 3, 5, 6, 7, whose rows went
    assert deleted == len({1, 2, 3, 5, 6, 7}) + finals
    assert [row.number for row in store.rounds("run")] == [4, 8, 9, 10]
    assert [row.version for row in store.metrics("run")] == [4, 8, 9, 10]
    assert [group.number for group in store.groups("run")] == [8, 9, 10]
    assert store.sweep("run", since_version=0, before_version=8, every=4, finals_before=0) == 0, "there is nothing left"
    store.commit("run", commit_row(store, 11), round=round_row(11))
    assert store.last_version("run") == 11


def test_sweeping_keeps_what_all_rounds_cost(store: Store) -> None:
    long_line(store)
    before = sum(row.seconds for row in store.usage("run")), sum(row.bytes_up for row in store.usage("run"))
    store.sweep("run", since_version=0, before_version=5, every=0, finals_before=0)
    store.sweep("run", since_version=5, before_version=8, every=0, finals_before=0)
    usage = store.usage("run")
    assert (sum(row.seconds for row in usage), sum(row.bytes_up for row in usage)) == before
    assert sorted(row.round for row in usage) == [0, 8, 9, 10]


def test_sweeping_leaves_alone_what_is_asked_for(store: Store) -> None:
    """Groups that wait, whose sums are kept, or of whom a device may still ask."""
    with_initial(store)
    for version in (1, 2, 3):
        number = store.add_group(
            "run", group_row(round=version, base_version=version - 1), counted=[(bytes([version]), 10.0)]
        )
        waiting = next(group for group in store.groups("run") if group.number == number)
        store.commit("run", commit_row(store, version), round=round_row(version), groups=[waiting])
    late = store.add_group(
        "run", group_row(round=1, base_version=0, sums_root=store.blobs.put(b"sums")), counted=[(b"z", 99.0)]
    )
    store.sweep("run", since_version=0, before_version=3, every=0, finals_before=0)
    assert [group.number for group in store.groups("run")] == [1, 2, 3, late]
    token = store.token("run", b"\1")
    assert token is not None and token.version == 1
    store.forget_tokens("run", before_s=50.0, to_version=99)
    store.sweep("run", since_version=0, before_version=3, every=0, finals_before=0)
    assert [group.number for group in store.groups("run")] == [3, late]
    assert store.blobs.has(store.groups("run", waiting=True)[0].sums_root)


def test_final_forms_that_have_served_go(store: Store) -> None:
    long_line(store, 4)
    finals = {version: store.final("run", version) for version in (1, 2, 3)}
    assert store.sweep("run", since_version=0, before_version=0, every=0, finals_before=3) == 2
    assert [store.final("run", version) is None for version in (1, 2, 3)] == [True, True, False]
    for version, final in finals.items():
        assert final is not None
        assert store.blobs.has(next(iter(final.model)).hash) == (version == 3)
    assert kept_whole(store) == [0, 1, 2, 3, 4]
