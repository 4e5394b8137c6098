"""What a simulation keeps of its past: as much as was asked for, whatever it is kept in; no bit of the model depends on it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shoal
from shoal.record.memory import MemoryStore
from shoal.record.retention import Retention
from shoal.record.sqlite import open_store
from shoal.record.store import Store
from shoal.simulate import sweeping
from shoal.simulate.engine import go_on, simulate
from tests.simulate.test_engine import population, task


def kept_versions(store: Store) -> list[int]:
    run_id = store.runs()[0].id
    return [commit.version for commit in store.commits(run_id) if not commit.is_swept]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "AT_ONCE_BYTES", 1)


@pytest.mark.usefixtures("at_once")
def test_the_newest_versions_and_every_fourth_are_kept_and_the_model_is_the_same(tmp_path: Path) -> None:
    whole = simulate(task(), population(), rounds=7, store=MemoryStore(), backend="sequential")
    for store in (MemoryStore(), open_store(tmp_path / "run")):
        made = simulate(
            task(), population(), rounds=7, store=store, backend="sequential", retention=Retention(recent=2, every=4)
        )
        assert kept_versions(store) == [0, 4, 6, 7]
        for name, value in whole.model.items():
            np.testing.assert_array_equal(made.model[name], value, err_msg=name)
        store.close()


@pytest.mark.usefixtures("at_once")
def test_a_run_taken_up_keeps_what_it_was_to_keep() -> None:
    store = MemoryStore()

    class Halt(Exception):
        pass

    def after_four(result: Any) -> None:
        if result.version == 4:
            raise Halt

    with pytest.raises(Halt):
        simulate(
            task(), population(), rounds=7, store=store, on_round=after_four, backend="sequential",
            retention=Retention(recent=2),
        )  # fmt: skip
    assert kept_versions(store) == [0, 3, 4]
    go_on(store, store.runs()[0].id, population())
    assert kept_versions(store) == [0, 6, 7]


def test_a_run_that_ends_early_is_swept_too() -> None:
    store = MemoryStore()
    rule = shoal.StopWhen("train/loss", patience=1, least=1e9)
    made = simulate(
        task(), population(), rounds=9, store=store, backend="sequential", retention=Retention(recent=1), stop_when=rule
    )
    assert made.stopped_early and made.version < 9 and kept_versions(store) == [0, made.version]


def test_small_versions_go_many_at_a_time_and_the_last_leaves_none() -> None:
    store, seen = MemoryStore(), list[int]()
    simulate(
        task(), population(), rounds=5, store=store, backend="sequential", retention=Retention(recent=1),
        on_round=lambda result: seen.append(len(kept_versions(store))),
    )  # fmt: skip
    assert seen == [2, 3, 4, 5, 6] and kept_versions(store) == [0, 5]


def test_what_is_to_be_kept_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder="):
        shoal.simulate(task(), population(), rounds=1, keep="5")
    with pytest.raises(ValueError, match="RECENT"):
        shoal.simulate(task(), population(), rounds=1, keep="all", folder=tmp_path / "run")
