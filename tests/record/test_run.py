"""Runs for people: start, log, find again."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.clock import ManualClock
from shoal.errors import DataError, StoreError
from shoal.record import find_runs, init, latest_run, new_run_id, open_run
from tests.record.builders import commit_row


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1_700_000_000.0)


def test_a_run_is_started_logged_and_read(tmp_path: Path, clock: ManualClock) -> None:
    with init("digits", kind="train", config={"rate": 0.1}, folder=tmp_path / "r", clock=clock) as run:
        clock.advance(2.5)
        run.log({"accuracy": 0.5, "loss": 2}, version=1)
        run.log({"accuracy": np.float32(0.75)}, version=3, scope="class", device_class="phone")
        assert run.row.status == "running"
    with open_run(tmp_path / "r") as again:
        assert (again.id, again.row.status, again.row.finished_s) == (run.id, "finished", 1_700_000_002.5)
        assert again.row.config == {"rate": 0.1} and again.row.provenance["cores"] >= 1
        versions, values = again.history("accuracy")
        np.testing.assert_array_equal(versions, [1, 3])
        np.testing.assert_array_equal(values, [0.5, 0.75])
        assert {row.time_s for row in again.store.metrics(run.id)} == {2.5}
        with pytest.raises(DataError, match=r"\(accuracy, loss\), got 'acuracy'"):
            again.history("acuracy")
    with open_run(tmp_path) as again:  # reading a run has not changed it
        assert again.row.status == "finished"


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")])
def test_an_error_ends_the_run(tmp_path: Path, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), init("digits", folder=tmp_path):
        raise error
    assert latest_run(tmp_path).run.status == status


def test_the_first_end_stays(tmp_path: Path) -> None:
    with init("digits", folder=tmp_path) as run:
        run.finish("stopped")
        run.finish()
    assert latest_run(tmp_path).run.status == "stopped"


def test_without_a_version_the_last_is_meant(tmp_path: Path) -> None:
    with init("digits", folder=tmp_path) as run:
        run.log({"loss": 1.0})
        for version in (0, 1):
            run.store.commit(run.id, commit_row(run.store, version), round=None)
        run.log({"loss": 2.0})
        assert run.history("loss")[0].tolist() == [0, 1]


def test_a_folder_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: ManualClock) -> None:
    monkeypatch.chdir(tmp_path)
    with init("../My task!", clock=clock) as run:
        pass
    assert run.folder == Path("runs") / f"2023-11-14-my-task-{run.id}"
    (found,) = find_runs(tmp_path / "runs")
    assert (found.path.name, found.run.name, found.last_version) == (run.folder.name, "../My task!", None)


def test_runs_are_found_oldest_first(tmp_path: Path, clock: ManualClock) -> None:
    for name in ("b/x", "a", "c/d/e"):
        with init(name, folder=tmp_path / name, clock=clock) as run:
            run.store.commit(run.id, commit_row(run.store), round=None)
        clock.advance(1.0)
    assert [(found.run.name, found.last_version) for found in find_runs(tmp_path)] == [
        ("b/x", 0),
        ("a", 0),
        ("c/d/e", 0),
    ]
    assert latest_run(tmp_path).path == tmp_path / "c/d/e"
    assert latest_run(tmp_path / "b").run.name == "b/x"


def test_one_folder_may_hold_several_runs(tmp_path: Path, clock: ManualClock) -> None:
    ids = []
    for _ in range(2):
        with init("digits", folder=tmp_path, clock=clock) as run:
            run.log({"loss": float(len(ids))})
        ids.append(run.id)
        clock.advance(1.0)
    assert [found.run.id for found in find_runs(tmp_path)] == ids
    with open_run(tmp_path) as last, open_run(tmp_path, run_id=ids[0]) as first:
        assert (last.history("loss")[1].tolist(), first.history("loss")[1].tolist()) == ([1.0], [0.0])


def test_a_run_is_named_by_its_id_or_its_task(tmp_path: Path, clock: ManualClock) -> None:
    ids = {}
    for place, task in (("old", "train"), ("old", "measured"), ("new", "train"), ("new", "evaluated")):
        with init(task, folder=tmp_path / place, clock=clock) as run:
            ids[place, task] = run.id
        clock.advance(1.0)
    assert latest_run(tmp_path).run.id == ids["new", "evaluated"]
    assert latest_run(tmp_path, task="train").run.id == ids["new", "train"]
    assert latest_run(tmp_path, task=ids["old", "train"]).path == tmp_path / "old"
    with open_run(tmp_path, run_id="measured") as run:
        assert (run.id, run.folder) == (ids["old", "measured"], tmp_path / "old")
    with open_run(tmp_path, run_id=ids["old", "train"]) as run:
        assert run.id == ids["old", "train"]
    with pytest.raises(DataError, match=r"evaluated \| measured \| train.* or the id of a run, got 'tarin'"):
        open_run(tmp_path, run_id="tarin")


def test_one_bad_record_need_not_hide_the_others(tmp_path: Path) -> None:
    with init("good", folder=tmp_path / "good"):
        pass
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "record.sqlite").write_bytes(b"x" * 4096)
    told: list[tuple[str, str]] = []
    found = find_runs(tmp_path, on_error=lambda path, error: told.append((path.name, str(error))))
    assert [item.run.name for item in found] == ["good"]
    assert told[0][0] == "bad" and "no database" in told[0][1]
    with pytest.raises(StoreError, match="no database"):
        find_runs(tmp_path)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Expected a run folder \(one with record\.sqlite\)"):
        latest_run(tmp_path)
    with pytest.raises(DataError, match="which is no folder"):
        open_run(tmp_path / "none")
    with pytest.raises(ValueError, match="a name for the run"):
        init("", folder=tmp_path / "r")


@given(st.lists(st.tuples(st.integers(0, 4_000_000_000_000), st.integers(0, 2**15 - 1)), min_size=2, max_size=5))
def test_run_ids_sort_by_time(moments: list[tuple[int, int]]) -> None:
    ids = [new_run_id(time_ms / 1000, entropy=entropy) for time_ms, entropy in moments]
    assert all(len(run_id) == 12 and run_id.isalnum() for run_id in ids)
    for (a_ms, _), a in zip(moments, ids, strict=True):
        for (b_ms, _), b in zip(moments, ids, strict=True):
            if a_ms + 1 < b_ms:
                assert a < b


def test_provenance_in_a_run_is_json(tmp_path: Path) -> None:
    with init("digits", folder=tmp_path) as run:
        assert json.loads(json.dumps(run.row.provenance)) == run.row.provenance
