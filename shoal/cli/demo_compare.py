"""What the demo is compared with: the same net trained on everything in one place, and on one device's pictures alone.

Both run the plan's own programs, so net, local optimizer and batches are those of the fleet. After the rounds, in child
processes of their own, side by side.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from types import TracebackType
from typing import Final, Self, final

import numpy as np

from shoal import data
from shoal.data.batch import num_blocks
from shoal.fleet.host import run_seed
from shoal.plan.child import ChildRunner
from shoal.plan.manifest import Manifest
from shoal.plan.plan import Plan
from shoal.plan.runner import Runner
from shoal.plan.train import evaluate, train
from shoal.tensors import Tensors

_TRAINED: Final = "trained"


@dataclass(frozen=True)
class Comparison:
    """Accuracies on all test pictures."""

    central: float
    alone: float
    """The median of a few devices."""
    passes: int
    """Of the central training over the pooled pictures."""


@final
class Comparing:
    """A comparison under way, in threads; leaving the block ends it."""

    def __init__(
        self, plan: Plan, model: Tensors, *, population: data.Population, train: data.Examples, test: data.Examples,
        passes: int, alone: Sequence[str], alone_passes: int, seed: int,
    ) -> None:  # fmt: skip
        """
        Args:
            plan: of the run.
            model: version 0.
            population: the devices.
            train: everybody's pictures.
            test: what is evaluated on.
            passes: over `train`.
            alone: the devices that are trained alone.
            alone_passes: over a device's own pictures.
            seed: of the run.
        """
        self._plan, self._model, self._test, self._passes = plan, model, test, passes
        self._runners = ChildRunner(plan, threads=1), ChildRunner(plan, threads=1)
        self._seed = run_seed(seed)
        self._blocks_done = 0
        self._blocks = self._num_blocks(len(train), passes)
        self._central: list[float] = []
        self._alone: list[float] = []
        self._failures: list[Exception] = []

        def central() -> None:
            self._central.append(self._trained(self._runners[0], train, passes, "central", self._count))

        def each_alone() -> None:
            for name in alone:
                examples = population[name]
                self._alone.append(self._trained(self._runners[1], examples, alone_passes, name, lambda: False))

        self._threads = [threading.Thread(target=self._guarded(work), daemon=True) for work in (central, each_alone)]

    @property
    def share(self) -> float:
        """How much of the central training is done."""
        return min(1.0, self._blocks_done / max(1, self._blocks))

    def wait(self, on_wait: Callable[[], None]) -> Comparison:
        """Waits for the results; `on_wait` is called a few times a second. Raises what went wrong."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)
                on_wait()
        for failure in self._failures:
            raise failure
        return Comparison(self._central[0], median(self._alone), self._passes)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for runner in self._runners:
            runner.close()

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except Exception as error:  # told to whoever waits
                self._failures.append(error)

        return run

    def _count(self) -> bool:
        self._blocks_done += 1
        return False

    def _num_blocks(self, num_examples: int, passes: int) -> int:
        training = self._plan.manifest.training
        return num_blocks(num_examples, training.batch_size, passes, steps_per_block=training.steps_per_block)

    def _trained(
        self, runner: Runner, examples: data.Examples, passes: int, name: str, should_stop: Callable[[], bool]
    ) -> float:
        """The accuracy of the net after training on these examples only."""
        manifest = _with_passes(self._plan.manifest, passes, len(examples))
        runner.set_model("start", self._model)
        update = train(
            runner, manifest, "start", examples, None, seed=self._seed, member=name, should_stop=should_stop
        )  # fmt: skip
        reached = {
            name: value + update.sums.get(f"delta/{name}", np.zeros_like(value)) for name, value in self._model.items()
        }
        runner.set_model(_TRAINED, reached)
        return evaluate(runner, manifest, _TRAINED, self._test)["accuracy"]


def _with_passes(manifest: Manifest, passes: int, num_examples: int) -> Manifest:
    """The manifest of a training of that many passes; its programs are the same."""
    training = replace(manifest.training, epochs=passes, max_examples=passes * num_examples)
    return replace(manifest, training=training)
