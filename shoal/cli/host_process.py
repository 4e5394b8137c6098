"""What a host process does: begins runs or takes them up, serves them, evaluates versions, tells how it went."""

import asyncio
import logging
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

from shoal.cli import data_argument, run_folder, words
from shoal.cli.build_plan import build_in_child
from shoal.cli.ending import run_until_told
from shoal.cli.evaluation import Evaluation
from shoal.cli.failures import Stopped, command_line
from shoal.cli.host_asked import Asked
from shoal.cli.host_checks import read_certificates, reserve
from shoal.cli.host_door import EVERY_ADDRESS, DoorFile
from shoal.cli.host_edges import EdgeSettings, attached
from shoal.cli.host_run import ServedRun, follow
from shoal.cli.join import LOOK_S
from shoal.cli.run_summary import RunSummary, summarize
from shoal.cli.screen import Screen, Stopwatch
from shoal.clock import SystemClock
from shoal.data.store import Examples
from shoal.errors import StoreError
from shoal.fleet import tls as tls_files
from shoal.fleet.address import joined
from shoal.fleet.entrance import PER_ADDRESS, Entrance
from shoal.fleet.following import Following
from shoal.fleet.grpc_server import GrpcServer, Tls
from shoal.fleet.host import Host
from shoal.fleet.keys import HostKeys
from shoal.fleet.members import Members
from shoal.fleet.process import be_a_server
from shoal.fleet.proxy import is_loopback
from shoal.fleet.several import SeveralHosts, refuse_evaluated_twice
from shoal.fleet.telemetry_host import TelemetryHost
from shoal.fleet.telemetry_link import GrpcHelperLink
from shoal.fleet.telemetry_server import serve_reports
from shoal.plan.plan import Plan
from shoal.plan.run_plan import begin_run, load_plan
from shoal.record.lock import only_writer
from shoal.record.sqlite import open_store
from shoal.record.store import Store
from shoal.tensors import Tensors

LINGER_S: Final = 10.0
"""Longest wait, after the last version, for devices to hear that the run is over."""
QUIET_S: Final = 1.0
"""So long without any device, and nobody is expected: one that lost its connection tries again within it, mostly."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the runs of a folder are served."""

    folder: Path
    run_ids: tuple[str, ...]
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
    insecure: bool = False
    edges: int = 0
    """Edges in processes of their own that the host starts."""
    edge_port: int | None = None
    """Where Edges attach; None: nowhere, or any free port where it starts some itself."""
    edge_address: str = "127.0.0.1"
    client_ca: Path | None = None
    """What devices' certificates are to be signed by; None: they show none."""
    per_address: int = PER_ADDRESS
    """See `Entrance`."""
    members_only: bool = False
    """From now on; a run that has served members only goes on doing so."""
    telemetry: str = ""
    """HOST:PORT of the helper that opens sums of telemetry; empty: none is taken."""
    telemetry_ca: Path | None = None
    has_devices: bool = False
    """It starts them itself, so that nobody is told how to."""

    @property
    def several_edges(self) -> bool:
        return bool(self.edges) or self.edge_port is not None

    def again(self) -> list[str]:
        """The command, but for `shoal`, that takes the run up again."""
        said: list[object] = [
            "host", "--resume", "--run", self.folder, "--port", self.port,
            *(["--address", self.address] if self.address != "127.0.0.1" else []),
            *(["--tls"] if self.make_tls else []),
            *(["--tls-cert", self.tls_cert, "--tls-key", self.tls_key] if self.tls_cert else []),
            *(["--client-ca", self.client_ca] if self.client_ca else []),
            *(["--per-address", self.per_address] if self.per_address != PER_ADDRESS else []),
            *(["--insecure"] if self.insecure else []),
            *(["--held-out", self.held_out] if self.held_out else []),
            *(["--rounds", self.rounds] if self.resumed and self.rounds else []),
            *(["--edges", self.edges] if self.edges else []),
            *(["--edge-port", self.edge_port] if self.edge_port is not None else []),
            *(["--edge-address", self.edge_address] if self.edge_address != "127.0.0.1" else []),
            *(["--telemetry", self.telemetry] if self.telemetry else []),
            *(["--telemetry-ca", self.telemetry_ca] if self.telemetry_ca else []),
        ]  # fmt: skip
        return [str(word) for word in said]

    def go_on_with(self) -> str:
        return command_line(["shoal", *self.again()])


def _built(task: str, asked: Asked) -> tuple[Plan, Tensors, int]:
    """A task's plan and initial model, and the seed that they were made by.

    With secure groups devices never offer an update from the same tensors twice: another run is to begin with others.
    """
    seed = asked.seed or 0
    plan, model = build_in_child(task, seed=seed, policy=asked.policy, each=asked.policies, iree=asked.iree)
    if asked.seed is None and plan.manifest.promises.group == "secure":
        seed = secrets.randbits(31)
        plan, model = build_in_child(task, seed=seed, policy=asked.policy, each=asked.policies, iree=asked.iree)
    return plan, model, seed


def begin(asked: Asked, *, run: Path | None, screen: Screen) -> tuple[Path, tuple[str, ...]]:
    """Builds the plans of the tasks and begins a run of each; returns the runs' folder and ids."""
    if run is not None:
        run_folder.new_folder(run, "")  # refused before the work, not after
    built = []
    for task in asked.tasks:
        screen.say(f"building the plan of {task}")
        built.append(_built(task, asked))
    names = [plan.manifest.task for plan, _, _ in built]
    asked.refuse_strangers(names)
    for plan, _, _ in built:
        _refuse_alone(plan, names)
    refuse_evaluated_twice([plan.manifest for plan, _, _ in built])
    folder = run_folder.new_folder(run, names[0])
    signing = HostKeys.load_or_make(folder).signing
    store = open_store(folder)
    try:
        run_ids = [
            begin_run(
                store, plan.sign(signing), model, kind="host", rounds=asked.rounds_of(name), seed=seed,
                population=asked.population_of(name),
                config=asked.config_of(name),
            )
            for name, (plan, model, seed) in zip(names, built, strict=True)
        ]  # fmt: skip
    finally:
        store.close()
    return folder, tuple(run_ids)


def _refuse_alone(plan: Plan, names: Sequence[str]) -> None:
    follows = plan.manifest.server.options.get("follows")
    if plan.manifest.server.aggregator == "evaluation" and follows not in names:
        raise ValueError(
            f"Task {plan.manifest.task!r} evaluates task {follows!r}: name that one too, so that there is something to evaluate."
        )


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
    be_a_server()
    held_out = data_argument.open_held_out(settings.held_out)
    store = open_store(settings.folder)
    try:
        keys = HostKeys.load_or_make(settings.folder)
        before = [summarize(store, run_id) for run_id in settings.run_ids]
        _say_what_is_finished(settings, store, screen)
        run_until_told(_serve(settings, store, keys, held_out, screen), parent=parent)
        watch.lap("rounds")
        _tell(settings, [summarize(store, run_id) for run_id in settings.run_ids], before, screen, watch)
    except Stopped as stopped:
        at = " and ".join(f"version {store.last_version(run_id)}" for run_id in settings.run_ids)
        raise Stopped(f"stopped at {at}. Go on with: {settings.go_on_with()}", code=stopped.code) from None
    finally:
        store.close()


def _say_what_is_finished(settings: Settings, store: Store, screen: Screen) -> None:
    for run_id in settings.run_ids:
        row, version = store.run(run_id), store.last_version(run_id) or 0
        wanted = settings.rounds or int(row.config["rounds"])
        if row.kind == "host" and version >= wanted:
            screen.say(
                f"{row.name} has version {version} of {wanted} already, and devices are told that it is over; ask for more with --rounds"
            )


async def _serve(settings: Settings, store: Store, keys: HostKeys, held_out: Examples | None, screen: Screen) -> None:
    runs: list[ServedRun] = []
    try:
        tls, ca = _tls(settings)
        members = _members(settings)
        entrance = _entrance(settings, members)
        populations = [store.run(run_id).population for run_id in settings.run_ids]
        post = partial(
            DoorFile.of, settings.address, key=keys.public, tls=tls, populations=populations, members_only=members is not None
        )  # fmt: skip
        plans = {run_id: load_plan(store, run_id).plan for run_id in settings.run_ids}
        following = [run_id for run_id, plan in plans.items() if plan.manifest.server.aggregator == "evaluation"]
        several = len(plans) > 1 or bool(following)
        for run_id in plans.keys() - set(following):
            runs.append(
                ServedRun(
                    store, run_id, keys, held_out, screen, rounds=settings.rounds, among=several,
                    several_edges=settings.several_edges, entrance=None if several else entrance,
                )
            )  # fmt: skip
        runs.sort(key=lambda run: settings.run_ids.index(run.host.run_id))
        evaluations = [run.evaluation for run in runs if run.evaluation is not None]
        if settings.several_edges:
            return await _serve_edges(settings, runs[0].host, evaluations, tls, ca, post, screen)
        evaluated = [follow(store, run_id, keys, screen) for run_id in following]
        host = _together(store, runs, evaluated, entrance) if several else runs[0].host
        address, telemetry = joined(settings.address, settings.port), _telemetry(settings, store)
        if telemetry is not None and (why := await asyncio.to_thread(_no_helper, settings)):
            screen.say(f"the telemetry helper does not answer: {why} Reports wait for it")
        async with served(host, evaluations, address=address, tls=tls, telemetry=telemetry) as server:
            _announce(settings, post(server.port), ca, screen)
            await host.run()
    finally:
        for run in runs:
            run.close()


async def _serve_edges(
    settings: Settings,
    host: Host,
    evaluations: Sequence[Evaluation],
    tls: Tls | None,
    ca: Path | None,
    post: Callable[[int], DoorFile],
    screen: Screen,
) -> None:
    """With Edges in other processes. Those that the host starts listen in its place."""
    port, held = reserve(settings.address, settings.port) if settings.edges else (settings.port, None)
    mine = "127.0.0.1:0" if settings.edges else joined(settings.address, port)
    made = settings.folder / tls_files.FOLDER
    key, cert = (
        (made / "server.key", made / "server.pem") if settings.make_tls else (settings.tls_key, settings.tls_cert)
    )
    edge_settings = EdgeSettings(
        number=settings.edges,
        address=(settings.edge_address, settings.edge_port or 0),
        folder=settings.folder,
        devices=(settings.address, port),
        tls=(key, cert) if key is not None and cert is not None else None,
        authority=ca,
        client_ca=settings.client_ca,
        per_address=settings.per_address,
        again=lambda edge_port: replace(settings, port=port, edge_port=edge_port, resumed=True).again(),
        adopts=settings.resumed,
    )
    try:
        async with served(host, evaluations, address=mine, tls=tls) as server:
            running = asyncio.create_task(host.run())
            try:
                own = tls if ca is not None or not is_loopback(settings.edge_address) else None  # nobody could check it
                own = replace(own, client_ca=None) if own is not None else None  # Edges show their credential
                async with attached(host, edge_settings, tls=own, screen=screen):
                    _announce(settings, post(port if settings.edges else server.port), ca, screen)
                    await running
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
    finally:
        if held is not None:
            held.close()


def _together(
    store: Store, runs: Sequence[ServedRun], evaluated: Sequence[Following], entrance: Entrance
) -> SeveralHosts:
    run_ids = [*(run.host.run_id for run in runs), *(each.run_id for each in evaluated)]
    configs = {run_id: store.run(run_id).config for run_id in run_ids}
    weights = {run_id: float(config.get("weight", 1.0)) for run_id, config in configs.items()}
    by_order = any(config.get("order") for config in configs.values())
    return SeveralHosts(
        [run.host for run in runs], evaluated, weights=weights, by_order=by_order, entrance=entrance
    )  # fmt: skip


@asynccontextmanager
async def served(
    host: Host | SeveralHosts,
    evaluations: Sequence[Evaluation],
    *,
    address: str,
    tls: Tls | None = None,
    quiet_s: float = QUIET_S,
    telemetry: TelemetryHost | None = None,
) -> AsyncGenerator[GrpcServer, None]:
    """Within the block devices can come, and versions are evaluated beside the rounds.

    At its end the last version is evaluated, and every device has heard that the run is over and left, and none has
    come for `quiet_s`.
    """
    server = host.server(address=address, tls=tls)
    evaluating = [asyncio.create_task(evaluation.run()) for evaluation in evaluations]
    beside = []
    try:
        if telemetry is not None:
            serve_reports(server.unstarted, telemetry)
            beside.append(asyncio.create_task(telemetry.run()))
        await server.start()
        yield server
        for evaluation in evaluations:
            evaluation.finish()
        await asyncio.gather(*evaluating)
        await server.until_quiet(quiet_s=quiet_s, longest_s=LINGER_S)
    finally:
        for task in (*evaluating, *beside):
            task.cancel()
        await asyncio.gather(*evaluating, *beside, return_exceptions=True)
        await server.close(grace_s=0.5)


def _members(settings: Settings) -> Members | None:
    """Raises ValueError where a run of members only is to be served so that they could not be told."""
    members = Members.begin(settings.folder) if settings.members_only else Members.of(settings.folder)
    if members is not None and settings.insecure:
        raise ValueError(
            f"{settings.folder} serves members only: leave out --insecure, else anyone sees what they show."
        )
    return members


def _entrance(settings: Settings, members: Members | None) -> Entrance:
    return Entrance(admit=None if members is None else members.admit, per_address=settings.per_address)


def _telemetry(settings: Settings, store: Store) -> TelemetryHost | None:
    if not settings.telemetry:
        return None
    ca = None if settings.telemetry_ca is None else read_certificates(settings.telemetry_ca, option="--telemetry-ca")
    return TelemetryHost(store, settings.run_ids[0], GrpcHelperLink(settings.telemetry, ca=ca), clock=SystemClock())


def _no_helper(settings: Settings) -> str:
    """Why the helper cannot be had: else that would be found out when the first day is over."""
    from shoal.fleet.handshake import refusal, unreached

    where, ca = settings.telemetry, settings.telemetry_ca
    why = unreached(where, timeout_s=LOOK_S)
    return why or (refusal(where, ca=ca.read_bytes(), timeout_s=LOOK_S) if ca is not None else "")


def _tls(settings: Settings) -> tuple[Tls | None, Path | None]:
    made, ca = _own_tls(settings)
    client_ca = None if settings.client_ca is None else settings.client_ca.read_bytes()
    return (None if made is None else replace(made, client_ca=client_ca)), ca


def _own_tls(settings: Settings) -> tuple[Tls | None, Path | None]:
    if settings.tls_cert is not None and settings.tls_key is not None:
        return tls_files.read_tls(settings.tls_key, settings.tls_cert), None
    return tls_files.load_or_make_tls(settings.folder, address=settings.address) if settings.make_tls else (None, None)


def _announce(settings: Settings, door: DoorFile, ca: Path | None, screen: Screen) -> None:
    door.write(settings.folder)
    where = joined(settings.address, door.port)
    line = f"listening on {where}"
    screen.say(line) if screen.json else print(line, flush=True)
    if not settings.has_devices:
        _invite(settings, door, ca, where, screen)
    screen.say(f"run: {settings.folder}")
    if settings.ready_file is not None:
        write_ready(settings.ready_file, where)


def _invite(settings: Settings, door: DoorFile, ca: Path | None, where: str, screen: Screen) -> None:
    """Says how to start devices."""
    if not door.members_only:
        reached = where if settings.address not in EVERY_ADDRESS else f"THIS-MACHINE:{door.port}"
        trusted = [*(["--ca", ca] if ca else []), "--key", door.plan_key]
        screen.say(f"devices: {command_line(['shoal', 'device', '--server', reached, '--data', 'PATH', *trusted])}")
    else:  # for `shoal predict --key`; a line tells devices
        screen.say(f"plans are signed by {door.plan_key}")
    if door.members_only or len(door.populations) > 1:
        screen.say(f"invite others: {command_line(['shoal', 'invite', settings.folder])}")
    elif door.is_reachable:
        screen.say(f"or elsewhere: shoal device --join {door.invitation().text} --data PATH")


def write_ready(path: Path, where: str) -> None:
    """Says where peers can come, in a file that is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(where)
        partial.replace(path)
    except OSError as error:
        raise StoreError(f"Cannot write --ready-file {path}: {error.strerror}.") from error


def _tell(
    settings: Settings, after: Sequence[RunSummary], before: Sequence[RunSummary], screen: Screen, watch: Stopwatch
) -> None:
    spent: dict[str, float] = {}
    for summary, at_first in zip(after, before, strict=True):
        see = f"no metrics; shoal runs show {settings.folder} --id {summary.task}"
        screen.line(f"{summary.task} version {summary.version}: {words.values(summary.metrics) or see}")
        for phase, seconds in summary.seconds_since(at_first).items():
            spent[phase] = spent.get(phase, 0.0) + seconds
    beside = {"commit": spent.pop("commit", 0.0), "evaluate, beside the rounds": spent.pop("evaluate", 0.0)}
    screen.line(f"where the time went: {words.phases({**watch.seconds, **beside}, total=watch.total)}")
    screen.line(f"and on the devices: {words.phases(spent)}")
    down, up = sum(summary.bytes_down for summary in after), sum(summary.bytes_up for summary in after)
    screen.line(f"sent down {words.size(down)}, up {words.size(up)}")
    screen.line(f"run: {settings.folder}")
    runs = [summary.to_json() for summary in after]
    told = runs[0] if len(runs) == 1 else {"runs": runs}
    screen.document(told | {"folder": str(settings.folder), "total_seconds": watch.total})
