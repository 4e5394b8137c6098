"""The demo's server process: what `shoal host` does with a run that was begun, told to the demo as news.

`python -m shoal.cli.demo_server`, started by `demo_fleet.py`. It takes the run up from its record, whatever state it is
in, serves until the last version is evaluated, and ends. It has no example of any device; the test pictures are its own.
"""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from shoal.cli.demo_child import Parent
from shoal.cli.demo_settings import DemoSettings
from shoal.cli.evaluation import Evaluation
from shoal.cli.host_process import served
from shoal.data.disk import open_population
from shoal.data.store import Examples
from shoal.fleet.coordinator import Commit
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.process import be_a_server
from shoal.plan.run_plan import load_plan
from shoal.record.lock import only_writer
from shoal.record.sqlite import open_store
from shoal.record.store import EventRow, Store

TELL_S: Final = 0.2
WATCHED, TEST = "watched/", "test/"
"""Before the names of metrics on the watched test pictures, version by version, and on all of them, where it counts."""


async def serve(parent: Parent, order: Mapping[str, Any]) -> None:
    """Serves one run to its end, or until the parent ends."""
    folder, run_id, settings = Path(order["folder"]), order["run"], DemoSettings.from_json(order["settings"])
    keys, store = HostKeys.load_or_make(folder), open_store(folder)
    test = open_population(Path(order["held_out"]))["held-out"]
    evaluation = Evaluation(
        store, run_id, load_plan(store, run_id).plan, Examples(test.take(slice(0, settings.num_watched))),
        prefix=WATCHED, threads=1, on_metrics=lambda version, found: _tell_accuracy(parent, version, found),
    )  # fmt: skip

    def committed(commit: Commit) -> None:
        evaluation.committed(commit.row)
        parent.tell(kind="commit", version=commit.row.version, seconds=commit.seconds, **commit.metrics)

    host = Host(store, run_id, keys, rounds=settings.rounds, alone=True, on_commit=committed)
    host.lease.take()
    began_s = float(order["began_s"]) - store.run(run_id).created_s
    store.journal(run_id, [EventRow(time_s=began_s, kind="session", data={"began_s": began_s})])
    _end_with(parent)
    reporting = asyncio.create_task(_report(parent, host))
    try:
        # All devices are the demo's own: none that lost its connection is waited for.
        async with served(host, [evaluation], address="127.0.0.1:0", quiet_s=0.0) as server:
            if (head := store.last_commit(run_id)) is not None and head.version:
                evaluation.committed(head)
            parent.tell(kind="ready", port=server.port, public_key=keys.public.hex())
            await host.run()
            parent.tell(kind="rounds-done")
            reporting.cancel()
        await asyncio.to_thread(_evaluate_on_all, evaluation, store, run_id, test, settings.goal_accuracy)
        parent.tell(kind="done")
    finally:
        reporting.cancel()
        evaluation.close()
        store.close()


def _end_with(parent: Parent) -> None:
    """The parent's end cancels this task."""
    serving, loop = asyncio.current_task(), asyncio.get_running_loop()
    assert serving is not None

    def end() -> None:
        loop.call_soon_threadsafe(serving.cancel)

    parent.on_end(end)


def _tell_accuracy(parent: Parent, version: int, watched: Mapping[str, float]) -> None:
    parent.tell(kind="evaluated", version=version, accuracy=watched[f"{WATCHED}accuracy"])


def _evaluate_on_all(evaluation: Evaluation, store: Store, run_id: str, test: Examples, goal: float) -> None:
    """The last version on all test pictures, and the first that really reached the goal."""
    done = {row.version: row.value for row in store.metrics(run_id, f"{TEST}accuracy")}

    def accuracy(version: int) -> float:
        if version not in done:
            row = store.get_commit(run_id, version)
            done[version] = evaluation.evaluate(row, test, prefix=TEST)[f"{TEST}accuracy"]
        return done[version]

    accuracy(store.last_version(run_id) or 0)
    watched = {row.version: row.value for row in store.metrics(run_id, f"{WATCHED}accuracy")}
    for version, value in sorted(watched.items()):
        if value >= goal and accuracy(version) >= goal:
            return


async def _report(parent: Parent, host: Host) -> None:
    """Where the round is, a few times a second."""
    while True:
        at = host.coordinator.snapshot()
        parent.tell(
            kind="round", phase=at.phase.value, round=at.round, version=at.version, counted=at.counted, goal=at.goal
        )
        await asyncio.sleep(TELL_S)


def main() -> None:
    """Serves one run, as the first order says."""
    be_a_server()
    parent = Parent()
    try:
        order = parent.order()
        with only_writer(Path(order["folder"])):
            asyncio.run(serve(parent, order))
    except asyncio.CancelledError:
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
