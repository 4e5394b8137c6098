"""A device: checks in, trains when it is asked to, reports, and keeps its update until that is counted.

One asyncio actor for each device; the work that a process's devices share is in `device_host.py`. A broken stream loses
nothing: the token and the update are kept, and after reconnecting the device first asks what became of them.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from shoal.codec.packed import PACKED
from shoal.data.store import Examples
from shoal.errors import (
    DataError,
    DeviceError,
    MissingExtra,
    NetworkError,
    PlanError,
    ProgramError,
    ProtocolError,
    TaskRefused,
    TooFewExamples,
)
from shoal.fleet.device_host import DeviceHost
from shoal.fleet.device_secret import Pseudonyms
from shoal.fleet.link import Link, Stream, longest_s
from shoal.fleet.progress import FINISHED, Progress
from shoal.fleet.secure_phases import MASKED
from shoal.fleet.sending import MAX_INLINE_BYTES, inline, slices
from shoal.fleet.training import SPENT, Training
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.fleet.work import Work, WorkInFile
from shoal.plan.manifest import Runtime
from shoal.plan.train import Interrupted

if TYPE_CHECKING:
    from shoal.fleet.secure_offer import SecureOffer

log = logging.getLogger("shoal.device")

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
RENAMED_S: Final = 5.0
"""For so long at most a device with pseudonyms stays away before it comes under the next."""
LONGEST_AWAY_S: Final = 86_400.0
"""Whatever an Edge says."""


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
        self.device_id, self._link, self._host, self._rng = device_id, link, host, rng
        self._home = link
        """Where it goes when the Edge that it was sent to does not answer."""
        self._stays, self._rest_s, self._on_progress = stays, rest_s, on_progress
        self.population, self._tasks = population, tuple(tasks)
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
        self._work: Work | None = None
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
        self._in_file = WorkInFile(host, f"{place} {population}", device_id)
        self._training = Training(
            device_id, examples, host=host, progress=self.progress, say=self._say,
            is_interrupted=lambda: self._is_leaving,
        )  # fmt: skip

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
                if self._producing is not None:  # the stream before broke: who has nothing to say yet is sent away
                    await asyncio.wait({self._producing})
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
                self._host.fetching.down_bytes += sum(len(blob.data) for blob in message.assigned.inline)
                if work is not None and work.assigned.token != message.assigned.token:
                    await self._drop_work()
                if self._work is None and self._to_rest_s() > 0.0:  # it was counted for another population meanwhile
                    resting = pb.GaveUp(token=message.assigned.token, stage="resting")
                    await stream.send(pb.FromDevice(gave_up=resting))
                    self._away_s = 0.0
                elif self._work is None:
                    self._work = Work(
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
                least_s = min(BACK_OFF_S[1], BACK_OFF_S[0] * 2.0 ** min(self._laters - 10, 20))
                self._away_s = max(self._drawn(message.later), least_s)
                if message.later.other_edge:
                    self._link = self._link.elsewhere(message.later.other_edge)
            case "incompatible" if self._short:
                self._wants_more, self._away_s = True, 0.0
            case "incompatible":
                if self._unfit:  # and nothing else is to be done here
                    raise next(iter(self._unfit.values()))
                needs = message.incompatible.needs or "another runtime, and does not say which"
                raise PlanError(f"The host asks for {needs}." if needs[:1].islower() else needs)
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
        await self._pause(min(REFUSED_LONGEST_S, REFUSED_DELAY_S * 2.0 ** min(self._refusals, 20)))

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
        if work is not None:
            await self._in_file.drop(work)

    async def _put_aside(self) -> None:
        """Stops what is under way; it is gone on with later, if it is useful then."""
        await self._stop(self._work)
        if self._work is not None and not self._work.has_revealed and self._work.update is None:
            await self._in_file.keep(self._work)

    async def _stop(self, work: Work | None) -> None:
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

    async def _report(self, work: Work, stream: Stream) -> None:
        self._called = (stream, work.name)  # by its token, whatever it is called by now
        await stream.send(pb.FromDevice(report=work.report))
        if self._is_leaving:
            await stream.send(pb.FromDevice(ping=pb.Ping()))

    async def _produce(self, work: Work) -> None:
        """One assignment, from the plan to an update that is ready to be reported."""
        with self._host.using(work.assigned.plan):
            trained, costs = await self._training.train(work, self._link)
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
            slices=inline(trained.update, self.progress),
            costs=costs,
        )
        await self._in_file.keep(work)
        await self._push(work)
        work.report.costs.wire_s += time.perf_counter() - begun

    async def _answer(self, work: Work, secure: "SecureOffer", message: pb.GroupMessage, stream: Stream) -> None:
        """To a message of the secure group that the update is in."""
        phase, data = await asyncio.to_thread(secure.hear, message.phase, message.data)
        if phase == "complaint":
            self.progress.last_error = data.decode()
            log.warning("%s: leaves its secure group: %s", self.device_id, self.progress.last_error)
        if phase == MASKED:
            work.sends = {MASKED: np.frombuffer(data, np.uint8)}
            return await self._masked(work, stream)
        await stream.send(pb.FromDevice(group=pb.GroupMessage(token=message.token, phase=phase, data=data)))

    async def _masked(self, work: Work, stream: Stream) -> None:
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

    async def _push(self, work: Work) -> None:
        """Sends what the Edge does not have yet of the update; goes on where a broken push ended."""
        assert work.report is not None
        tries = 0
        while not work.report.slices and not work.stopped:
            try:
                status = await self._link.status(pb.StatusRequest(token=work.assigned.token))
                async with asyncio.timeout(longest_s(sum(value.nbytes for value in work.sends.values()))):
                    await self._link.push(slices(work, dict(status.received), self.progress))
                return
            except TimeoutError:
                raise NetworkError("The Edge takes slices too slowly, or not at all.") from None
            except NetworkError:
                tries += 1
                if tries > PUSH_TRIES:
                    raise
                await self._pause(BACK_OFF_S[0] * 2**tries)

    async def _settle(self) -> None:
        """The update was counted: now what it leaves on the device is kept."""
        work = self._work
        if work is None or work.update is None:
            return  # nothing was sent that could be counted
        self._work = None
        # Without its state the device is not what the server takes it for; the rest can be done without.
        while not await self._in_file.counted(work, work.update) and work.update.device_state:
            self._say("disk full")
            await self._pause(REFUSED_LONGEST_S)
        self.progress.counted += 1

    def _read_work(self) -> Work | None:
        work = self._in_file.read()
        if work is not None and work.report is not None and work.update is not None:
            work.report.slices.extend(inline(work.update, self.progress))
        return work

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

    async def _give_up(self, work: Work, error: Exception, stream: Stream) -> None:
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
            await self._pause(min(REFUSED_LONGEST_S, REFUSED_DELAY_S * 2.0 ** min(self._refusals, 20)))
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


def _runtime_info(runtime: Runtime) -> pb.RuntimeInfo:
    return pb.RuntimeInfo(
        kind=runtime.kind,
        version=runtime.version,
        calling_convention=runtime.calling_convention,
        platforms=runtime.platforms,
    )
