"""Facts: what the record says, put together."""

from dataclasses import replace

import pytest

from shoal.record.store import CommitRow, EventRow
from shoal.report.facts import Facts, Point, Usage, seconds_at_work
from shoal.tensors import Index


def test_a_run_is_summed_up(facts: Facts) -> None:
    assert facts.run.name == "line" and facts.run.status == "finished"
    assert facts.version == 3 and facts.parameters == 2
    assert facts.commits == ((2, 12),) * 3 and facts.num_examples_used == 36
    assert [row.state for row in facts.rounds] == ["committed"] * 3
    assert facts.usage["compute"].seconds > 0
    assert facts.usage.get("teleport", Usage()).seconds == 0


def test_metrics_are_by_version(facts: Facts) -> None:
    accuracy = facts.metrics["accuracy"]
    assert [point.version for point in accuracy] == [1, 2, 3]
    assert facts.last("accuracy") == accuracy[-1].value and facts.last("nothing") is None
    assert [point.version for point in facts.metrics["train/loss"]] == [0, 1, 2]


def test_the_first_version_that_reaches_a_level_is_found(facts: Facts) -> None:
    facts = replace(facts, metrics={"a": [Point(1, 0.1), Point(2, 0.6), Point(3, 0.4)]})
    assert facts.first_reaching("a", 0.5) == 2
    assert facts.first_reaching("a", 0.9) is None
    assert facts.first_reaching("b", 0.0) is None


def _commit(version: int, created_s: float) -> CommitRow:
    empty = Index(())
    return CommitRow(
        version=version, model=empty, server_state=empty, round=version, members=1, weight=1, created_s=created_s
    )


def test_seconds_at_work_of_an_unbroken_run_count_from_its_creation() -> None:
    commits = [_commit(0, 100.0), _commit(1, 103.0), _commit(2, 104.0)]
    assert seconds_at_work(commits, [], created_s=100.0) == {1: 3.0, 2: 4.0}


def test_seconds_at_work_leave_out_pauses_and_work_that_was_lost() -> None:
    commits = [_commit(0, 100.0), _commit(1, 103.0), _commit(2, 110.0), _commit(3, 1006.0)]
    sessions = [
        EventRow(time_s=at, kind="session", data={"began_s": at})
        for at in (-2.0, 900.0)  # the command began before the run was created
    ]
    seconds = seconds_at_work(commits, [*sessions, EventRow(time_s=1.0, kind="other", data={})], created_s=100.0)
    assert seconds == pytest.approx({1: 5.0, 2: 12.0, 3: 18.0})


def test_a_session_without_a_commit_adds_nothing() -> None:
    sessions = [EventRow(time_s=at, kind="session", data={"began_s": at}) for at in (0.0, 50.0, 60.0)]
    seconds = seconds_at_work([_commit(1, 10.0), _commit(2, 65.0)], sessions, created_s=0.0)
    assert seconds == pytest.approx({1: 10.0, 2: 15.0})
