"""What the algorithms of the `accuracy` benchmark learn: Fashion-MNIST over made users, MovieLens by its own.

Every device holds out a part of its examples, marked by the field `held_out`; `accuracy_devices.py` measures on them what
its local training has reached. Another seed deals Fashion-MNIST out to other users.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
import optax

import shoal
from benchmarks.small_net import Net
from shoal.data import Examples, Population
from shoal.policy import RoundPolicy
from shoal.task import Sum, Task

HELD_OUT: Final = "held_out"
"""1 for the examples that a device holds out, else 0."""
ONE_IN: Final = 5
"""Of so many examples in order one is held out."""
TUNING_SEED: Final = 100
"""By which settings are chosen."""


@dataclass(frozen=True)
class Data:
    """The data of one seed."""

    users: Population
    validation: Examples
    """By which settings are chosen."""
    test: Examples
    """By which algorithms are judged."""


@dataclass(frozen=True)
class Problem:
    """A task, by federated averaging, and its data."""

    name: str
    quality: str
    """The metric, of which more is better."""
    target: float
    """Quality to which rounds are counted."""
    rounds: int
    rate: float
    """Learning rate of plain SGD on devices around which grids are laid."""
    users: int
    """Devices there are."""
    central_epochs: int
    """Passes of central training."""
    private: str
    """The leaves that a personal part of the model has, where an algorithm keeps one."""
    lora: str
    """The leaves that get adapters, where an algorithm trains those alone."""
    make: Callable[[float], Task]
    """Rate -> task."""
    data: Callable[[int], Data]
    """Seed -> data."""
    tuned_as: str = ""
    """The problem whose best settings are taken; empty: its own."""


def held_out(count: int) -> np.ndarray:
    """The field, for a device with so many examples."""
    made: np.ndarray = (np.arange(count) % ONE_IN == ONE_IN - 1).astype(np.int32)
    return made


# Fashion-MNIST: 20,000 images over 100 users whose labels are drawn from a Dirichlet distribution.

IMAGES, USERS = 20_000, 100


def fashion(alpha: float, *, target: float, tuned_as: str = "") -> Problem:
    """The small net, 20 of 100 users in a round."""
    return Problem(
        f"fashion, Dirichlet {alpha}", "accuracy", target, rounds=100, rate=0.1, users=USERS, central_epochs=20,
        private="params/out/*", lora="params/hidden/kernel", make=fashion_task, data=cache(lambda seed: fashion_data(alpha, seed)),
        tuned_as=tuned_as,
    )  # fmt: skip


def fashion_task(rate: float) -> Task:
    made = Task.from_flax(
        Net, name="fashion", loss="softmax_cross_entropy",
        batch={"image": ((28, 28, 1), "uint8"), "label": ((), "int32"), HELD_OUT: ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(rate), batch_size=20, max_examples=300),
    )  # fmt: skip
    return made.replace(rounds=RoundPolicy(goal=20, over_selection=1.0))


def fashion_data(alpha: float, seed: int) -> Data:
    loaded = shoal.data.load("fashion-mnist")
    rng = np.random.default_rng(seed)
    train = Examples(loaded.train.take(rng.permutation(60_000)[:IMAGES]))
    split = shoal.data.dirichlet(train.fields["label"], USERS, alpha=alpha, rng=rng, min_examples=20)
    flags = np.zeros(IMAGES, np.int32)
    for indices in split.values():
        flags[rng.permutation(indices)] = held_out(len(indices))
    marked = Examples({**train.fields, HELD_OUT: flags})
    validation, test = (_central(loaded.test.take(part)) for part in np.array_split(np.arange(10_000), 2))
    return Data(Population.from_split(marked, split), validation, test)


def _central(fields: dict[str, np.ndarray]) -> Examples:
    count = len(next(iter(fields.values())))
    return Examples({**fields, HELD_OUT: np.zeros(count, np.int32)})


# MovieLens-100K: the film that a user sees next, of 1,682, by those seen last (Covington et al. 2016). A user is a device.

FILMS, HISTORY, DIM, BEST = 1682, 10, 16, 10


def movielens(*, target: float) -> Problem:
    """40 of 943 users in a round."""
    return Problem(
        "MovieLens by user", "hit_rate", target, rounds=100, rate=4.0, users=943, central_epochs=20,
        private="params/liking", lora="params/film", make=movielens_task, data=cache(lambda seed: movielens_data()),
    )  # fmt: skip


def movielens_task(rate: float) -> Task:
    return Task(
        name="movielens", init=_init, loss=_loss, evaluate=_evaluate,
        batch={"history": ((HISTORY,), "int32"), "label": ((), "int32"), HELD_OUT: ((), "int32")},
        local=shoal.Local(optimizer=optax.sgd(rate), batch_size=20, max_examples=200),
        rounds=RoundPolicy(goal=40, over_selection=1.0),
    )  # fmt: skip


def _init(key: jax.Array) -> dict[str, jax.Array]:
    film = 0.1 * jax.random.normal(key, (FILMS + 1, DIM))  # row 0 is "nothing yet"
    return {"film": film, "recency": jnp.zeros(HISTORY), "liking": jnp.zeros(FILMS)}


def _scores(params: Any, batch: Any) -> jax.Array:
    """(B, FILMS): how well each film goes on from the history (B, HISTORY), the film seen last in the last column."""
    history = batch["history"]
    weight = jax.nn.softmax(jnp.where(history > 0, params["recency"][None, :], -1e9), axis=1)
    user = jnp.einsum("bh,bhd->bd", weight, params["film"][history])
    made: jax.Array = user @ params["film"][1:].T + params["liking"][None, :]
    return made


def _loss(params: Any, state: Any, batch: Any, key: jax.Array) -> jax.Array:
    each: jax.Array = optax.softmax_cross_entropy_with_integer_labels(_scores(params, batch), batch["label"])
    return each


def _evaluate(params: Any, state: Any, batch: Any) -> dict[str, Sum]:
    made = _scores(params, batch)
    own = jnp.take_along_axis(made, batch["label"][:, None], axis=1)
    is_hit = ((made > own).sum(axis=1) < BEST).astype(jnp.float32)
    return {"hit_rate": Sum(is_hit, jnp.ones_like(is_hit), (0.0, 1.0))}


@cache
def movielens_data() -> Data:
    """Users' films in the order of time; what they saw last is for validation and test, in turns."""
    found = shoal.data.load_federated("movielens-100k")
    users: dict[str, dict[str, np.ndarray]] = {}
    parts: tuple[list[Examples], list[Examples]] = ([], [])
    for user, ratings in found.train.items():
        seen, later = ratings.fields["film"], found.test[user].fields["film"]
        users[user] = {**_histories(seen, 1), HELD_OUT: held_out(len(seen) - 1)}
        after = _histories(np.concatenate([seen, later]), len(seen))
        for turn, part in enumerate(parts):
            part.append(_central({name: array[turn::2] for name, array in after.items()}))
    whole, ends = _joined(users)
    validation, test = (Examples.concatenate(part) for part in parts)
    return Data(Population.from_split(whole, ends), validation, test)


def _joined(users: dict[str, dict[str, np.ndarray]]) -> tuple[Examples, dict[str, np.ndarray]]:
    """One array of all users' examples, and who has which."""
    ends = np.cumsum([len(fields["label"]) for fields in users.values()])
    split = {user: np.arange(end - len(users[user]["label"]), end) for user, end in zip(users, ends, strict=True)}
    return Examples.concatenate([Examples(fields) for fields in users.values()]), split


def _histories(seen: np.ndarray, first: int) -> dict[str, np.ndarray]:
    """The films from the `first`-th on, of those seen (N,) in order, each with those before it, numbered from 1."""
    padded = np.concatenate([np.zeros(HISTORY, np.int32), seen + 1])
    at = np.arange(first, len(seen))
    return {"history": padded[at[:, None] + np.arange(HISTORY)].astype(np.int32), "label": seen[at].astype(np.int32)}


PROBLEMS: Final = (
    fashion(0.1, target=0.70),
    fashion(0.5, target=0.76, tuned_as="fashion, Dirichlet 0.1"),
    movielens(target=0.08),
)
