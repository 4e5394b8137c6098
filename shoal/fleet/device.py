"""A device: checks in, trains when it is asked to, reports, and keeps its update until that is counted.

One asyncio actor for each device; the work that a process's devices share is in `device_host.py`. A broken stream loses
nothing: the token and the update are kept, and after reconnecting the device first asks what became of them.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from shoal.codec.packed import PACKED, pack
from shoal.data.store import Examples
from shoal.errors import (
    DataError,
    DeviceError,
    MissingExtra,
    NetworkError,
    PlanError,
    ProgramError,
    ProtocolError,
    StoreError,
    TaskRefused,
    TooFewExamples,
    UpdateRefused,
)
from shoal.fleet.device_host import DeviceHost, Prepared, Spent, name_of_run
from shoal.fleet.device_secret import Pseudonyms
from shoal.fleet.example_ledger import cost
from shoal.fleet.floor import Floor
from shoal.fleet.link import Link, Stream, longest_s
from shoal.fleet.secure_phases import MASKED
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.manifest import Manifest, Runtime
from shoal.plan.runner import Update
from shoal.plan.train import NOISE_SEED_BYTES, Interrupted, Paused, train
from shoal.tensors import Index, Tensors, dtype_name, sha256, to_bytes

if TYPE_CHECKING:
    from shoal.fleet.secure_offer import SecureOffer

log = logging.getLogger("shoal.device")

SLICE_BYTES: Final = 64 << 10  # four of them are in the memory of the server for each device that sends
MAX_INLINE_BYTES: Final = 24 << 10
BACK_OFF_S: Final = (0.1, 5.0)
REFUSED_DELAY_S: Final = 0.5
REFUSED_LONGEST_S: Final = 60.0
PUSH_TRIES: Final = 6
MOST_REPEATS: Final = 100
TRIES_ELSEWHERE: Final = 3
LOOK_S: Final = 60.0
"""Between two looks at the clock of a device that rests."""
EXAMPLES_LOOK_S: Final = 5.0
"""Between two looks of a device that waits for examples."""
FINISHED: Final = "finished"
"""Stage at which the host has said that the run is over."""
SPENT: Final = "spent"
"""Stage at which a device gives up what it may not offer again."""
RENAMED_S: Final = 5.0
"""For so long at most a device with pseudonyms stays away before it comes under the next."""
LONGEST_AWAY_S: Final = 86_400.0
"""Whatever an Edge says."""


@dataclass
class _Work:
    """An assignment, and its update once there is one."""

    assigned: pb.Assigned
    name: str
    """Under which the device has checked in for it."""
    key: bytes
    """That signed its plan: as the host says, and once the plan is here, as was verified."""
    task: str = ""
    """Its name, once the plan is here."""
    stopped: bool = False
    training: bool = False
    """A thread is at it, which stops between two blocks and cannot be cancelled."""
    update: Update | None = None
    report: pb.Report | None = None
    sends: Tensors = field(default_factory=dict)
    """What is pushed: the update's sums, or in a secure group what they look like under their masks."""
    secure: "SecureOffer | None" = None
    """The update's way through secure groups, where the task has them."""
    paused: Paused | None = None
    """Where its training was interrupted."""
    repeats: int = 0
    """How often the Edge has asked for what it had been sent."""
    is_kept: bool = False
    """It is in the device's file."""

    @property
    def run(self) -> str:
        """What the device keeps its state of the run under."""
        return name_of_run(self.assigned.run, self.key)

    @property
    def has_revealed(self) -> bool:
        """Its update was revealed in a sum: it is offered no more, whatever is said of it."""
        return self.secure is not None and self.secure.has_revealed


@dataclass(frozen=True, slots=True)
class _Trained:
    """What the worker gives back."""

    update: Update
    root: str
    """Of its sums."""
    started_s: float
    """When it was the device's turn (`time.perf_counter`)."""
    compile_s: float


@dataclass
class Progress:
    """What a device has done; for the command line."""

    stage: str = "connecting"
    counted: int = 0
    refused: int = 0
    released: int = 0
    failures: int = 0
    last_error: str = ""
    up_bytes: int = 0


class Device:
    """See the module's text."""

    def __init__(
        self,
        device_id: str,
        examples: Callable[[], Examples],
        *,
        link: Link,
        host: DeviceHost,
        rng: np.random.Generator,
        stays: bool = True,
        rest_s: float = 0.0,
        population: str = "default",
        place: str = "",
        tasks: Sequence[str] = (),
        credential: bytes = b"",
        pseudonyms: Pseudonyms | None = None,
        num_examples: Callable[[], int] | None = None,
        on_progress: Callable[["Device"], None] = lambda device: None,
    ) -> None:
        """
        Args:
            device_id: its name for this population.
            examples: opens its data; called for each round.
            link: to the Edge.
            host: what the process shares.
            rng: for the jitter of its delays.
            stays: whether it waits for the next assignment; else it goes away after each and comes when it was told to.
            rest_s: least time from one update that is counted to the next training, whatever a host says.
            population: which it is of.
            place: whose: what it has in hand for one is offered to no other. The host's address, say.
            tasks: names of those that it serves; none: any.
            credential: shown at check-in, to a host that serves members only.
            pseudonyms: what it is called when it checks in; None: by its name.
            num_examples: how many there are now, where examples come and go: with too few of them it waits for more.
        """
        self.device_id, self._examples, self._link, self._host, self._rng = device_id, examples, link, host, rng
        self._home = link
        """Where it goes when the Edge that it was sent to does not answer."""
        self._stays, self._rest_s, self._on_progress = stays, rest_s, on_progress
        self.population, self._tasks = population, tuple(tasks)
        self._entry = f"{place} {population}", device_id
        """Of the device's file, which is no name that anybody hears."""
        self._credential, self._pseudonyms = credential, pseudonyms
        self._called: tuple[Stream, str] | None = None
        """A stream, and the name that it knows the device by: no stream hears two."""
        self._unfit: dict[str, DataError | TaskRefused] = {}
        """Tasks that its examples do not fit, or that promise too little, and why."""
        self._num_examples = num_examples
        self._short: dict[str, int] = {}
        """Tasks for which it had too few examples, and how many these were."""
        self._wants_more = False
        """Nothing is to be done here with so many examples."""
        self._away_s: float | None = None
        """How long it is to be gone, once it was told so."""
        self._work: _Work | None = None
        self._producing: asyncio.Task[None] | None = None
        self._checked_in: Stream | None = None
        self._is_leaving = False
        self._refusals = 0
        self._rested_from: float | None = None
        """When the last update was counted that it has rested from."""
        self._laters = 0
        """How often it was sent away since the last assignment."""
        self._failures = 0
        """Streams that broke since the last assignment: each makes the next pause longer."""
        self.progress = Progress()

    async def run(self) -> None:
        """Serves until the host says that the run is over, or until it is interrupted; then it may be called again.

        What it has in hand when it is interrupted or cancelled it goes on with then, also in another process where the host has a folder.

        Raises:
            PlanError: the device's runtime cannot run the task, or its plan is refused.
            DataError: the device's examples do not fit the task.
        """
        self._is_leaving = False
        self._work = self._work or await asyncio.to_thread(self._read_work)
        try:
            await self._run()
        finally:
            await (self._drop_work() if self.is_over else self._put_aside())

    @property
    def is_over(self) -> bool:
        """Whether the host has said that the run is over."""
        return self.progress.stage == FINISHED

    def rest(self) -> None:
        """Says that it does nothing for now; `run` goes on."""
        self._say("resting")

    async def predict(self, fields: Mapping[str, np.ndarray], *, task: str = "") -> np.ndarray:
        """As `DeviceHost.predict`, for this device: offline, by the newest version that it was sent."""
        return await self._host.predict(self.device_id, fields, task=task)

    def interrupt(self) -> bool:
        """The device can go no further: its conditions have changed, or its process is to end.

        A training stops between two blocks; where the plan takes partial work its steps are reported, and `run` returns
        once the Edge has them; else it is put aside, for the next `run` to go on with. Returns whether there is something to wait for; else
        `run` may be cancelled.
        """
        self._is_leaving = True
        work = self._work
        if work is None or self._producing is None:
            return False
        return work.update is not None or work.training

    async def _run(self) -> None:
        while not self._has_left:
            try:
                await self._rest()
                await self._until_enough()
                async with self._link.session() as stream:
                    if await self._serve(stream):
                        return
                if self._away_s is not None:
                    away_s, self._away_s = self._away_s, None
                    self._say("away")
                    await self._sleep(away_s)
            except (NetworkError, ProtocolError) as error:
                self._failures += 1
                self.progress.last_error = str(error)
                self.progress.failures += 1
                if isinstance(error, ProtocolError):
                    log.warning("%s: %s", self.device_id, error)
                    await self._drop_work()
                if self._failures >= TRIES_ELSEWHERE:
                    self._link = self._home
                self._say("reconnecting")
                first, longest = BACK_OFF_S
                await self._pause(min(longest, first * 2 ** min(self._failures, 20)))

    async def _serve(self, stream: Stream) -> bool:
        """One stream; True when the run is over. Work goes on over streams that break."""
        await self._resume(stream)
        hearing: asyncio.Task[pb.FromEdge] | None = None
        renaming = None if self._pseudonyms is None else asyncio.create_task(self._until_renamed(self._pseudonyms))
        try:
            while True:
                hearing = hearing or asyncio.create_task(stream.receive())
                waited: list[asyncio.Task[Any]] = [hearing]
                waited += [self._producing] if self._producing is not None else []
                waited += [renaming] if renaming is not None and self._work is None else []
                done, _ = await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if renaming in done:
                    self._come_anew()
                if self._producing in done:
                    await self._produced(stream)
                    if self._has_left:
                        return True
                if hearing in done:
                    message, hearing = hearing.result(), None
                    if await self._hear(message, stream):
                        return True
                if self._away_s is not None:
                    return False
        finally:
            tasks = [task for task in (hearing, renaming) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _hear(self, message: pb.FromEdge, stream: Stream) -> bool:
        work = self._work
        if self._is_of_other_work(message):
            return False
        match message.WhichOneof("kind"):
            case "assigned":
                self._failures = self._laters = 0  # the Edge is there and wants something
                self._host.down_bytes += sum(len(blob.data) for blob in message.assigned.inline)
                if work is not None and work.assigned.token != message.assigned.token:
                    await self._drop_work()
                if self._work is None and self._to_rest_s() > 0.0:  # it was counted for another population meanwhile
                    resting = pb.GaveUp(token=message.assigned.token, stage="resting")
                    await stream.send(pb.FromDevice(gave_up=resting))
                    self._away_s = 0.0
                elif self._work is None:
                    self._work = _Work(
                        message.assigned, self._name_of(stream, self._name()), message.assigned.plan_public_key
                    )
                    self._producing = asyncio.create_task(self._produce(self._work))
            case "counted" if self._producing is None:
                self._failures = self._refusals = 0
                await self._settle()
                await self._stay(stream, message.counted)
            case "refused":
                await self._refused(message.refused.reason, message.refused.detail)
                self._checked_in = None  # it is not waited for any more: it must say that it is there
                await self._stay(stream, message.refused)
            case "released":
                self.progress.released += 1
                await self._drop_work()
                await self._stay(stream, message.released)
            case "incomplete" if work is not None and work.report is not None:
                work.repeats += 1
                if work.repeats > MOST_REPEATS:
                    raise ProtocolError(f"The Edge has asked {work.repeats} times for the same update.")
                await self._push(work)
                await (self._report(work, stream) if work.secure is None else self._masked(work, stream))
            case "group" if work is not None and work.secure is not None:
                await self._answer(work, work.secure, message.group, stream)
            case "ping" if self._is_leaving and work is not None:
                return True  # what was sent before it, the report, has been taken in
            case "later":
                self._laters += 1
                # A host that has nothing to do is asked less and less often, whatever it says.
                least_s = min(BACK_OFF_S[1], BACK_OFF_S[0] * 2.0 ** (self._laters - 10))
                self._away_s = max(self._drawn(message.later), least_s)
                if message.later.other_edge:
                    self._link = self._link.elsewhere(message.later.other_edge)
            case "incompatible" if self._short:
                self._wants_more, self._away_s = True, 0.0
            case "incompatible":
                if self._unfit:  # and nothing else is to be done here
                    raise next(iter(self._unfit.values()))
                raise PlanError(message.incompatible.needs)
            case "finished":
                if self._unfit and not self.progress.counted:
                    raise next(iter(self._unfit.values()))
                self._say(FINISHED)
                return True
            case kind:
                log.debug("%s: ignored %s", self.device_id, kind)
        return self._has_left

    @property
    def _has_left(self) -> bool:
        """It was interrupted, and nothing more is to be said of what it has in hand."""
        return self._is_leaving and self._producing is None and (self._work is None or self._work.update is None)

    def _is_of_other_work(self, message: pb.FromEdge) -> bool:
        """Whether it is an answer about an update that the device has no more: what it holds now is not touched by it."""
        kind = message.WhichOneof("kind")
        if kind not in ("counted", "refused", "released", "incomplete", "group"):
            return False
        about: pb.Token = getattr(message, kind).token
        held = self._work.assigned.token if self._work is not None else None
        return bool(about.signed) and about != held

    async def _refused(self, reason: str, detail: str) -> None:
        self.progress.refused += 1
        self._refusals += 1
        told, self.progress.last_error = self.progress.last_error, f"{reason}: {detail}"
        if told != self.progress.last_error:
            log.warning("%s: refused: %s", self.device_id, self.progress.last_error)
        await self._drop_work()
        if reason == "protocol":
            raise ProtocolError(detail)
        await self._pause(min(REFUSED_LONGEST_S, REFUSED_DELAY_S * 2.0**self._refusals))

    async def _resume(self, stream: Stream) -> None:
        """On a new stream: first what became of the update in hand, if there is one."""
        work = self._work
        if work is None:
            return await self._check_in(stream)
        if self._producing is not None:
            return  # it will be reported on this stream
        status = await self._link.status(pb.StatusRequest(token=work.assigned.token))
        work.stopped = False  # as it was when the run before was interrupted
        match status.state:
            case pb.StatusReply.COUNTED if work.update is not None:
                await self._settle()
            case pb.StatusReply.REFUSED | pb.StatusReply.EXPIRED | pb.StatusReply.COUNTED:
                self.progress.refused += 1
                self.progress.last_error = status.reason
                await self._drop_work()
            case pb.StatusReply.UNKNOWN if work.has_revealed:
                self.progress.refused += 1
                self.progress.last_error = "its secure group failed after the update was revealed in it"
                await self._drop_work()
            case _ if work.report is None:
                self._producing = asyncio.create_task(self._produce(work))
                return
            case _:
                if work.secure is None:
                    await self._push(work)
                return await self._report(work, stream)
        await self._check_in(stream)

    async def _stay(self, stream: Stream, answer: pb.Counted | pb.Refused | pb.Released) -> None:
        """Waits for the next assignment: without a word where it has checked in on this stream; or goes away."""
        if self._is_leaving:
            return
        if not self._stays or self._rest_s:
            self._away_s = self._drawn(answer)
        elif self._checked_in is stream:
            self._say("waiting")
        else:
            await self._check_in(stream)

    async def _check_in(self, stream: Stream) -> None:
        short = self._short and await self._too_few()
        name = self._name()
        if self._name_of(stream, name) != name:
            return self._come_anew()
        self._say("waiting")
        self._checked_in, self._called = stream, (stream, name)
        check_in = pb.CheckIn(
            population=self.population,
            tasks=self._tasks,
            unfit=[*self._unfit, *short],
            device_id=name,
            credential=self._credential,
            runtime=_runtime_info(self._host.runtime),
            software="shoal",
            codecs=["float32", PACKED],
            memory_bytes=self._host.limits.memory_bytes,
            stay=self._stays,
        )
        await stream.send(pb.FromDevice(check_in=check_in))

    def _name(self) -> str:
        """What it is called now."""
        return self.device_id if self._pseudonyms is None else self._pseudonyms.name(self._host.clock.wall_s())

    def _name_of(self, stream: Stream, otherwise: str) -> str:
        """What it is called on a stream, where it has said so."""
        return self._called[1] if self._called is not None and self._called[0] is stream else otherwise

    async def _until_renamed(self, pseudonyms: Pseudonyms) -> None:
        """Returns when it is called otherwise."""
        clock = self._host.clock
        await clock.sleep_until(clock.now_s() + pseudonyms.left_s(clock.wall_s()))

    def _come_anew(self) -> None:
        """On a new stream, a little later: the old one knows it by another name."""
        self._away_s = float(self._rng.uniform(0.0, RENAMED_S))

    async def _drop_work(self) -> None:
        """Stops what is under way; the server needs it no more."""
        work, self._work = self._work, None
        await self._stop(work)
        if work is not None and work.is_kept:
            await self._try_to_write(
                "what it had in hand is not forgotten", lambda: self._host.file.drop_work(*self._entry)
            )

    async def _put_aside(self) -> None:
        """Stops what is under way; it is gone on with later, if it is useful then."""
        await self._stop(self._work)
        if self._work is not None and not self._work.has_revealed and self._work.update is None:
            await self._keep_work(self._work)

    async def _stop(self, work: _Work | None) -> None:
        producing, self._producing = self._producing, None
        if work is not None:
            work.stopped = True
        if producing is not None:
            if work is None or not work.training:
                producing.cancel()
            await asyncio.gather(producing, return_exceptions=True)

    async def _produced(self, stream: Stream) -> None:
        """The work is done, or has failed: the Edge is told."""
        work, producing = self._work, self._producing
        assert work is not None and producing is not None
        self._producing = None
        try:
            producing.result()
        except Interrupted:  # it is put aside; its place is free until then
            self._say("interrupted")
            gave_up = pb.GaveUp(token=work.assigned.token, stage="interrupted")
            return await stream.send(pb.FromDevice(gave_up=gave_up))
        except (ProgramError, DeviceError, DataError, PlanError, MissingExtra) as error:
            await self._drop_work()
            return await self._give_up(work, error, stream)
        except NetworkError:
            if work.report is None and work.paused is None:
                self._work = None  # else it is gone on with on the next stream
            raise
        except ProtocolError as error:
            await self._drop_work()
            if work.report is None:
                raise
            await self._refused("wrong slices", str(error))
            return await self._check_in(stream)
        await self._report(work, stream)
        self._say("reported")

    async def _report(self, work: _Work, stream: Stream) -> None:
        self._called = (stream, work.name)  # by its token, whatever it is called by now
        await stream.send(pb.FromDevice(report=work.report))
        if self._is_leaving:
            await stream.send(pb.FromDevice(ping=pb.Ping()))

    async def _produce(self, work: _Work) -> None:
        """One assignment, from the plan to an update that is ready to be reported."""
        with self._host.using(work.assigned.plan):
            trained, costs = await self._train(work)
        self._say("reporting")
        begun = time.perf_counter()
        work.update = trained.update
        if work.secure is not None:
            work.report = pb.Report(token=work.assigned.token, costs=costs)
            return
        work.sends = trained.update.sums
        work.report = pb.Report(
            token=work.assigned.token,
            root=trained.root,
            weight=trained.update.weight,
            slices=self._inline(trained.update),
            costs=costs,
        )
        await self._keep_work(work)
        await self._push(work)
        work.report.costs.wire_s += time.perf_counter() - begun

    async def _answer(self, work: _Work, secure: "SecureOffer", message: pb.GroupMessage, stream: Stream) -> None:
        """To a message of the secure group that the update is in."""
        phase, data = await asyncio.to_thread(secure.hear, message.phase, message.data)
        if phase == "complaint":
            self.progress.last_error = data.decode()
            log.warning("%s: leaves its secure group: %s", self.device_id, self.progress.last_error)
        if phase == MASKED:
            work.sends = {MASKED: np.frombuffer(data, np.uint8)}
            return await self._masked(work, stream)
        await stream.send(pb.FromDevice(group=pb.GroupMessage(token=message.token, phase=phase, data=data)))

    async def _masked(self, work: _Work, stream: Stream) -> None:
        """Sends the masked update: within its message where it is small."""
        data = work.sends[MASKED]
        is_small = data.nbytes <= MAX_INLINE_BYTES
        if not is_small:
            await self._push(work)
        else:
            self.progress.up_bytes += data.nbytes
        inline = data.tobytes() if is_small else b""
        told = pb.GroupMessage(token=work.assigned.token, phase=MASKED, data=inline)
        await stream.send(pb.FromDevice(group=told))

    async def _train(self, work: _Work) -> tuple[_Trained, pb.Costs]:
        host, assigned, spent = self._host, work.assigned, Spent()
        begun = time.perf_counter()
        self._say("fetching")
        prepared = await host.prepare(assigned, self._link, spent)
        work.task, work.key = prepared.manifest.task, prepared.plan.public_key
        is_secure = prepared.manifest.promises.group == "secure"
        if is_secure and _is_spent(host, self.device_id, prepared.manifest, assigned.model):
            raise DeviceError(
                "An update from these tensors was revealed in a secure group before, and is never offered again: it waits for other tensors "
                "(the next version, or a run with another --seed).",
                stage=SPENT,
            )
        await host.ensure_model(assigned, prepared, self._link, spent)
        self._say("queued")
        loop = asyncio.get_running_loop()
        trained = await loop.run_in_executor(host.worker, self._train_now, work, prepared)
        if is_secure:
            work.secure = await asyncio.to_thread(self._secure_offer, work, prepared.manifest, trained.update)
        costs = pb.Costs(
            compute_s=trained.update.seconds.get("compute", 0.0),
            compile_s=spent.start_s + trained.compile_s,
            data_s=trained.update.seconds.get("data", 0.0),
            # For its turn, and for what another device of the process fetched or started.
            wait_s=trained.started_s - begun - spent.wire_s - spent.start_s,
            wire_s=spent.wire_s,
        )
        privacy = prepared.manifest.promises.privacy
        if not (
            is_secure or privacy.noise_multiplier or privacy.examples
        ):  # else they would say what nothing else does
            costs.padding, costs.examples = trained.update.padding, trained.update.weight
        return trained, costs

    def _train_now(self, work: _Work, prepared: Prepared) -> _Trained:
        """In the worker's thread, when it is this device's turn."""
        started_s = time.perf_counter()
        if work.stopped:
            raise DeviceError("The training was stopped before it began.", stage="train")
        if not prepared.runner.has_model(work.assigned.model):
            raise DeviceError("The model was pushed out by a newer one before training began.", stage="train")
        spends = cost(prepared.manifest)
        self._refuse_overspending(prepared.manifest)
        work.training = True
        self.progress.stage = "training"
        try:
            compile_s = prepared.runner.compile()
            update = train(
                prepared.runner,
                prepared.manifest,
                work.assigned.model,
                self._examples(),
                self._host.state(work.run, self.device_id, prepared.manifest),
                seed=work.assigned.configuration.seed,
                member=work.name,
                noise_seed=self._host.random(NOISE_SEED_BYTES),
                should_stop=lambda: work.stopped,
                is_interrupted=lambda: self._is_leaving,
                paused=work.paused,
            )
        except Interrupted as error:
            work.paused = error.paused or work.paused
            raise
        finally:
            work.training = False
        if spends:
            self._host.example_ledger(self.device_id).add(spends)
        return _Trained(update, Index.of(update.sums, prepared.manifest.update).root, started_s, compile_s)

    def _refuse_overspending(self, manifest: Manifest) -> None:
        budget = self._host.floor.examples
        if budget is None or not (why := self._host.example_ledger(self.device_id).overspent(manifest, budget)):
            return
        log.warning("%s: %s", self.device_id, why)
        # What the server is told says nothing of what was spent elsewhere.
        raise DataError(f"The examples' privacy budget does not allow another update of task {manifest.task!r}.")

    def _secure_offer(self, work: _Work, manifest: Manifest, update: Update) -> "SecureOffer":
        from shoal.fleet.secure_offer import SecureOffer  # what it needs is much, and most tasks need none of it

        host = self._host
        try:
            return SecureOffer(
                manifest, work.assigned.model, update.sums, update.weight, spent=host.spent(self.device_id), floor=host.floor,
                identity=host.identity, wall_s=host.clock.wall_s,
            )  # fmt: skip
        except UpdateRefused as error:  # in a secure group nobody else would see it
            log.warning("%s: its update is of no use: %s", self.device_id, error)
            # What the server is told holds no number of the update.
            raise DeviceError(f"The update is of no use: {error.reason}.", stage="train") from None

    def _inline(self, update: Update) -> list[pb.PushSlice]:
        """A small update, which goes with its report."""
        if sum(value.nbytes + len(name) + 32 for name, value in update.sums.items()) > MAX_INLINE_BYTES:
            return []
        self.progress.up_bytes += sum(value.nbytes for value in update.sums.values())
        return [pb.PushSlice(tensor=name, data=to_bytes(value)) for name, value in update.sums.items()]

    async def _push(self, work: _Work) -> None:
        """Sends what the Edge does not have yet of the update; goes on where a broken push ended."""
        assert work.report is not None
        tries = 0
        while not work.report.slices and not work.stopped:
            try:
                status = await self._link.status(pb.StatusRequest(token=work.assigned.token))
                async with asyncio.timeout(longest_s(sum(value.nbytes for value in work.sends.values()))):
                    await self._link.push(self._slices(work, dict(status.received)))
                return
            except TimeoutError:
                raise NetworkError("The Edge takes slices too slowly, or not at all.") from None
            except NetworkError:
                tries += 1
                if tries > PUSH_TRIES:
                    raise
                await self._pause(BACK_OFF_S[0] * 2**tries)

    async def _slices(self, work: _Work, received: dict[str, int]) -> AsyncIterator[pb.PushSlice]:
        assert work.report is not None
        token: pb.Token | None = work.assigned.token
        # What is under a mask is as random as can be.
        is_packed = work.assigned.configuration.codec_up == PACKED and MASKED not in work.sends
        for name, value in work.sends.items():
            data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            for offset in range(received.get(name, 0), data.size, SLICE_BYTES):
                if work.stopped:
                    return
                piece = data[offset : offset + SLICE_BYTES].tobytes()
                part = pb.PushSlice(token=token, tensor=name, offset=offset, root=work.report.root)
                if is_packed:
                    part.data, part.unpacked = pack(piece, dtype_name(value.dtype)), len(piece)
                else:
                    part.data = piece
                yield part
                self.progress.up_bytes += len(part.data)
                token = None

    async def _settle(self) -> None:
        """The update was counted: now what it leaves on the device is kept."""
        work = self._work
        if work is None or work.update is None:
            return  # nothing was sent that could be counted
        self._work = None
        state, file, wall_s = work.update.device_state, self._host.file, self._host.clock.wall_s()
        counted = partial(file.counted, *self._entry, run=work.run, state=state, wall_s=wall_s)
        # Without its state the device is not what the server takes it for; the rest can be done without.
        while not await self._try_to_write("what a counted update leaves is not kept", counted) and state:
            self._say("disk full")
            await self._pause(REFUSED_LONGEST_S)
        self.progress.counted += 1

    # What is in hand, over a restart.

    async def _keep_work(self, work: _Work) -> None:
        """Puts the work in hand into the device's file, where that outlives the process."""
        if not self._host.file.is_durable or work.secure is not None:
            return
        content = {**_content(work), "floor": _as_array(_digest(self._host.floor))}
        expires_s = work.assigned.expires_s
        work.is_kept = await self._try_to_write(
            "what it has in hand will not outlive this process",
            lambda: self._host.file.keep_work(*self._entry, content, expires_s=expires_s),
        )

    def _read_work(self) -> _Work | None:
        """What was in hand when the process before ended."""
        file = self._host.file
        content = file.work(*self._entry, wall_s=self._host.clock.wall_s()) if file.is_durable else None
        if content is None:
            return None
        try:
            work = _of_content(content)
            is_ours = content["floor"].tobytes() == _digest(self._host.floor)
        except (KeyError, ValueError, DecodeError) as error:
            log.warning("%s: what it had in hand cannot be read: %r", self.device_id, error)
            return None
        trusted = self._host.trusted_key
        if not is_ours or (trusted is not None and trusted != work.key):
            log.warning(
                "%s: what it had in hand is for another host, or was made on other terms: it is not offered",
                self.device_id,
            )
            return None
        if work.report is not None and work.update is not None:
            work.report.slices.extend(self._inline(work.update))
        return work

    async def _try_to_write(self, otherwise: str, write: Callable[[], None]) -> bool:
        """Whether it could be; else a warning says what that means."""
        try:
            if self._host.file.is_durable:
                await asyncio.to_thread(write)
            else:
                write()
        except StoreError as error:
            log.warning("%s: %s: %s", self.device_id, otherwise, error)
            return False
        return True

    async def _rest(self) -> None:
        """Until as long has passed since the last update that was counted as the device wants to rest."""
        # Never longer than that, wherever the clock was when the last one was written down.
        latest_s = self._host.clock.now_s() + self._rest_s
        while self._work is None and (left_s := min(self._to_rest_s(), latest_s - self._host.clock.now_s())) > 0.0:
            self._say("resting")
            await self._sleep(min(left_s, LOOK_S))  # the machine may be suspended meanwhile, or its clock be set
        if self._rest_s and self._work is None:
            self._rested_from = self._host.file.contributed_s(self.device_id)

    async def _until_enough(self) -> None:
        """Where its examples come and go: until it has some, and more than were too few."""
        while self._work is None and self._num_examples is not None:
            count = await asyncio.to_thread(self._num_examples)
            if count and not (self._wants_more and count <= min(self._short.values())):
                break
            self._say("waiting for examples")
            await self._sleep(EXAMPLES_LOOK_S)
        self._wants_more = False

    async def _too_few(self) -> list[str]:
        """Tasks for which it has no more examples than were too few."""
        assert self._num_examples is not None
        count = await asyncio.to_thread(self._num_examples)
        return [task for task, held in self._short.items() if count <= held]

    def _to_rest_s(self) -> float:
        last_s = self._host.file.contributed_s(self.device_id) if self._rest_s else None
        if last_s is None or last_s == self._rested_from:
            return 0.0
        return last_s + self._rest_s - self._host.clock.wall_s()

    async def _give_up(self, work: _Work, error: Exception, stream: Stream) -> None:
        self.progress.failures += 1
        self.progress.last_error = str(error)
        # An error of its data names files, fields and values, which are nobody else's.
        why = "Its examples do not fit the task, or cannot be had." if isinstance(error, DataError) else str(error)
        gave_up = pb.GaveUp(token=work.assigned.token, stage=self.progress.stage, why=why[:500])
        await stream.send(pb.FromDevice(gave_up=gave_up))
        task = error.task if isinstance(error, TaskRefused) else work.task
        if isinstance(error, TooFewExamples) and task and self._num_examples is not None:
            self._short[task] = await asyncio.to_thread(self._num_examples)
            return await self._check_in(stream)
        if isinstance(error, DataError | TaskRefused) and task:
            self._unfit[task] = error
            return await self._check_in(stream)
        if isinstance(error, DataError | PlanError | MissingExtra):
            raise error
        if self._is_leaving:
            return
        if isinstance(error, DeviceError) and error.stage == SPENT:
            if not self._refusals:
                log.warning("%s: %s", self.device_id, error)
            self._refusals += 1
            await self._pause(min(REFUSED_LONGEST_S, REFUSED_DELAY_S * 2.0**self._refusals))
            return await self._check_in(stream)
        log.warning("%s: %s", self.device_id, error)
        await self._pause(REFUSED_DELAY_S)
        await self._check_in(stream)

    def _drawn(self, answer: pb.Counted | pb.Refused | pb.Released | pb.Later) -> float:
        """How long to be gone, within the window that the Edge names."""
        low = min(max(0.0, answer.delay_min_s), LONGEST_AWAY_S)
        return float(self._rng.uniform(low, min(max(low, answer.delay_max_s), LONGEST_AWAY_S)))

    async def _pause(self, seconds: float) -> None:
        await self._sleep(seconds * float(self._rng.uniform(0.5, 1.5)))

    async def _sleep(self, seconds: float) -> None:
        await self._host.clock.sleep_until(self._host.clock.now_s() + seconds)

    def _say(self, stage: str) -> None:
        self.progress.stage = stage
        self._on_progress(self)


def _is_spent(host: DeviceHost, device_id: str, manifest: Manifest, model: str) -> bool:
    from shoal.plan.secure import update_of  # what it needs is much, and most tasks need none of it

    return update_of(manifest, model) in host.spent(device_id)


def _content(work: _Work) -> Tensors:
    """Work in hand as one set of tensors."""
    told = {"assigned": work.assigned.SerializeToString(), "name": work.name.encode(), "key": work.key}
    content = {name: _as_array(data) for name, data in told.items()}
    if work.paused is not None:
        content["blocks"] = np.array(work.paused.blocks)
        content |= {f"carry {name}": value for name, value in work.paused.carry.items()}
    if work.report is not None and work.update is not None:
        report = pb.Report()
        report.CopyFrom(work.report)
        del report.slices[:]  # the update has them
        content["report"] = _as_array(report.SerializeToString())
        content |= {f"sum {name}": value for name, value in work.update.sums.items()}
        content |= {f"state {name}": value for name, value in work.update.device_state.items()}
    return content


def _of_content(content: Tensors) -> _Work:
    """What `_content` made."""

    def named(kind: str) -> Tensors:
        return {name.removeprefix(kind): value for name, value in content.items() if name.startswith(kind)}

    assigned = pb.Assigned.FromString(content["assigned"].tobytes())
    work = _Work(assigned, content["name"].tobytes().decode(), content["key"].tobytes(), is_kept=True)
    if "blocks" in content:
        work.paused = Paused(int(content["blocks"]), named("carry "))
    if "report" in content:
        work.report = pb.Report.FromString(content["report"].tobytes())
        work.update = Update(named("sum "), work.report.weight, named("state "))
        work.sends = work.update.sums
    return work


def _digest(floor: Floor) -> bytes:
    """Of what a device asks of plans: what it made when it asked for less it does not offer when it asks for more."""
    return bytes.fromhex(sha256(repr(floor).encode()))


def _as_array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _runtime_info(runtime: Runtime) -> pb.RuntimeInfo:
    return pb.RuntimeInfo(
        kind=runtime.kind,
        version=runtime.version,
        calling_convention=runtime.calling_convention,
        platforms=runtime.platforms,
    )
