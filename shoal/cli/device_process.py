"""What a device process does: one connection, one runner, and an actor for each user that it plays."""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shoal.cli import words
from shoal.cli.device_crew import Crew
from shoal.cli.ending import run_until_told
from shoal.cli.failures import Stopped
from shoal.cli.screen import Screen, Stopwatch
from shoal.data.example_store import ExampleStore
from shoal.data.store import Examples, Population
from shoal.errors import DataError, DeviceError, StoreUnavailable
from shoal.fleet.device import Device
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.device_secret import DeviceSecret, Pseudonyms, credential
from shoal.fleet.example_ledger import DELTA, epsilon
from shoal.fleet.floor import Floor
from shoal.fleet.gate import Gate
from shoal.fleet.grpc_link import GrpcLink
from shoal.fleet.politeness import LEAVE_S, Politeness, while_open
from shoal.fleet.process import switch_threads_often
from shoal.plan.child_engines import EngineName
from shoal.plan.left_out import EMPTY, named, told
from shoal.plan.manifest import Runtime
from shoal.plan.plan import Plan
from shoal.plan.priority import Priority
from shoal.plan.runner import Limits, Runner
from shoal.plan.signature import is_good, is_good_apart
from shoal.record.lock import only_writer

if TYPE_CHECKING:
    from shoal.fleet.telemetry_device import TelemetryDevice
    from shoal.privacy.identity import Identity

log = logging.getLogger("shoal.device")

KEPT_BYTES: Final = 256 << 20
"""Examples of all users together that are kept in memory between rounds."""
IDLE_S: Final = 30.0
"""After which the process that runs programs ends, where it is soon started again."""
GRACE_S: Final = 3.0
"""For the others, once a device has heard that the run is over."""
_AGAIN: Final = ("Work that was not counted is done anew", "What is in hand is kept")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a process takes part."""

    server: str
    users: tuple[str, ...]
    id: str = ""
    authority: bytes | None = None
    server_name: str | None = None
    trusted_key: bytes | None = None
    state: Path | None = None
    memory_bytes: int = Limits().memory_bytes
    threads: int | None = None
    accelerators: int = 1
    """That share each batch."""
    patience_s: float = 300.0
    in_process: bool = False
    engine: EngineName = "jax"
    """What runs programs."""
    visits: bool = False
    """Come and go, rather than stay and wait."""
    populations: tuple[str, ...] = ("default",)
    """Which each device is of."""
    tasks: tuple[str, ...] = ()
    """Those to serve; none: any."""
    floor: Floor = field(default_factory=Floor)
    """What a plan must promise at least."""
    telemetry: bytes | None = None
    """Key of the helper that telemetry is split for; None: none is sent."""
    identity: "Identity | None" = None
    """Of the one device that an authority knows."""
    politeness: Politeness = field(default_factory=Politeness)
    """When it may work, and what it may cost this machine."""
    rest_s: float = 0.0
    """From one counted update of a device to its next training."""
    priority: Priority = "low"
    client: tuple[bytes, bytes] | None = None
    """PEM of key and certificate that the host is shown."""
    token: bytes = b""
    """Of an invitation, where the host serves members only."""
    pseudonym_window_s: float | None = None
    """How long devices keep a name; None: always."""

    def device_id(self, user: str) -> str:
        """The name under which a user checks in."""
        if not self.id:
            return user
        return self.id if len(self.users) == 1 else f"{self.id}/{user}"

    def credential(self, population: str, device: str, secret: DeviceSecret) -> bytes:
        """What a device shows at check-in."""
        if not self.token:
            return b""
        assert self.trusted_key is not None  # an invitation names it
        return credential(self.token, secret.of_member(self.trusted_key, population, device))

    def pseudonyms(self, population: str, device: str, secret: DeviceSecret) -> Pseudonyms | None:
        """What a device is called in which window; None: always the same."""
        if self.pseudonym_window_s is None:
            return None
        return Pseudonyms(
            secret=secret, host=self.server, population=population, device=device, window_s=self.pseudonym_window_s
        )


def choose(population: Population, *, first: int, count: int | None) -> tuple[str, ...]:
    """The users to play: those with examples, `count` of them (None: all) from number `first` on.

    Raises:
        DataError: there are not so many.
    """
    ids = population.ids[first : first + count] if count else population.ids[first:]
    if not ids or (count and len(ids) < count):
        wanted = f"users {first} to {first + count - 1}" if count else f"users from {first} on"
        raise DataError(f"Expected {wanted} (from 0), the population has {len(population)}.")
    sizes = population.sizes()
    chosen = tuple(user for user in ids if sizes[user])
    if not chosen:
        raise DataError("None of the users chosen has an example.")
    if empty := [user for user in ids if not sizes[user]]:
        log.warning("%s", told(empty, EMPTY))
    return chosen


def run(
    settings: Settings, population: Population | ExampleStore, *, screen: Screen, watch: Stopwatch, parent: int
) -> None:
    """Plays the users until the run is over.

    Raises:
        PlanError: the plan was refused, or cannot be run here.
        DataError: no user's examples fit the task.
        NetworkError: the host did not answer for as long as patience lasts.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    switch_threads_often()
    told = (
        len(population)
        if isinstance(population, ExampleStore)
        else sum(population.sizes()[user] for user in settings.users)
    )
    screen.say(f"{words.count(len(settings.users), 'device')}, {words.count(told, 'example')}; host {settings.server}")
    with _own_folder(settings.state):
        _run(settings, population, screen, watch, parent)


@contextmanager
def _own_folder(state: Path | None) -> Iterator[None]:
    """Keeps other device processes out of the state folder: two would give each other's work up."""
    if state is None:
        yield
        return
    state.mkdir(parents=True, exist_ok=True)
    with only_writer(state, what="state of devices", hint=""):
        yield


def _run(
    settings: Settings, population: Population | ExampleStore, screen: Screen, watch: Stopwatch, parent: int
) -> None:
    host = make_host(settings, runtime_of(settings))
    watch.lap("start")
    crew = Crew(settings.server, settings.patience_s, screen, host, has_authority=settings.authority is not None)
    try:
        run_until_told(play(settings, population, host, watch=crew.watch, on_progress=crew.heard), parent=parent)
    except Stopped as stopped:
        raise Stopped(
            f"stopped; {crew.totals()}. {_AGAIN[settings.state is not None]}: start the same command again to go on.",
            code=stopped.code,
        ) from None
    else:
        watch.lap("run")
        _tell(settings, crew, host, screen, watch)
    finally:
        host.close()


def make_host(settings: Settings, runtime: Runtime, *, looks_only: bool = False) -> DeviceHost:
    """What the users' devices share."""
    return DeviceHost(
        make_runner=partial(_make_runner, settings), runtime=runtime, trusted_key=settings.trusted_key,
        limits=Limits(memory_bytes=settings.memory_bytes), state_folder=settings.state, looks_only=looks_only, floor=settings.floor,
        identity=settings.identity, is_signed=is_good_apart if settings.engine == "iree" else is_good,
    )  # fmt: skip


def _make_runner(settings: Settings, plan: Plan) -> Runner:
    if settings.in_process and settings.engine == "iree":
        from shoal.plan.iree_runner import IreeRunner

        return IreeRunner(plan, threads=settings.threads)
    if settings.in_process:
        from shoal.plan.jax_runner import JaxRunner, mesh_of

        return JaxRunner(plan, mesh_of(settings.accelerators))
    from shoal.plan.child import ChildRunner

    # JAX takes seconds to start again, IREE a tenth of one.
    idle_s = IDLE_S if settings.engine == "iree" else None
    limits = Limits(memory_bytes=settings.memory_bytes)
    return ChildRunner(
        plan,
        limits,
        settings.threads,
        priority=settings.priority,
        engine=settings.engine,
        idle_s=idle_s,
        accelerators=settings.accelerators,
    )


def runtime_of(settings: Settings) -> Runtime:
    """What runs programs here."""
    if settings.engine == "iree":
        from shoal.plan.iree_targets import this_runtime as this_iree

        return this_iree()
    if settings.in_process:
        from shoal.plan.stablehlo import this_runtime

        return this_runtime()
    from shoal.plan.child import probe

    return probe(threads=settings.threads)


def _sources(
    data: Population | ExampleStore, users: Sequence[str]
) -> tuple[Callable[[str], Examples], Callable[[], int] | None]:
    """How a user's examples are had, and counted where they come and go."""
    if not isinstance(data, ExampleStore):
        return _kept_if_small(data, users), None

    def read(user: str) -> Examples:
        try:
            return data.examples()
        except StoreUnavailable as error:  # tried again, as for whatever fails on a device
            raise DeviceError(str(error), stage="data") from error

    def count() -> int:
        try:
            return len(data)
        except StoreUnavailable as error:
            log.warning("%s", error)
            return 0

    return read, count


def _kept_if_small(population: Population, users: Sequence[str]) -> Callable[[str], Examples]:
    """How a user's examples are had: read once where all of them together are small, else anew for each round."""
    sizes, spec = population.sizes(), population.spec()
    each = sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in spec.values())
    read = population.__getitem__
    return cache(read) if sum(sizes[user] for user in users) * each <= KEPT_BYTES else read


async def play(
    settings: Settings,
    population: Population | ExampleStore,
    host: DeviceHost,
    *,
    watch: Callable[[Sequence[Device]], Coroutine[Any, Any, None]],
    on_progress: Callable[[Device], None] = lambda device: None,
) -> Sequence[Device]:
    """Plays the users until the run is over; `watch` runs beside them. Returns the devices."""
    link = GrpcLink(settings.server, ca=settings.authority, server_name=settings.server_name, client=settings.client)
    (examples_of, num_examples), secret = _sources(population, settings.users), DeviceSecret.of(host.file)
    told: dict[str, TelemetryDevice] = {}

    def heard(device: Device) -> None:
        on_progress(device)
        if device.device_id in told:
            told[device.device_id].heard(device.progress)

    devices = [
        Device(
            name, partial(examples_of, user), link=link, host=host,
            rng=np.random.default_rng(), stays=not settings.visits, on_progress=heard,
            population=of, place=settings.server, tasks=settings.tasks, rest_s=settings.rest_s, credential=settings.credential(of, name, secret),
            pseudonyms=settings.pseudonyms(of, name, secret), num_examples=num_examples,
        )
        for of in settings.populations
        for user in settings.users
        for name in (settings.device_id(user),)
    ]  # fmt: skip
    told |= _telemetry(settings, host)
    telling = [asyncio.create_task(told[device.device_id].run(device.progress)) for device in devices if told]
    watching = asyncio.create_task(watch(devices))
    gate = _gate(settings, host, devices)
    watching_machine = [asyncio.create_task(gate.run())] if gate is not None else []
    playing = {asyncio.create_task(while_open(device, gate)): device for device in devices}
    try:
        await _until_all_over(playing, watching, *watching_machine)
    except asyncio.CancelledError:
        try:
            reporting = [task for task, device in playing.items() if device.interrupt()]
            if reporting:
                await asyncio.wait(reporting, timeout=LEAVE_S)
        finally:
            host.stop()  # ends a program that is running, so that its devices can end
        raise
    finally:
        for task in (watching, *watching_machine, *playing, *telling):
            task.cancel()
        await asyncio.gather(watching, *watching_machine, *playing, return_exceptions=True)
        for error in await asyncio.gather(*telling, return_exceptions=True):
            if isinstance(error, Exception):
                log.error("a device's telemetry has failed: %s", error)
        await link.close()
    return devices


def _gate(settings: Settings, host: DeviceHost, devices: Sequence[Device]) -> Gate | None:
    def moved_bytes() -> int:
        return host.fetching.down_bytes + sum(device.progress.up_bytes for device in devices)

    return settings.politeness.gate(host.processes, moved_bytes, file=host.file, clock=host.clock)


def _telemetry(settings: Settings, host: DeviceHost) -> "dict[str, TelemetryDevice]":
    """By name of the device; each has a secret and slots of its own."""
    if settings.telemetry is None or settings.state is None:
        return {}
    from shoal.fleet.telemetry_device import KeptFact, TelemetryDevice  # most devices do without
    from shoal.fleet.telemetry_link import GrpcTelemetryLink

    link = GrpcTelemetryLink(
        settings.server, ca=settings.authority, server_name=settings.server_name, client=settings.client
    )
    return {
        name: TelemetryDevice(
            helper=settings.telemetry, kept=KeptFact(host.file, f"telemetry {name}"), link=link, clock=host.clock
        )
        for name in map(settings.device_id, settings.users)
    }


async def _until_all_over(playing: "Mapping[asyncio.Task[None], Device]", *others: "asyncio.Task[None]") -> None:
    """A population whose run is over, or that no user's data fit, leaves the others alone."""
    of: dict[str, dict[asyncio.Task[None], Device]] = {}
    for task, device in playing.items():
        of.setdefault(device.population, {})[task] = device
    waiting = {asyncio.create_task(_until_over(group, *others)): name for name, group in of.items()}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for over in done:
                name, error = waiting.pop(over), over.exception()
                if error is not None and not (isinstance(error, DataError) and waiting):
                    raise error
                if error is not None:
                    log.warning("population %r is left out: %s", name, error)
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _until_over(playing: "Mapping[asyncio.Task[None], Device]", *others: "asyncio.Task[None]") -> None:
    """A user whose data do not fit leaves the others alone, unless all fail; anything else ends them all.

    Once one has heard that the run is over, the others need not: they may be looking for a host that has gone.
    """
    waiting: set[asyncio.Task[None]] = set(playing)
    failed: dict[str, DataError] = {}
    grace_s: float | None = None
    while waiting:
        done, _ = await asyncio.wait({*waiting, *others}, return_when=asyncio.FIRST_COMPLETED, timeout=grace_s)
        if not done:
            break
        for other in done & {*others}:
            other.result()
        for task in done & waiting:
            waiting.discard(task)
            error = task.exception()
            if isinstance(error, DataError):
                if not failed:  # of those that follow, often for the same reason, the names are said at the end
                    log.warning("a user is left out: %s", error)
                failed[playing[task].device_id] = error
            elif error is not None:
                raise error
            else:
                grace_s = GRACE_S
    if len(failed) == len(playing):
        raise next(iter(failed.values()))
    if len(failed) > 1:
        log.warning("in all %s were left out: their examples do not fit", named(sorted(failed)))


def _tell(settings: Settings, crew: Crew, host: DeviceHost, screen: Screen, watch: Stopwatch) -> None:
    progress = [device.progress for device in crew.devices]
    told = {stage: s for stage, s in crew.seconds.items() if stage}
    up = sum(p.up_bytes for p in progress)
    screen.line(f"the run is over; {words.count(len(progress), 'device')}, updates {crew.totals()}")
    screen.line(f"where the time went: {words.phases(watch.seconds, total=watch.total)}")
    screen.line(f"and of the devices, added up: {words.phases(told)}")
    screen.line(f"came down {words.size(host.fetching.down_bytes)}, went up {words.size(up)}")
    spent = max((host.example_ledger(device.device_id).rho for device in crew.devices), default=0.0)
    delta = settings.floor.examples.delta if settings.floor.examples is not None else DELTA
    if spent:
        screen.line(f"spent of one device's examples, at most: epsilon {epsilon(spent, delta):.3g} at delta {delta:g}")
    if settings.state is not None:
        screen.line(f"kept between rounds: {settings.state}")
    document: dict[str, Any] = {
        "devices": len(progress), "counted": sum(p.counted for p in progress), "refused": sum(p.refused for p in progress),
        "released": sum(p.released for p in progress), "failures": sum(p.failures for p in progress),
        "bytes_down": host.fetching.down_bytes, "bytes_up": up, "seconds": dict(watch.seconds), "stage_seconds": told,
        "epsilon_of_examples": epsilon(spent, delta) if spent else None,
        "total_seconds": watch.total, "state": None if settings.state is None else str(settings.state),
    }  # fmt: skip
    screen.document(document)
