"""A task's updates read back into examples: what the first dense layer gives away of a round (`inversion.py`).

Three rounds of the task, with its own local training: one device alone, without noise (its *bare update*); the smallest group that the task allows,
without noise; and that group as the task is, noise included. What is read from the change of the layer is held against every example that was
trained on, by the absolute correlation with the nearest: 1 is the example itself. It is read twice: by the neuron whose bias moved
most, which anybody can do, and by the neuron that gives it best, as somebody would find who knows what examples look like. What chance gives
is the latter held against as many users' examples who were not in the round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from shoal.audit.inversion import dense_input
from shoal.data import Examples, Population
from shoal.errors import DataError
from shoal.fleet.host import run_seed
from shoal.fleet.keys import HostKeys
from shoal.plan.build import Built, build
from shoal.plan.jax_runner import JaxRunner
from shoal.plan.run_plan import begin_run
from shoal.policy import Privacy, RoundPolicy
from shoal.record.memory import MemoryStore
from shoal.record.tensor_blobs import view_tensors
from shoal.simulate.engine import go_on
from shoal.simulate.selection import select
from shoal.task import Task
from shoal.tensors import Tensors


@dataclass(frozen=True, kw_only=True)
class ReadBack:
    """Of one kind of round: medians over trials, with the least and the largest."""

    what: str
    devices: int
    noise: float
    guessed: tuple[float, float, float]
    """Median, least and largest correlation of what the neuron gives whose bias moved most."""
    known: tuple[float, float, float]
    """Of what the best neuron gives."""
    chance: tuple[float, float, float] | None
    """Of that with examples of others; None: there are too few others."""

    @property
    def beyond_chance(self) -> float:
        """What the best neuron gives, medians, from 0, no more than chance does, to 1, the example itself. Where chance is not known: what the
        neuron gives whose bias moved most."""
        if self.chance is None:
            return self.guessed[0]
        known, chance = self.known[0], self.chance[0]
        return max(0.0, (known - chance) / (1 - chance)) if chance < 1 else 0.0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense layer that reads a field of the batch."""

    kernel: str
    bias: str
    field: str


def first_dense(task: Task, tensors: Mapping[str, np.ndarray]) -> Layer:
    """The layer that is read: a kernel with as many inputs as a field has numbers, and a bias beside it.

    Raises:
        DataError: there is none, so that nothing can be read this way (which does not say that there is no other).
    """
    fields = {prod(shape): name for name, (shape, _) in task.batch.items() if prod(shape) > 1}
    for name, kernel in tensors.items():
        parent = name.rpartition("/")[0]
        if kernel.ndim != 2 or kernel.shape[0] not in fields:
            continue
        for other, bias in tensors.items():
            if other.rpartition("/")[0] == parent and bias.shape == kernel.shape[1:]:
                return Layer(kernel=name, bias=other, field=fields[kernel.shape[0]])
    raise DataError(
        f"Task {task.name!r} has no dense layer with a bias that reads a field of its batch ({', '.join(task.batch)}): this attack has nothing "
        "to read. Others may: it is no proof of safety."
    )


def read_back(task: Task, users: Population, *, trials: int = 10, seed: int = 0) -> list[ReadBack]:
    """Reads the task's rounds, each with users of its own.

    Args:
        task: as it is to be run.
        users: whose examples are trained on; at least the smallest group.
        trials: of each kind of round.
        seed: of who is in them, and of training.

    Raises:
        DataError: the task has no layer that can be read, or there are too few users.
    """
    group = task.rounds.minimum_group
    if len(users) < group:
        raise DataError(f"Expected at least {group} users, the smallest group of task {task.name!r}, got {len(users)}.")
    clear = replace(task.privacy, noise_multiplier=0.0, epsilon=None, correlated=None, distributed=False, secure=None)
    as_it_is = replace(
        task.privacy, epsilon=None, distributed=False, secure=None
    )  # of a sum secure groups change nothing
    kinds = [("one device's bare update", 1, clear), (f"the sum of a group of {group}", group, clear)]
    if task.privacy.noise_multiplier:
        kinds.append((f"that sum with the task's noise of {task.privacy.noise_multiplier:g}", group, as_it_is))
    return [_read(task, users, what, devices, privacy, trials, seed) for what, devices, privacy in kinds]


def _read(task: Task, users: Population, what: str, devices: int, privacy: Privacy, trials: int, seed: int) -> ReadBack:
    hands = 1 if privacy.correlated is None else task.rounds.min_separation  # what correlated noise is made for
    rounds = RoundPolicy(goal=devices, minimum_group=devices, over_selection=1.0, min_separation=hands)
    built = build(task.replace(rounds=rounds, privacy=privacy), seed=seed)
    runner, found = JaxRunner(built.plan), []
    for trial in range(trials):
        rng = np.random.default_rng([seed, devices, trial])
        order = [users.ids[at] for at in rng.permutation(len(users))]
        who, others = order[:devices], order[devices : 2 * devices]
        before, after = _round(built, runner, [users[user] for user in who], hands, seed=trial)
        guess, best = _correlations(task, before, after, [users[user].fields for user in who])
        by_chance = _correlations(task, before, after, [users[user].fields for user in others])[1] if others else 0.0
        found.append((guess, best, by_chance))
    guessed, known, chance = np.array(found).T
    return ReadBack(
        what=what, devices=devices, noise=privacy.noise_multiplier, guessed=_spread(guessed), known=_spread(known),
        chance=_spread(chance) if len(users) >= 2 * devices else None,
    )  # fmt: skip


def _round(
    built: Built, runner: JaxRunner, trained_on: Sequence[Examples], hands: int, *, seed: int
) -> tuple[Tensors, Tensors]:
    """The model before and after a round of devices with these examples. Those of the other hands rest; what they hold nobody looks at."""
    store, keys = MemoryStore(), HostKeys.make()
    run = begin_run(store, built.plan.sign(keys.signing), built.model, kind="simulate", rounds=1, seed=seed)
    ids = [f"{number:06d}" for number in range(len(trained_on) * hands)]
    policy = built.plan.manifest.server.rounds
    taken = select(policy, ids, np.ones(len(ids)), bytes(32), version=0, run_seed=run_seed(seed))  # the whole hand
    holds = dict.fromkeys(ids, trained_on[0]) | dict(zip(taken, trained_on, strict=True))
    go_on(store, run, Population.from_arrays(holds), runner=runner, keys=keys)
    before, after = (view_tensors(store.blobs, store.get_commit(run, version).model) for version in (0, 1))
    return before, after


def _correlations(
    task: Task, before: Tensors, after: Tensors, trained_on: Sequence[Mapping[str, np.ndarray]]
) -> tuple[float, float]:
    layer = first_dense(task, before)
    kernel, bias = (after[name].astype(np.float64) - before[name] for name in (layer.kernel, layer.bias))
    if not np.any(bias):
        return 0.0, 0.0
    examples = np.concatenate([fields[layer.field].reshape(len(fields[layer.field]), -1) for fields in trained_on])
    each = _correlation(kernel[:, bias != 0].T / bias[bias != 0][:, None], examples)
    return float(_correlation(dense_input(kernel, bias)[None], examples)[0]), float(each.max())


def _correlation(found: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Of each found, (n, inputs), the largest with any example, (m, inputs): (n,)."""

    def centred(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64) - values.mean(axis=1, keepdims=True)
        return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-300))

    return np.asarray(np.abs(centred(found) @ centred(examples).T).max(axis=1))


def _spread(values: np.ndarray) -> tuple[float, float, float]:
    return float(np.median(values)), float(values.min()), float(values.max())
