"""Metric sums of each user of a population, on one version: one after the other, or packed into full batches.

The plan's `evaluate` program gives the sums of a batch, so that it is called for each user alone, however few examples he has.
With the task itself the examples of many users fill a batch together, and what each adds is put to its user's sums here,
in float64: the same to rounding, and as many batches as there are examples for.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol, final, runtime_checkable

import jax
import numpy as np

from shoal.data.batch import Blocks
from shoal.data.store import Examples, Population
from shoal.errors import DataError
from shoal.local import scorer
from shoal.plan.manifest import Manifest
from shoal.plan.runner import Runner
from shoal.plan.train import conform, evaluated_sums
from shoal.task import Task
from shoal.tensors import Tensors

_BATCHES_AT_ONCE: Final = 16


@runtime_checkable
class ByUser(Protocol):
    """Evaluates users."""

    def sums(self, root: str, model: Tensors, users: Population) -> Iterator[Mapping[str, float]]:
        """`NAME/numerator` and `NAME/denominator` of each user who has examples, in order.

        Args:
            root: of the version, which the runner holds.
            model: its tensors.
            users: whom.

        Raises:
            DataError: a user's examples do not fit the task; the user is named.
        """
        ...


@final
class OneByOne:
    """By the plan's program."""

    def __init__(self, runner: Runner, manifest: Manifest) -> None:
        self._runner, self._manifest = runner, manifest

    def sums(self, root: str, model: Tensors, users: Population) -> Iterator[Mapping[str, float]]:
        for _, examples in _conformed(users, self._manifest):
            yield evaluated_sums(self._runner, self._manifest, root, examples)


@final
class Packed:
    """By the task's `evaluate`, many users at once."""

    def __init__(self, task: Task, manifest: Manifest) -> None:
        """The task has an `evaluate`, and is that of the manifest's plan."""
        score = scorer(task)
        assert score is not None
        self._score, self._manifest = jax.jit(score), manifest

    def sums(self, root: str, model: Tensors, users: Population) -> Iterator[Mapping[str, float]]:
        on_device = jax.device_put(dict(model))
        most = _BATCHES_AT_ONCE * self._manifest.training.evaluate_batch_size
        waiting: list[Examples] = []
        for _, examples in _conformed(users, self._manifest):
            waiting.append(examples)
            if sum(map(len, waiting)) >= most:
                yield from self._of(on_device, waiting)
                waiting = []
        if waiting:
            yield from self._of(on_device, waiting)

    def _of(self, model: Any, users: list[Examples]) -> Iterator[Mapping[str, float]]:
        owner = np.repeat(np.arange(len(users)), [len(examples) for examples in users])
        totals: dict[str, np.ndarray] = {}
        size, at = self._manifest.training.evaluate_batch_size, 0
        for batches, mask in Blocks(Examples.concatenate(users), batch_size=size, steps_per_block=1, shuffle=False):
            found = self._score(model, {name: values[0] for name, values in batches.items()}, mask[0])
            own = owner[at : at + int(mask[0].sum())]
            at += len(own)
            for name, each in found.items():
                added = np.bincount(own, np.asarray(each, np.float64)[mask[0]], minlength=len(users))
                totals[name] = totals.get(name, 0.0) + added
        for place in range(len(users)):
            yield {name: float(sums[place]) for name, sums in totals.items()}


def _conformed(users: Population, manifest: Manifest) -> Iterator[tuple[str, Examples]]:
    for user, examples in users.items():
        if len(examples):
            try:
                yield user, conform(examples, manifest)
            except DataError as error:
                raise DataError(f"User {user!r} cannot be measured: {error} Mend its data, or leave it out.") from error
