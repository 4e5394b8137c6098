"""What the devices of one process share: plans and their runners, models, what they keep between rounds.

A plan is verified and checked once and its programs compiled once, however many devices the process plays; a model is
fetched once for each version. Trainings run one after another: a process is one worker.
"""

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from shoal.clock import Clock, SystemClock
from shoal.errors import DataError, PlanError, ProtocolError
from shoal.fleet import kept_model
from shoal.fleet.device_file import MOST_STATE_BYTES, DeviceFile
from shoal.fleet.example_ledger import ExampleLedger
from shoal.fleet.fetching import Fetching, OtherBytes, Wanted
from shoal.fleet.floor import Floor
from shoal.fleet.link import Link
from shoal.fleet.spent import SpentUpdates
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.plan.check import check_plan, readable
from shoal.plan.manifest import DEVICE_PROGRAMS, Manifest, Program, Runtime
from shoal.plan.plan import Plan
from shoal.plan.runner import Limits, Runner
from shoal.plan.signature import is_good
from shoal.tensors import Index, Tensors, from_bytes, total_bytes

if TYPE_CHECKING:
    from shoal.privacy.identity import Identity

log = logging.getLogger("shoal.device")

MakeRunner = Callable[[Plan], Runner]
V = TypeVar("V")

RUNNERS_HELD: Final = 4
"""That nobody works with, beside those that somebody does."""
PLANS_HELD: Final = 4
"""Whose latest model is held beside the runner's copy."""
MAX_INDEX_BYTES: Final = 64 << 20
MAX_PLAN_BYTES: Final = 16 << 20


@dataclass(frozen=True)
class Prepared:
    """A plan that passed every check, and what runs it."""

    plan: Plan
    runner: Runner

    @property
    def manifest(self) -> Manifest:
        return self.plan.manifest


@dataclass
class Spent:
    """What getting ready took the one who did it; those who waited for it meanwhile spent nothing of it."""

    wire_s: float = 0.0
    """Fetching, and handing the model to the runner."""
    start_s: float = 0.0
    """Starting the runner, compiling or loading its programs: while the model is fetched."""


@dataclass
class DeviceHost:
    """See the module's text. All methods belong to one event loop."""

    make_runner: MakeRunner
    runtime: Runtime
    limits: Limits = field(default_factory=Limits)
    trusted_key: bytes | None = None
    """Ed25519 key whose plans are run; None: that of the first plan seen (trust on first use)."""
    floor: Floor = field(default_factory=Floor)
    """What a plan must promise at least."""
    looks_only: bool = False
    """It writes nothing into the state folder, which another process may be using: for predictions."""
    identity: "Identity | None" = None
    """With its certificate, for secure groups of certified members."""
    state_folder: Path | None = None
    """Where what devices keep outlives the process (`device_file.py`, `kept_model.py`); None: in memory."""
    is_signed: Callable[[bytes, bytes, bytes], bool] = is_good
    """Whether a key's signature of a message is good (`plan/signature.py`)."""
    random: Callable[[int], bytes] = os.urandom
    """So many bytes that nobody can foretell, for noise on examples."""
    clock: Clock = field(default_factory=SystemClock)
    worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "shoal-training"))
    """What calls the runners: one training follows the other without waiting for the event loop."""
    fetching: Fetching = field(init=False)
    file: DeviceFile = field(init=False)
    """What its devices keep."""
    _plans: "dict[str, asyncio.Future[Prepared]]" = field(default_factory=dict)
    _in_use: Counter[str] = field(default_factory=Counter)
    _models: dict[str, "asyncio.Future[None]"] = field(default_factory=dict)
    _latest: dict[str, dict[str, tuple[str, np.ndarray]]] = field(default_factory=dict)
    """Plan -> name -> hash and values of the model that was fetched last: what rounds do not change is fetched once, and of what they do
    change the difference may be enough."""

    def __post_init__(self) -> None:
        """Raises StoreError: the state folder cannot be used. Raises ValueError: native code, and nobody named whose."""
        if self.runtime.is_native and self.trusted_key is None:
            raise ValueError(
                f"Expected trusted_key with the runtime {self.runtime.kind}, got None: native code is run for nobody but a key that was "
                "named beforehand, not for the first that comes."
            )
        self.fetching = Fetching(self.clock)
        self.file = DeviceFile(self.state_folder, read_only=self.looks_only)

    async def prepare(self, assigned: pb.Assigned, link: Link, spent: Spent) -> Prepared:
        """The plan of an assignment, verified, checked, ready to run. What it took is added to `spent`.

        Raises:
            PlanError: it is not signed by the trusted key, altered, too large, or not for this runtime. It was not loaded.
        """
        if assigned.plan not in self._plans:
            self._plans[assigned.plan] = asyncio.ensure_future(self._prepare(assigned, link, spent))
        return await self._shared(self._plans, assigned.plan)

    @contextmanager
    def using(self, plan: str) -> Iterator[None]:
        """While a device works with a plan its runner stays; of the others the last few do, as each may be a process."""
        self._in_use[plan] += 1
        try:
            yield
        finally:
            self._in_use[plan] -= 1
            if plan in self._plans:
                self._plans[plan] = self._plans.pop(plan)  # used last
            self._close_idle()

    def _close_idle(self) -> None:
        for plan, future in [*self._plans.items()][:-RUNNERS_HELD]:
            if future.done() and not self._in_use[plan]:
                del self._plans[plan], self._in_use[plan]
                if not future.cancelled() and future.exception() is None:
                    future.result().runner.close()

    async def _prepare(self, assigned: pb.Assigned, link: Link, spent: Spent) -> Prepared:
        try:
            return await self._verified(assigned, link, spent)
        except OtherBytes as error:
            raise PlanError(
                f"The plan that the host sent is not the one that it named: {error} It was not run."
            ) from error

    async def _verified(self, assigned: pb.Assigned, link: Link, spent: Spent) -> Prepared:
        begun_s = time.perf_counter()
        (data,) = await self.fetching.fetch(assigned, [Wanted(hash=assigned.plan, most=MAX_PLAN_BYTES)], link)
        manifest = Manifest.parse(data)
        unproven = Plan(manifest, {}, assigned.plan_public_key, assigned.plan_signature)
        await asyncio.to_thread(unproven.verify, self.trusted_key or unproven.public_key, self.is_signed)
        if (first := self.trusted_key) is not None and first != unproven.public_key:
            unproven.verify(first, self.is_signed)  # another plan was the first meanwhile: this says so
        self._trust(unproven.public_key)
        check_plan(manifest, self.limits)
        if (kept := total_bytes(manifest.device_state)) > MOST_STATE_BYTES:
            raise PlanError(
                f"The plan of task {manifest.task!r} keeps {readable(kept)} on a device, this one allows {readable(MOST_STATE_BYTES)}."
            )
        self.floor.check(manifest)
        if assigned.group != manifest.promises.group:
            raise PlanError(
                f"The plan promises {manifest.promises.group} groups, the host offers {assigned.group[:20]!r}."
            )
        chosen = manifest.pick(self.runtime)
        # A model that is kept is to be used where it is, without a host.
        needed = (*DEVICE_PROGRAMS, *(("predict",) if self.state_folder is not None and "predict" in chosen else ()))
        programs = [self._wanted(chosen[name]) for name in needed]
        fetched = await self.fetching.fetch(assigned, programs, link)
        by_hash = {wanted.hash: data for wanted, data in zip(programs, fetched, strict=True)}
        plan = Plan(manifest, by_hash, assigned.plan_public_key, assigned.plan_signature)
        plan.check_programs()
        spent.wire_s += time.perf_counter() - begun_s
        runner = await asyncio.to_thread(self.make_runner, plan)
        return Prepared(plan, runner)

    def _wanted(self, program: Program) -> Wanted:
        if program.size_bytes > self.limits.program_bytes:
            raise PlanError(
                f"Program {program.name!r} has {program.size_bytes} bytes, allowed are {self.limits.program_bytes}."
            )
        return Wanted(hash=program.hash, most=program.size_bytes)

    def _trust(self, key: bytes) -> None:
        if self.trusted_key is None:
            self.trusted_key = key
            log.warning("trusting plans signed by %s from now on: the first seen (name one with --key)", key.hex())

    async def ensure_model(self, assigned: pb.Assigned, prepared: Prepared, link: Link, spent: Spent) -> None:
        """Makes the runner hold the assignment's model; devices that need the same one wait for one transfer.

        What it took is added to `spent`.
        """
        root = assigned.model
        if prepared.runner.has_model(root):
            return
        if root not in self._models or self._models[root].done():
            self._models[root] = asyncio.ensure_future(self._load_model(assigned, prepared, link, spent))
        await self._shared(self._models, root)

    async def _load_model(self, assigned: pb.Assigned, prepared: Prepared, link: Link, spent: Spent) -> None:
        # The runner starts and compiles while the model arrives.
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self.worker, _start, prepared.runner, spent)
        fetching = asyncio.ensure_future(self._model(assigned, prepared, link, spent))
        try:
            both: set[asyncio.Future[Any]] = {starting, fetching}
            await asyncio.wait(both, return_when=asyncio.FIRST_EXCEPTION)
            await starting
            tensors = await fetching
        finally:
            fetching.cancel()
            await asyncio.gather(starting, fetching, return_exceptions=True)
        await loop.run_in_executor(self.worker, _hand_over, prepared.runner, assigned.model, tensors, spent)
        await asyncio.to_thread(self._keep_model, assigned, prepared.plan, tensors)

    async def _model(self, assigned: pb.Assigned, prepared: Prepared, link: Link, spent: Spent) -> Tensors:
        begun_s = time.perf_counter()
        (data,) = await self.fetching.fetch(assigned, [Wanted(hash=assigned.model, most=MAX_INDEX_BYTES)], link)
        index = Index.parse(data)
        if index.specs != prepared.manifest.broadcast:
            raise ProtocolError("The model's tensors are not those that the plan names.")
        now = dict(self._latest.get(assigned.plan, {}))
        others = [entry for entry in index if entry.spec.name not in now or now[entry.spec.name][0] != entry.hash]
        wanted = [
            Wanted(hash=entry.hash, most=entry.spec.size_bytes, dtype=entry.spec.dtype, base=now.get(entry.spec.name))
            for entry in others
        ]
        for entry, data in zip(others, await self.fetching.fetch(assigned, wanted, link), strict=True):
            now[entry.spec.name] = entry.hash, from_bytes(data, entry.spec)
        self._latest.pop(assigned.plan, None)
        self._latest[assigned.plan] = now
        while len(self._latest) > PLANS_HELD:
            self._latest.pop(next(iter(self._latest)))
        spent.wire_s += time.perf_counter() - begun_s
        return {name: value for name, (_, value) in now.items()}

    def _keep_model(self, assigned: pb.Assigned, plan: Plan, tensors: Tensors) -> None:
        has_predict = any(program.hash in plan.programs for program in plan.manifest.variants("predict"))
        if self.state_folder is None or not has_predict:
            return
        version = assigned.configuration.base_version
        try:
            kept_model.keep(self.state_folder, plan, tensors, run=assigned.run, version=version)
        except OSError as error:  # it can train nonetheless
            log.warning("version %d of task %r is not kept: %s", version, plan.manifest.task, error)

    async def predict(self, device: str, fields: Mapping[str, np.ndarray], *, task: str = "") -> np.ndarray:
        """Predictions (N, …) of the newest version that was sent, without a host; with the device's own leaves where it has such.

        Args:
            device: whose.
            fields: of the examples, (N, …) each.
            task: by name; empty: the only one there is.

        Raises:
            DataError: no model is kept, or the fields are not those that the task reads.
        """
        return await asyncio.get_running_loop().run_in_executor(self.worker, self._predict, device, fields, task)

    def _predict(self, device: str, fields: Mapping[str, np.ndarray], task: str) -> np.ndarray:
        if self.state_folder is None:
            raise DataError("Expected a device that keeps its state in a folder: without one no model is kept.")
        model = kept_model.find(self.state_folder, task, self.trusted_key)
        if self.trusted_key is not None:
            model.plan.verify(self.trusted_key)
        own = self.state(name_of_run(model.run, model.plan.public_key), device, model.plan.manifest)
        prepared = self._plans.get(model.plan.hash)
        if prepared is not None and prepared.done() and not prepared.cancelled() and prepared.exception() is None:
            return model.predict(prepared.result().runner, fields, own=own)
        runner = self.make_runner(model.plan)
        try:
            return model.predict(runner, fields, own=own)
        finally:
            runner.close()

    async def _shared(self, futures: "dict[str, asyncio.Future[V]]", key: str) -> V:
        future = futures[key]
        try:
            return await asyncio.shield(future)
        except BaseException:
            # A failure is not kept: whoever comes next tries anew. A caller that is cancelled leaves the work going.
            if future.done() and futures.get(key) is future:
                del futures[key]
            raise

    def state(self, run: str, device: str, manifest: Manifest) -> Tensors | None:
        """What a device kept from its last counted round of a run (`name_of_run`); None if it has nothing that fits."""
        if not manifest.device_state:
            return None
        kept = self.file.state(run, device)
        if kept is None or [(n, v.shape, v.dtype) for n, v in kept.items()] != [
            (s.name, s.shape, s.numpy_dtype) for s in manifest.device_state
        ]:
            return None
        return kept

    def spent(self, device: str) -> SpentUpdates:
        """What a device has spent."""
        return SpentUpdates(self.file, device)

    def example_ledger(self, device: str) -> ExampleLedger:
        """What a device's examples have spent."""
        return ExampleLedger(self.file, device)

    def processes(self) -> list[int]:
        """Those that run programs now."""
        return [pid for runner in self._runners() if (pid := runner.pid) is not None]

    def close(self) -> None:
        """Ends every runner, and lets go of what is kept."""
        self.stop()
        self.file.close()

    def stop(self) -> None:
        """Ends every runner, and what it runs."""
        self.worker.shutdown(wait=False, cancel_futures=True)
        for runner in self._runners():
            runner.close()

    def _runners(self) -> list[Runner]:
        done = [future for future in self._plans.values() if future.done() and not future.cancelled()]
        return [future.result().runner for future in done if future.exception() is None]


def name_of_run(run: str, key: bytes) -> str:
    """What a device calls a run: another host, whose plans another key signs, may give the same name, and is not to have what this one left."""
    return f"{run} of {key.hex()}"


def _start(runner: Runner, spent: Spent) -> None:
    """Starts the runner, if it is not. In the worker's thread."""
    begun_s = time.perf_counter()
    runner.compile()
    spent.start_s += time.perf_counter() - begun_s


def _hand_over(runner: Runner, root: str, tensors: Tensors, spent: Spent) -> None:
    """Gives the runner the model. In the worker's thread."""
    begun_s = time.perf_counter()
    runner.set_model(root, tensors)
    spent.wire_s += time.perf_counter() - begun_s
