"""A host's evaluation: the newest version, each once, also where the run ends while one is evaluated."""

import asyncio
import threading
from typing import Any

import numpy as np
import pytest

from shoal.cli import evaluation
from shoal.cli.evaluation import Evaluation
from shoal.data.store import Examples
from shoal.plan.run_plan import begin_run
from shoal.record.memory import MemoryStore
from shoal.record.store import CommitRow, MetricRow
from shoal.tensors import Index
from tests.fleet import toy

PLAN = toy.plan(toy.exact("a"))


@pytest.fixture
def begun() -> tuple[MemoryStore, str]:
    store = MemoryStore()
    return store, begin_run(store, PLAN, {"params/w": np.zeros(1, np.float32)}, kind="host", rounds=3, seed=0)


def row(version: int) -> CommitRow:
    index = Index(())
    return CommitRow(
        version=version, model=index, server_state=index, round=version, members=1, weight=1, created_s=0.0
    )


def evaluator(store: MemoryStore, run_id: str, told: list[int]) -> Evaluation:
    made = Examples({"x": np.zeros(1, np.float32)})
    return Evaluation(store, run_id, PLAN, made, on_metrics=lambda version, metrics: told.append(version))


def test_the_last_version_is_evaluated_once_and_those_between_are_left_out(
    begun: tuple[MemoryStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = begun
    told, evaluated, entered, go_on = [], [], threading.Event(), threading.Event()  # type: ignore[var-annotated]

    def slow(
        runner: Any, manifest: Any, store: Any, run_id: str, row: CommitRow, *_: Any, **__: Any
    ) -> dict[str, float]:
        evaluated.append(row.version)
        entered.set()
        assert go_on.wait(10)
        return {}

    monkeypatch.setattr(evaluation, "evaluate_version", slow)

    async def run() -> None:
        made = evaluator(store, run_id, told)
        running = asyncio.create_task(made.run())
        made.committed(row(1))
        await asyncio.to_thread(entered.wait, 10)
        made.committed(row(2))
        made.committed(row(3))
        made.finish()
        go_on.set()
        await running
        made.close()

    asyncio.run(run())
    assert evaluated == told == [1, 3]


def test_what_the_record_has_is_not_evaluated_again(
    begun: tuple[MemoryStore, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run_id = begun
    store.log(run_id, [MetricRow(version=0, name="accuracy", value=0.5, scope="server", time_s=0.0)])
    told: list[int] = []

    async def run() -> None:
        made = evaluator(store, run_id, told)
        made.committed(row(0))
        made.finish()
        await made.run()
        made.close()

    asyncio.run(run())
    assert told == []
