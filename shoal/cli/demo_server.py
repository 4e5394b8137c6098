"""The demo's server process: Coordinator and Edge of one run, and an evaluator beside them.

`python -m shoal.cli.demo_server`, started by `demo_fleet.py`. It takes the run up from its record, whatever state it is
in, serves until the last version is evaluated, and ends. It has no example of any device; the test pictures are its own.
"""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

from shoal.cli.demo_child import Parent
from shoal.cli.demo_settings import DemoSettings
from shoal.data.disk import open_population
from shoal.data.store import Examples
from shoal.fleet.coordinator import Commit
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.process import use_one_arena
from shoal.plan.child import ChildRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import load_plan
from shoal.plan.train import evaluate
from shoal.record.lock import only_writer
from shoal.record.resume import take_up
from shoal.record.sqlite import open_store
from shoal.record.store import CommitRow, EventRow, MetricRow, Store, UsageRow
from shoal.record.tensor_blobs import view_tensors

TELL_S: Final = 0.2
WATCHED, ALL = "accuracy", "test/accuracy"
"""Metrics on the watched test pictures, version by version, and on all of them, where it counts."""


@final
class Evaluator:
    """Evaluates versions in a process of its own, one at a time; of those that come meanwhile, the newest."""

    def __init__(self, store: Store, run_id: str, plan: Plan, test: Examples, settings: DemoSettings) -> None:
        self._store, self._run_id, self._plan, self._test, self._settings = store, run_id, plan, test, settings
        self._watched = Examples(test.take(slice(0, settings.num_watched)))
        self._runner = ChildRunner(plan, threads=1)
        self._created_s = store.run(run_id).created_s
        self._waiting: CommitRow | None = None
        self._news = asyncio.Event()

    def put(self, row: CommitRow) -> None:
        """Hands a version in."""
        self._waiting = row
        self._news.set()

    async def run(self, parent: Parent) -> None:
        """Evaluates what is handed in, for ever."""
        while True:
            await self._news.wait()
            self._news.clear()
            if (row := self._waiting) is not None:
                metrics = await asyncio.to_thread(self.measure, row, self._watched, "")
                parent.tell(kind="evaluated", version=row.version, **metrics)

    def measure(self, row: CommitRow, examples: Examples, prefix: str) -> dict[str, float]:
        """Metrics of a version, into the record too. Blocks."""
        begun = time.perf_counter()
        root = row.model.root
        if not self._runner.has_model(root):
            self._runner.set_model(root, view_tensors(self._store.blobs, row.model))
        metrics = dict(evaluate(self._runner, self._plan.manifest, root, examples))
        time_s = time.time() - self._created_s
        rows = [
            MetricRow(version=row.version, name=f"{prefix}{name}", value=value, scope="server", time_s=time_s)
            for name, value in metrics.items()
        ]
        self._store.log(self._run_id, rows)
        seconds = time.perf_counter() - begun
        self._store.add_usage(self._run_id, [UsageRow(round=row.round, phase="evaluate", seconds=seconds, count=1)])
        return metrics

    def finish(self, parent: Parent) -> None:
        """After the last round: the last version on all test pictures, and the first that really reached the goal."""
        last = self._store.last_commit(self._run_id)
        assert last is not None
        done = {row.version: row.value for row in self._store.metrics(self._run_id, ALL)}
        if last.version not in done:
            parent.tell(kind="evaluated", version=last.version, **self.measure(last, self._watched, ""))
            done[last.version] = self.measure(last, self._test, "test/")["accuracy"]
        watched = {row.version: row.value for row in self._store.metrics(self._run_id, WATCHED)}
        for version in sorted(v for v, value in watched.items() if value >= self._settings.goal_accuracy):
            if version not in done:
                row = self._store.get_commit(self._run_id, version)
                done[version] = self.measure(row, self._test, "test/")["accuracy"]
            if done[version] >= self._settings.goal_accuracy:
                return

    def close(self) -> None:
        self._runner.close()


async def serve(parent: Parent, order: Mapping[str, Any]) -> None:
    """Serves one run to its end, or until the parent ends."""
    folder = Path(order["folder"])
    settings = DemoSettings.from_json(order["settings"])
    keys = HostKeys.load_or_make(folder)
    store = open_store(folder)
    run_id = order["run"]
    taken = take_up(store, run_id, time_s=time.time())
    began_s = float(order["began_s"]) - taken.run.created_s
    store.journal(run_id, [EventRow(time_s=began_s, kind="session", data={"began_s": began_s})])
    test = open_population(Path(order["held_out"]))["held-out"]
    evaluator = Evaluator(store, run_id, load_plan(store, run_id).plan, test, settings)

    def committed(commit: Commit) -> None:
        evaluator.put(commit.row)
        parent.tell(kind="commit", version=commit.row.version, seconds=commit.seconds, **commit.metrics)

    host = Host(store, run_id, keys, rounds=settings.rounds, on_commit=committed)
    server = host.server(address="127.0.0.1:0")
    await server.start()
    main, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert main is not None

    def end() -> None:
        loop.call_soon_threadsafe(main.cancel)

    parent.on_end(end)
    parent.tell(kind="ready", port=server.port, public_key=keys.public.hex())
    watching = [asyncio.create_task(evaluator.run(parent)), asyncio.create_task(_report(parent, host))]
    try:
        if taken.last is not None and taken.last.version:
            evaluator.put(taken.last)
        await host.run()
        parent.tell(kind="rounds-done")
        await asyncio.gather(*map(_cancelled, watching))
        await asyncio.to_thread(evaluator.finish, parent)
        parent.tell(kind="done")
    finally:
        evaluator.close()
        await server.close(grace_s=0.2)
        store.close()


async def _cancelled(task: "asyncio.Task[None]") -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _report(parent: Parent, host: Host) -> None:
    """Where the round is, a few times a second."""
    while True:
        at, counters = host.coordinator.snapshot(), host.edge.statistics()
        parent.tell(
            kind="round", phase=at.phase.value, round=at.round, version=at.version, waiting=at.waiting,
            counted=at.counted, goal=at.goal, outstanding=at.outstanding, sessions=counters.sessions_now,
            down_bytes=counters.down_bytes, up_bytes=counters.up_bytes,
        )  # fmt: skip
        await asyncio.sleep(TELL_S)


def main() -> None:
    """Serves one run, as the first order says."""
    use_one_arena()
    parent = Parent()
    try:
        order = parent.order()
        with only_writer(Path(order["folder"])):
            asyncio.run(serve(parent, order))
    except asyncio.CancelledError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
