"""Canaries: devices that do not learn but send what can be found again, a direction of their own as long as the clip norm allows.

`with_canaries` changes a task so that a device whose examples carry a canary's number sends that canary's direction; all others train as they
would. It is an ordinary task: it is simulated, or goes to a fleet, and whatever clips, adds up and has noise does so as ever. Directions
are random, so that in many dimensions no two are alike, and a model that has moved along one tells (Andrew et al. 2024, "One-shot Empirical Privacy
Estimation for Federated Learning"). A canary that is out takes part and sends zeros, which is what a ledger calls not to be there: who is in which
round does not hang on the coins. (Where the clip norm adapts it tells a bit as well; only how many are in can be seen of those.)
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

from shoal.data import Examples, Population
from shoal.local import LocalRule, Report, local_rule
from shoal.policy import Privacy
from shoal.task import Task
from shoal.tensors import Tensors

FIELD: Final = "canary"
"""0 for ordinary examples, `OUT` for those of a canary that is out."""
OUT: Final = 2**31 - 1
_CARRIED: Final = "canary/number"
_LONG: Final = 2.0**40
"""Of a canary before it is clipped: beyond any bound, so that it comes out as long as that allows, group by group."""


@dataclass(frozen=True)
class Canaries:
    """Which are in a run."""

    was_in: np.ndarray
    """(canaries,) bool: canary i + 1 is."""
    seed: int
    """Of their directions."""

    @classmethod
    def toss(cls, count: int, *, seed: int) -> "Canaries":
        """Each by a fair coin."""
        rng = np.random.default_rng([seed, 1])
        return cls(rng.random(count) < 0.5, seed)

    @property
    def ids(self) -> list[str]:
        """Of the devices, (canaries,)."""
        return [f"canary-{number:05d}" for number in range(1, len(self.was_in) + 1)]

    def among(self, users: Population) -> Population:
        """The users and the canaries, each of these with one example."""
        first = next(iter(users.items()))[1]
        blank = {name: values[:1] for name, values in first.fields.items()}
        made = {user: _marked(examples.fields, 0) for user, examples in users.items()}
        numbers = np.where(self.was_in, np.arange(1, len(self.was_in) + 1), OUT)
        made |= {name: _marked(blank, int(number)) for name, number in zip(self.ids, numbers, strict=True)}
        return Population.from_arrays(made)

    def scores(self, before: Tensors, after: Tensors) -> np.ndarray:
        """How far a model has moved along each canary's direction, (canaries,) float64.

        Args:
            before, after: tensors of two versions, by name.
        """
        names = sorted(name for name in before if name.startswith("params/"))
        moved = {name: after[name].astype(np.float32) - before[name].astype(np.float32) for name in names}

        def score(number: jax.Array) -> jax.Array:
            made = direction(number, {name: value.shape for name, value in moved.items()}, self.seed)
            return sum((jnp.vdot(made[name], moved[name]) for name in names), start=jnp.zeros(()))

        compiled = jax.jit(score)
        found = [float(compiled(jnp.uint32(number))) for number in range(1, len(self.was_in) + 1)]
        return np.asarray(found, np.float64)


def direction(number: Any, shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, jax.Array]:
    """A canary's, of length 1 over all tensors: independent normals, by name."""
    key = jax.random.fold_in(jax.random.key(seed), number)
    made = {
        name: jax.random.normal(jax.random.fold_in(key, at), shape)
        for at, (name, shape) in enumerate(sorted(shapes.items()))
    }
    length = jnp.sqrt(sum((jnp.sum(jnp.square(values)) for values in made.values()), start=jnp.zeros(())))
    return {name: values / length for name, values in made.items()}


def with_canaries(task: Task, *, seed: int) -> Task:
    """The task, whose devices with a canary's number send its direction. `seed`: of the directions.

    Raises:
        ValueError: nothing clips the task's updates, so that a canary's length would be anything; or they go through a linear map.
    """
    if any(spec.rotated or spec.one_of > 1 for spec in local_rule(task).sums):
        raise ValueError(
            f"Expected updates without a linear map, got shoal.compressed(rotate=True or 'random_k') in task {task.name!r}: audit the task before it "
            "is compressed, as neither changes what its noise is worth."
        )
    if task.privacy.clip_norm is None:
        raise ValueError("Expected a task with privacy.clip_norm, got None: a canary's update is as long as that.")
    # Clipped, added up and noised is what the canaries' rule makes, not what the task's own does.
    of_examples = Privacy(delta_bound=task.privacy.delta_bound, examples=task.privacy.examples)
    bare = replace(task, privacy=of_examples)

    def rule(changed: Task) -> LocalRule:
        inner = local_rule(bare)

        def begin(broadcast: Any, device_state: Any) -> Any:
            return _ordered({**inner.begin(broadcast, device_state), _CARRIED: jnp.zeros((), jnp.int32)})

        def block(carry: Any, batches: Any, mask: Any, key: Any) -> Any:
            numbers = jnp.max(jnp.where(mask, batches[FIELD], 0))
            own = {name: values for name, values in carry.items() if name != _CARRIED}
            given = {name: values for name, values in batches.items() if name != FIELD}
            return _ordered({**inner.block(own, given, mask, key), _CARRIED: jnp.maximum(carry[_CARRIED], numbers)})

        def finish(carry: Any, broadcast: Any) -> Report:
            own = {name: values for name, values in carry.items() if name != _CARRIED}
            report = inner.finish(own, broadcast)
            delta, number = report.sums["delta"], carry[_CARRIED]
            learned = {name: values.shape for name, values in delta.items() if name.startswith("params/")}
            sung = direction(number, learned, seed)
            length = jnp.where(number == OUT, 0.0, _LONG)
            made = {
                name: jnp.where(number > 0, length * sung[name] if name in sung else 0.0, values)
                for name, values in delta.items()
            }
            return report._replace(sums={**report.sums, "delta": made})

        return replace(inner, begin=begin, block=block, finish=finish)

    return replace(task, rule=rule, batch={**task.batch, FIELD: ((), "int32")})


def _marked(fields: Mapping[str, np.ndarray], number: int) -> Examples:
    count = len(next(iter(fields.values())))
    return Examples({**fields, FIELD: np.full(count, number, np.int32)})


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(values.items()))
