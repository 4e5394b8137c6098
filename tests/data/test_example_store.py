"""The example store: limits whatever is added and however the clock goes; crashes, several processes, files that are none."""

import math
import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import Examples, ExampleStore
from shoal.data import example_store as module
from shoal.errors import DataError, StoreError, StoreUnavailable, TooFewExamples


class Wall:
    def __init__(self, now_s: float = 1e6) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def rows(first: int, count: int) -> dict[str, np.ndarray]:
    """Examples that are known by their number: 20 bytes each."""
    numbers = np.arange(first, first + count)
    return {
        "x": np.repeat(numbers[:, None], 3, axis=1).astype(np.float32),
        "label": numbers.astype(np.int32),
        "seen": numbers.astype(np.int32),
    }


def hurry(store: ExampleStore) -> None:
    """No waiting for the disk, where no power cut is played."""
    store._file._db.execute("PRAGMA synchronous = OFF")


def labels(store: ExampleStore) -> list[int]:
    examples = store.examples()
    assert examples.fields["x"][:, 2].tolist() == examples.fields["label"].tolist()
    return [int(label) for label in examples.fields["label"]]


def test_what_was_added_is_there_in_order_also_in_another_process_s_eyes(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "steps.examples") as app, ExampleStore(tmp_path / "steps.examples") as device:
        app.add(rows(0, 3))
        app.add({name: array for name, array in reversed(rows(3, 1).items())})
        assert labels(device) == [0, 1, 2, 3] and len(device) == 4
        assert device.spec() == app.examples().spec() == Examples(rows(0, 1)).spec()
        app.add(rows(4, 0))
        assert len(device) == 4


def test_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "steps.examples"
    path.touch(0o666)
    with ExampleStore(path) as store:
        store.add(rows(0, 1))
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    assert set(modes.values()) == {0o600}, modes


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 9)),
        st.tuples(st.just("wait"), st.floats(0.0, 60.0)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=12, deadline=None)
@given(
    steps=STEPS,
    max_age_s=st.none() | st.floats(1.0, 90.0),
    max_examples=st.none() | st.integers(1, 12),
    max_bytes=st.none() | st.integers(20, 300),
    chunk=st.sampled_from([20, 60, 1 << 20]),
)
def test_limits_hold_whatever_is_added(
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, float]],
    max_age_s: float | None,
    max_examples: int | None,
    max_bytes: int | None,
    chunk: int,
) -> None:
    wall, model, number = Wall(), list[tuple[int, float]](), 0
    most = min(max_examples or math.inf, (max_bytes or math.inf) // 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        path = tmp_path_factory.mktemp("store") / "a.examples"
        with ExampleStore(path, max_age_s, max_examples, max_bytes, wall) as store:
            hurry(store)
            store.add(rows(0, 0))
            for kind, amount in steps:
                if kind == "add":
                    store.add(rows(number, int(amount)))
                    model += [(n, wall.now_s) for n in range(number, number + int(amount))]
                    number += int(amount)
                elif kind == "wait":
                    wall.now_s += amount
                model = [(n, at) for n, at in model if at >= wall.now_s - (max_age_s or math.inf)]
                model = model[max(0, len(model) - int(min(most, 1000))) :]
                assert labels(store) == [n for n, _ in model]
                assert store.statistics().size_bytes == 20 * len(model) <= (max_bytes or math.inf)


@settings(max_examples=12, deadline=None)
@given(leaps=st.lists(st.floats(-500.0, 500.0), max_size=8))
def test_after_any_leaps_an_example_lives_as_long_as_its_age_from_when_the_clock_was_seen(
    tmp_path_factory: pytest.TempPathFactory, leaps: list[float]
) -> None:
    wall = Wall()
    with ExampleStore(tmp_path_factory.mktemp("store") / "a.examples", max_age_s=100.0, wall_s=wall) as store:
        hurry(store)
        for leap in leaps:
            store.add(rows(0, 1))
            wall.now_s += leap
            labels(store)
        store.add(rows(7, 1))
        wall.now_s -= 1000.0  # all are from the future now: none is dropped early, none is kept for ever
        before = labels(store)
        assert before[-1] == 7
        wall.now_s += 99.0
        assert labels(store) == before
        wall.now_s += 2.0
        assert labels(store) == [] and len(store) == 0


def test_limits_are_kept_in_the_file_and_change_for_all(tmp_path: Path) -> None:
    path = tmp_path / "a.examples"
    with ExampleStore(path, max_examples=3) as app, ExampleStore(path) as device:
        app.add(rows(0, 5))
        device.add(rows(5, 1))
        assert labels(app) == [3, 4, 5]
        with ExampleStore(path, max_bytes=45):
            assert labels(app) == [4, 5] and device.statistics().limits.max_examples == 3
        with ExampleStore(path, max_bytes=math.inf, max_examples=math.inf):
            app.add(rows(6, 9))
            assert len(device) == 11


@pytest.mark.parametrize("asked", [{"max_age_s": 0.0}, {"max_examples": 0}, {"max_examples": 2.5}, {"max_bytes": -1}])
def test_a_limit_that_is_none_is_refused_before_a_file_is_made(tmp_path: Path, asked: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(asked))):
        ExampleStore(tmp_path / "a.examples", **asked)
    assert not list(tmp_path.iterdir())


def test_another_spec_is_refused_by_name_and_nothing_is_added(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "a.examples") as store:
        with pytest.raises(TooFewExamples, match="nothing was added yet"):
            store.examples()
        store.add(rows(0, 2))
        with pytest.raises(ValueError, match="field 'x' is float64"):
            store.add(rows(0, 2) | {"x": np.zeros((2, 3))})
        with pytest.raises(ValueError, match="missing"):
            store.add({"x": rows(0, 2)["x"]})
        with pytest.raises(ValueError, match="text"):
            store.add({"x": np.array(["a"])})
        assert labels(store) == [0, 1]
    with ExampleStore(tmp_path / "b.examples") as store, pytest.raises(ValueError, match="complex64"):
        store.add({"x": np.zeros(2, np.complex64)})
    with (
        ExampleStore(tmp_path / "c.examples", max_bytes=10) as store,
        pytest.raises(ValueError, match="raise max_bytes"),
    ):
        store.add(rows(0, 1))


def test_files_of_others_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"NAME\.examples"):
        ExampleStore(tmp_path / "a.npz")
    with pytest.raises(StoreError, match="no example store at"):
        ExampleStore(tmp_path / "a.examples", must_exist=True)
    (tmp_path / "text.examples").write_text("no database at all, whatever its name says" * 50)
    with pytest.raises(StoreError, match="no database"):
        ExampleStore(tmp_path / "text.examples")
    with sqlite3.connect(tmp_path / "other.examples") as other:
        other.execute("CREATE TABLE contacts (name TEXT)")
    other.close()
    with pytest.raises(StoreError, match="another program made it"):
        ExampleStore(tmp_path / "other.examples")
    assert b"contacts" in (tmp_path / "other.examples").read_bytes()


def test_a_newer_schema_and_a_changed_chunk_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.examples"
    with ExampleStore(path) as store:
        store.add(rows(0, 4))
    with sqlite3.connect(path) as db:
        db.execute("UPDATE chunk SET data = zeroblob(length(data))")
    db.close()
    with ExampleStore(path) as store, pytest.raises(StoreError, match="chunk 1 has changed"):
        store.examples()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(StoreError, match="has schema 9, this shoal reads 1"):
        ExampleStore(path)


def test_a_full_disk_loses_nothing_and_is_told(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "a.examples") as store:
        store.add(rows(0, 2))
        pages = store._file._db.execute("PRAGMA page_count").fetchone()[0]
        store._file._db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StoreUnavailable, match="No space left"):
            store.add(rows(2, 5000))
        assert labels(store) == [0, 1]
        store._file._db.execute("PRAGMA max_page_count = 100000")
        store.add(rows(2, 1))
        assert labels(store) == [0, 1, 2]


def test_what_was_dropped_is_not_in_the_file_any_more(tmp_path: Path) -> None:
    path, secret = tmp_path / "a.examples", np.frombuffer(b"a secret of mine" * 2, np.uint8)
    wall = Wall()
    with ExampleStore(path, max_age_s=10.0, wall_s=wall) as store:
        store.add({"x": secret[None]})
        wall.now_s += 11.0
        assert len(store) == 0
    assert b"a secret" not in path.read_bytes() and not path.with_name("a.examples-wal").exists()


def test_a_shard_joins_once_whole_or_not_at_all(tmp_path: Path) -> None:
    with ExampleStore(tmp_path / "a.examples", max_examples=6) as store:
        store.add(rows(0, 2))
        with pytest.raises(DataError, match="no room"):
            store.join("r/0", 8, [rows(2, 3), rows(5, 5)])
        with pytest.raises(DataError, match="do not fit"):
            store.join("r/0", 2, [rows(2, 1), {"y": np.zeros(1)}])
        assert labels(store) == [0, 1] and store.shards() == {}
        store.join("r/1", 3, [rows(2, 2), rows(4, 1)])
        store.join("r/1", 3, [rows(2, 2), rows(4, 1)])
        assert labels(store) == [0, 1, 2, 3, 4] and store.shards() == {"r/1": False}
        store.confirm("r/1")
        assert store.shards() == {"r/1": True} and store.statistics().shards == 1
        store.leave("r/1")
        assert labels(store) == [0, 1] and store.shards() == {}


ADDS = """
import sys, numpy as np
from shoal.data import ExampleStore
with ExampleStore(sys.argv[1], max_examples=64) as store:
    print("ready", flush=True)
    number = int(sys.argv[2])
    while True:
        store.add({"label": np.arange(number, number + 3, dtype=np.int64)})
        print(number, flush=True)
        number += 3
"""


@pytest.mark.slow
@pytest.mark.integration
def test_processes_add_at_once_are_killed_and_lose_nothing_that_was_said(tmp_path: Path) -> None:
    path = tmp_path / "a.examples"
    command = [sys.executable, "-c", ADDS, str(path)]
    apps = [subprocess.Popen([*command, str(n)], stdout=subprocess.PIPE, text=True) for n in (0, 10**6)]
    said: list[list[int]] = []
    for app in apps:
        assert app.stdout is not None
        said.append([int(app.stdout.readline()) if i else app.stdout.readline() and -1 for i in range(9)][1:])
    with ExampleStore(path) as store:
        for app in apps:
            os.kill(app.pid, signal.SIGKILL)
            assert app.stdout is not None
            said[apps.index(app)] += [int(line) for line in app.stdout.read().split()]
            app.wait()
            app.stdout.close()
        held = [int(label) for label in store.examples().fields["label"]]
    assert len(held) == 64
    for who, numbers in enumerate(said):
        mine = [label for label in held if (label >= 10**6) == bool(who)]
        assert mine == list(range(mine[0], mine[-1] + 1)) if mine else True  # whole, in order, none missing
        if mine:
            assert mine[-1] >= numbers[-1] + 2  # what was said to be added is there
