"""`shoal demo`: a server and four device processes train a model on real pictures that never leave the devices.

    data ─> start (plan; server, devices-1 … devices-4) ─> rounds, watched ─> evaluate ─> compare ─> report

Everything is in the run folder. What a process of the demo does is in `demo_server.py` and `demo_device.py`; how it is
started, heard and ended in `demo_fleet.py`.
"""

import json as json_format
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from rich.console import Console

from shoal.cli.demo_fleet import ChildDied, News, Processes
from shoal.cli.demo_settings import DemoSettings
from shoal.cli.failures import FAILED, command_line
from shoal.cli.panel import View, Watch
from shoal.cli.run_folder import RUNS, new_folder
from shoal.cli.screen import Stopwatch
from shoal.errors import DataError
from shoal.told import Told

if TYPE_CHECKING:
    from shoal.data import Dataset

DATA: Final = "demo-data"
HEAR_S: Final = 0.1
QUIET_S: Final = 150.0
"""Longest silence of all processes; a compilation on a busy machine takes tens of seconds."""


def run(*, rounds: int | None, folder: Path | None, resume: bool, quick: bool, json: bool) -> int:
    """Runs the demo.

    Args:
        rounds: versions to commit; None: as many as the demo is made for. When it goes on, None is what it was.
        folder: the run folder; None: a new one under `runs/`, or the newest demo there to go on with.
        resume: go on with a demo that was stopped or killed.
        quick: few devices, few pictures, few rounds.
        json: the result as one line of JSON on standard output; progress goes to standard error.

    Returns:
        The exit code.

    Raises:
        ShoalError: no data, no demo to go on with.
        ValueError: the folder holds a run and `resume` is not set.
    """
    began_s, watch = time.time(), Stopwatch()
    console = Console(stderr=json)
    chosen = _to_resume(folder) if resume else new_folder(folder, "demo")
    with Told() as told:
        demo = _Demo(chosen, console, watch, told, began_s=began_s)
        return _ended(demo, DemoSettings.of(rounds=rounds, quick=quick), rounds=rounds, json=json)


def _ended(demo: "_Demo", settings: DemoSettings, *, rounds: int | None, json: bool) -> int:
    """Runs the demo, says how it ended, returns the exit code."""
    console, chosen = demo.console, demo.folder
    try:
        result = demo.run(settings, rounds=rounds)
    except KeyboardInterrupt:
        console.print(f"\nStopped. Go on with:\n\n    {_resume_line(chosen)}\n", soft_wrap=True, highlight=False)
        return demo.told.code
    except ChildDied as error:
        console.print(f"\n{error}\n\nGo on with: {_resume_line(chosen)}", soft_wrap=True, highlight=False, markup=False)
        return FAILED
    if json:
        print(json_format.dumps(result), flush=True)
    return 0


@final
class _Demo:
    """One demo, from its data to its report."""

    def __init__(self, folder: Path, console: Console, watch: Stopwatch, told: Told, *, began_s: float) -> None:
        self.folder, self.console, self.watch, self.told, self.began_s = folder, console, watch, told, began_s

    def run(self, settings: DemoSettings, *, rounds: int | None) -> dict[str, Any]:
        from shoal.cli import demo_data

        run_id, settings, names = self._found(settings, rounds)
        scratch = self.folder / DATA
        view = View(title="shoal demo", rounds=settings.rounds, goal_accuracy=settings.goal_accuracy)
        try:
            with Watch(view, self.console) as screen:
                view.stage = "loading data"
                found = demo_data.load(settings, say=screen.say, names=names)
                view.title = f"shoal demo: {found.dataset.name} on {settings.devices} devices"
                demo_data.write(found, scratch)
                self.watch.lap("data")
                with Processes(self.folder / "logs") as processes:
                    self._rounds(processes, screen, settings, run_id, found.dataset)
                    self._evaluate(processes, screen)
                view.stage = "comparing with central training"
                passes = self._compare(found, settings, screen)
                self.watch.lap("compare")
        finally:
            demo_data.remove(scratch)
        self.told.check()
        return self._report(found, settings, passes)

    def _found(self, settings: DemoSettings, rounds: int | None) -> tuple[str | None, DemoSettings, tuple[str, ...]]:
        """The run to go on with, its settings and its data set; none, what was asked for, and any, for a new one."""
        from shoal.cli.demo_data import NAMES
        from shoal.record.run import find_runs

        if not (self.folder / "record.sqlite").exists():
            return None, settings, NAMES
        begun = [run for run in find_runs(self.folder) if run.last_version is not None and "demo" in run.run.config]
        if not begun:  # killed before the run began
            return None, settings, NAMES
        config = begun[-1].run.config
        kept = DemoSettings.from_json(config["demo"])
        kept = replace(kept, rounds=rounds or int(config["rounds"]))
        return begun[-1].run.id, kept, (str(config["data"]),)

    def _rounds(
        self, processes: Processes, screen: Watch, settings: DemoSettings, run_id: str | None, dataset: "Dataset"
    ) -> None:
        """Starts everything and watches until the last version is committed."""
        screen.view.stage = "starting"
        screen.changed()
        processes.start("server", "shoal.cli.demo_server")
        names = [f"devices-{number + 1}" for number in range(settings.processes)]
        for name in names:
            processes.start(name, "shoal.cli.demo_device")
        # The plan is made while the processes import what they need.
        run_id = run_id or begin(self.folder, settings, dataset)
        from shoal.plan.stablehlo import this_runtime

        scratch = self.folder.resolve() / DATA
        processes.order(
            "server", folder=str(self.folder.resolve()), run=run_id, held_out=str(scratch / "held-out.npz"),
            settings=settings.to_json(), began_s=self.began_s,
        )  # fmt: skip
        ready = self._until(processes, screen, "ready")
        for number, name in enumerate(names):
            processes.order(
                name, server=f"127.0.0.1:{ready.data['port']}", data=str(scratch / "devices"),
                first=number * settings.per_process, count=settings.per_process, public_key=ready.data["public_key"],
                runtime=this_runtime().to_json(),
            )  # fmt: skip
        self.watch.lap("start")
        screen.view.stage = "training"
        self._until(processes, screen, "rounds-done")
        self.watch.lap("rounds")

    def _evaluate(self, processes: Processes, screen: Watch) -> None:
        screen.view.stage, screen.view.phase = "evaluating on all test pictures", ""
        self._until(processes, screen, "done")
        self.watch.lap("evaluate")

    def _until(self, processes: Processes, screen: Watch, kind: str) -> News:
        """Hears the processes until the server says this.

        Raises:
            ChildDied: one of them ended before, or all were silent for long.
        """
        heard_s = time.monotonic()
        while True:
            self.told.check()
            screen.changed()
            news = processes.news(timeout_s=HEAR_S)
            if news is None:
                if time.monotonic() - heard_s > QUIET_S:
                    raise ChildDied(
                        f"No process of the demo said anything for {QUIET_S:g} s; see {self.folder / 'logs'}."
                    )
                continue
            heard_s = time.monotonic()
            if news.sender == "server" and news.kind == kind:
                return news
            if news.sender == "server" and news.kind == "ended":
                raise ChildDied(f"The server ended before it said {kind!r}; see {self.folder / 'logs'}.")
            learn(screen.view, news)

    def _compare(self, found: Any, settings: DemoSettings, screen: Watch) -> int:
        """Trains centrally and alone, and writes what that gave into the record; returns the passes."""
        from shoal.cli.demo_compare import Comparing
        from shoal.plan.run_plan import load_plan
        from shoal.record.run import open_run
        from shoal.record.tensor_blobs import view_tensors

        with open_run(self.folder, read_only=False) as record:
            store, run_id = record.store, record.id
            plan, first = load_plan(store, run_id).plan, store.get_commit(run_id, 0)
            used = sum(commit.weight for commit in store.commits(run_id))
            passes = max(1, round(used / len(found.dataset.train)))
            names = found.population.ids
            last = store.last_version(run_id)
            if any(row.version == last for row in store.metrics(run_id, "central/accuracy")):
                return passes  # a demo that was finished before
            with Comparing(
                plan, view_tensors(store.blobs, first.model), population=found.population, train=found.dataset.train,
                test=found.dataset.test, passes=passes, alone=names[:: len(names) // settings.alone][: settings.alone],
                alone_passes=settings.alone_passes, seed=settings.seed,
            ) as comparing:  # fmt: skip

                def waiting() -> None:
                    self.told.check()
                    screen.view.share = comparing.share
                    screen.changed()

                made = comparing.wait(waiting)
            record.log({"central/accuracy": made.central, "alone/accuracy": made.alone})
            return passes

    def _report(self, found: Any, settings: DemoSettings, passes: int) -> dict[str, Any]:
        from shoal.cli import demo_end
        from shoal.report.facts import read_facts

        outcome = demo_end.Outcome(
            facts=read_facts(self.folder), settings=settings, data_name=found.dataset.name,
            num_test=len(found.dataset.test), passes=passes, seconds=self.watch.seconds,
        )  # fmt: skip
        shown = demo_end.sample(self.folder, found.dataset)
        files = demo_end.write_files(outcome, self.folder, shown)
        self.watch.lap("report")
        demo_end.show(outcome, self.folder, shown, files, self.console)
        return outcome.to_json(self.folder)


def begin(folder: Path, settings: DemoSettings, dataset: "Dataset") -> str:
    """Makes plan and initial model and writes the run into the record; returns its id."""
    from shoal.cli.demo_task import task_on
    from shoal.fleet.keys import HostKeys
    from shoal.plan.build import build
    from shoal.plan.run_plan import begin_run
    from shoal.record.sqlite import open_store

    keys = HostKeys.load_or_make(folder)
    built = build(task_on(dataset, goal=settings.goal), seed=settings.seed)
    store = open_store(folder)
    try:
        return begin_run(
            store, built.plan.sign(keys.signing), built.model, kind="host", rounds=settings.rounds, seed=settings.seed,
            config={"demo": settings.to_json(), "data": dataset.name},
        )  # fmt: skip
    finally:
        store.close()


def learn(view: View, news: News) -> None:
    """What a process said, into the view."""
    said = news.data
    match news.kind:
        case "round":
            view.phase, view.counted, view.goal = said["phase"], said["counted"], said["goal"]
            view.version = max(view.version, said["version"])
        case "commit":
            view.version = said["version"]
            view.round_s.append(said["seconds"])
        case "evaluated":
            view.accuracy.append((said["version"], said["accuracy"]))
        case "devices":
            view.devices[news.sender] = said["stages"]
            view.moved[news.sender] = (said["down_bytes"], said["up_bytes"])
            view.trouble = f"{news.sender}: {said['last_error']}" if said["failures"] else view.trouble
        case _:
            pass


def _to_resume(folder: Path | None) -> Path:
    """The folder of the demo to go on with: the one named, or the newest under `runs/`.

    Raises:
        DataError: there is none.
    """
    from shoal.record.run import find_runs

    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"Expected the folder of a demo that was stopped, got {folder}, which is no folder.")
        return folder
    found = find_runs(Path(RUNS), on_error=lambda *_: None) if Path(RUNS).is_dir() else []
    demos = [run for run in found if "demo" in run.run.config]
    if not demos:
        raise DataError(f"There is no demo to go on with in ./{RUNS}. Start one with: shoal demo")
    return demos[-1].path


def _resume_line(folder: Path) -> str:
    return command_line(["shoal", "demo", "--run", folder, "--resume"])


def main() -> None:
    """For tests: `python -m shoal.cli.demo ROUNDS FOLDER [resume] [json]`, quick."""
    words = sys.argv[1:]
    raise SystemExit(
        run(rounds=int(words[0]), folder=Path(words[1]), resume="resume" in words, quick=True, json="json" in words)
    )


if __name__ == "__main__":
    main()
