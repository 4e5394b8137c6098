"""What a host process does: begins a run or takes one up, serves it, evaluates its versions, tells how it went."""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shoal.aggregate.commit import CallProgram
from shoal.cli import data_argument, run_folder, words
from shoal.cli.build_plan import build_in_child
from shoal.cli.ending import run_until_told
from shoal.cli.evaluation import Evaluation
from shoal.cli.failures import Stopped, command_line
from shoal.cli.run_summary import RunSummary, summarize
from shoal.cli.screen import Screen, Stopwatch
from shoal.data.store import Examples
from shoal.errors import StoreError
from shoal.fleet.coordinator import Commit
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.host import Host, begin_run
from shoal.fleet.keys import HostKeys
from shoal.fleet.process import switch_threads_often, use_one_arena
from shoal.plan.child import ChildRunner
from shoal.plan.plan import Plan
from shoal.plan.run_plan import load_plan
from shoal.record.lock import only_writer
from shoal.record.sqlite import open_store
from shoal.record.store import Store

LINGER_S: Final = 10.0
"""Longest wait, after the last version, for devices to hear that the run is over."""
QUIET_S: Final = 1.0
"""So long without any device, and nobody is expected: one that lost its connection tries again within it, mostly."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one run is served."""

    folder: Path
    run_id: str
    rounds: int | None
    """Last version; None: as the run says."""
    address: str
    port: int
    held_out: str
    ready_file: Path | None
    make_tls: bool
    tls_cert: Path | None
    tls_key: Path | None
    resumed: bool

    def go_on_with(self) -> str:
        """The command that takes the run up again."""
        tls = ["--tls"] if self.make_tls else []
        own = ["--tls-cert", self.tls_cert, "--tls-key", self.tls_key] if self.tls_cert else []
        held_out = ["--held-out", self.held_out] if self.held_out else []
        rounds = ["--rounds", self.rounds] if self.resumed and self.rounds else []
        where = ["--address", self.address] if self.address != "127.0.0.1" else []
        return command_line(
            [
                "shoal",
                "host",
                "--resume",
                "--run",
                self.folder,
                "--port",
                self.port,
                *where,
                *tls,
                *own,
                *held_out,
                *rounds,
            ]
        )


def begin(
    task: str, *, rounds: int, seed: int, policy: Mapping[str, Any], run: Path | None, screen: Screen
) -> tuple[Path, str]:
    """Builds the plan of TASK and begins a run of it; returns the run's folder and id."""
    if run is not None:
        run_folder.new_folder(run, "")  # refused before the work, not after
    screen.say(f"building the plan of {task}")
    plan, model = build_in_child(task, seed=seed, policy=policy)
    folder = run_folder.new_folder(run, plan.manifest.task)
    signed = plan.sign(HostKeys.load_or_make(folder).signing)
    store = open_store(folder)
    try:
        return folder, begin_run(store, signed, model, kind="host", rounds=rounds, seed=seed)
    finally:
        store.close()


def run(settings: Settings, *, screen: Screen, watch: Stopwatch, parent: int) -> None:
    """Serves the run to its end.

    Raises:
        Stopped: by Ctrl-C, SIGTERM, or the end of the parent.
        NetworkError: the port is taken.
        StoreError: another process writes this run.
    """
    with only_writer(settings.folder):
        _run(settings, screen=screen, watch=watch, parent=parent)


def _run(settings: Settings, *, screen: Screen, watch: Stopwatch, parent: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    use_one_arena()
    switch_threads_often()
    held_out = data_argument.open_held_out(settings.held_out)
    store = open_store(settings.folder)
    try:
        keys, before = HostKeys.load_or_make(settings.folder), summarize(store, settings.run_id)
        run_until_told(_serve(settings, store, keys, held_out, screen), parent=parent)
        watch.lap("rounds")
        _tell(settings, summarize(store, settings.run_id), before, screen, watch)
    except Stopped as stopped:
        version = store.last_version(settings.run_id)
        raise Stopped(f"stopped at version {version}. Go on with: {settings.go_on_with()}", code=stopped.code) from None
    finally:
        store.close()


async def _serve(settings: Settings, store: Store, keys: HostKeys, held_out: Examples | None, screen: Screen) -> None:
    plan = load_plan(store, settings.run_id).plan
    server_programs = _ServerPrograms(plan)
    evaluation = _evaluation(settings, store, plan, held_out, screen)
    rounds = _Rounds(screen, evaluation)
    host = Host(
        store, settings.run_id, keys, rounds=settings.rounds, call_program=server_programs.call(), on_commit=rounds
    )
    rounds.last_version = host.last_version
    try:
        tls, ca = _tls(settings)
        address = _joined(settings.address, settings.port)
        async with served(host, evaluation, address=address, tls=tls) as server:
            _announce(settings, server.port, ca, keys, screen)
            await host.run()
    finally:
        if evaluation is not None:
            evaluation.close()
        server_programs.close()


@asynccontextmanager
async def served(
    host: Host, evaluation: Evaluation | None, *, address: str, tls: Tls | None = None, quiet_s: float = QUIET_S
) -> AsyncGenerator[GrpcServer, None]:
    """Within the block devices can come, and versions are evaluated beside the rounds.

    At its end the last version is evaluated, and every device has heard that the run is over and left, and none has
    come for `quiet_s`.
    """
    server = host.server(address=address, tls=tls)
    evaluating = asyncio.create_task(evaluation.run()) if evaluation is not None else None
    try:
        await server.start()
        yield server
        if evaluation is not None and evaluating is not None:
            evaluation.finish()
            await evaluating
        await server.until_quiet(quiet_s=quiet_s, longest_s=LINGER_S)
    finally:
        await _end(evaluating)
        await server.close(grace_s=0.5)


async def _end(task: "asyncio.Task[None] | None") -> None:
    if task is not None:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _evaluation(
    settings: Settings, store: Store, plan: Plan, held_out: Examples | None, screen: Screen
) -> Evaluation | None:
    if held_out is None:
        return None
    if not plan.manifest.variants("evaluate"):
        raise ValueError(f"Task {plan.manifest.task!r} has no `evaluate`, so --held-out has no use: leave it out.")
    evaluation = Evaluation(
        store, settings.run_id, plan, held_out,
        on_metrics=lambda version, metrics: screen.say(f"version {version} evaluated: {words.values(metrics)}"),
    )  # fmt: skip
    if (head := store.last_commit(settings.run_id)) is not None:
        evaluation.committed(head)
    return evaluation


class _ServerPrograms:
    """Runs the plan's server programs in a child process, which is started when the first is called."""

    def __init__(self, plan: Plan) -> None:
        self._runner = ChildRunner(plan) if plan.manifest.variants("server_step") else None

    def call(self) -> CallProgram | None:
        return None if self._runner is None else self._runner.call

    def close(self) -> None:
        if self._runner is not None:
            self._runner.close()


class _Rounds:
    """A line for each version."""

    def __init__(self, screen: Screen, evaluation: Evaluation | None) -> None:
        self._screen, self._evaluation, self._watch = screen, evaluation, Stopwatch()
        self._done, self._slow_s = 0, 0.0  # the first one waits for devices to come and compile
        self.last_version = 0

    def __call__(self, commit: Commit) -> None:
        row, self._done = commit.row, self._done + 1
        self._slow_s = self._slow_s or self._watch.total
        left = ""
        if self._done > 1:
            each_s = (self._watch.total - self._slow_s) / (self._done - 1)
            left = f", {words.duration((self.last_version - row.version) * each_s)} left"
        self._screen.say(
            f"version {row.version:{len(str(self.last_version))}}/{self.last_version}  {words.count(row.members, 'update')}, "
            f"{row.weight:,} uses of examples  {words.values(commit.metrics)}  {words.duration(commit.seconds)}{left}"
        )
        if self._evaluation is not None:
            self._evaluation.committed(row)


def _tls(settings: Settings) -> tuple[Tls | None, Path | None]:
    from shoal.fleet import tls

    if settings.tls_cert is not None and settings.tls_key is not None:
        return tls.read_tls(settings.tls_key, settings.tls_cert), None
    return tls.load_or_make_tls(settings.folder, address=settings.address) if settings.make_tls else (None, None)


def _announce(settings: Settings, port: int, ca: Path | None, keys: HostKeys, screen: Screen) -> None:
    where = _joined(settings.address, port)
    line = f"listening on {where}"
    screen.say(line) if screen.json else print(line, flush=True)
    reached = where if settings.address not in ("0.0.0.0", "::") else f"THIS-MACHINE:{port}"
    trusted = [*(["--ca", ca] if ca else []), "--key", keys.public.hex()]
    screen.say(f"devices: {command_line(['shoal', 'device', '--server', reached, '--data', 'PATH', *trusted])}")
    screen.say(f"run: {settings.folder}")
    if settings.ready_file is not None:
        _write_ready(settings.ready_file, where)


def _write_ready(path: Path, where: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(where)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"Cannot write --ready-file {path}: {error.strerror}.") from error


def _joined(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _tell(settings: Settings, summary: RunSummary, before: RunSummary, screen: Screen, watch: Stopwatch) -> None:
    spent = summary.seconds_since(before)
    beside = {"commit": spent.pop("commit", 0.0), "evaluate, beside the rounds": spent.pop("evaluate", 0.0)}
    screen.line(f"{summary.task} version {summary.version}: {words.values(summary.metrics) or 'no metrics'}")
    screen.line(f"where the time went: {words.phases({**watch.seconds, **beside}, total=watch.total)}")
    screen.line(f"and on the devices: {words.phases(spent)}")
    screen.line(f"sent down {words.size(summary.bytes_down)}, up {words.size(summary.bytes_up)}")
    screen.line(f"run: {settings.folder}")
    screen.document(summary.to_json() | {"folder": str(settings.folder), "total_seconds": watch.total})
