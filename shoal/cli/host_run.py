"""One of the runs that a host process serves: its host, what runs its server programs, what evaluates and tells of it."""

from collections.abc import Mapping

from shoal.aggregate.commit import CallProgram
from shoal.cli import words
from shoal.cli.evaluation import Evaluation
from shoal.cli.screen import Screen, Stopwatch
from shoal.clock import SystemClock
from shoal.data.store import Examples
from shoal.fleet.coordinator import Commit
from shoal.fleet.entrance import Entrance
from shoal.fleet.following import Following
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.plan.child import ChildRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import load_plan
from shoal.record.store import Store


class ServedRun:
    """See the module's text."""

    def __init__(
        self,
        store: Store,
        run_id: str,
        keys: HostKeys,
        held_out: Examples | None,
        screen: Screen,
        *,
        rounds: int | None,
        among: bool,
        several_edges: bool,
        entrance: Entrance | None = None,
    ) -> None:
        """
        Args:
            store: the record.
            run_id: the run.
            keys: the run folder's.
            held_out: examples that versions are evaluated on.
            screen: is told of versions.
            rounds: last version; None: as the run says.
            several_edges: Edges of other processes may attach.
            entrance: who may come in; None: whoever comes.
            among: there are other runs: lines name the task, and one that cannot be evaluated is not.
        """
        plan = load_plan(store, run_id).plan
        self._programs = ServerPrograms(plan)
        name = f"{plan.manifest.task}  " if among else ""
        self.evaluation = _evaluation(store, run_id, plan, held_out, screen, name=name)
        told = Rounds(screen, self.evaluation, name)
        self.host = Host(
            store, run_id, keys, rounds=rounds, call_program=self._programs.call(), several_edges=several_edges,
            alone=True, entrance=entrance, on_commit=told,
        )  # fmt: skip
        self.host.lease.take()  # before anything of the run is written, or devices are asked to come
        told.last_version = self.host.last_version

    def close(self) -> None:
        if self.evaluation is not None:
            self.evaluation.close()
        self._programs.close()


def follow(store: Store, run_id: str, keys: HostKeys, screen: Screen) -> Following:
    """An evaluation of the run that it follows."""

    def told(version: int, metrics: Mapping[str, float]) -> None:
        screen.say(f"{name}  version {version} evaluated on devices: {words.values(dict(metrics))}")

    made = Following(
        store, run_id, make_host=lambda last: Host(store, run_id, keys, rounds=last, alone=True), clock=SystemClock(),
        on_metrics=told,
    )  # fmt: skip
    made.host.lease.take()
    name = store.run(made.followed).name
    return made


def _evaluation(
    store: Store, run_id: str, plan: Plan, held_out: Examples | None, screen: Screen, *, name: str
) -> Evaluation | None:
    if held_out is None:
        return None
    if not plan.manifest.variants("evaluate"):
        if name:
            return None
        raise ValueError(f"Task {plan.manifest.task!r} has no `evaluate`, so --held-out has no use: leave it out.")
    evaluation = Evaluation(
        store, run_id, plan, held_out,
        on_metrics=lambda version, metrics: screen.say(f"{name}version {version} evaluated: {words.values(metrics)}"),
    )  # fmt: skip
    if (head := store.last_commit(run_id)) is not None:
        evaluation.committed(head)
    return evaluation


class ServerPrograms:
    """Runs the plan's server programs in a child process, which is started when the first is called."""

    def __init__(self, plan: Plan) -> None:
        self._runner = ChildRunner(plan) if plan.manifest.variants("server_step") else None

    def call(self) -> CallProgram | None:
        return None if self._runner is None else self._runner.call

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


class Rounds:
    """A line for each version."""

    def __init__(self, screen: Screen, evaluation: Evaluation | None, name: str) -> None:
        """`name` begins each line, where there are several tasks."""
        self._screen, self._evaluation, self._watch, self._name = screen, evaluation, Stopwatch(), name
        self._done, self._slow_s = 0, 0.0  # the first one waits for devices to come and compile
        self.last_version = 0

    def __call__(self, commit: Commit) -> None:
        row, self._done = commit.row, self._done + 1
        self._slow_s = self._slow_s or self._watch.total
        left = ""
        if self._done > 1:
            each_s = (self._watch.total - self._slow_s) / (self._done - 1)
            left = f", {words.duration((self.last_version - row.version) * each_s)} left"
        uses = ""  # devices that count alike do not say how many examples they used
        if row.weight != row.members:
            uses = f", {row.weight:,} uses of examples"
        self._screen.say(
            f"{self._name}version {row.version:{len(str(self.last_version))}}/{self.last_version}  {words.count(row.members, 'update')}{uses}  "
            f"{words.values(commit.metrics)}  {words.duration(commit.seconds)}{left}"
        )
        if self._evaluation is not None:
            self._evaluation.committed(row)
