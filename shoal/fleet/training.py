"""From an assignment to an update: on a device, when it is its turn."""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from shoal.data.store import Examples
from shoal.errors import DataError, DeviceError, UpdateRefused
from shoal.fleet.device_host import DeviceHost, Prepared, Spent
from shoal.fleet.example_ledger import cost
from shoal.fleet.link import Link
from shoal.fleet.progress import Progress
from shoal.fleet.wire import fleet_pb2 as pb
from shoal.fleet.work import Work
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Update
from shoal.plan.train import NOISE_SEED_BYTES, Interrupted, train
from shoal.tensors import Index

if TYPE_CHECKING:
    from shoal.fleet.secure_offer import SecureOffer

log = logging.getLogger("shoal.device")

SPENT: Final = "spent"
"""Stage at which a device gives up what it may not offer again."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What the worker gives back."""

    update: Update
    root: str
    """Of its sums."""
    started_s: float
    """When it was the device's turn (`time.perf_counter`)."""
    compile_s: float


class Training:
    """Of one device; its process trains for one device at a time."""

    def __init__(
        self,
        device: str,
        examples: Callable[[], Examples],
        *,
        host: DeviceHost,
        progress: Progress,
        say: Callable[[str], None],
        is_interrupted: Callable[[], bool],
    ) -> None:
        """
        Args:
            device: its name.
            examples: opens its data.
            host: what the process shares.
            progress: where its stage is told from the thread that trains.
            say: told each stage before.
            is_interrupted: asked between two blocks.
        """
        self._device, self._examples, self._host = device, examples, host
        self._progress, self._say, self._is_interrupted = progress, say, is_interrupted

    async def train(self, work: Work, link: Link) -> tuple[Trained, pb.Costs]:
        host, assigned, spent = self._host, work.assigned, Spent()
        begun = time.perf_counter()
        self._say("fetching")
        prepared = await host.prepare(assigned, link, spent)
        work.task, work.key = prepared.manifest.task, prepared.plan.public_key
        is_secure = prepared.manifest.promises.group == "secure"
        if is_secure and _is_spent(host, self._device, prepared.manifest, assigned.model):
            raise DeviceError(
                "An update from these tensors was revealed in a secure group before, and is never offered again: it waits for other tensors "
                "(the next version, or a run with another --seed).",
                stage=SPENT,
            )
        await host.ensure_model(assigned, prepared, link, spent)
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
            wait_s=max(0.0, trained.started_s - begun - max(spent.wire_s, spent.start_s)),
            wire_s=spent.wire_s,
        )
        privacy = prepared.manifest.promises.privacy
        if not (
            is_secure or privacy.noise_multiplier or privacy.examples
        ):  # else they would say what nothing else does
            costs.padding, costs.examples = trained.update.padding, trained.update.weight
        return trained, costs

    def _train_now(self, work: Work, prepared: Prepared) -> Trained:
        """In the worker's thread, when it is this device's turn."""
        started_s = time.perf_counter()
        if work.stopped:
            raise DeviceError("The training was stopped before it began.", stage="train")
        if not prepared.runner.has_model(work.assigned.model):
            raise DeviceError("The model was pushed out by a newer one before training began.", stage="train")
        spends = cost(prepared.manifest)
        self._refuse_overspending(prepared.manifest)
        work.training = True
        self._progress.stage = "training"
        try:
            compile_s = prepared.runner.compile()
            update = train(
                prepared.runner,
                prepared.manifest,
                work.assigned.model,
                self._examples(),
                self._host.state(work.run, self._device, prepared.manifest),
                seed=work.assigned.configuration.seed,
                member=work.name,
                noise_seed=self._host.random(NOISE_SEED_BYTES),
                should_stop=lambda: work.stopped,
                is_interrupted=self._is_interrupted,
                paused=work.paused,
            )
        except Interrupted as error:
            work.paused = error.paused or work.paused
            raise
        finally:
            work.training = False
        if spends:
            self._host.example_ledger(self._device).add(spends)
        return Trained(update, Index.of(update.sums, prepared.manifest.update).root, started_s, compile_s)

    def _refuse_overspending(self, manifest: Manifest) -> None:
        budget = self._host.floor.examples
        if budget is None or not (why := self._host.example_ledger(self._device).overspent(manifest, budget)):
            return
        log.warning("%s: %s", self._device, why)
        # What the server is told says nothing of what was spent elsewhere.
        raise DataError(f"The examples' privacy budget does not allow another update of task {manifest.task!r}.")

    def _secure_offer(self, work: Work, manifest: Manifest, update: Update) -> "SecureOffer":
        from shoal.fleet.secure_offer import SecureOffer  # what it needs is much, and most tasks need none of it

        host = self._host
        try:
            return SecureOffer(
                manifest, work.assigned.model, update.sums, update.weight, spent=host.spent(self._device), floor=host.floor,
                identity=host.identity, wall_s=host.clock.wall_s,
            )  # fmt: skip
        except UpdateRefused as error:  # in a secure group nobody else would see it
            log.warning("%s: its update is of no use: %s", self._device, error)
            # What the server is told holds no number of the update.
            raise DeviceError(f"The update is of no use: {error.reason}.", stage="train") from None


def _is_spent(host: DeviceHost, device_id: str, manifest: Manifest, model: str) -> bool:
    from shoal.plan.secure import update_of  # what it needs is much, and most tasks need none of it

    return update_of(manifest, model) in host.spent(device_id)
