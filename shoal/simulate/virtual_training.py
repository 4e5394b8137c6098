"""Training for a virtual fleet: a device's update is what the plan's own programs make of a user's examples.

Device number i plays user i modulo the number of users, so that a fleet of any size trains on the data at hand. It is
asked for an update when that is added, however late: it starts from the version that the device was sent.
"""

from collections.abc import Callable
from itertools import count

import numpy as np

from shoal.data.batch import num_blocks
from shoal.data.store import Examples, Population
from shoal.errors import DataError
from shoal.fleet.configuration import round_seed
from shoal.fleet.host import run_seed
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.plan import Plan
from shoal.plan.runner import Runner
from shoal.plan.train import evaluate, train
from shoal.record.store import Store
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.sent import model_as_sent
from shoal.tensors import Tensors


class VirtualTraining:
    """Gives the devices of a virtual fleet their updates. One run's; not thread-safe."""

    def __init__(
        self,
        plan: Plan,
        population: Population,
        store: Store,
        run_id: str,
        *,
        seed: int,
        user_of: Callable[[int], str | None] = lambda device: None,
        runner: Runner | None = None,
    ) -> None:
        """
        Args:
            plan: of the task. One whose devices keep state is refused: here a device is a number, and keeps nothing.
            population: the users' examples; those without are left out.
            store: the record of the run; holds the versions.
            run_id: the run.
            seed: of the run.
            user_of: device -> the user that it plays; None: number i plays user i modulo their number.
            runner: of a plan with the same programs; None: one of its own.

        Raises:
            ValueError: the plan's devices keep state, or it has secure groups.
            DataError: no user has examples.
        """
        if plan.manifest.device_state:
            raise ValueError(
                f"Task {plan.manifest.task!r} keeps state on devices ({len(plan.manifest.device_state)} tensors), which a "
                "virtual fleet does not hold. Simulate it without --virtual, or leave the training out."
            )
        if plan.manifest.promises.privacy.secure is not None:
            raise ValueError(
                f"Task {plan.manifest.task!r} has secure groups, which a virtual fleet does not play. Simulate it without --virtual (the "
                "sums have the same bits), or take Privacy(secure=None) for this."
            )
        self._manifest, self._population, self._user_of = plan.manifest, population, user_of
        self._sizes = population.sizes()
        self._users = [user for user, size in self._sizes.items() if size]
        if not self._users:
            raise DataError(f"Expected users with examples for the devices to play, got {len(self._sizes)} with none.")
        self._store, self._run, self._seed = store, run_id, run_seed(seed)
        self._runner: Runner = runner or JaxRunner(plan)

    def update_of(self, device: int, version: int, blocks: int = 1 << 30) -> tuple[Tensors, int]:
        """The update of a device that started from a version, and its weight; after so many blocks it is interrupted."""
        asked, seed = count(), round_seed(self._seed, version)
        update = train(
            self._runner, self._manifest, self._hand_over(version, as_sent=True), self._population[self._user(device)], None,
            seed=seed, member=str(device), noise_seed=seed, is_interrupted=lambda: next(asked) >= blocks,
        )  # fmt: skip
        return update.sums, update.weight

    def blocks_of(self, device: int) -> int:
        """Blocks that a device's training has."""
        training = self._manifest.training
        used = min(self._sizes[self._user(device)], training.max_examples // training.epochs)
        return num_blocks(
            used, training.batch_size, training.epochs, steps_per_block=training.steps_per_block,
            drop_remainder=training.drop_remainder,
        )  # fmt: skip

    @property
    def partial(self) -> Callable[[int], int] | None:
        """`blocks_of` where the plan takes the work of devices that are interrupted: what a virtual fleet is given."""
        return self.blocks_of if self._manifest.takes_partial else None

    def _user(self, device: int) -> str:
        return self._user_of(device) or self._users[device % len(self._users)]

    def evaluate(self, version: int, examples: Examples) -> dict[str, float]:
        """The task's metrics of a version."""
        return dict(evaluate(self._runner, self._manifest, self._hand_over(version), examples))

    def _hand_over(self, version: int, *, as_sent: bool = False) -> str:
        model, blobs = self._store.get_commit(self._run, version).model, self._store.blobs
        root, tensors = (
            model_as_sent(blobs, model, self._manifest) if as_sent else (model.root, view_tensors(blobs, model))
        )
        if not self._runner.has_model(root):
            self._runner.set_model(root, {name: np.asarray(value) for name, value in tensors.items()})
        return root
